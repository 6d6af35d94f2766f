//! The watcher: what the service says against what arrives in the streams, while it happens.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use commitstream::Lane;
use commitstream::streams::Streams;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use uuid::Uuid;

use super::audit::Ledger;
use super::live::{LaneSample, Live, Sample};
use super::tail::{Arrivals, follow};
use crate::commands::latency::Latency;

/// Reads that may wait to be counted.
const READS_WAITING: usize = 100;
/// Notes that may wait to be counted; then the load waits.
const NOTES_WAITING: usize = 10_000;
const NOTES_AT_ONCE: usize = 1_000;

/// What the service tells of each operation.
pub enum Note {
    /// `commit()` returned at that instant.
    Committed {
        event: Uuid,
        at: Instant,
    },
    /// The call that sent them started at that instant, and succeeded.
    Sent {
        events: Vec<Uuid>,
        at: Instant,
    },
    RolledBack {
        event: Uuid,
    },
    /// The answer to the commit was lost; the business row tells.
    InDoubt {
        event: Uuid,
        row: Uuid,
    },
    /// Nothing was committed. High-frequency events of the call may have been sent: `stream/aggregate` and number of each.
    Failed {
        reason: String,
        in_doubt: Vec<(String, i64)>,
    },
}

/// What has not arrived yet.
#[derive(Debug, Default, Clone, Copy)]
pub struct Progress {
    /// The service has told everything.
    pub told: bool,
    /// Events that are committed or sent, and not seen.
    pub backlog: u64,
}

/// Operations that failed, and what the last one said.
#[derive(Debug, Default)]
pub struct Failures {
    pub count: u64,
    pub last: Option<String>,
}

/// What the watcher knows at the end.
pub struct Watched {
    pub ledger: Ledger,
    pub failures: Failures,
    /// Business row → event of each commit without an answer.
    pub commits_in_doubt: HashMap<Uuid, Uuid>,
    pub critical: Latency,
    pub high_frequency: Latency,
}

/// The running watcher. Dropping it ends it.
pub struct Watcher {
    task: JoinSet<anyhow::Result<Watched>>,
    tail: JoinSet<()>,
    stop_tail: watch::Sender<bool>,
    progress: watch::Receiver<Progress>,
}

impl Watcher {
    /// Follows the streams from their beginning. Notes go to the sender.
    pub fn start(streams: &Streams, live: Live) -> anyhow::Result<(Self, mpsc::Sender<Note>)> {
        let (notes_to, notes) = mpsc::channel(NOTES_WAITING);
        let (arrivals_to, arrivals) = mpsc::channel(READS_WAITING);
        let (progress_to, progress) = watch::channel(Progress::default());
        let (stop_tail, stopped) = watch::channel(false);
        let (mut task, mut tail) = (JoinSet::new(), JoinSet::new());
        tail.spawn(follow(streams.clone(), arrivals_to, stopped));
        task.spawn(State::new(live, progress_to)?.run(notes, arrivals));
        Ok((Self { task, tail, stop_tail, progress }, notes_to))
    }

    /// Waits until everything that was told has arrived, `patience` at most.
    pub async fn caught_up(&mut self, patience: Duration) {
        let arrived = self.progress.wait_for(|progress| progress.told && progress.backlog == 0);
        // Too late, or the watcher has ended: the audit and `finish` say what is wrong.
        drop(tokio::time::timeout(patience, arrived).await);
    }

    pub async fn finish(mut self) -> anyhow::Result<Watched> {
        self.stop_tail.send_replace(true);
        while let Some(ended) = self.tail.join_next().await {
            ended?;
        }
        self.task.join_next().await.unwrap_or_else(|| Ok(Err(anyhow::anyhow!("the watcher was never started"))))?
    }
}

/// One lane, as it is watched.
struct LaneState {
    /// When each event was committed or sent, until it is seen.
    unseen: HashMap<Uuid, Instant>,
    /// When each event was seen, until the service tells of it.
    untold: HashMap<Uuid, Instant>,
    entries: u64,
    last_second: Latency,
    total: Latency,
}

impl LaneState {
    fn new() -> anyhow::Result<Self> {
        let (unseen, untold) = (HashMap::new(), HashMap::new());
        Ok(Self { unseen, untold, entries: 0, last_second: Latency::new()?, total: Latency::new()? })
    }

    fn told(&mut self, event: Uuid, since: Instant) {
        match self.untold.remove(&event) {
            Some(seen) => self.measured(since, seen),
            None => drop(self.unseen.insert(event, since)),
        }
    }

    fn seen(&mut self, event: Uuid, at: Instant) {
        self.entries += 1;
        match self.unseen.remove(&event) {
            Some(since) => self.measured(since, at),
            None => drop(self.untold.insert(event, at)),
        }
    }

    /// An entry may be seen before `commit()` has returned: that counts as 0.
    fn measured(&mut self, since: Instant, seen: Instant) {
        let latency = seen.saturating_duration_since(since);
        self.last_second.record(latency);
        self.total.record(latency);
    }

    /// What the live line shows; the next sample starts afresh.
    fn sample(&mut self, elapsed: Duration) -> LaneSample {
        let per_second = self.entries as f64 / elapsed.as_secs_f64().max(0.001);
        let sample = LaneSample { per_second, latency: self.last_second.summary(), backlog: self.unseen.len() as u64 };
        self.entries = 0;
        self.last_second.reset();
        sample
    }
}

struct State {
    critical: LaneState,
    high_frequency: LaneState,
    ledger: Ledger,
    failures: Failures,
    commits_in_doubt: HashMap<Uuid, Uuid>,
    live: Live,
    progress: watch::Sender<Progress>,
}

impl State {
    fn new(live: Live, progress: watch::Sender<Progress>) -> anyhow::Result<Self> {
        Ok(Self {
            critical: LaneState::new()?,
            high_frequency: LaneState::new()?,
            ledger: Ledger::default(),
            failures: Failures::default(),
            commits_in_doubt: HashMap::new(),
            live,
            progress,
        })
    }

    /// Until the service has told everything and the tail has ended.
    async fn run(mut self, mut notes: mpsc::Receiver<Note>, mut arrivals: mpsc::Receiver<Arrivals>) -> anyhow::Result<Watched> {
        let start = Instant::now();
        let mut last = start;
        let mut ticks = tokio::time::interval(self.live.interval());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut batch = Vec::with_capacity(NOTES_AT_ONCE);
        let (mut told, mut ended) = (false, false);
        while !(told && ended) {
            tokio::select! {
                received = notes.recv_many(&mut batch, NOTES_AT_ONCE), if !told => {
                    told = received == 0;
                    batch.drain(..).for_each(|note| self.note(note));
                }
                read = arrivals.recv(), if !ended => match read {
                    Some(read) => read.events.iter().for_each(|(event, lane)| self.lane(*lane).seen(*event, read.at)),
                    None => ended = true,
                },
                _ = ticks.tick() => {
                    let now = Instant::now();
                    self.show(now - start, now - last)?;
                    last = now;
                }
            }
            let backlog = (self.critical.unseen.len() + self.high_frequency.unseen.len()) as u64;
            self.progress.send_replace(Progress { told, backlog });
        }
        self.live.end()?;
        let (critical, high_frequency) = (self.critical.total, self.high_frequency.total);
        let Self { ledger, failures, commits_in_doubt, .. } = self;
        Ok(Watched { ledger, failures, commits_in_doubt, critical, high_frequency })
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Committed { event, at } => self.publish(event, Lane::Critical, at),
            Note::Sent { events, at } => events.into_iter().for_each(|event| self.publish(event, Lane::HighFrequency, at)),
            Note::RolledBack { event } => drop(self.ledger.rolled_back.insert(event)),
            Note::InDoubt { event, row } => drop(self.commits_in_doubt.insert(row, event)),
            Note::Failed { reason, in_doubt } => {
                self.ledger.in_doubt.extend(in_doubt);
                self.failures.count += 1;
                self.failures.last = Some(reason);
            }
        }
    }

    fn publish(&mut self, event: Uuid, lane: Lane, since: Instant) {
        self.ledger.committed.insert(event, lane);
        self.lane(lane).told(event, since);
    }

    fn lane(&mut self, lane: Lane) -> &mut LaneState {
        match lane {
            Lane::Critical => &mut self.critical,
            Lane::HighFrequency => &mut self.high_frequency,
        }
    }

    fn show(&mut self, running: Duration, elapsed: Duration) -> anyhow::Result<()> {
        let (critical, high_frequency) = (self.critical.sample(elapsed), self.high_frequency.sample(elapsed));
        Ok(self.live.show(&Sample { running, critical, high_frequency })?)
    }
}
