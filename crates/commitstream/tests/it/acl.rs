//! The rights in docs/acl.md are enough: each part works as the user that the document makes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream::EventEnvelope;
use commitstream::config::RedisSettings;
use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError, WhenUnknown};
use commitstream::doctor;
use commitstream::outbox::OutboxRepository;
use commitstream::streams::{RetriedAs, Streams};
use commitstream_sandbox::{Redis, Sandbox};
use redis::aio::MultiplexedConnection;

use crate::consumer_book::{GROUP, publish};
use crate::doctor_report::{found, passes};
use crate::events::envelope;
use crate::support::{PATIENCE, World, eventually};

const DOCUMENT: &str = include_str!("../../../../docs/acl.md");

/// A Redis with the users of the document, and worlds that log in as them.
struct Users {
    redis: Redis,
    client: MultiplexedConnection,
    /// As the default user.
    world: World,
}

impl Users {
    async fn new() -> Result<Self> {
        let redis = Redis::start()?;
        let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
        // Of what the tests themselves send: a busy machine takes its time.
        let patient = RedisSettings { response_timeout: PATIENCE, ..world.settings.redis.clone() };
        world.streams = Streams::new(&redis.url(), &patient)?;
        world.outbox.migrate(&mut world.connect().await?).await?;
        let mut client = world.redis().await?;
        let rules: Vec<&str> = DOCUMENT.lines().filter(|line| line.starts_with("ACL SETUSER ")).collect();
        ensure!(rules.len() == 4, "{rules:?}");
        for rule in rules {
            let words: Vec<&str> = rule.split_whitespace().skip(1).collect();
            redis::cmd("ACL").arg(&words).query_async::<()>(&mut client).await?;
        }
        redis::cmd("ACL").arg(&["LOG", "RESET"]).query_async::<()>(&mut client).await?;
        Ok(Self { redis, client, world })
    }

    /// The same world with what this user may do.
    fn as_user(&self, user: &str) -> Result<World> {
        let url = self.redis.url();
        let server = url.rsplit_once('@').context("a login")?.1;
        let mut settings = self.world.settings.clone();
        settings.redis.url = Some(format!("redis://{user}:password@{server}"));
        let streams = Streams::new(settings.redis.url.as_deref().context("a URL")?, &settings.redis)?;
        let outbox = OutboxRepository::new(&settings.database.schema);
        Ok(World { database: Sandbox::shared().database()?, outbox, settings, streams })
    }

    /// What Redis refused to whom; nothing is what is wanted.
    async fn refused(&mut self) -> Result<Vec<redis::Value>> {
        Ok(redis::cmd("ACL").arg("LOG").query_async(&mut self.client).await?)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_publishes_with_its_rights() -> Result<()> {
    let mut users = Users::new().await?;
    let publisher = users.as_user("publisher")?;
    publish(&publisher, 50, 5).await?;
    assert_eq!(users.world.streams.len(&users.world.user_stream()).await?, 50);
    assert_eq!(users.refused().await?, []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_publishes_recovers_and_trims_with_its_rights() -> Result<()> {
    let mut users = Users::new().await?;
    let mut relay = users.as_user("relay")?;
    relay.settings.outbox.cleanup.interval = Duration::from_secs(1);
    relay.settings.streams.max_entries = 100;
    let stream = users.world.user_stream();
    redis::cmd("XGROUP").arg(&["CREATE", &stream, GROUP, "0", "MKSTREAM"]).query_async::<()>(&mut users.client).await?;
    for _ in 0..2 {
        let handle = relay.relay()?;
        users.world.insert(500, 20).await?;
        users.world.drained().await?;
        eventually("the stream to be trimmed", async || Ok(users.world.streams.len(&stream).await? <= 100)).await?;
        handle.stop().await?;
    }
    assert_eq!(users.refused().await?, []);
    // Of what `doctor` asks besides, it says that it was not examined: that is for operators.
    passes(&doctor::examine(&relay.settings).await, "redis-permissions");
    Ok(())
}

/// Does an effect once; one event fails, another is given up.
struct Varied;

impl Handler<EventEnvelope> for Varied {
    async fn handle(&self, event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        delivery.once("effect", WhenUnknown::Repeat, || std::future::ready(Ok(()))).await?;
        match event.aggregate_id.as_str() {
            "fails" => Err("no".into()),
            "poison" => Err(HandlerError::give_up("never")),
            _ => Ok(()),
        }
    }
}

/// Two of a group: they share aggregates, and one takes over from the other.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_do_all_they_do_with_their_rights() -> Result<()> {
    let mut users = Users::new().await?;
    let mut world = users.as_user("consumer")?;
    world.settings.consumer.claim_idle = Duration::from_secs(1);
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    let stream = users.world.user_stream();
    let start = || Consumer::new(GROUP, &world.settings)?.on_any("user", Varied).start();
    let (first, second) = (start()?, start()?);
    publish(&users.world, 2_000, 40).await?;
    let odd = ["fails", "poison"].map(|id| envelope("user", id, &0)).into_iter().collect::<Result<Vec<_>>>()?;
    users.world.streams.publish(&odd).await.map_err(|unsent| unsent.error)?;
    let left = async || {
        let groups = users.world.streams.groups(&stream).await?;
        let group = groups.first().context("the group")?;
        Ok::<_, anyhow::Error>((group.pending, group.behind, group.dead))
    };
    eventually("all to be handled", async || Ok(left().await? == (0, Some(0), Some(2)))).await?;
    publish(&users.world, 2_000, 40).await?;
    drop(first);
    eventually("the rest to be handled", async || Ok(left().await? == (0, Some(0), Some(2)))).await?;
    // As an operator has it delivered again.
    let letter = users.world.streams.dead_letters(&stream, "0", 1).await?.pop().context("a dead letter")?;
    assert_eq!(users.world.streams.retry_dead(&letter).await?, RetriedAs::Entry);
    eventually("it to be a dead letter again", async || Ok(left().await? == (0, Some(0), Some(2)))).await?;
    second.stop().await?;
    assert_eq!(users.refused().await?, []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_looks_and_acts_with_its_rights() -> Result<()> {
    let mut users = Users::new().await?;
    let operator = users.as_user("operator")?;
    let stream = users.world.user_stream();
    publish(&users.world, 50, 5).await?;
    let mut settings = users.world.settings.clone();
    settings.consumer.max_deliveries = 1;
    let consumer = Consumer::new(GROUP, &settings)?.on_any("user", Varied).start()?;
    let odd: Vec<_> = (0..4).map(|n| envelope("user", "poison", &n)).collect::<Result<_>>()?;
    users.world.streams.publish(&odd).await.map_err(|unsent| unsent.error)?;
    consumer.wait_for(|status| status.dead == 4).await.context("ended")?;
    consumer.stop().await?;

    let streams = &operator.streams;
    assert_eq!(streams.dead_streams().await?.len(), 1);
    let letters = streams.dead_letters(&stream, "0", 10).await?;
    streams.dead_letter(&stream, &letters[0].dead_id).await?.context("the dead letter")?;
    assert_eq!(streams.retry_dead(&letters[0]).await?, RetriedAs::Entry);
    redis::cmd("XDEL").arg(&[&stream, &letters[1].entry]).query_async::<()>(&mut users.client).await?;
    ensure!(matches!(streams.retry_dead(&letters[1]).await?, RetriedAs::Copy(_)));
    ensure!(streams.discard_dead(&stream, &letters[2].dead_id).await?);
    assert_eq!(streams.groups(&stream).await?.len(), 1);
    streams.lags(&stream).await?;
    streams.figures(&stream).await?.context("the stream")?;
    streams.deliveries(&stream, &letters[3].entry).await?;
    streams.newest(&stream, 5).await?;
    let mut tail = streams.tail([(stream.clone(), "0".to_owned())].into());
    ensure!(!tail.next(10, Duration::from_millis(10)).await?.is_empty());
    streams.trim(&stream, Duration::ZERO, 10).await?;

    let report = doctor::examine(&operator.settings).await;
    for check in ["redis-reachable", "redis-information", "redis-permissions"] {
        passes(&report, check);
        assert!(found(&report, check).is_empty());
    }
    // `doctor` looks for outboxes whose prefix ours begins with, and takes a refusal for none.
    let is_neighbour = |entry: &redis::Value| format!("{entry:?}").contains("{streams}");
    let refused: Vec<_> = users.refused().await?.into_iter().filter(|entry| !is_neighbour(entry)).collect();
    assert_eq!(refused, []);
    Ok(())
}

/// The rights on keys, where those on commands are there.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_the_keys_that_a_user_may_not_use() -> Result<()> {
    let mut users = Users::new().await?;
    let relay = users.as_user("relay")?;
    let rule = |keys: &str| format!("ACL SETUSER relay resetkeys {keys}");
    for (has, lacks) in [("~events:*", "~{events:*"), ("~{events:*", "~events:*")] {
        let rule = rule(has);
        let words: Vec<&str> = rule.split_whitespace().skip(1).collect();
        redis::cmd("ACL").arg(&words).query_async::<()>(&mut users.client).await?;
        let report = doctor::examine(&relay.settings).await;
        let finding = *found(&report, "redis-permissions").first().context("a finding")?;
        assert!(finding.seen.contains(lacks), "{finding:?}");
        let grant = format!("ACL SETUSER the_user '{lacks}'");
        assert!(finding.mend.contains(&grant) && !finding.mend.contains("+get"), "{finding:?}");
        crate::doctor_report::mend_for(&users.world.settings, "relay", finding)?;
        passes(&doctor::examine(&relay.settings).await, "redis-permissions");
    }
    Ok(())
}
