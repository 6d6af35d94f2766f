use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::metrics::ConsumerMetrics;

/// What a consumer is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsumerState {
    /// Joining its groups.
    Connecting,
    /// Reading and handling, or waiting for events.
    Active,
    /// Cannot read one of its streams now, and keeps trying. The reason is for people.
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
    state: ConsumerState,
    in_hand: (usize, usize),
}

impl Inner {
    pub fn status(&self) -> ConsumerStatus {
        let states = || self.streams.values().map(|stream| &stream.state);
        let has = |wanted: fn(&ConsumerState) -> bool| states().find(|state| wanted(state)).cloned();
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
        let fresh = || StreamState { state: ConsumerState::Connecting, in_hand: (0, 0) };
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

    /// Logs each change of state once, with its first reason.
    pub fn state(&self, state: ConsumerState) {
        self.shared.send_if_modified(|inner| {
            let Some(stream) = inner.streams.get_mut(&self.stream) else { return false };
            if std::mem::discriminant(&stream.state) != std::mem::discriminant(&state) {
                log(&self.stream, &state);
            }
            let changed = stream.state != state;
            stream.state = state;
            changed
        });
    }

    pub fn in_hand(&self, in_hand: (usize, usize)) {
        self.metrics.in_hand(in_hand.0);
        self.shared.send_if_modified(|inner| {
            let Some(stream) = inner.streams.get_mut(&self.stream) else { return false };
            std::mem::replace(&mut stream.in_hand, in_hand) != in_hand
        });
    }

    pub fn handled(&self, events: usize) {
        self.metrics.handled(events);
        self.shared.send_modify(|inner| inner.handled += events as u64);
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
        ConsumerState::Unable { reason } => tracing::warn!(stream, reason, "consumer cannot work, and keeps trying"),
        ConsumerState::Stopped => tracing::info!(stream, "consumer has stopped"),
    }
}
