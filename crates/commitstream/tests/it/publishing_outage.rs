//! Publishers while Redis is down, silent, full or just back: a typed error in bounded time, or the outbox in its place.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::DomainEvent;
use commitstream::publisher::{CommitError, DomainEventPublisher, PublishError, RedisStreamsPublisher};
use commitstream::streams::StreamsError;
use commitstream_sandbox::{FaultProxy, Redis, Sandbox};
use sqlx::Connection;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::events::{session, user};
use crate::support::{World, eventually};

/// Redis is given half a second to connect and half a second to answer; the rest is for a busy machine.
const BOUND: Duration = Duration::from_secs(4);

/// A world with a Redis of its own, and short time-outs.
async fn world_with(redis_url: &str) -> Result<World> {
    let mut world = World::on(Sandbox::shared().database()?, redis_url, "events:".into())?;
    world.settings.redis.response_timeout = Duration::from_millis(500);
    world.outbox.migrate(&mut world.connect().await?).await?;
    Ok(world)
}

/// A URL where nobody listens.
fn unused_url() -> Result<String> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    Ok(format!("redis://default:secret-word@127.0.0.1:{port}"))
}

fn outage(error: PublishError) -> Result<StreamsError> {
    let text = error.to_string();
    let PublishError::Streams(error) = error else { anyhow::bail!("not an error of streams: {error:?}") };
    ensure!(error.is_outage(), "not an outage: {error:?}");
    ensure!(text.contains("127.0.0.1:"), "does not name the server: {text}");
    Ok(error)
}

/// How long 200 publishers take that all start at once; none may succeed.
async fn two_hundred_at_once(publisher: &RedisStreamsPublisher) -> Result<Duration> {
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for n in 0..200 {
        let publisher = publisher.clone();
        tasks.spawn(async move { publisher.publish(&session(n)).await });
    }
    for done in tasks.join_all().await {
        outage(done.err().context("it was published")?)?;
    }
    Ok(started.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_listens_the_error_says_so_at_once() -> Result<()> {
    let world = world_with(&unused_url()?).await?;
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    let started = Instant::now();
    let error = anyhow::Error::from(publisher.publish(&session(1)).await.unwrap_err());
    let shown = format!("{error:#} {error:?} {publisher:?}");
    assert!(shown.contains("is unavailable") && !shown.contains("secret-word"), "{shown}");
    assert!(started.elapsed() < BOUND);
    let taken = two_hundred_at_once(&publisher).await?;
    assert!(taken < BOUND, "{taken:?}");

    // The critical lane does not need Redis, and the transaction is not harmed by the failure of the other lane.
    let publisher = world.publisher()?;
    let mut connection = world.connect().await?;
    let mut tx = connection.begin().await?;
    outage(publisher.publish(&mut tx, &session(1)).await.unwrap_err())?;
    publisher.publish(&mut tx, &user(1)).await?;
    tx.commit().await?;
    assert_eq!(world.rows().await?, ["UserCreated user/1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_redis_is_given_up_in_bounded_time() -> Result<()> {
    let redis = Redis::start()?;
    let (_, address) = redis.url().rsplit_once('@').map(|(login, at)| (login.to_owned(), at.to_owned())).context("a login")?;
    let proxy = FaultProxy::start(address)?;
    let world = world_with(&proxy.url(&redis.url())).await?;
    let connected = RedisStreamsPublisher::new(&world.settings)?;
    let fresh = RedisStreamsPublisher::new(&world.settings)?;
    connected.publish(&session(0)).await?;
    // At once, so that the connection is not yet idle: it would be tested before it is used.
    proxy.stall();

    let started = Instant::now();
    let error = outage(connected.publish(&session(1)).await.unwrap_err())?;
    assert!(matches!(error, StreamsError::OutcomeUnknown { .. }), "it was sent: {error:?}");
    assert!(started.elapsed() < BOUND, "{:?}", started.elapsed());
    let started = Instant::now();
    let error = outage(fresh.publish(&session(2)).await.unwrap_err())?;
    assert!(matches!(error, StreamsError::Unavailable { .. }), "it was never sent: {error:?}");
    assert!(started.elapsed() < BOUND, "{:?}", started.elapsed());
    let taken = two_hundred_at_once(&fresh).await?;
    assert!(taken < BOUND, "{taken:?}");
    let taken = two_hundred_at_once(&connected).await?;
    assert!(taken < BOUND, "{taken:?}");

    proxy.flow();
    for publisher in [connected, fresh] {
        // The proxy has hundreds of connections to pass on first.
        eventually("the lane to work again", async || Ok(publisher.publish(&session(3)).await.is_ok())).await?;
    }
    let arrived = world.streamed().await?;
    assert!(arrived.iter().filter(|e| e.ends_with("/3")).count() >= 2);
    assert!(!arrived.contains(&"SessionStarted session/2".to_owned()), "what is reported as never sent has arrived");
    Ok(())
}

/// All 200 are in flight on one connection when the server stops answering.
#[tokio::test(flavor = "multi_thread")]
async fn publishers_in_flight_on_one_connection_fail_together() -> Result<()> {
    let redis = Redis::start()?;
    let world = world_with(&redis.url()).await?;
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    publisher.publish(&session(0)).await?;
    redis.pause()?;
    let taken = two_hundred_at_once(&publisher).await?;
    assert!(taken < BOUND, "{taken:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_publisher_goes_on_when_redis_is_back() -> Result<()> {
    let redis = Redis::start()?;
    let world = world_with(&redis.url()).await?;
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    publisher.publish(&session(1)).await?;
    redis.kill()?;
    outage(publisher.publish(&session(2)).await.unwrap_err())?;
    outage(publisher.publish(&session(3)).await.unwrap_err())?;
    redis.restart()?;
    publisher.publish(&session(4)).await?;
    assert_eq!(world.streamed().await?, ["SessionStarted session/1", "SessionStarted session/4"]);
    Ok(())
}

/// Nothing was in flight when the connection was lost, so the next publish has lost nothing and need not fail.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_redis_between_two_events_is_not_noticed() -> Result<()> {
    let redis = Redis::start()?;
    let world = world_with(&redis.url()).await?;
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    for n in 0..3 {
        publisher.publish(&session(n)).await?;
        redis.restart()?;
        // Longer than a connection may lie idle before it is tried.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    publisher.publish(&session(3)).await?;
    assert_eq!(world.streamed().await?.len(), 4);
    Ok(())
}

/// One transaction waits for a Redis that is silent, and the next ones do not, until it answers again.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_do_not_wait_one_after_the_other_for_a_silent_redis() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = world_with(&redis.url()).await?;
    world.settings.redis.response_timeout = Duration::from_secs(2);
    let (publisher, mut connection) = (world.publisher()?, world.connect().await?);
    publisher.publish(&mut connection, &session(0)).await?;
    redis.pause()?;
    outage(publisher.publish(&mut connection, &session(1)).await.unwrap_err())?;
    let started = Instant::now();
    let mut failed = 0;
    while started.elapsed() < Duration::from_millis(900) {
        let began = Instant::now();
        let mut tx = connection.begin().await?;
        outage(publisher.publish(&mut tx, &session(2)).await.unwrap_err())?;
        publisher.publish(&mut tx, &user(1)).await?;
        tx.commit().await?;
        failed += u32::from(began.elapsed() < Duration::from_millis(400));
    }
    assert!(failed > 2, "{failed}");
    redis.resume()?;
    eventually("the lane to be open again", async || Ok(publisher.publish(&mut connection, &session(3)).await.is_ok())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_fallback_an_outage_sends_events_through_the_outbox() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = world_with(&redis.url()).await?;
    world.settings.publishing.fallback_to_outbox = true;
    let (publisher, pool) = (Arc::new(world.publisher()?), world.pool().await?);
    publisher.publish(&mut *pool.acquire().await?, &session(0)).await?;
    redis.kill()?;

    let mut tasks = JoinSet::new();
    for n in 1..=100 {
        let (publisher, pool) = (publisher.clone(), pool.clone());
        tasks.spawn(async move {
            let mut tx = pool.begin().await?;
            publisher.publish(&mut tx, &session(n)).await?;
            if n % 2 == 0 {
                tx.commit().await?
            } else {
                tx.rollback().await?
            }
            anyhow::Ok(())
        });
    }
    tasks.join_all().await.into_iter().collect::<Result<()>>()?;
    // Held events of a unit of work are written after its commit.
    let mut work = publisher.begin(&pool).await?;
    work.publish_all(&[&session(200), &user(200), &session(201)]).await?;
    work.commit().await?;
    let mut work = publisher.begin(&pool).await?;
    work.publish(&session(202)).await?;
    work.rollback().await?;
    let rows = world.rows().await?;
    assert_eq!(rows.len(), 53, "{rows:?}");
    assert_eq!(rows[50..], ["UserCreated user/200", "SessionStarted session/200", "SessionStarted session/201"]);

    let relay = world.relay()?;
    redis.restart()?;
    world.drained().await?;
    relay.stop().await?;
    let arrived: HashSet<String> = world.streamed().await?.into_iter().collect();
    let mut expected: HashSet<String> = rows.into_iter().collect();
    expected.insert("SessionStarted session/0".into());
    assert_eq!(arrived, expected);
    assert_eq!(world.streamed().await?.len(), 54, "and each once");
    Ok(())
}

/// Whether it arrived is unknown, so it goes through the outbox too: twice at most, and then under one id.
#[tokio::test(flavor = "multi_thread")]
async fn what_falls_back_after_silence_keeps_its_id() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = world_with(&redis.url()).await?;
    world.settings.publishing.fallback_to_outbox = true;
    let publisher = world.publisher()?;
    let mut connection = world.connect().await?;
    publisher.publish(&mut connection, &session(0)).await?;
    redis.pause()?;
    let id = publisher.publish(&mut connection, &session(1)).await?;
    redis.resume()?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let entries = world.entries(&world.streams.stream_of("session")).await?;
    let ids: Vec<_> = entries.iter().filter(|e| e.field("aggregate_id") == Some("1")).map(|e| e.field("id")).collect();
    assert!(!ids.is_empty() && ids.iter().all(|found| *found == Some(&id.to_string())), "{ids:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_fallback_a_unit_of_work_hands_unsent_events_back() -> Result<()> {
    let mut world = world_with(&unused_url()?).await?;
    for enabled in [true, false] {
        // With the outbox disabled there is nowhere to fall back to.
        world.settings.outbox.enabled = enabled;
        world.settings.publishing.fallback_to_outbox = !enabled;
        let (publisher, pool) = (world.publisher()?, world.pool().await?);
        let mut work = publisher.begin(&pool).await?;
        let id = work.publish(&session(1)).await?;
        let error = work.commit().await.unwrap_err();
        let CommitError::NotSent { events, source } = error else { anyhow::bail!("{error:?}") };
        assert_eq!(events.iter().map(|e| e.id).collect::<Vec<_>>(), [id]);
        outage(source)?;
        assert!(world.rows().await?.is_empty());
    }
    Ok(())
}

/// No memory, no persistence, a replica, a wrong password: Redis answers, but none of it is the event's fault.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_cannot_work_is_an_outage() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = world_with(&redis.url()).await?;
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    let mut client = world.redis().await?;
    for (setting, bad, good, code) in [
        ("maxmemory", "1", "0", "OOM"),
        ("replicaof", "127.0.0.1 1", "no one", "READONLY"),
        ("min-replicas-to-write", "1", "0", "NOREPLICAS"),
    ] {
        set(&mut client, setting, bad).await?;
        let error = outage(publisher.publish(&session(1)).await.unwrap_err())?;
        assert!(matches!(error, StreamsError::Unavailable { .. }), "{error:?}");
        let many = outage(publisher.publish_all(&[&session(1), &user(1)]).await.unwrap_err())?;
        assert!(matches!(many, StreamsError::Unavailable { .. }), "{many:?}");
        let chain = format!("{:#}", anyhow::Error::from(error));
        assert!(chain.to_uppercase().contains(code), "{setting}: {chain}");
        set(&mut client, setting, good).await?;
    }
    publisher.publish(&session(1)).await?;
    assert_eq!(world.streamed().await?, ["SessionStarted session/1"]);

    world.settings.redis.url = Some(redis.url().replacen("redis://default:", "redis://default:wrong", 1));
    let error = outage(RedisStreamsPublisher::new(&world.settings)?.publish(&session(2)).await.unwrap_err())?;
    let chain = format!("{:#}", anyhow::Error::from(error));
    assert!(chain.to_lowercase().contains("auth") || chain.contains("WRONGPASS"), "{chain}");
    Ok(())
}

async fn set(client: &mut redis::aio::MultiplexedConnection, setting: &str, value: &str) -> Result<()> {
    let mut command = redis::cmd(if setting == "replicaof" { "REPLICAOF" } else { "CONFIG" });
    if setting != "replicaof" {
        command.arg("SET").arg(setting);
    }
    Ok(command.arg(value.split(' ').collect::<Vec<_>>()).query_async(client).await?)
}

/// A user who may append to one stream only.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_is_a_refusal() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = world_with(&redis.url()).await?;
    let mut client = world.redis().await?;
    let mut acl = redis::cmd("ACL");
    acl.arg("SETUSER").arg("app").arg("on").arg(">pw").arg("~events:user").arg("+@all");
    acl.query_async::<()>(&mut client).await?;
    let address = redis.url().rsplit_once('@').context("an address")?.1.to_owned();
    world.settings.redis.url = Some(format!("redis://app:pw@{address}"));
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    publisher.publish(&user(1)).await?;
    let error = publisher.publish(&session(1)).await.unwrap_err();
    assert!(matches!(error, PublishError::Streams(StreamsError::Refused { .. })), "{error:?}");
    assert!(error.to_string().to_uppercase().contains("NOPERM"), "{error}");
    Ok(())
}

/// A way to Redis that breaks for good once it has carried so many answers to `XADD` back.
async fn breaking_after(redis_url: &str, answers: usize) -> Result<String> {
    let (credentials, address) = redis_url.rsplit_once('@').context("an address")?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("{credentials}@{}", listener.local_addr()?);
    let address = address.to_owned();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await?;
        drop(listener);
        let mut server = TcpStream::connect(address).await?;
        let ((mut from_client, mut to_client), (from_server, mut to_server)) = (client.split(), server.split());
        let back = async {
            let mut lines = BufReader::new(from_server);
            let (mut line, mut ids) = (Vec::new(), 0);
            // An entry's id is two lines: `$` with its length, and itself.
            while ids < answers && lines.read_until(b'\n', &mut line).await? > 0 {
                if line.starts_with(b"$") {
                    lines.read_until(b'\n', &mut line).await?;
                    ids += 1;
                }
                to_client.write_all(&line).await?;
                line.clear();
            }
            std::io::Result::Ok(0)
        };
        tokio::select! {
            there = tokio::io::copy(&mut from_client, &mut to_server) => there,
            back = back => back,
        }
    });
    Ok(url)
}

/// A long `publish_all` goes out a thousand at a time. What Redis has confirmed is in its stream: it must not go through the outbox
/// as well.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_confirmed_before_the_outage_does_not_fall_back() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = world_with(&redis.url()).await?;
    // The way breaks before the publisher has its answer to that.
    world.note(&["session"]).await?;
    world.settings.publishing.fallback_to_outbox = true;
    world.settings.redis.url = Some(breaking_after(&redis.url(), 1_000).await?);
    let publisher = world.publisher()?;
    let events: Vec<_> = (0..2_500).map(session).collect();
    let events: Vec<&dyn DomainEvent> = events.iter().map(|e| e as &dyn DomainEvent).collect();
    publisher.publish_all(&mut world.connect().await?, &events).await?;

    let sent = world.streamed().await?;
    assert!(sent.len() >= 1_000, "{}", sent.len());
    let rows = world.rows().await?;
    let everywhere: HashSet<&String> = sent.iter().chain(&rows).collect();
    assert_eq!(everywhere.len(), 2_500, "none is lost");
    let confirmed: HashSet<&String> = sent.iter().take(1_000).collect();
    let twice = rows.iter().filter(|row| confirmed.contains(row)).count();
    assert_eq!(twice, 0, "confirmed events that were written to the outbox too");
    Ok(())
}
