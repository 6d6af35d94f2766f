//! The streams and who reads them.

use super::advice::{age, quoted, redis_cli};
use super::{Finding, Report, Severity, error, finding, note, warning};
use crate::config::Settings;
use crate::outbox::KnownStream;
use crate::outbox::examine::OutboxFacts;
use crate::relay::losses;
use crate::streams::examine::{KeyFacts, Place, RedisFacts, RegistryFacts, StreamFacts};
use crate::streams::{GroupInfo, Owner};

/// An entry may be in hand for so long.
const OLD_ENTRY_MS: u64 = 10 * 60 * 1_000;

/// So late an entry is read when consumers cannot keep up.
const SLOW_ENTRY_MS: u64 = 30 * 1_000;
const LATE_ENTRY_MS: u64 = 5 * 60 * 1_000;

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

pub(super) fn judge(report: &mut Report, settings: &Settings, facts: &RedisFacts) {
    // Of a cluster, any server leads to the others.
    let place = facts.servers.first().and_then(|server| server.place.as_ref());
    match &facts.keys {
        Ok(keys) => report.check("stream-keys", foreign(settings, place, keys)),
        // Which streams there are is not known then.
        Err(error) => return report.unknown("stream-keys", error),
    }
    if let Err(error) = &facts.registry {
        return report.unknown("consumer-groups", error);
    }
    match &facts.streams {
        Ok(streams) => {
            consumers(report, place, &streams.iter().flat_map(|stream| &stream.groups).collect::<Vec<_>>());
            if settings.streams.trim {
                report.check("trimming", streams.iter().filter_map(|stream| untrimmed(settings, place, stream)));
            }
        }
        Err(error) => report.unknown("consumer-groups", error),
    }
}

/// What consumers have not handled.
pub(super) fn consumers(report: &mut Report, place: Option<&Place>, groups: &[&GroupInfo]) {
    report.check("consumer-groups", groups.iter().flat_map(|of| group(place, of)));
    report.check("dead-letters", groups.iter().filter_map(|of| dead_letters(of)));
}

/// What takes both servers to see: who else writes here, and what is gone.
pub(super) fn judge_with_outbox(report: &mut Report, settings: &Settings, outbox: &OutboxFacts, redis: &RedisFacts) {
    match (&outbox.owner, &redis.registry, &redis.keys) {
        (Ok(owner), Ok(registry), Ok(keys)) => report.check("neighbours", neighbours(settings, owner, registry, keys)),
        (Err(error), ..) => report.unknown("neighbours", error),
        (_, Err(error), _) | (.., Err(error)) => report.unknown("neighbours", error),
    }
    match &outbox.streams {
        Ok(known) => report.check("lost-entries", known.iter().filter_map(|known| lost_entries(redis, known))),
        Err(error) => report.unknown("lost-entries", error),
    }
}

fn neighbours(settings: &Settings, owner: &Owner, registry: &RegistryFacts, keys: &KeyFacts) -> Vec<Finding> {
    let prefix = &settings.redis.stream_prefix;
    let own_prefix = "give each a redis.streamPrefix of its own, such as shop:, and restart its relays and publishers";
    let others = registry.registered.others(&owner.id, registry.now_ms).into_iter().map(|other| {
        warning(
            format!("another outbox writes to streams under {prefix}, too: {other}"),
            "consumers get the events of both; a stream is trimmed by the outbox that wrote to it first, and what no outbox writes to by neither",
            own_prefix,
        )
    });
    let nested = |other: &String| {
        note(
            format!("the prefixes {prefix} and {other} of another outbox begin alike"),
            "each outbox looks after the streams that it writes to and leaves the others alone; relays of earlier builds trim what begins with their prefix",
            own_prefix,
        )
    };
    let foreign = keys.streams.iter().filter(|key| {
        let of = key.strip_prefix(prefix.as_str()).unwrap_or(key);
        !registry.registered.types.contains_key(of) && !keys.inner.iter().any(|inner| key.starts_with(inner.as_str()))
    });
    let foreign = foreign.map(|key| {
        note(
            format!("nobody of this outbox is known to have written to the stream {key}"),
            "it is neither listed nor trimmed; a publisher that goes straight to streams makes it known when it publishes again",
            "if it belongs to another program, choose another redis.streamPrefix; if nobody needs it, delete it",
        )
    });
    others.chain(keys.inner.iter().chain(&registry.outer).map(nested)).chain(foreign).collect()
}

/// What a relay has written down, or what shows now.
fn lost_entries(redis: &RedisFacts, known: &KnownStream) -> Option<Finding> {
    let seen = match &known.lost {
        Some((at, lost)) => format!("{}: {lost} (seen at {})", known.stream, at.format("%Y-%m-%d %H:%M:%S UTC")),
        None => format!("{}: {}", known.stream, losses::lost(known, redis.states.get(&known.stream)?.as_ref())?),
    };
    Some(error(
        seen,
        "published events are gone from the stream: it was deleted, renamed or replaced; what only a failover of Redis took, the relay has published again",
        "commitstream verify --republish, which shows what is missing and publishes it with --yes",
    ))
}

fn foreign(settings: &Settings, place: Option<&Place>, keys: &KeyFacts) -> Vec<Finding> {
    let foreign = keys.foreign.iter().map(|(key, kind)| {
        warning(
            format!("the key {key} is a {kind}, not a stream"),
            "events of this aggregate type wait (WRONGTYPE) until the key is gone; if it belongs to another program, choose another redis.streamPrefix",
            // The braces keep it in its slot.
            redis_cli(place, &[&["RENAME", key, &format!("was-{{{key}}}")]]),
        )
    });
    let prefix = &settings.redis.stream_prefix;
    let some = keys.incomplete.then(|| {
        note(
            format!("there are too many keys to look at all under {prefix}"),
            format!("{} streams were found and examined", keys.streams.len()),
            "commitstream groups",
        )
    });
    foreign.chain(some).collect()
}

fn dead_letters(group: &GroupInfo) -> Option<Finding> {
    let dead = group.dead.map_or_else(|| format!("over {}", GroupInfo::COUNTED), |entries| entries.to_string());
    (group.dead != Some(0)).then(|| {
        warning(
            format!("the group {} of {} gave {dead} events up: they are dead letters", group.group, group.stream),
            "their effects did not happen",
            "commitstream dead list; when the handler is fixed: commitstream dead retry --all",
        )
    })
}

fn group(place: Option<&Place>, group: &GroupInfo) -> Vec<Finding> {
    let named = format!("the group {} of {}", group.group, group.stream);
    let mut found = Vec::new();
    if group.is_deserted() && (group.pending > 0 || group.behind != Some(0)) {
        let behind = group.behind.map_or_else(|| format!("over {}", GroupInfo::COUNTED), |entries| entries.to_string());
        found.push(warning(
            format!("{named} has no living consumer; {} entries are pending, {behind} not delivered", group.pending),
            "its events wait, and the stream keeps everything from there on",
            format!(
                "start its consumer; if nobody needs it any more: {}",
                redis_cli(place, &[&["XGROUP", "DESTROY", &group.stream, &group.group]])
            ),
        ));
    } else if let Some(oldest) = group.oldest_pending_age_ms.filter(|millis| group.pending > 0 && *millis >= OLD_ENTRY_MS) {
        found.push(warning(
            format!("{named} has {} entries pending, the oldest written {} ago", group.pending, age(oldest.cast_signed())),
            "a handler hangs or keeps failing, or the group is far behind; later events of the same aggregates wait",
            format!("who has them: commitstream groups {} --consumers", quoted(&group.stream)),
        ));
    } else if let Some(oldest) = group.oldest_behind_age_ms.filter(|millis| *millis >= SLOW_ENTRY_MS) {
        let behind = group.behind.map_or_else(|| format!("over {}", GroupInfo::COUNTED), |entries| entries.to_string());
        let severity = if oldest >= LATE_ENTRY_MS { Severity::Warning } else { Severity::Note };
        found.push(finding(
            severity,
            format!("{named} is {behind} entries behind, the oldest of them written {} ago", age(oldest.cast_signed())),
            "its consumers are slower than the publishers, or do not read",
            format!("see what they do, and start more of them: commitstream groups {} --consumers", quoted(&group.stream)),
        ));
    }
    found
}

/// Of a stream that should not go back so far. A group that stands still is told among the groups.
fn untrimmed(settings: &Settings, place: Option<&Place>, facts: &StreamFacts) -> Option<Finding> {
    let retention = u64::from(settings.streams.retention_days) * DAY_MS;
    let first = facts.first_age_ms.filter(|millis| *millis > retention + DAY_MS)?;
    let seen = format!(
        "the stream {} goes back {}, though retentionDays is {}",
        facts.stream,
        age(first.cast_signed()),
        settings.streams.retention_days
    );
    if facts.groups.is_empty() {
        return Some(note(
            seen,
            "no consumer group reads it, so it is never trimmed and takes ever more memory",
            "start a consumer, or cut it to so many entries: app.streams.maxEntries = 1000000 in application.conf",
        ));
    }
    let behind = facts.groups.iter().find(|group| group.pending > 0 || group.behind != Some(0));
    Some(match behind {
        Some(group) => warning(
            seen,
            format!("the group {} has not acknowledged its beginning, so nothing from there on is trimmed", group.group),
            format!("start its consumer, or: {}", redis_cli(place, &[&["XGROUP", "DESTROY", &facts.stream, &group.group]])),
        ),
        None => warning(
            seen,
            "every group has acknowledged it: the hourly clean-up of the relay does not get on",
            "commitstream cleanup",
        ),
    })
}
