//! What is measured, through the `metrics` facade: without a recorder it costs next to nothing, and the application chooses which one.
//!
//! Set the recorder before a relay, a publisher or a consumer is made: each looks its metrics up once.
//! [`METRICS`] is the one table; docs/metrics.md is held to it by a test.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};

use crate::outbox::{Backlog, OutboxError};
use crate::relay::RelayState;
use crate::streams::{GroupLag, StreamsError};

/// Event types that have a label of their own, for each lane of a process; the others are counted as [`OTHER`] together.
pub const MAX_TYPES: usize = 100;
/// Consumer groups whose lag has labels of its own; the largest of the others is that of [`OTHER`].
pub const MAX_GROUPS: usize = 200;
/// The `type` of events beyond [`MAX_TYPES`], and of those of recovered batches, whose types are not read; `stream` and `group` beyond
/// [`MAX_GROUPS`].
pub const OTHER: &str = "other";

/// What a metric counts or measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

const fn metric(name: &'static str, kind: Kind, unit: Unit, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind, unit, labels, help }
}

/// Everything that is measured.
pub const METRICS: &[Metric] = &[
    metric(
        EVENTS,
        Kind::Counter,
        Unit::Count,
        &["lane", "type", "outcome"],
        "Events by lane (outbox, streams), type (at most 100, then other) and outcome: published, refused (to be tried again), failed (given up).",
    ),
    metric(
        LATENCY,
        Kind::Histogram,
        Unit::Seconds,
        &[],
        "From the insert of the oldest event of a batch to the acknowledgement of its append. Its age by PostgreSQL's clock at the claim, then time that passed in the relay: no two clocks are compared.",
    ),
    metric(BATCH_EVENTS, Kind::Histogram, Unit::Count, &[], "Events in one appended batch."),
    metric(REDIS_SECONDS, Kind::Histogram, Unit::Seconds, &["operation"], "Round trips to Redis, answered or not: append."),
    metric(
        POSTGRES_SECONDS,
        Kind::Histogram,
        Unit::Seconds,
        &["operation"],
        "Round trips to PostgreSQL that succeeded: claim, settle.",
    ),
    metric(
        FAILURES,
        Kind::Counter,
        Unit::Count,
        &["server", "class"],
        "Calls that failed, by server (postgres, redis) and class: unreachable, timeout, unanswered, refused, lost, not_replicated, other. Says nothing about events.",
    ),
    metric(
        PREVENTED,
        Kind::Counter,
        Unit::Count,
        &[],
        "Events that would have been appended twice: their batch's marker was found after a lost answer or the death of a relay.",
    ),
    metric(
        REPUBLISHED,
        Kind::Counter,
        Unit::Count,
        &[],
        "Events that Redis had acknowledged and lost, and that were made unsent again.",
    ),
    metric(PARTITIONS, Kind::Gauge, Unit::Count, &[], "Of the 64 partitions, those that this relay works on."),
    metric(
        WAITING,
        Kind::Gauge,
        Unit::Count,
        &[],
        "Streams that this relay cannot append to (a key of another type, a missing permission, a server that is away) and tries again; the others go on.",
    ),
    metric(STATE, Kind::Gauge, Unit::Count, &["state"], "1 for the state that this relay is in, 0 for the others."),
    metric(
        BACKLOG,
        Kind::Gauge,
        Unit::Count,
        &[],
        "Unpublished events in the outbox, of all relays, counted up to 100,000: that value means as many or more.",
    ),
    metric(
        OLDEST,
        Kind::Gauge,
        Unit::Seconds,
        &[],
        "Age of the oldest of these unpublished events, by PostgreSQL's clock; 0 when there is none.",
    ),
    metric(
        FAILED_EVENTS,
        Kind::Gauge,
        Unit::Count,
        &[],
        "FAILED events in the outbox, which wait for an operator, counted up to 10,000.",
    ),
    metric(
        OPEN_BATCHES,
        Kind::Gauge,
        Unit::Count,
        &[],
        "Batches that are claimed and not settled, of all relays, counted up to 10,000.",
    ),
    metric(
        CONSUMED,
        Kind::Counter,
        Unit::Count,
        &["stream", "group", "outcome"],
        "Deliveries to this process's consumers by outcome: handled, skipped (no handler), failed (to be tried again), dead (given up).",
    ),
    metric(
        IN_HAND,
        Kind::Gauge,
        Unit::Count,
        &["stream", "group"],
        "Events that a consumer of this process has read and not finished.",
    ),
    metric(
        LAG,
        Kind::Gauge,
        Unit::Count,
        &["stream", "group"],
        "Events of a stream that a consumer group has not acknowledged, delivered or not, as a relay reads it (at most 200 groups, then other with the largest). Counted up to 5,000 where Redis does not know it.",
    ),
];

const EVENTS: &str = "commitstream_events_total";
const LATENCY: &str = "commitstream_append_latency_seconds";
const BATCH_EVENTS: &str = "commitstream_batch_events";
const REDIS_SECONDS: &str = "commitstream_redis_seconds";
const POSTGRES_SECONDS: &str = "commitstream_postgres_seconds";
const FAILURES: &str = "commitstream_failures_total";
const PREVENTED: &str = "commitstream_duplicates_prevented_total";
const REPUBLISHED: &str = "commitstream_republished_events_total";
const PARTITIONS: &str = "commitstream_partitions";
const WAITING: &str = "commitstream_waiting_streams";
const STATE: &str = "commitstream_relay_state";
const BACKLOG: &str = "commitstream_backlog_events";
const OLDEST: &str = "commitstream_oldest_unpublished_age_seconds";
const FAILED_EVENTS: &str = "commitstream_failed_events";
const OPEN_BATCHES: &str = "commitstream_open_batches";
const CONSUMED: &str = "commitstream_consumer_events_total";
const IN_HAND: &str = "commitstream_consumer_in_hand_events";
const LAG: &str = "commitstream_consumer_lag_events";

/// Gives the recorder the help texts and units. To be called once, after it was set.
pub fn describe() {
    for Metric { name, kind, unit, help, .. } in METRICS {
        match kind {
            Kind::Counter => ::metrics::describe_counter!(*name, *unit, *help),
            Kind::Gauge => ::metrics::describe_gauge!(*name, *unit, *help),
            Kind::Histogram => ::metrics::describe_histogram!(*name, *unit, *help),
        }
    }
}

/// What became of an event on its way to its stream.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Outcome {
    Published,
    Refused,
    Failed,
}

/// Events of one lane, by type and outcome.
pub(crate) struct Events {
    lane: &'static str,
    by_type: Mutex<HashMap<String, [Counter; 3]>>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("lane", &self.lane).finish_non_exhaustive()
    }
}

impl Events {
    pub fn new(lane: &'static str) -> Self {
        Self { lane, by_type: Mutex::default() }
    }

    /// Counts these, one look-up for each run of events of the same type.
    pub fn count<'a>(&self, types: impl Iterator<Item = &'a str>, outcome: Outcome) {
        let mut run: Option<(&str, u64)> = None;
        for of in types {
            match &mut run {
                Some((current, events)) if *current == of => *events += 1,
                _ => {
                    if let Some((ended, events)) = run.replace((of, 1)) {
                        self.add(ended, events, outcome);
                    }
                }
            }
        }
        if let Some((ended, events)) = run {
            self.add(ended, events, outcome);
        }
    }

    pub fn add(&self, event_type: &str, events: u64, outcome: Outcome) {
        let mut by_type = self.by_type.lock().unwrap_or_else(PoisonError::into_inner);
        let of = if by_type.contains_key(event_type) || by_type.len() < MAX_TYPES { event_type } else { OTHER };
        if !by_type.contains_key(of) {
            let of_outcome =
                |outcome: &'static str| counter!(EVENTS, "lane" => self.lane, "type" => of.to_owned(), "outcome" => outcome);
            by_type.insert(of.to_owned(), ["published", "refused", "failed"].map(of_outcome));
        }
        if let Some(counters) = by_type.get(of) {
            counters[outcome as usize].increment(events);
        }
    }
}

/// The metrics of a relay, looked up once.
#[derive(Debug)]
pub(crate) struct RelayMetrics {
    pub events: Events,
    pub latency: Histogram,
    pub batch_events: Histogram,
    pub append: Histogram,
    pub claim: Histogram,
    pub settle: Histogram,
    pub prevented: Counter,
    pub republished: Counter,
    pub partitions: Gauge,
    pub waiting: Gauge,
    states: Vec<(&'static str, Gauge)>,
}

impl RelayMetrics {
    pub fn new() -> Self {
        // From 0 on, so that the first failure shows in a rate.
        for (server, classes) in [("redis", REDIS_CLASSES), ("postgres", POSTGRES_CLASSES)] {
            classes.iter().for_each(|class| counter!(FAILURES, "server" => server, "class" => *class).increment(0));
        }
        let states = ["connecting", "standby", "paused", "recovering", "active", "unable", "stopped"];
        Self {
            events: Events::new("outbox"),
            latency: histogram!(LATENCY),
            batch_events: histogram!(BATCH_EVENTS),
            append: histogram!(REDIS_SECONDS, "operation" => "append"),
            claim: histogram!(POSTGRES_SECONDS, "operation" => "claim"),
            settle: histogram!(POSTGRES_SECONDS, "operation" => "settle"),
            prevented: counter!(PREVENTED),
            republished: counter!(REPUBLISHED),
            partitions: gauge!(PARTITIONS),
            waiting: gauge!(WAITING),
            states: states.map(|state| (state, gauge!(STATE, "state" => state))).into(),
        }
    }

    pub fn state(&self, state: &RelayState) {
        for (name, gauge) in &self.states {
            gauge.set(if *name == state.name() { 1.0 } else { 0.0 });
        }
    }
}

const REDIS_CLASSES: &[&str] = &["unreachable", "unanswered", "refused", "lost", "not_replicated", OTHER];
const POSTGRES_CLASSES: &[&str] = &["unreachable", "timeout", "refused", OTHER];

/// Calls that fail are rare enough to be looked up each time.
pub(crate) fn redis_failed(error: &StreamsError) {
    let class = match error {
        StreamsError::Unavailable { .. } | StreamsError::SentinelLogin { .. } => "unreachable",
        StreamsError::OutcomeUnknown { .. } => "unanswered",
        StreamsError::Refused { .. } | StreamsError::PartlyRefused { .. } => "refused",
        StreamsError::Lost { .. } => "lost",
        StreamsError::NotReplicated { .. } => "not_replicated",
        _ => OTHER,
    };
    counter!(FAILURES, "server" => "redis", "class" => class).increment(1);
}

/// The same of PostgreSQL.
pub(crate) fn postgres_failed(error: &OutboxError) {
    let class = match error {
        OutboxError::Unreachable { .. } | OutboxError::NoHost { .. } => "unreachable",
        OutboxError::Timeout { .. } | OutboxError::Silent { .. } => "timeout",
        OutboxError::Database { .. } => "refused",
        _ => OTHER,
    };
    counter!(FAILURES, "server" => "postgres", "class" => class).increment(1);
}

/// The state of the outbox as it was read, or nothing known of it.
pub fn set_backlog(backlog: &Backlog) {
    let count = |name: &'static str, events: u32| gauge!(name).set(events);
    count(BACKLOG, backlog.events);
    count(FAILED_EVENTS, backlog.failed);
    count(OPEN_BATCHES, backlog.open_batches);
    gauge!(OLDEST).set(backlog.oldest.unwrap_or(Duration::ZERO).as_secs_f64());
}

/// How far consumer groups are behind.
#[derive(Debug, Default)]
pub struct ConsumerLags(HashMap<(String, String), Gauge>);

impl ConsumerLags {
    /// As they were read: all that there are. A group that is gone is behind by nothing.
    pub fn set(&mut self, lags: &[GroupLag]) {
        let mut largest = HashMap::<_, u64>::new();
        for GroupLag { stream, group, events } in lags {
            let own = (stream.clone(), group.clone());
            let has_room = self.0.len() < MAX_GROUPS || self.0.contains_key(&own);
            let labels = if has_room { own } else { (OTHER.to_owned(), OTHER.to_owned()) };
            let (stream, group) = labels.clone();
            self.0.entry(labels.clone()).or_insert_with(|| gauge!(LAG, "stream" => stream, "group" => group));
            let known = largest.entry(labels).or_default();
            *known = (*events).max(*known);
        }
        for (labels, gauge) in &self.0 {
            gauge.set(largest.get(labels).copied().unwrap_or_default() as f64);
        }
    }
}

/// The metrics of a consumer on one stream.
#[derive(Debug, Clone)]
pub(crate) struct ConsumerMetrics(Arc<[Counter; 4]>, Gauge);

impl ConsumerMetrics {
    pub fn new(stream: &str, group: &str) -> Self {
        let of = |outcome: &'static str| counter!(CONSUMED, "stream" => stream.to_owned(), "group" => group.to_owned(), "outcome" => outcome);
        let in_hand = gauge!(IN_HAND, "stream" => stream.to_owned(), "group" => group.to_owned());
        Self(Arc::new(["handled", "skipped", "failed", "dead"].map(of)), in_hand)
    }

    pub fn handled(&self, events: usize) {
        self.0[0].increment(events as u64);
    }

    pub fn skipped(&self) {
        self.0[1].increment(1);
    }

    pub fn failed(&self) {
        self.0[2].increment(1);
    }

    pub fn dead(&self) {
        self.0[3].increment(1);
    }

    pub fn in_hand(&self, events: usize) {
        self.1.set(u32::try_from(events).unwrap_or(u32::MAX));
    }
}
