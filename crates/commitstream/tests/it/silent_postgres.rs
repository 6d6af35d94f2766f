//! Connections to PostgreSQL that die in silence: nothing comes on them any more, and nobody says so.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::consumer::{Consumer, Delivery, HandlerError, TransactionalHandler};
use commitstream::relay::RelayState;
use commitstream::{DomainEvent, EventEnvelope};
use commitstream_sandbox::FaultProxy;
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, PgPool};

use crate::support::{World, eventually};

/// What is promised is 5 s; a loaded machine may add to it. Without an answer a statement would be given up after 30 s.
const RECOVERED: Duration = Duration::from_secs(15);
/// Nothing may be found by polling.
const NEVER: Duration = Duration::from_secs(10 * 60);

/// A proxy before the PostgreSQL of the world, and the URL through it.
pub fn proxied(world: &World) -> Result<(FaultProxy, String)> {
    let url = world.database.url();
    let (_, place) = url.rsplit_once('@').context("a login")?;
    let proxy = FaultProxy::start(place.split('/').next().context("an address")?)?;
    let url = proxy.url(url);
    Ok((proxy, url))
}

async fn world() -> Result<(World, FaultProxy)> {
    let mut world = World::new().await?;
    let (proxy, url) = proxied(&world)?;
    world.settings.database.url = Some(url);
    world.settings.outbox.processor.poll_interval = NEVER;
    Ok((world, proxy))
}

/// The time from now until everything is published.
async fn drained(world: &World) -> Result<Duration> {
    let began = Instant::now();
    world.drained().await?;
    Ok(began.elapsed())
}

/// Inserted into the dead quiet, and some time after it, when only LISTEN and the wake-up lock bring it in time.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_relay_replaces_sessions_that_died_in_silence() -> Result<()> {
    let (world, proxy) = world().await?;
    let relay = world.relay()?;
    world.insert(10, 10).await?;
    drained(&world).await?;
    let (mut slowest, mut slowest_later) = (Duration::ZERO, Duration::ZERO);
    for round in 0..3_u64 {
        // Somewhere between two heartbeats.
        tokio::time::sleep(Duration::from_millis(700 * round + 100)).await;
        proxy.swallow();
        world.insert(10, 10).await?;
        slowest = slowest.max(drained(&world).await?);
        world.insert(10, 10).await?;
        slowest_later = slowest_later.max(drained(&world).await?);
    }
    println!("slowest: inserted when the connections died {slowest:?}, afterwards {slowest_later:?}");
    assert!(slowest < RECOVERED && slowest_later < RECOVERED, "{slowest:?}, {slowest_later:?}");
    relay.stop().await?;
    assert_eq!(world.audit().await?, 70);
    Ok(())
}

/// Claims, appends and settles are under way when it happens.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_relay_replaces_sessions_that_died_in_silence() -> Result<()> {
    let (world, proxy) = world().await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        let before = relay.status().published;
        world.insert(20_000, 100).await?;
        status.wait_for(|status| status.published > before).await?;
        proxy.swallow();
        let began = Instant::now();
        // What was on its way may still be counted; a new claim is not.
        eventually("the relay to be unable", async || {
            Ok(matches!(relay.status().state, RelayState::Unable { .. }) || relay.status().published >= before + 20_000)
        })
        .await?;
        eventually("the relay to be active", async || Ok(relay.status().state == RelayState::Active)).await?;
        slowest = slowest.max(began.elapsed());
        world.drained().await?;
    }
    println!("slowest: {slowest:?} until it went on");
    assert!(slowest < RECOVERED, "{slowest:?}");
    relay.stop().await?;
    assert_eq!(world.audit().await?, 60_000);
    Ok(())
}

/// In the server, a session that died in silence keeps the wake-up lock. Producers go on notifying, so nobody is deaf.
#[tokio::test(flavor = "multi_thread")]
async fn the_wake_up_lock_of_a_dead_session_makes_no_relay_deaf() -> Result<()> {
    let (mut world, proxy) = world().await?;
    let first = world.relay()?;
    let held = "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = 1129139027 AND granted
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database());";
    eventually("the first relay to sleep", async || Ok(world.database.psql(held)?.trim() == "t")).await?;
    world.settings.database.url = Some(world.database.url().to_owned());
    let second = world.relay()?;
    eventually("both to have partitions", async || Ok(first.status().partitions == 32 && second.status().partitions == 32))
        .await?;
    proxy.swallow();
    let mut slowest = Duration::ZERO;
    let until = Instant::now() + Duration::from_secs(12);
    while Instant::now() < until {
        world.insert(64, 64).await?;
        slowest = slowest.max(drained(&world).await?);
    }
    assert_eq!(world.database.psql(held)?.trim(), "t", "the dead session is gone: this shows nothing");
    println!("slowest: {slowest:?}");
    assert!(slowest < RECOVERED, "{slowest:?}");
    first.stop().await?;
    second.stop().await?;
    world.audit().await?;
    Ok(())
}

#[derive(Debug, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
struct Paid {
    #[event(key)]
    user: u32,
}

struct Receipts;

impl TransactionalHandler<Paid> for Receipts {
    async fn handle(&self, _: Paid, delivery: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        sqlx::query("INSERT INTO receipt VALUES ($1)").bind(delivery.event_id()).execute(transaction).await?;
        Ok(())
    }
}

async fn paid(world: &World, events: u32) -> Result<()> {
    let events = (0..events).map(|user| Paid { user }.envelope()).collect::<Result<Vec<EventEnvelope>, _>>()?;
    world.streams.publish(&events).await.map_err(|unsent| unsent.error)?;
    Ok(())
}

/// A pool with so many idle connections.
async fn idle_pool(options: PgPoolOptions, url: &str, connections: u32) -> Result<PgPool> {
    let pool = options.max_connections(connections).min_connections(connections).connect(url).await?;
    eventually("the pool to be full", async || Ok(pool.num_idle() == connections as usize)).await?;
    Ok(pool)
}

/// However many connections of the pool are dead, and whether the pool tests what it gives out or not.
#[tokio::test(flavor = "multi_thread")]
async fn transactional_handlers_get_past_a_pool_of_dead_connections() -> Result<()> {
    for tests in [true, false] {
        let world = World::new().await?;
        world.database.psql("CREATE TABLE receipt (event_id uuid PRIMARY KEY);")?;
        let (proxy, url) = proxied(&world)?;
        let pool = idle_pool(PgPoolOptions::new().test_before_acquire(tests), &url, 20).await?;
        let consumer = Consumer::new("receipts", &world.settings)?.on_transaction(&pool, Receipts).start()?;
        paid(&world, 1).await?;
        consumer.wait_for(|status| status.handled == 1).await.context("ended")?;
        let mut slowest = Duration::ZERO;
        for round in 1..=3 {
            eventually("the pool to be idle", async || Ok(pool.num_idle() == 20)).await?;
            proxy.swallow();
            let began = Instant::now();
            paid(&world, 5).await?;
            let handled = consumer.wait_for(|status| status.handled == 1 + 5 * round);
            tokio::time::timeout(Duration::from_secs(60), handled).await?.context("ended")?;
            slowest = slowest.max(began.elapsed());
        }
        println!("slowest, pool tests {tests}: {slowest:?}");
        assert!(slowest < RECOVERED, "{slowest:?}");
        let status = consumer.stop().await?;
        assert_eq!((status.failed, status.dead), (0, 0));
        assert_eq!(world.database.psql("SELECT count(*) FROM receipt;")?.trim(), "16");
    }
    Ok(())
}
