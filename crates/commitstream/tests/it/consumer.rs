//! Consumers share the work, keep the order, and lose nothing.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use commitstream::EventEnvelope;
use commitstream::consumer::{Consumer, ConsumerHandle, Delivery, Handler, HandlerError};
use tokio::sync::Semaphore;

use crate::events::envelope;
use crate::support::{World, eventually};

const GROUP: &str = "tests";

/// What handlers saw, by aggregate, in the order in which they began; and who was at work at once.
#[derive(Default)]
struct Book {
    seen: Mutex<BTreeMap<String, Vec<u64>>>,
    at_work: Mutex<HashSet<String>>,
    overlaps: AtomicUsize,
}

impl Book {
    fn begin(&self, delivery: &Delivery) -> Result<(), HandlerError> {
        let event = delivery.envelope();
        if !self.at_work.lock().unwrap().insert(event.aggregate_id.clone()) {
            self.overlaps.fetch_add(1, Ordering::Relaxed);
        }
        let n: u64 = serde_json::from_str(event.payload.get())?;
        self.seen.lock().unwrap().entry(event.aggregate_id.clone()).or_default().push(n);
        Ok(())
    }

    fn end(&self, delivery: &Delivery) {
        self.at_work.lock().unwrap().remove(&delivery.envelope().aggregate_id);
    }

    fn count(&self) -> usize {
        self.seen.lock().unwrap().values().map(Vec::len).sum()
    }

    /// Each aggregate saw 0, 1, 2 ... once.
    fn check(&self, events: usize) -> Result<()> {
        ensure!(self.overlaps.load(Ordering::Relaxed) == 0, "two handlers of one aggregate at once");
        for (aggregate, seen) in self.seen.lock().unwrap().iter() {
            let expected: Vec<u64> = (0..seen.len() as u64).collect();
            ensure!(*seen == expected, "{aggregate}: {seen:?}");
        }
        ensure!(self.count() == events, "{} of {events}", self.count());
        Ok(())
    }
}

/// Writes down what it sees.
struct Writer(Arc<Book>);

impl Handler<EventEnvelope> for Writer {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        self.0.begin(delivery)?;
        tokio::task::yield_now().await;
        self.0.end(delivery);
        Ok(())
    }
}

/// `events` events, each with its number within its aggregate.
async fn publish(world: &World, events: u64, aggregates: u64) -> Result<()> {
    let envelopes = (0..events).map(|n| envelope("user", &(n % aggregates).to_string(), &(n / aggregates)));
    let envelopes: Vec<EventEnvelope> = envelopes.collect::<Result<_>>()?;
    world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    Ok(())
}

fn start(world: &World, handler: impl Handler<EventEnvelope>) -> Result<ConsumerHandle> {
    Ok(Consumer::new(GROUP, &world.settings)?.on_any("user", handler).start()?)
}

/// Entries that the group was given and has not acknowledged.
async fn pending(world: &World) -> Result<u64> {
    let mut command = redis::cmd("XPENDING");
    let reply: (u64, redis::Value, redis::Value, redis::Value) =
        command.arg(world.user_stream()).arg(GROUP).query_async(&mut world.redis().await?).await?;
    Ok(reply.0)
}

async fn all_acknowledged(world: &World) -> Result<()> {
    eventually("everything to be acknowledged", async || Ok(pending(world).await? == 0)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn three_consumers_share_the_work_and_keep_the_order_of_each_aggregate() -> Result<()> {
    let world = World::new().await?;
    let book = Arc::new(Book::default());
    publish(&world, 5_000, 50).await?;
    let consumers: Vec<ConsumerHandle> = (0..3).map(|_| start(&world, Writer(book.clone()))).collect::<Result<_>>()?;
    publish_more(&world, 5_000, 50, 100).await?;
    eventually("all to be handled", async || Ok(book.count() >= 10_000)).await?;
    all_acknowledged(&world).await?;
    let mut handled = Vec::new();
    for consumer in consumers {
        handled.push(consumer.stop().await?.handled);
    }
    book.check(10_000)?;
    assert_eq!(handled.iter().sum::<u64>(), 10_000);
    assert!(handled.iter().all(|handled| *handled > 1_000), "{handled:?}");
    Ok(())
}

async fn publish_more(world: &World, events: u64, aggregates: u64, from: u64) -> Result<()> {
    for chunk in 0..10 {
        let envelopes = (0..events / 10).map(|n| {
            let n = n + chunk * events / 10;
            envelope("user", &(n % aggregates).to_string(), &(from + n / aggregates))
        });
        let envelopes: Vec<EventEnvelope> = envelopes.collect::<Result<_>>()?;
        world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    }
    Ok(())
}

/// Holds every handler until it is let go.
struct Gate(Arc<Semaphore>, Arc<Book>);

impl Handler<EventEnvelope> for Gate {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        self.1.begin(delivery)?;
        self.0.acquire().await?.forget();
        self.1.end(delivery);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_handler_keeps_its_event_and_a_dead_consumer_does_not() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.claim_idle = Duration::from_secs(1);
    publish(&world, 3, 1).await?;
    let (gate, held) = (Arc::new(Semaphore::new(0)), Arc::new(Book::default()));
    let long = start(&world, Gate(gate.clone(), held.clone()))?;
    eventually("the handler to begin", async || Ok(held.count() == 1)).await?;
    let book = Arc::new(Book::default());
    let other = start(&world, Writer(book.clone()))?;
    // Several times as long as a silent consumer would live.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((held.count(), book.count()), (1, 0));
    drop(long);
    eventually("the other one to take over", async || Ok(book.count() == 3)).await?;
    all_acknowledged(&world).await?;
    other.stop().await?;
    book.check(3)
}
