//! What is in the outbox, and who works on it.

use std::collections::BTreeSet;

use super::advice::{age, counted, identifier, psql};
use super::{Finding, Report, Severity, error, finding, note, warning};
use crate::config::{AfterFailure, Settings};
use crate::outbox::examine::{Backlog, COUNTED, FailedFacts, History, OpenFacts, OutboxFacts, OutboxFlow};
use crate::outbox::{OutboxError, Pause, RelayRow};

/// A relay that works publishes an event within milliseconds.
const SLOW_EVENT_MS: i64 = 30 * 1_000;
const OLD_EVENT_MS: i64 = 5 * 60 * 1_000;
const VERY_OLD_EVENT_MS: i64 = 60 * 60 * 1_000;

/// A living relay takes over what a dead one left within seconds.
const OLD_BATCH_MS: i64 = 60 * 1_000;

/// Longer silences of all producers are worth a note.
const SILENT_DAYS: i64 = 3;

pub(super) fn judge(report: &mut Report, settings: &Settings, facts: &OutboxFacts) {
    let OutboxFacts { relays, pause, backlog, failed, .. } = facts;
    flow(report, settings, &Parts { relays, pause, backlog, failed });
    if let Ok(all) = relays {
        let alive = alive(all);
        report.check("relay-versions", versions(&alive));
        match &facts.open {
            Ok(open) => report.check("open-batches", orphaned(settings, *open, !alive.is_empty())),
            Err(error) => report.unknown("open-batches", error),
        }
    }
    match &facts.history {
        Ok(history) => {
            report.check("writers", silent(settings, *history));
            let is_partitioned = matches!(&facts.missing_days, Ok(Some(_)));
            report.check("cleanup", uncleaned(settings, *history, is_partitioned));
        }
        Err(error) => report.unknown("writers", error),
    }
}

/// What tells whether events flow out of the outbox.
pub(super) struct Parts<'a> {
    pub relays: &'a Result<Vec<RelayRow>, OutboxError>,
    pub pause: &'a Result<Option<Pause>, OutboxError>,
    pub backlog: &'a Result<Backlog, OutboxError>,
    pub failed: &'a Result<FailedFacts, OutboxError>,
}

impl<'a> From<&'a OutboxFlow> for Parts<'a> {
    fn from(OutboxFlow { relays, pause, backlog, failed }: &'a OutboxFlow) -> Self {
        Self { relays, pause, backlog, failed }
    }
}

pub(super) fn flow(report: &mut Report, settings: &Settings, facts: &Parts<'_>) {
    let backlog = facts.backlog.as_ref().ok();
    match facts.relays {
        Ok(all) => {
            let alive = alive(all);
            report.check("relays", relays(settings, all, &alive, backlog));
            // Without a relay, or while relays are paused, that is the finding.
            let may_work = !alive.is_empty() && !matches!(facts.pause, Ok(Some(_)));
            if let Some(backlog) = backlog.filter(|backlog| may_work || backlog.events == 0) {
                report.check("backlog", old_backlog(*backlog));
            }
        }
        Err(error) => report.unknown("relays", error),
    }
    match facts.pause {
        Ok(pause) => report.check("pause", pause.as_ref().map(paused)),
        Err(error) => report.unknown("pause", error),
    }
    match facts.backlog {
        Ok(backlog) => report.check("refused-events", refused(settings, *backlog)),
        Err(error) => report.unknown("backlog", error),
    }
    match facts.failed {
        Ok(failed) => report.check("failed-events", failed_events(settings, failed)),
        Err(error) => report.unknown("failed-events", error),
    }
}

fn alive(all: &[RelayRow]) -> Vec<&RelayRow> {
    all.iter().filter(|relay| relay.alive).collect()
}

fn relays(settings: &Settings, all: &[RelayRow], alive: &[&RelayRow], backlog: Option<&Backlog>) -> Vec<Finding> {
    if alive.is_empty() {
        let mend = start_relay(settings);
        return vec![match backlog {
            Some(backlog) if backlog.events > 0 => {
                let oldest = backlog.oldest_ms.map_or_else(String::new, |millis| format!(", the oldest for {}", age(millis)));
                let seen = format!("no relay is alive; waiting: {}{oldest}", counted(backlog.events, "event", COUNTED));
                match last_reason(all) {
                    None => {
                        error(seen, "nothing is published; nothing is lost either: a relay publishes what waits", mend.to_owned())
                    }
                    Some(reason) => error(
                        format!("{seen}; {reason}"),
                        "nothing is published, and a relay that is started anew most likely meets the same; nothing is lost",
                        format!("mend what it names, then see whether a relay is there: commitstream relays; if not: {mend}"),
                    ),
                }
            }
            _ if !settings.outbox.enabled => {
                note("no relay is alive, and outbox.enabled is false", "what other programs write to the outbox waits", mend)
            }
            Some(_) => note("no relay is alive, and nothing waits", "the next event waits until there is one", mend),
            None => warning("no relay is alive", "what is in the outbox waits until there is one", mend),
        }];
    }
    let partly = alive.iter().filter(|relay| relay.state != "unable").filter_map(|relay| Some((relay, relay.reason.as_ref()?)));
    let partly = partly.map(|(relay, reason)| {
        if reason.contains(WAITS) {
            return waits(relay, reason);
        }
        warning(
            format!("the relay on {} (pid {}) says: {reason}", relay.host, relay.pid),
            "it goes on with what it can; no event is sent twice for it, and none is lost",
            "mend what it names: the relay tries again every 15 s; to look again: commitstream relays",
        )
    });
    let unable: Vec<&&RelayRow> = alive.iter().filter(|relay| relay.state == "unable").collect();
    let severity = if unable.len() == alive.len() { Severity::Error } else { Severity::Warning };
    let tell = |relay: &&&RelayRow| {
        let reason = relay.reason.as_deref().unwrap_or("it does not say why");
        finding(
            severity,
            format!("the relay on {} (pid {}) cannot work: {reason}", relay.host, relay.pid),
            "its share of the events waits, or goes to the other relays; it tries again by itself",
            "mend what it names; to look again: commitstream relays",
        )
    };
    unable.iter().map(tell).chain(partly).collect()
}

/// What the relay said that was heard of last.
fn last_reason(all: &[RelayRow]) -> Option<String> {
    let last = all.iter().min_by_key(|relay| relay.heartbeat_age_ms)?;
    let reason = last.reason.as_ref()?;
    Some(format!("the last one, on {} (pid {}), said {} ago: {reason}", last.host, last.pid, age(last.heartbeat_age_ms)))
}

/// What a relay says of streams that it cannot append to.
const WAITS: &str = " wait";

/// A stream that cannot be appended to. The reason names the key and what Redis says of it.
fn waits(relay: &RelayRow, reason: &str) -> Finding {
    let mend = if reason.contains("WRONGTYPE") {
        "rename that key, or delete it if nobody needs it; what else stands in the way: see stream-keys"
    } else if reason.contains("NOPERM") || reason.contains("can't run this command") {
        "give the user of REDIS_URL this command and these keys; what else it lacks: see redis-permissions"
    } else if reason.contains("exhausted") {
        "the ids of the stream have come to the last: RENAME the stream when its consumers have read it, and a new one begins"
    } else {
        "fix what it names; to look again: commitstream relays"
    };
    error(
        format!("the relay on {} (pid {}) cannot append to a stream: {reason}", relay.host, relay.pid),
        "its events wait, in order; none becomes FAILED, other streams go on, and so does this one when the cause is gone",
        mend,
    )
}

fn start_relay(settings: &Settings) -> &'static str {
    if settings.outbox.enabled { "commitstream relay" } else { "OUTBOX_ENABLED=true commitstream relay" }
}

fn paused(pause: &Pause) -> Finding {
    warning(
        format!("publishing is paused by {} since {}", pause.who, pause.since.format("%Y-%m-%d %H:%M:%S UTC")),
        "relays claim nothing, and every event waits; nothing is lost",
        "commitstream relays resume",
    )
}

fn versions(alive: &[&RelayRow]) -> Option<Finding> {
    let versions: BTreeSet<&str> = alive.iter().map(|relay| relay.version.as_str()).collect();
    (versions.len() > 1).then(|| {
        warning(
            format!("relays of different versions share the outbox: {}", versions.into_iter().collect::<Vec<_>>().join(", ")),
            "that is meant for the minutes of an update; settings and repairs may differ",
            "restart the older relays with the newer build; who is which: commitstream relays",
        )
    })
}

fn orphaned(settings: &Settings, open: OpenFacts, is_relay_alive: bool) -> Option<Finding> {
    let oldest = open.oldest_ms.filter(|millis| open.orphaned > 0 && *millis >= OLD_BATCH_MS)?;
    let seen = format!(
        "{} of dead relays, the oldest for {}",
        counted(open.orphaned, "open batch", COUNTED).replace("batchs", "batches"),
        age(oldest)
    );
    let why = "whether their events are in Redis is decided when a relay takes their partitions over; until then these wait";
    Some(if is_relay_alive {
        let why = format!("{why}. A living relay should have done so by now: see what it says of itself");
        warning(seen, why, "commitstream relays")
    } else {
        error(seen, why, start_relay(settings))
    })
}

fn old_backlog(backlog: Backlog) -> Option<Finding> {
    let oldest = backlog.oldest_ms.filter(|millis| *millis >= SLOW_EVENT_MS)?;
    let severity = match oldest {
        VERY_OLD_EVENT_MS.. => Severity::Error,
        OLD_EVENT_MS.. => Severity::Warning,
        _ => Severity::Note,
    };
    Some(finding(
        severity,
        format!("waiting though a relay is alive: {}, the oldest for {}", counted(backlog.events, "event", COUNTED), age(oldest)),
        "producers are faster than the relays, a relay cannot work, or something slows every look down (see vacuum-held-back, indexes)",
        "commitstream relays; if they are busy, another one: OUTBOX_BATCH_SIZE=1000 commitstream relay",
    ))
}

fn refused(settings: &Settings, backlog: Backlog) -> Option<Finding> {
    (backlog.waiting > 0).then(|| {
        let schema = identifier(&settings.database.schema);
        let list = format!(
            "SELECT id, event_type, aggregate_type, retry_count, next_retry_at, left(last_error, 100) AS last_error \
             FROM {schema}.event_outbox WHERE next_retry_at IS NOT NULL AND status = 'PENDING' ORDER BY next_retry_at LIMIT 10"
        );
        warning(
            format!("waiting because Redis refused one: {} of {}", counted(backlog.waiting, "event", COUNTED), counted(backlog.blocked, "aggregate", COUNTED)),
            "they are tried again by themselves, later events of their aggregates behind them; after maxRetries an event is FAILED",
            format!("mend what last_error names: {}", psql(&[&list])),
        )
    })
}

fn failed_events(settings: &Settings, failed: &FailedFacts) -> Option<Finding> {
    (failed.events > 0).then(|| {
        let holds = settings.outbox.processor.after_failure == AfterFailure::Hold;
        let newest = failed.newest_error.as_deref().map_or_else(String::new, |error| format!("; the newest: {error}"));
        let (severity, why) = if holds {
            (Severity::Error, "they are not published, and hold back all later events of their aggregates (afterFailure = hold)")
        } else {
            (Severity::Warning, "they are not published, while later events of their aggregates are")
        };
        finding(
            severity,
            format!(
                "FAILED: {} of {}{newest}",
                counted(failed.events, "event", COUNTED),
                counted(failed.aggregates, "aggregate", COUNTED)
            ),
            why,
            "commitstream failed list; when the cause is mended: commitstream failed retry --all",
        )
    })
}

fn silent(settings: &Settings, history: History) -> Option<Finding> {
    let seen = match (history.ever_written, history.last_write) {
        (Some(false), _) => "no event was ever written to this outbox".to_owned(),
        (_, Some(last)) if (history.now - last).num_days() >= SILENT_DAYS => {
            format!("no event was written for {}", age((history.now - last).num_milliseconds()))
        }
        _ => return None,
    };
    Some(note(
        seen,
        format!("producers may write to another database or schema than this one ({})", settings.database.schema),
        "compare with the settings of the producers: commitstream config",
    ))
}

fn uncleaned(settings: &Settings, history: History, is_partitioned: bool) -> Option<Finding> {
    let cleanup = &settings.outbox.cleanup;
    // The clean-up comes hourly; with partitions, whole days go.
    let days = i64::from(cleanup.retention_days) + if is_partitioned { 2 } else { 1 };
    let oldest = history.now - history.oldest_published?;
    (oldest.num_days() >= days).then(|| {
        let why = if cleanup.enabled {
            "the hourly clean-up of the relay does not get on: the table grows"
        } else {
            "outbox.cleanup.enabled is false, and nobody else removes them: the table grows"
        };
        let seen = format!(
            "published events are kept for {}, though retentionDays is {}",
            age(oldest.num_milliseconds()),
            cleanup.retention_days
        );
        warning(seen, why, "commitstream cleanup")
    })
}
