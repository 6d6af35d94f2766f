//! What is wrong, why it matters, and the command that mends it.
//!
//! [`examine`] asks both servers for facts (in [`outbox::examine`](crate::outbox::examine) and
//! [`streams::examine`](crate::streams::examine)); [`judge`] makes findings of them, without I/O. Nothing is changed, no table is read in
//! full, and a server that cannot be reached is a finding like any other.

mod advice;
mod barriers;
mod outbox;
mod postgres;
mod redis;
mod schema;
mod steps;
mod streams;
#[cfg(test)]
mod tests;
mod verdict;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

pub use steps::Step;
pub use verdict::{Consumers, Flow, Verdict, judge_flow};

use crate::config::Settings;
use crate::outbox::examine::PostgresFacts;
use crate::outbox::{KnownStream, OutboxError, OutboxRepository};
use crate::streams::examine::RedisFacts;
use crate::streams::{StreamInfo, Streams, StreamsError};

/// How bad it is, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know; nothing has to be done.
    Note,
    /// It costs speed, space or safety, or will be trouble.
    Warning,
    /// Events do not flow, or may be lost.
    Error,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// Which of [`CHECKS`] found it.
    pub check: &'static str,
    /// What is there.
    pub seen: String,
    /// Why it matters.
    pub why: String,
    /// What fixes it: a command, or several parted by ` && `; where none can, what to do. [`Finding::steps`] has its parts.
    pub mend: String,
}

/// Every check, in the order in which they are carried out.
pub const CHECKS: [&str; 47] = [
    "postgres-reachable",
    "postgres-pooler",
    "postgres-version",
    "postgres-writable",
    "postgres-durability",
    "postgres-connections",
    "postgres-wraparound",
    "postgres-visibility",
    "postgres-encoding",
    "autovacuum",
    "vacuum-held-back",
    "privileges",
    "migration",
    "schema",
    "indexes",
    "leases",
    "sequences",
    "two-phase",
    "row-security",
    "triggers",
    "bloat",
    "partitions-ahead",
    "relays",
    "relay-versions",
    "pause",
    "open-batches",
    "backlog",
    "refused-events",
    "failed-events",
    "writers",
    "cleanup",
    "redis-reachable",
    "redis-information",
    "redis-version",
    "redis-writable",
    "redis-permissions",
    "redis-eviction",
    "redis-persistence",
    "redis-memory",
    "redis-replicas",
    "stream-keys",
    "neighbours",
    "consumer-groups",
    "dead-letters",
    "trimming",
    "lost-entries",
    "clocks",
];

/// Findings of one check that are told one by one.
const TOLD: usize = 5;

/// What an examination came to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// The worst first.
    pub findings: Vec<Finding>,
    /// Checks that found nothing. A check that is in neither list could not be carried out, because of another finding.
    pub passed: Vec<&'static str>,
}

impl Report {
    /// The severity of the worst finding.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }

    /// A check was carried out and found this.
    fn check(&mut self, check: &'static str, found: impl IntoIterator<Item = Finding>) {
        let mut found: Vec<Finding> = found.into_iter().map(|finding| Finding { check, ..finding }).collect();
        found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        if found.is_empty() {
            self.passed.push(check);
        }
        let untold = found.len().saturating_sub(TOLD);
        if let Some(last) = found.get_mut(TOLD - 1).filter(|_| untold > 0) {
            last.seen = format!("{} (and {untold} more like this)", last.seen);
        }
        self.findings.extend(found.into_iter().take(TOLD));
    }

    /// A check could not be carried out, which may be a symptom.
    fn unknown(&mut self, check: &'static str, error: &(dyn std::error::Error + 'static)) {
        let is_told = |check| self.findings.iter().any(|finding| finding.check == check);
        if error.downcast_ref().is_some_and(OutboxError::is_denied) && is_told("privileges") {
            return;
        }
        let seen = format!("this could not be examined: {}", crate::chain::chain(error));
        let why = "nobody knows whether it is in order";
        self.check(check, [warning(seen, why, "mend what is said, then run `commitstream doctor` again")]);
    }
}

fn finding(severity: Severity, seen: impl Into<String>, why: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { severity, check: "", seen: seen.into(), why: why.into(), mend: mend.into() }
}

fn note(seen: impl Into<String>, why: impl Into<String>, mend: impl Into<String>) -> Finding {
    finding(Severity::Note, seen, why, mend)
}

fn warning(seen: impl Into<String>, why: impl Into<String>, mend: impl Into<String>) -> Finding {
    finding(Severity::Warning, seen, why, mend)
}

fn error(seen: impl Into<String>, why: impl Into<String>, mend: impl Into<String>) -> Finding {
    finding(Severity::Error, seen, why, mend)
}

/// A server's clock against that of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Milliseconds that it is ahead.
    pub ahead_ms: i64,
    /// It may be so much more or less.
    pub margin_ms: i64,
}

impl Clock {
    /// Of a server that answered `time` to a question that was sent at `sent` and took so long.
    #[must_use]
    pub fn measured(sent: DateTime<Utc>, took: Duration, time: DateTime<Utc>) -> Self {
        let half = i64::try_from(took.as_millis() / 2).unwrap_or(i64::MAX);
        Self { ahead_ms: (time - sent).num_milliseconds().saturating_sub(half), margin_ms: half }
    }
}

/// What was found out about both servers; `None` of one that has no URL.
#[derive(Debug)]
pub struct Facts {
    pub postgres: Option<Result<PostgresFacts, OutboxError>>,
    pub redis: Option<Result<RedisFacts, StreamsError>>,
}

/// Longest that PostgreSQL may take for all questions.
const LIMIT: Duration = Duration::from_secs(60);

/// What takes too long then.
const EXAMINING: &str = "examining PostgreSQL";

/// Longest that one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(10);

/// Examines both servers at the same time, in some seconds and at most a minute.
pub async fn examine(settings: &Settings) -> Report {
    let (postgres, mut redis) = tokio::join!(ask_postgres(settings), ask_redis(settings));
    if let (Some(Ok(PostgresFacts::Direct(postgres))), Some(Ok(redis))) = (&postgres, &mut redis)
        && let Some(Ok(known)) = postgres.outbox.as_ref().map(|outbox| &outbox.streams)
    {
        // In this order: what the journal has by now is in the streams by then.
        redis.states = states(settings, known).await;
    }
    judge(settings, &Facts { postgres, redis })
}

/// How the streams stand that the outbox knows; those that are asked about before time is up.
async fn states(settings: &Settings, known: &[KnownStream]) -> BTreeMap<String, Option<StreamInfo>> {
    let Some(Ok(streams)) = settings.redis.url.as_deref().map(|url| Streams::new(url, &settings.redis)) else {
        return BTreeMap::new();
    };
    let ask = streams.states(known.iter().map(|known| &known.stream));
    tokio::time::timeout(CONNECT, ask).await.unwrap_or_default()
}

async fn ask_postgres(settings: &Settings) -> Option<Result<PostgresFacts, OutboxError>> {
    let url = settings.database.url_with_tls()?;
    let outbox = OutboxRepository::new(&settings.database.schema);
    let asked = tokio::time::timeout(LIMIT, outbox.examine(&url, settings.database.timeout.min(CONNECT))).await;
    Some(asked.unwrap_or(Err(OutboxError::Timeout { doing: EXAMINING, limit: LIMIT })))
}

async fn ask_redis(settings: &Settings) -> Option<Result<RedisFacts, StreamsError>> {
    let url = settings.redis.url.as_deref()?;
    Some(match Streams::new(url, &settings.redis) {
        Ok(streams) => streams.examine().await,
        Err(error) => Err(error),
    })
}

/// What the facts mean under these settings.
#[must_use]
pub fn judge(settings: &Settings, facts: &Facts) -> Report {
    let mut report = Report::default();
    postgres::judge(&mut report, settings, facts.postgres.as_ref());
    redis::judge(&mut report, settings, facts.redis.as_ref());
    if let (Some(Ok(PostgresFacts::Direct(postgres))), Some(Ok(redis))) = (&facts.postgres, &facts.redis)
        && let Some(outbox) = &postgres.outbox
    {
        streams::judge_with_outbox(&mut report, settings, outbox, redis);
    }
    report.check("clocks", clocks(facts));
    report.sort();
    report
}

/// What clocks may differ by.
const CLOCK_TOLERANCE_MS: i64 = 1_000;

fn clocks(facts: &Facts) -> Vec<Finding> {
    let mut clocks = vec![("this machine".to_owned(), Clock { ahead_ms: 0, margin_ms: 0 })];
    if let Some(Ok(PostgresFacts::Direct(postgres))) = &facts.postgres {
        clocks.extend(postgres.clock.iter().map(|clock| ("PostgreSQL".to_owned(), *clock)));
    }
    if let Some(Ok(redis)) = &facts.redis {
        clocks.extend(redis.servers.iter().filter_map(|s| Some((format!("Redis at {}", s.name), *s.clock.as_ref().ok()?))));
    }
    let mut found = Vec::new();
    for (i, (one, first)) in clocks.iter().enumerate() {
        for (other, second) in &clocks[i + 1..] {
            let ahead = second.ahead_ms.saturating_sub(first.ahead_ms);
            let surely = ahead.saturating_abs().saturating_sub(first.margin_ms.saturating_add(second.margin_ms));
            if surely > CLOCK_TOLERANCE_MS {
                let side = if ahead > 0 { "ahead of" } else { "behind" };
                found.push(warning(
                    format!("the clock of {other} is {} {side} that of {one}", advice::age(ahead.saturating_abs())),
                    "no event is lost by it, but latencies, ages and retention are wrong, and events may go to the partition of another day",
                    "on the machine whose clock is wrong: timedatectl set-ntp true",
                ));
            }
        }
    }
    found
}
