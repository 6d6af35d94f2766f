use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::brake::cause_of;
use crate::metrics::ConsumerMetrics;

/// What a consumer is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsumerState {
    /// Joining its groups.
    Connecting,
    /// Reading and handling, or waiting for events.
    Active,
    /// Cannot read one of its streams or handle its events now, and keeps trying. The reason is for people.
    Unable { reason: String },
    /// Ended.
    Stopped,
}

/// The consumer's state, and what it did since it was started.
#[derive(Debug, Clone)]
pub struct ConsumerStatus {
    pub state: ConsumerState,
    /// Events whose handler returned `Ok`.
    pub handled: u64,
    /// Events that no handler is for, and were passed over.
    pub skipped: u64,
    /// Failed deliveries.
    pub failed: u64,
    /// Events that became dead letters.
    pub dead: u64,
    /// Entries in hand, of all streams.
    pub in_hand: usize,
    /// Of these, those that wait: after a failure, or behind an event that failed.
    pub waiting: usize,
}

/// What one stream of a consumer says.
#[derive(Debug, Clone)]
pub(super) struct Reporter {
    stream: Arc<str>,
    shared: Arc<watch::Sender<Inner>>,
    metrics: ConsumerMetrics,
}

#[derive(Debug, Clone)]
pub(super) struct Inner {
    streams: BTreeMap<Arc<str>, StreamState>,
    handled: u64,
    skipped: u64,
    failed: u64,
    dead: u64,
}

#[derive(Debug, Clone)]
struct StreamState {
    /// But for its troubles.
    state: ConsumerState,
    troubles: BTreeMap<Part, Trouble>,
    in_hand: (usize, usize),
}

impl StreamState {
    fn with_troubles(&self) -> ConsumerState {
        let reason = self.troubles.values().find_map(|trouble| trouble.reason.clone());
        match reason {
            Some(reason) if self.state != ConsumerState::Stopped => ConsumerState::Unable { reason },
            _ => self.state.clone(),
        }
    }

    /// Whether it seemed to be in trouble.
    fn works(&mut self, part: Part, stream: &str) -> bool {
        let Some(trouble) = self.troubles.get_mut(&part) else { return false };
        let was_in_trouble = trouble.reason.take().is_some();
        if trouble.last.elapsed() >= OVER_AFTER {
            let times = trouble.times;
            tracing::info!(stream, part = part.description(), times, "consumer works again");
            self.troubles.remove(&part);
        }
        was_in_trouble
    }
}

/// What may be in trouble while the rest works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Joining the group, reading it, acknowledging.
    Group,
    /// The wait for new entries; without it they are looked for now and then.
    Wait,
    /// The tables that handlers need.
    Tables,
    /// The servers that handlers need.
    Handlers,
    DeadLetters,
}

impl Part {
    fn description(self) -> &'static str {
        match self {
            Self::Group => "reading and acknowledging",
            Self::Wait => "waiting for new entries",
            Self::Tables => "looking for the tables of handlers",
            Self::Handlers => "handling events",
            Self::DeadLetters => "writing dead letters",
        }
    }
}

/// It is one trouble, with one line at its beginning and one at its end, until nothing was heard of it for so long.
const OVER_AFTER: Duration = Duration::from_secs(5);
/// Between two lines on changes of its reason.
const BETWEEN_REASONS: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
struct Trouble {
    /// `None` once it seems to be over.
    reason: Option<String>,
    times: u64,
    last: Instant,
    /// The reason of the last line, without its numbers, and when that was.
    reported: (String, Instant),
}

impl Inner {
    pub fn status(&self) -> ConsumerStatus {
        let states: Vec<ConsumerState> = self.streams.values().map(StreamState::with_troubles).collect();
        let has = |wanted: fn(&ConsumerState) -> bool| states.iter().find(|state| wanted(state)).cloned();
        let state = has(|state| matches!(state, ConsumerState::Unable { .. }))
            .or_else(|| has(|state| *state == ConsumerState::Connecting))
            .or_else(|| has(|state| *state == ConsumerState::Active))
            .unwrap_or(ConsumerState::Stopped);
        let (in_hand, waiting) = self.streams.values().fold((0, 0), |sum, s| (sum.0 + s.in_hand.0, sum.1 + s.in_hand.1));
        ConsumerStatus {
            state,
            handled: self.handled,
            skipped: self.skipped,
            failed: self.failed,
            dead: self.dead,
            in_hand,
            waiting,
        }
    }
}

impl Reporter {
    /// One for each stream, and what they say together.
    pub fn all(streams: &[Arc<str>], group: &str) -> (Vec<Reporter>, watch::Receiver<Inner>) {
        let fresh = || StreamState { state: ConsumerState::Connecting, troubles: BTreeMap::new(), in_hand: (0, 0) };
        let inner = Inner {
            streams: streams.iter().map(|stream| (Arc::clone(stream), fresh())).collect(),
            handled: 0,
            skipped: 0,
            failed: 0,
            dead: 0,
        };
        let shared = Arc::new(watch::Sender::new(inner));
        let changes = shared.subscribe();
        let reporter = |stream: &Arc<str>| Self {
            stream: Arc::clone(stream),
            shared: Arc::clone(&shared),
            metrics: ConsumerMetrics::new(stream, group),
        };
        (streams.iter().map(reporter).collect(), changes)
    }

    /// Logs each change of state once.
    pub fn state(&self, state: ConsumerState) {
        self.update(|stream| {
            let changed = stream.state != state;
            if changed {
                log(&self.stream, &state);
                stream.state = state;
            }
            changed
        });
    }

    /// A part does not work now. Repetitions are counted; the log has one line for all of them, and another where the reason changes.
    pub fn trouble(&self, part: Part, reason: &str) {
        let (now, cause, stream) = (Instant::now(), cause_of(reason), self.stream.as_ref());
        self.update(|state| {
            let trouble = state.troubles.entry(part).or_insert_with(|| {
                tracing::warn!(stream, part = part.description(), reason, "consumer is in trouble, and keeps trying");
                Trouble { reason: None, times: 0, last: now, reported: (cause.clone(), now) }
            });
            (trouble.times, trouble.last) = (trouble.times + 1, now);
            if trouble.reported.0 != cause && now >= trouble.reported.1 + BETWEEN_REASONS {
                let times = trouble.times;
                tracing::warn!(
                    stream,
                    part = part.description(),
                    reason,
                    times,
                    "consumer is still in trouble, for another reason"
                );
                trouble.reported = (cause, now);
            }
            trouble.reason.replace(reason.to_owned()).as_deref() != Some(reason)
        });
    }

    /// A part works.
    pub fn works(&self, part: Part) {
        self.update(|state| state.works(part, &self.stream));
    }

    /// Whether it tells those who wait is what `change` returns.
    fn update(&self, change: impl FnOnce(&mut StreamState) -> bool) {
        self.shared.send_if_modified(|inner| inner.streams.get_mut(&self.stream).is_some_and(change));
    }

    pub fn in_hand(&self, in_hand: (usize, usize)) {
        self.metrics.in_hand(in_hand.0);
        self.update(|stream| std::mem::replace(&mut stream.in_hand, in_hand) != in_hand);
    }

    pub fn handled(&self, events: usize) {
        self.metrics.handled(events);
        self.shared.send_modify(|inner| {
            inner.handled += events as u64;
            let Some(stream) = inner.streams.get_mut(&self.stream).filter(|stream| !stream.troubles.is_empty()) else { return };
            stream.works(Part::Handlers, &self.stream);
            stream.works(Part::DeadLetters, &self.stream);
        });
    }

    pub fn skipped(&self) {
        self.metrics.skipped();
        self.shared.send_modify(|inner| inner.skipped += 1);
    }

    pub fn failed(&self) {
        self.metrics.failed();
        self.shared.send_modify(|inner| inner.failed += 1);
    }

    pub fn dead(&self) {
        self.metrics.dead();
        self.shared.send_modify(|inner| inner.dead += 1);
    }
}

fn log(stream: &str, state: &ConsumerState) {
    match state {
        ConsumerState::Connecting => tracing::debug!(stream, "consumer joins its group"),
        ConsumerState::Active => tracing::info!(stream, "consumer is active"),
        // Of a part: reported there.
        ConsumerState::Unable { .. } => {}
        ConsumerState::Stopped => tracing::info!(stream, "consumer has stopped"),
    }
}
