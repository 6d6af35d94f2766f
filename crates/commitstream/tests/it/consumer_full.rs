//! Redis is full: consumers go on acknowledging, so that trimming makes room and the relay goes on.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::EventEnvelope;
use commitstream::config::RedisSettings;
use commitstream::consumer::{Delivery, Handler, HandlerError, WhenUnknown};
use commitstream::relay::RelayState;
use commitstream::streams::{Streams, Trimmed, dead_stream};
use commitstream_sandbox::{Redis, Sandbox};
use redis::aio::MultiplexedConnection;

use crate::consumer_book::{Book, GROUP, start};
use crate::support::{PATIENCE, World, eventually};

const EVENTS: u32 = 3_000;
const AGGREGATES: u32 = 50;

/// Does an effect once, writes down what it sees, and gives one event up.
struct Careful(Arc<Book>);

impl Handler<EventEnvelope> for Careful {
    async fn handle(&self, event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        if event.event_type == "Poison" {
            return Err(HandlerError::give_up("poison"));
        }
        let effect = || async {
            self.0.begin(delivery)?;
            self.0.end(delivery);
            Ok(())
        };
        delivery.once("effect", WhenUnknown::Repeat, effect).await?;
        Ok(())
    }
}

async fn config(redis: &mut MultiplexedConnection, name: &str, value: u64) -> Result<()> {
    Ok(redis::cmd("CONFIG").arg("SET").arg(name).arg(value).query_async(redis).await?)
}

async fn used_memory(redis: &mut MultiplexedConnection) -> Result<u64> {
    let info: String = redis::cmd("INFO").arg("memory").query_async(redis).await?;
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
    Ok(used.context("used_memory")?.trim().parse()?)
}

/// Each event has its number within its aggregate, and behind it some kilobytes of spaces as JSON allows.
async fn insert(world: &World) -> Result<()> {
    let sql = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
               SELECT 'Numbered', 'user', (n % $2)::text, to_jsonb(n / $2), jsonb_build_object('ballast', repeat('x', 8000))
               FROM generate_series(0, $1 - 1) n";
    let mut connection = world.connect().await?;
    sqlx::query(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('Poison', 'user', 'p', '0')",
    )
    .execute(&mut connection)
    .await?;
    sqlx::query(sql).bind(i32::try_from(EVENTS)?).bind(i32::try_from(AGGREGATES)?).execute(&mut connection).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_is_read_empty_and_trimmed_and_the_relay_goes_on() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.settings.consumer.claim_idle = Duration::from_secs(2);
    // Of what the test itself sends: a busy machine takes its time.
    let own = RedisSettings { connect_timeout: PATIENCE, response_timeout: PATIENCE, ..world.settings.redis.clone() };
    world.streams = Streams::new(&redis.url(), &own)?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    let (stream, mut client) = (world.user_stream(), world.redis().await?);
    let create = ["CREATE", &stream, GROUP, "0", "MKSTREAM"];
    redis::cmd("XGROUP").arg(&create).query_async::<()>(&mut client).await?;
    let room = used_memory(&mut client).await? + (8 << 20);
    config(&mut client, "maxmemory", room).await?;
    let relay = world.relay()?;
    insert(&world).await?;
    let is_full = |state: &RelayState| matches!(state, RelayState::Unable { reason } if reason.contains("OOM"));
    relay.watch().wait_for(|status| is_full(&status.state)).await?;
    // Whatever is freed meanwhile: only what makes room may go on until there is some.
    config(&mut client, "maxmemory", 1).await?;

    let book = Arc::new(Book::default());
    let first = start(&world, Careful(book.clone()))?;
    eventually("events to be handled while Redis is full", async || Ok(book.count() > 100)).await?;
    // Another takes over from one that died.
    drop(first);
    let second = start(&world, Careful(book.clone()))?;
    let left = async || -> Result<(u64, Option<u64>)> {
        let groups = world.streams.groups(&stream).await?;
        let group = groups.first().context("the group")?;
        Ok((group.pending, group.behind))
    };
    eventually("everything to be acknowledged while Redis is full", async || Ok(left().await? == (0, Some(0)))).await?;
    // The poison stands first: nothing behind it could be trimmed while it waited for its dead letter.
    assert_eq!(world.streams.len(&dead_stream(&stream)).await?, 1);
    let entries = world.streams.len(&stream).await?;
    let trimmed = world.streams.trim(&stream, Duration::ZERO, 0).await?;
    assert_eq!(trimmed, Trimmed { acknowledged: entries, unread: 0 });

    config(&mut client, "maxmemory", room).await?;
    eventually("the relay to go on as there is room", async || {
        world.streams.trim(&stream, Duration::ZERO, 0).await?;
        Ok(relay.status().published == u64::from(EVENTS) + 1)
    })
    .await?;
    eventually("everything to be acknowledged", async || Ok(left().await? == (0, Some(0)))).await?;
    // What was at work at the death may have been done twice.
    book.seen.lock().map_err(|_| anyhow::anyhow!("a handler panicked"))?.values_mut().for_each(Vec::dedup);
    book.check(EVENTS as usize)?;
    assert_eq!(relay.status().refused, 0);
    relay.stop().await?;
    second.stop().await?;
    Ok(())
}
