//! What is nobody's event makes no dead letters, and is said once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::config::Settings;
use commitstream::consumer::{
    Consumer, ConsumerHandle, ConsumerState, ConsumerStatus, Delivery, Handler, HandlerError, TransactionalHandler,
};
use commitstream::streams::dead_stream;
use commitstream::{DomainEvent, EventEnvelope};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context as LayerContext, Layer, SubscriberExt};

use crate::consumer_book::{Book, GROUP, Writer, publish};
use crate::events::envelope;
use crate::support::{World, eventually};

#[derive(Debug, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
struct Paid {
    #[event(key)]
    user: u32,
}

/// Needs the table `receipt`.
struct Receipts;

impl TransactionalHandler<Paid> for Receipts {
    async fn handle(&self, _event: Paid, delivery: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        sqlx::query("INSERT INTO receipt (event_id) VALUES ($1)").bind(delivery.event_id()).execute(transaction).await?;
        Ok(())
    }
}

async fn pay(world: &World, users: std::ops::Range<u32>) -> Result<()> {
    let events = users.map(|user| Paid { user }.envelope()).collect::<Result<Vec<EventEnvelope>, _>>()?;
    world.streams.publish(&events).await.map_err(|unsent| unsent.error)?;
    Ok(())
}

async fn receipts(world: &World) -> Result<ConsumerHandle> {
    Ok(Consumer::new(GROUP, &world.settings)?.on_transaction(&world.pool().await?, Receipts).start()?)
}

fn is_unable(status: &ConsumerStatus, part: &str) -> bool {
    matches!(&status.state, ConsumerState::Unable { reason } if reason.contains(part))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_without_its_inbox_handles_nothing_and_says_which_command_makes_it() -> Result<()> {
    let mut world = World::unmigrated()?;
    world.settings.consumer.max_deliveries = 1;
    pay(&world, 0..50).await?;
    let consumer = receipts(&world).await?;
    consumer.wait_for(|status| is_unable(status, "commitstream migrate")).await.context("ended")?;
    assert_eq!(world.streams.groups(&world.user_stream()).await?.len(), 0, "it has not joined");
    world.outbox.migrate(&mut world.connect().await?).await?;
    world.database.psql("CREATE TABLE receipt (event_id uuid);")?;
    consumer.wait_for(|status| status.handled == 50 && status.state == ConsumerState::Active).await.context("ended")?;
    let status = consumer.stop().await?;
    assert_eq!((status.failed, status.dead), (0, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_goes_missing_later_is_an_outage() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 1;
    world.database.psql("CREATE TABLE receipt (event_id uuid);")?;
    let consumer = receipts(&world).await?;
    for (n, table) in ["event_inbox", "receipt"].into_iter().enumerate() {
        let from = u32::try_from(n)? * 20;
        pay(&world, from..from + 10).await?;
        consumer.wait_for(|status| status.handled == u64::from(from) + 10).await.context("ended")?;
        world.database.psql(&format!("ALTER TABLE {table} RENAME TO hidden;"))?;
        pay(&world, from + 10..from + 20).await?;
        consumer.wait_for(|status| is_unable(status, table) && status.waiting == 10).await.context("ended")?;
        world.database.psql(&format!("ALTER TABLE hidden RENAME TO {table};"))?;
        let status = consumer.wait_for(|status| status.handled == u64::from(from) + 20).await.context("ended")?;
        assert_eq!((status.failed, status.dead), (0, 0), "{table}");
    }
    consumer.stop().await?;
    assert_eq!(world.database.psql("SELECT count(DISTINCT event_id), count(*) FROM receipt;")?.trim(), "40|40");
    Ok(())
}

/// Writes nothing down, and needs a payload of its own.
struct Reader;

impl Handler<Paid> for Reader {
    async fn handle(&self, _event: Paid, _delivery: &Delivery) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Events whose payload is not that of `Paid`, each with an id of its own in the reason.
async fn garble(world: &World, events: u32) -> Result<()> {
    let garbled = (0..events).map(|n| {
        let event = envelope("user", &n.to_string(), &format!("no user {n}"))?;
        Ok(EventEnvelope { event_type: "Paid".into(), ..event })
    });
    let garbled: Vec<EventEnvelope> = garbled.collect::<Result<_>>()?;
    world.streams.publish(&garbled).await.map_err(|unsent| unsent.error)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_all_fail_alike_become_dead_letters_slowly() -> Result<()> {
    let mut world = World::unmigrated()?;
    world.settings.consumer.retry_base_delay = Duration::from_secs(60);
    garble(&world, 300).await?;
    let consumer = Consumer::new(GROUP, &world.settings)?.on(Reader).start()?;
    let decided = |status: &ConsumerStatus| status.waiting as u64 + status.dead == 300;
    let braked = |status: &ConsumerStatus| is_unable(status, "maxDeadLettersInRow") && decided(status);
    let status = consumer.wait_for(braked).await.context("ended")?;
    assert_eq!((status.dead, status.handled), (20, 0));
    // What can be handled is, and shows that the brake may go.
    pay(&world, 1_000..1_001).await?;
    consumer.wait_for(|status| status.handled == 1 && status.state == ConsumerState::Active).await.context("ended")?;
    consumer.stop().await?;
    assert_eq!(world.streams.len(&dead_stream(&world.user_stream())).await?, 20);

    // With a short pause they go on, one in each.
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    world.settings.consumer.retry_max_delay = Duration::from_millis(1);
    let consumer = Consumer::new(GROUP, &world.settings)?.on(Reader).start()?;
    consumer.wait_for(|status| status.dead == 280).await.context("ended")?;
    consumer.stop().await?;
    Ok(())
}

/// Takes what is said at `WARN` and above.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push_str(&format!("{field}={value:?} "));
    }
}

impl<S: tracing::Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _: LayerContext<'_, S>) {
        if *event.metadata().level() > tracing::Level::WARN || !event.metadata().target().starts_with("commitstream") {
            return;
        }
        let mut line = Line(String::new());
        event.record(&mut line);
        if let Ok(mut lines) = self.0.lock() {
            lines.push(line.0);
        }
    }
}

/// On one thread, whose log is taken.
#[tokio::test]
async fn a_consumer_that_may_not_wait_for_entries_says_so_once_and_handles_them() -> Result<()> {
    let log = Log::default();
    // With a single subscriber, `tracing` asks the thread that comes first whether anybody listens, which may be another test's.
    let _another = tracing::Dispatch::new(tracing_subscriber::registry());
    let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(log.clone()));
    let world = World::unmigrated()?;
    let user = format!("u{}", uuid::Uuid::now_v7().simple());
    let acl = ["SETUSER", &user, "on", ">secret", "~*", "+@all", "-xread"];
    let mut redis = world.redis().await?;
    redis::cmd("ACL").arg(&acl).query_async::<()>(&mut redis).await?;
    let mut settings: Settings = world.settings.clone();
    let url = settings.redis.url.as_deref().context("a URL")?;
    let server = url.rsplit_once('@').map_or_else(|| url.trim_start_matches("redis://"), |(_, server)| server);
    settings.redis.url = Some(format!("redis://{user}:secret@{server}"));

    let book = Arc::new(Book::default());
    let consumer = Consumer::new(GROUP, &settings)?.on_any("user", Writer(book.clone())).start()?;
    consumer.wait_for(|status| is_unable(status, "xread")).await.context("ended")?;
    for n in 1..=5 {
        publish(&world, 20, 20).await?;
        eventually("events to be handled by looking for them", async || Ok(book.count() == n * 20)).await?;
        assert!(is_unable(&consumer.status(), "xread"), "{:?}", consumer.status());
    }
    consumer.stop().await?;
    drop(guard);
    let lines = log.0.lock().map_err(|_| anyhow::anyhow!("a writer panicked"))?.clone();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("waiting for new entries") && lines[0].contains("xread"), "{lines:?}");
    redis::cmd("ACL").arg("DELUSER").arg(&user).query_async::<()>(&mut redis).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_in_memory_leaves_what_met_an_outage_for_later() -> Result<()> {
    let world = World::unmigrated()?;
    let mut consumer = Consumer::new(GROUP, &world.settings)?.on_transaction(&world.pool().await?, Receipts).in_memory()?;
    consumer.publish(&Paid { user: 1 })?;
    consumer.run().await;
    assert_eq!((consumer.waiting(), consumer.dead_letters().len()), (1, 0));
    Ok(())
}
