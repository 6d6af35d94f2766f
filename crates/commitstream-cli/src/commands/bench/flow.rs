//! Events at a steady pace, and how long each takes to its stream.
//!
//! The pace is an open loop: each transaction has its time, and one that is late does not put off those after it. So an event that
//! waits for a slow server is counted with its wait, and so are those behind it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use commitstream::publisher::{DomainEventPublisher, PostgresOutboxPublisher};
use commitstream::streams::StreamTail;
use sqlx::PgConnection;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::stage::Stage;
use super::workload::{AGGREGATE_TYPE, OrderPlaced};
use crate::commands::latency::Latency;

/// Most entries of one read.
const ENTRIES_PER_READ: usize = 1_000;
/// Longest wait of one read; a stop is noticed after it.
const READ_PATIENCE: Duration = Duration::from_millis(100);
/// Longest wait for the last events.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running flow. Dropping it ends it.
pub struct Flow {
    shared: Arc<Shared>,
    producers: JoinSet<anyhow::Result<()>>,
    reader: JoinSet<anyhow::Result<()>>,
}

struct Shared {
    stop_producers: AtomicBool,
    stop_reader: AtomicBool,
    state: Mutex<State>,
}

/// Latencies of events.
pub struct Lap {
    pub events: u64,
    /// From the return of the commit until a blocking reader has the entry.
    pub after_commit: Latency,
    /// From the time at which the transaction was due.
    pub after_due: Latency,
}

struct State {
    lap: Lap,
    /// When each event was due and when it was committed, until it is seen.
    unseen: HashMap<Uuid, (Instant, Instant)>,
    /// When each event was seen, until its commit has returned.
    untold: HashMap<Uuid, Instant>,
}

impl Flow {
    /// `rate` transactions a second in all, of one event each, over so many connections.
    pub async fn start(stage: &Stage, rate: u32, connections: u32) -> anyhow::Result<Self> {
        let state = State { lap: Lap::new()?, unseen: HashMap::new(), untold: HashMap::new() };
        let (stop_producers, stop_reader) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { stop_producers, stop_reader, state: Mutex::new(state) });
        let stream = stage.streams.stream_of(AGGREGATE_TYPE);
        let newest = stage.streams.newest(&stream, 1).await?.pop().map_or_else(|| "0".to_owned(), |entry| entry.id);
        let tail = stage.streams.tail(BTreeMap::from([(stream, newest)]));
        let (mut producers, mut reader) = (JoinSet::new(), JoinSet::new());
        reader.spawn(read(tail, shared.clone()));
        let publisher = PostgresOutboxPublisher::new(&stage.settings);
        let every = Duration::from_secs(1) * connections / rate;
        let mut sessions = Vec::new();
        for _ in 0..connections {
            sessions.push(stage.connect("flow").await?);
        }
        let start = Instant::now();
        for (turn, session) in (0..).zip(sessions) {
            let first = start + every * turn / connections;
            producers.spawn(produce(session, publisher.clone(), shared.clone(), first, every));
        }
        Ok(Self { shared, producers, reader })
    }

    /// What was seen since the last call.
    pub fn lap(&self) -> anyhow::Result<Lap> {
        Ok(std::mem::replace(&mut self.shared.state().lap, Lap::new()?))
    }

    /// Ends the producers, waits until all that they published was seen, and returns what was seen since the last lap.
    pub async fn finish(mut self) -> anyhow::Result<Lap> {
        self.shared.stop_producers.store(true, Ordering::Relaxed);
        while let Some(ended) = self.producers.join_next().await {
            ended??;
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.shared.state().unseen.is_empty() && self.reader.try_join_next().is_none() {
            let unseen = self.shared.state().unseen.len();
            ensure!(Instant::now() < deadline, "{unseen} events did not come to their stream");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.shared.stop_reader.store(true, Ordering::Relaxed);
        while let Some(ended) = self.reader.join_next().await {
            ended??;
        }
        self.lap()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lap {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { events: 0, after_commit: Latency::new()?, after_due: Latency::new()? })
    }

    /// An entry may be seen before the commit has returned to the producer: that counts as 0.
    fn record(&mut self, due: Instant, committed: Instant, seen: Instant) {
        self.events += 1;
        self.after_commit.record(seen.saturating_duration_since(committed));
        self.after_due.record(seen.saturating_duration_since(due));
    }
}

async fn produce(
    mut session: PgConnection,
    publisher: PostgresOutboxPublisher,
    shared: Arc<Shared>,
    first: Instant,
    every: Duration,
) -> anyhow::Result<()> {
    let mut due = first;
    for number in 0.. {
        sleep_until(due).await;
        if shared.stop_producers.load(Ordering::Relaxed) {
            break;
        }
        let event = publisher.publish(&mut session, &OrderPlaced::new(number)).await?;
        let committed = Instant::now();
        let mut state = shared.state();
        match state.untold.remove(&event) {
            Some(seen) => state.lap.record(due, committed, seen),
            None => drop(state.unseen.insert(event, (due, committed))),
        }
        drop(state);
        due += every;
    }
    Ok(())
}

async fn read(mut tail: StreamTail, shared: Arc<Shared>) -> anyhow::Result<()> {
    while !shared.stop_reader.load(Ordering::Relaxed) {
        let entries = tail.next(ENTRIES_PER_READ, READ_PATIENCE).await?;
        let seen = Instant::now();
        let mut state = shared.state();
        for entry in entries {
            let event: Uuid = entry.field("id").context("an entry has the id of its event")?.parse()?;
            match state.unseen.remove(&event) {
                Some((due, committed)) => state.lap.record(due, committed, seen),
                None => drop(state.untold.insert(event, seen)),
            }
        }
    }
    Ok(())
}
