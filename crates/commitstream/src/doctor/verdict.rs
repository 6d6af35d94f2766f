//! One verdict on how events flow, from producers to consumers: what the console, `stats`, `/readyz` and doctor all say first.

use serde::Serialize;

use super::{Finding, Report, Severity, error, outbox, streams};
use crate::config::Settings;
use crate::outbox::examine::OutboxFlow;
use crate::streams::GroupInfo;

/// Checks that tell whether events flow, in the order in which they are told where they are equally bad.
const FLOW: [&str; 10] = [
    "postgres-reachable",
    "redis-reachable",
    "relays",
    "pause",
    "backlog",
    "stream-keys",
    "refused-events",
    "failed-events",
    "consumer-groups",
    "dead-letters",
];

/// What is asked often.
#[derive(Debug)]
pub struct Flow {
    pub outbox: OutboxFlow,
    pub consumers: Consumers,
}

/// The consumer groups of the streams.
#[derive(Debug, Clone)]
pub enum Consumers {
    /// Redis was not asked.
    Unknown,
    /// Redis cannot be used, and why.
    Unreachable(String),
    Known(Vec<GroupInfo>),
}

/// Whether events flow, in one sentence: the worst of what keeps them from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// `None` when all is well.
    pub severity: Option<Severity>,
    /// Which of [`CHECKS`](super::CHECKS) found it; empty when all is well.
    pub check: &'static str,
    pub sentence: String,
}

/// What these facts mean, without I/O: a part of what [`judge`](super::judge) finds, in the same words.
#[must_use]
pub fn judge_flow(settings: &Settings, flow: &Flow) -> Report {
    let mut report = Report::default();
    outbox::flow(&mut report, settings, &(&flow.outbox).into());
    match &flow.consumers {
        Consumers::Unknown => {}
        Consumers::Unreachable(why) => report.check("redis-reachable", [unusable(why)]),
        Consumers::Known(groups) => streams::consumers(&mut report, None, &groups.iter().collect::<Vec<_>>()),
    }
    report.sort();
    report
}

fn unusable(why: &str) -> Finding {
    error(
        format!("Redis cannot be used: {why}"),
        "nothing is published, and nothing is lost: events wait in the outbox",
        "commitstream doctor",
    )
}

impl Report {
    /// The worst first; of what is equally bad, what stops events first.
    pub(super) fn sort(&mut self) {
        self.findings.sort_by_key(|finding| (std::cmp::Reverse(finding.severity), place(finding.check)));
    }

    /// Whether events flow: the worst finding of those that are about that. Others, such as those about the settings of a server,
    /// are told beside it.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let worst = self.findings.iter().find(|finding| place(finding.check) < FLOW.len());
        match worst {
            Some(Finding { severity, check, seen, .. }) => Verdict { severity: Some(*severity), check, sentence: sentence(seen) },
            None if self.passed.contains(&"consumer-groups") => Verdict::well("All is well: events flow, and consumers keep up."),
            None => Verdict::well("All is well: events flow. The consumers were not looked at."),
        }
    }
}

impl Verdict {
    fn well(sentence: &str) -> Self {
        Self { severity: None, check: "", sentence: sentence.to_owned() }
    }
}

fn place(check: &str) -> usize {
    FLOW.iter().position(|known| *known == check).unwrap_or(FLOW.len())
}

/// A finding begins with a small letter and ends without a stop.
fn sentence(seen: &str) -> String {
    let mut letters = seen.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().to_string()).unwrap_or_default();
    let stop = if seen.ends_with(['.', '!', '?']) { "" } else { "." };
    format!("{first}{}{stop}", letters.as_str())
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use uuid::Uuid;

    use super::*;
    use crate::outbox::examine::{Backlog, FailedFacts};
    use crate::outbox::{Pause, RelayRow};
    use crate::streams::GroupConsumer;

    fn relay(state: &str, reason: Option<&str>) -> RelayRow {
        RelayRow {
            relay_id: Uuid::nil(),
            host: "one".to_owned(),
            pid: 7,
            version: "0.1.0".to_owned(),
            started_at: DateTime::UNIX_EPOCH,
            heartbeat_age_ms: 100,
            alive: true,
            state: state.to_owned(),
            reason: reason.map(str::to_owned),
            partitions: 64,
            age_ms: 1_000,
            published: 0,
            failed: 0,
            republished: 0,
            events_per_second: 0.0,
        }
    }

    fn group(alive: bool, behind: u64, oldest_behind_age_ms: u64, dead: u64) -> GroupInfo {
        let consumer =
            GroupConsumer { name: "c".to_owned(), pending: 0, oldest_pending_age_ms: None, idle_ms: 0, alive: Some(alive) };
        GroupInfo {
            stream: "events:user".to_owned(),
            group: "mail".to_owned(),
            consumers: vec![consumer],
            pending: 0,
            oldest_pending_age_ms: None,
            behind: Some(behind),
            oldest_behind_age_ms: Some(oldest_behind_age_ms).filter(|_| behind > 0),
            last_delivered: "0-0".to_owned(),
            dead: Some(dead),
        }
    }

    fn healthy() -> Flow {
        let outbox = OutboxFlow {
            relays: Ok(vec![relay("active", None)]),
            pause: Ok(None),
            backlog: Ok(Backlog::default()),
            failed: Ok(FailedFacts::default()),
        };
        Flow { outbox, consumers: Consumers::Known(vec![group(true, 0, 0, 0)]) }
    }

    fn backlog(events: i64, oldest_ms: i64) -> Result<Backlog, crate::outbox::OutboxError> {
        Ok(Backlog { events, oldest_ms: Some(oldest_ms), ..Backlog::default() })
    }

    fn paused() -> Pause {
        Pause { who: "ada".to_owned(), since: DateTime::<Utc>::UNIX_EPOCH }
    }

    /// The severity of the verdict, and how its sentence begins, for what is changed in a healthy flow.
    #[test]
    fn the_verdict_tells_the_worst_first_and_counts_consumers_in() {
        type Case = (&'static str, fn(&mut Flow), Option<Severity>, &'static str);
        let cases: [Case; 13] = [
            ("healthy", |_| (), None, "All is well: events flow, and consumers keep up."),
            ("streams not looked at", |f| f.consumers = Consumers::Unknown, None, "All is well: events flow. The consumers"),
            (
                "dead letters only",
                |f| f.consumers = Consumers::Known(vec![group(true, 0, 0, 306)]),
                Some(Severity::Warning),
                "The group mail of events:user gave 306 events up",
            ),
            (
                "a group without a living consumer",
                |f| f.consumers = Consumers::Known(vec![group(false, 12, 1, 0)]),
                Some(Severity::Warning),
                "The group mail of events:user has no living consumer",
            ),
            (
                "a group that is late",
                |f| f.consumers = Consumers::Known(vec![group(true, 200, 600_000, 0)]),
                Some(Severity::Warning),
                "The group mail of events:user is 200 entries behind, the oldest of them written 10m ago",
            ),
            (
                "a group that is a little late",
                |f| f.consumers = Consumers::Known(vec![group(true, 200, 31_000, 0)]),
                Some(Severity::Note),
                "The group mail of events:user is 200 entries behind",
            ),
            ("a group that is busy", |f| f.consumers = Consumers::Known(vec![group(true, 200, 900, 0)]), None, "All is well"),
            (
                "failed events and no relay, nothing waiting",
                |f| {
                    f.outbox.relays = Ok(Vec::new());
                    f.outbox.failed = Ok(FailedFacts { events: 5, aggregates: 2, newest_error: None });
                },
                Some(Severity::Warning),
                "FAILED: 5 events of 2 aggregates",
            ),
            (
                "failed events, no relay, and events wait",
                |f| {
                    f.outbox.relays = Ok(Vec::new());
                    f.outbox.backlog = backlog(3, 1_000);
                    f.outbox.failed = Ok(FailedFacts { events: 5, aggregates: 2, newest_error: None });
                    f.consumers = Consumers::Known(vec![group(false, 12, 1, 306)]);
                },
                Some(Severity::Error),
                "No relay is alive; waiting: 3 events, the oldest for 1s",
            ),
            (
                "no relay, nothing waits",
                |f| f.outbox.relays = Ok(Vec::new()),
                Some(Severity::Note),
                "No relay is alive, and nothing waits",
            ),
            (
                "Redis away",
                |f| {
                    f.consumers = Consumers::Unreachable("cache:6379: refused".to_owned());
                    f.outbox.relays = Ok(vec![relay("unable", Some("cache:6379: refused"))]);
                },
                Some(Severity::Error),
                "Redis cannot be used: cache:6379: refused",
            ),
            ("paused", |f| f.outbox.pause = Ok(Some(paused())), Some(Severity::Warning), "Publishing is paused by ada since"),
            (
                "slow",
                |f| f.outbox.backlog = backlog(9, 31_000),
                Some(Severity::Note),
                "Waiting though a relay is alive: 9 events, the oldest for 31s",
            ),
        ];
        for (case, change, severity, beginning) in cases {
            let mut flow = healthy();
            change(&mut flow);
            let verdict = judge_flow(&Settings::default(), &flow).verdict();
            assert_eq!(verdict.severity, severity, "{case}: {verdict:?}");
            assert!(verdict.sentence.starts_with(beginning), "{case}: {verdict:?}");
        }
    }
}
