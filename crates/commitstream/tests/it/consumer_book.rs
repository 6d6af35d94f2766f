//! What the tests of consumers share: events with numbers, and a book of who handled them.
#![allow(clippy::unwrap_used, reason = "locks that only a failed test poisons")]

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use commitstream::EventEnvelope;
use commitstream::consumer::{Consumer, ConsumerHandle, Delivery, Handler, HandlerError};

use crate::events::envelope;
use crate::support::{World, eventually};

pub const GROUP: &str = "tests";

/// What handlers saw, by aggregate, in the order in which they began; and who was at work at once.
#[derive(Default)]
pub struct Book {
    pub seen: Mutex<BTreeMap<String, Vec<u64>>>,
    pub at_work: Mutex<HashSet<String>>,
    pub overlaps: AtomicUsize,
}

impl Book {
    pub fn begin(&self, delivery: &Delivery) -> Result<(), HandlerError> {
        let event = delivery.envelope();
        if !self.at_work.lock().unwrap().insert(event.aggregate_id.clone()) {
            self.overlaps.fetch_add(1, Ordering::Relaxed);
        }
        let n: u64 = serde_json::from_str(event.payload.get())?;
        self.seen.lock().unwrap().entry(event.aggregate_id.clone()).or_default().push(n);
        Ok(())
    }

    pub fn end(&self, delivery: &Delivery) {
        self.at_work.lock().unwrap().remove(&delivery.envelope().aggregate_id);
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().values().map(Vec::len).sum()
    }

    /// Each aggregate saw 0, 1, 2 ... once.
    pub fn check(&self, events: usize) -> Result<()> {
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
pub struct Writer(pub Arc<Book>);

impl Handler<EventEnvelope> for Writer {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        self.0.begin(delivery)?;
        tokio::task::yield_now().await;
        self.0.end(delivery);
        Ok(())
    }
}

/// `events` events, each with its number within its aggregate.
pub async fn publish(world: &World, events: u64, aggregates: u64) -> Result<()> {
    let envelopes = (0..events).map(|n| envelope("user", &(n % aggregates).to_string(), &(n / aggregates)));
    let envelopes: Vec<EventEnvelope> = envelopes.collect::<Result<_>>()?;
    world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    Ok(())
}

pub fn start(world: &World, handler: impl Handler<EventEnvelope>) -> Result<ConsumerHandle> {
    Ok(Consumer::new(GROUP, &world.settings)?.on_any("user", handler).start()?)
}

/// Entries that the group was given and has not acknowledged.
pub async fn pending(world: &World) -> Result<u64> {
    let mut command = redis::cmd("XPENDING");
    let reply: (u64, redis::Value, redis::Value, redis::Value) =
        command.arg(world.user_stream()).arg(GROUP).query_async(&mut world.redis().await?).await?;
    Ok(reply.0)
}

pub async fn all_acknowledged(world: &World) -> Result<()> {
    eventually("everything to be acknowledged", async || Ok(pending(world).await? == 0)).await
}
