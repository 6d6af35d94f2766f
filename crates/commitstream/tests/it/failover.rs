//! Redis fails over and loses what it had acknowledged; PostgreSQL fails over while commits go unanswered.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream::relay::{RelayState, RelayStatus};
use commitstream_sandbox::{FaultProxy, Postgres, Redis, Sandbox};
use sqlx::{Connection, PgConnection};

use crate::support::{World, eventually};

fn address(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, rest)| rest.split('/').next().unwrap_or(rest))
}

/// A master with a replica, behind an address that can be moved from one to the other.
struct Pair {
    master: Redis,
    replica: Redis,
    proxy: FaultProxy,
    world: World,
}

impl Pair {
    async fn new() -> Result<Self> {
        let master = Redis::start()?;
        let replica = Redis::start_replica_of(&master)?;
        let proxy = FaultProxy::start(address(&master.url()))?;
        let mut world = World::on(Sandbox::shared().database()?, &proxy.url(&master.url()), "events:".into())?;
        world.settings.redis.response_timeout = Duration::from_millis(500);
        world.outbox.migrate(&mut world.connect().await?).await?;
        Ok(Self { master, replica, proxy, world })
    }

    /// The replica becomes the master, without what it had not received.
    fn fail_over(&self) -> Result<()> {
        self.master.kill()?;
        self.replica.restart()?;
        self.replica.promote()?;
        self.proxy.retarget(address(&self.replica.url()))?;
        Ok(())
    }

    /// Publishes `kept` events that the replica gets, and `lost` ones while it is down, which a failover loses.
    async fn publish(&self, kept: u32, lost: u32, aggregates: u32) -> Result<()> {
        self.world.insert(kept, aggregates).await?;
        self.world.drained().await?;
        self.replica_has(kept.into()).await?;
        self.replica.kill()?;
        self.world.insert(lost, aggregates).await?;
        self.world.drained().await
    }

    async fn replica_has(&self, entries: u64) -> Result<()> {
        let mut client = redis::Client::open(self.replica.url())?.get_multiplexed_async_connection().await?;
        eventually("the replica to have it", async || {
            Ok(redis::cmd("XLEN").arg("events:user").query_async::<u64>(&mut client).await? == entries)
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_lost_in_a_failover_is_published_again_in_order() -> Result<()> {
    let pair = Pair::new().await?;
    let world = &pair.world;
    let relays = [world.relay()?, world.relay()?];
    pair.publish(3_000, 3_000, 100).await?;
    pair.fail_over()?;
    world.insert(3_000, 100).await?;
    eventually("what was lost to be published again", async || {
        let republished: u64 = relays.iter().map(|r| r.status().republished).sum();
        Ok(republished == 3_000 && world.stats().await?.published == 9_000)
    })
    .await?;
    for relay in relays {
        relay.stop().await?;
    }
    assert_eq!(world.audit().await?, 9_000);
    Ok(())
}

/// Nothing is published any more when Redis fails over: the relay must notice by itself.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_relay_notices_that_redis_lost_something() -> Result<()> {
    let pair = Pair::new().await?;
    let world = &pair.world;
    let relay = world.relay()?;
    pair.publish(100, 50, 10).await?;
    pair.fail_over()?;
    relay.watch().wait_for(|s| s.republished == 50).await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 150);
    Ok(())
}

/// While relays are paused, they go on looking: by the time they are resumed, it might be too late.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_relay_notices_that_redis_lost_something() -> Result<()> {
    let pair = Pair::new().await?;
    let world = &pair.world;
    let relay = world.relay()?;
    pair.publish(100, 50, 10).await?;
    world.outbox.pause(&mut world.connect().await?, "ada").await?;
    relay.watch().wait_for(|s| s.state == RelayState::Paused).await?;
    pair.fail_over()?;
    relay.watch().wait_for(|s| s.republished == 50 && s.state == RelayState::Paused).await?;
    assert_eq!(world.stats().await?.pending, 50);
    world.outbox.resume(&mut world.connect().await?, "ada").await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 150);
    Ok(())
}

/// The relay is gone when Redis fails over: its successor looks its batches up before it publishes anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_relay_looks_up_what_the_last_one_published() -> Result<()> {
    let pair = Pair::new().await?;
    let world = &pair.world;
    let relay = world.relay()?;
    pair.publish(500, 500, 20).await?;
    relay.stop().await?;
    pair.fail_over()?;
    world.insert(500, 20).await?;
    let relay = world.relay()?;
    world.drained().await?;
    assert_eq!(relay.status().republished, 500);
    relay.stop().await?;
    assert_eq!(world.audit().await?, 1_500);
    Ok(())
}

/// Redis evicts or somebody deletes markers, and the entries are there: nothing may be sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_marker_that_is_gone_alone_is_no_loss() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    let mut client = world.redis().await?;
    for round in 1..=5_u32 {
        world.insert(500, 20).await?;
        world.drained().await?;
        let markers: Vec<String> = redis::cmd("KEYS").arg("{events:*").query_async(&mut client).await?;
        ensure!(!markers.is_empty(), "round {round}");
        redis::cmd("DEL").arg(markers).query_async::<()>(&mut client).await?;
    }
    world.insert(500, 20).await?;
    world.drained().await?;
    assert_eq!(relay.status().republished, 0);
    relay.stop().await?;
    assert_eq!(world.audit().await?, 3_000);
    Ok(())
}

/// A server that restarts without its data has lost everything of late: here thousands of batches, which are asked for and made unsent
/// some at a time.
#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_redis_gets_what_was_published_of_late() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    world.settings.outbox.processor.batch_size = 2;
    let relay = world.relay()?;
    world.insert(6_000, 100).await?;
    world.drained().await?;
    redis::cmd("FLUSHALL").query_async::<()>(&mut world.redis().await?).await?;
    relay.watch().wait_for(|s| s.republished == 6_000).await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 6_000);
    Ok(())
}

/// Requests arrive and their answers do not: claims, settles and their commits on the one side, appends on the other. What became of each
/// is looked up.
#[tokio::test(flavor = "multi_thread")]
async fn lost_and_torn_answers_are_looked_up() -> Result<()> {
    use rand::{Rng, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let redis = Redis::start()?;
    let database = Sandbox::shared().database()?;
    let proxies = [FaultProxy::start(address(database.url()))?, FaultProxy::start(address(&redis.url()))?];
    let mut world = World::on(database, &proxies[1].url(&redis.url()), "events:".into())?;
    world.settings.redis.response_timeout = Duration::from_millis(500);
    world.outbox.migrate(&mut world.connect().await?).await?;
    world.settings.database.url = world.settings.database.url.map(|url| proxies[0].url(&url));
    world.settings.outbox.processor.batch_size = 20;
    let relay = world.relay()?;
    let fired = || proxies.iter().map(FaultProxy::fired).sum::<u64>();
    while fired() < 40 {
        world.insert(1_000, 50).await?;
        let (proxy, before) = (&proxies[rng.random_range(0..2)], fired());
        if rng.random_bool(0.5) {
            proxy.drop_reply()
        } else {
            proxy.half_reply()
        }
        eventually("the fault to strike", async || Ok(fired() > before)).await?;
    }
    world.drained().await?;
    relay.stop().await?;
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM event_outbox").fetch_one(&mut world.connect().await?).await?;
    assert_eq!(i64::try_from(world.audit().await?)?, rows, "seed {seed}");
    let blamed = "SELECT count(*) FROM event_outbox WHERE retry_count > 0 OR last_error IS NOT NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(blamed).fetch_one(&mut world.connect().await?).await?, 0, "seed {seed}");
    Ok(())
}

/// PostgreSQL's primary dies under load and its synchronous standby takes over, at the same address.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_of_postgresql_loses_and_doubles_nothing() -> Result<()> {
    let primary = Postgres::start()?;
    let standby = Postgres::start_standby_of(&primary)?;
    primary.set_synchronous_replication(true)?;
    let proxy = FaultProxy::start(address(&primary.url()))?;
    let sandbox = Sandbox::shared();
    let mut world = World::on(sandbox.database()?, &sandbox.redis_url(), sandbox.key_prefix()?)?;
    world.settings.database.url = Some(proxy.url(&primary.url()));
    let connect = async || -> Result<PgConnection> { Ok(PgConnection::connect(&proxy.url(&primary.url())).await?) };
    world.outbox.migrate(&mut connect().await?).await?;
    let relays = [world.relay()?, world.relay()?];
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                  SELECT 'E', 'user', (n % 50)::text, '{}' FROM generate_series(1, 5000) n";
    sqlx::raw_sql(insert).execute(&mut connect().await?).await?;
    relays[0].watch().wait_for(|s| s.published > 0).await?;
    primary.kill()?;
    standby.promote()?;
    proxy.retarget(address(&standby.url()))?;
    sqlx::raw_sql(insert).execute(&mut connect().await?).await?;
    let mut connection = connect().await?;
    eventually("the outbox to be drained", async || {
        let unsent = "SELECT count(*) FROM event_outbox WHERE status = 'PENDING'";
        Ok(sqlx::query_scalar::<_, i64>(unsent).fetch_one(&mut connection).await? == 0)
    })
    .await?;
    for relay in relays {
        // One that lost its partitions to the other waits a moment before it comes back.
        let is_back = |s: &RelayStatus| matches!(s.state, RelayState::Active | RelayState::Recovering | RelayState::Standby);
        relay.watch().wait_for(is_back).await?;
        relay.stop().await?;
    }
    let order = "SELECT id::text FROM event_outbox ORDER BY aggregate_id, seq";
    let ids: Vec<String> = sqlx::query_scalar(order).fetch_all(&mut connection).await?;
    assert_eq!(ids.len(), 10_000);
    let mut entries = world.entries(&world.user_stream()).await?;
    entries.sort_by(|a, b| a.field("aggregate_id").cmp(&b.field("aggregate_id")));
    let sent = entries.iter().map(|e| e.field("id").map(str::to_owned).context("no id")).collect::<Result<Vec<_>>>()?;
    assert_eq!(sent, ids);
    Ok(())
}
