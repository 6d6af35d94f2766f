//! The servers of the streams.

use ::redis::ErrorKind;

use super::advice::{config_set, redis_cli, size};
use super::{Finding, Report, Severity, error, finding, note, streams, warning};
use crate::chain::chain;
use crate::config::{Settings, redact_url};
use crate::streams::StreamsError;
use crate::streams::examine::{RedisFacts, ServerFacts};

const OLDEST_VERSION: (u32, u32) = (6, 2);

/// Per cent of the memory.
const MUCH_MEMORY: u64 = 75;
const TOO_MUCH_MEMORY: u64 = 90;

pub(super) fn judge(report: &mut Report, settings: &Settings, facts: Option<&Result<RedisFacts, StreamsError>>) {
    let facts = match facts {
        None => return report.check("redis-reachable", [no_url()]),
        Some(Err(error)) => return report.check("redis-reachable", [unreachable(settings, error)]),
        Some(Ok(facts)) => facts,
    };
    report.check("redis-reachable", []);
    let servers = &facts.servers;
    report.check("redis-information", servers.iter().flat_map(silent));
    report.check("redis-writable", servers.iter().filter_map(unwritable));
    report.check("redis-permissions", servers.iter().flat_map(lacking));
    if servers.iter().all(|server| server.info.is_ok()) {
        report.check("redis-version", servers.iter().filter_map(version));
        report.check("redis-eviction", servers.iter().filter_map(eviction));
        report.check("redis-persistence", servers.iter().flat_map(persistence));
        report.check("redis-memory", servers.iter().filter_map(memory));
        report.check("redis-replicas", servers.iter().filter_map(|server| replicas(server, settings.redis.wait_replicas)));
    }
    streams::judge(report, settings, facts);
}

fn no_url() -> Finding {
    error(
        "app.redis.url (REDIS_URL) is not set",
        "the streams were not examined; a relay needs them",
        "export REDIS_URL=redis://:password@host:6379",
    )
}

fn unreachable(settings: &Settings, why: &StreamsError) -> Finding {
    let url = redact_url(settings.redis.url.as_deref().unwrap_or_default());
    if matches!(why, StreamsError::Unavailable { source, .. } if source.is_timeout()) {
        return error(
            format!("{url}: not all questions were answered within a minute"),
            "events wait as long; nothing else of Redis was examined",
            "see what it is busy with: redis-cli -u \"$REDIS_URL\" SLOWLOG GET 10",
        );
    }
    let has_several = url.contains("-sentinel://") || url.contains("-cluster://");
    let mend = match why {
        StreamsError::Url(_) => "export REDIS_URL=redis://user:password@host:6379/0",
        StreamsError::Tls(_) => "check REDIS_CA_FILE, REDIS_CERT_FILE and REDIS_KEY_FILE (app.redis.tls)",
        StreamsError::SentinelLogin { .. } => "check REDIS_SENTINEL_PASSWORD (app.redis.sentinelPassword)",
        StreamsError::Unavailable { source, .. }
            if source.kind() == ErrorKind::AuthenticationFailed || matches!(source.code(), Some("NOAUTH" | "WRONGPASS")) =>
        {
            "check the user and the password in REDIS_URL"
        }
        _ if has_several => "see whether its servers run and where, each of them: redis-cli -h host -p port PING",
        _ => "see whether it runs and where: redis-cli -u \"$REDIS_URL\" PING",
    };
    error(format!("{url}: {}", chain(why)), "nothing can be published to streams; nothing else of Redis was examined", mend)
}

/// What this user may not ask is a note: the relay does not need it.
fn silent(server: &ServerFacts) -> Vec<Finding> {
    let lacks = |command: &str, unknown: &str, error: &StreamsError| {
        note(
            format!("Redis at {} does not answer {command}: {}", server.name, chain(error)),
            format!("{unknown} were not examined"),
            format!(
                "run doctor as a user that may, or: {}",
                redis_cli(
                    server.place.as_ref(),
                    &[&["ACL", "SETUSER", "the_user", &format!("+{}", command.to_lowercase().replace(' ', "|"))]]
                )
            ),
        )
    };
    let info =
        server.info.as_ref().err().map(|error| lacks("INFO", "version, memory, eviction, persistence and replicas", error));
    let config =
        server.config.as_ref().err().map(|error| lacks("CONFIG GET", "snapshots and the syncing of the append-only file", error));
    info.into_iter().chain(config).collect()
}

fn version(server: &ServerFacts) -> Option<Finding> {
    let version = server.field("redis_version")?;
    let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
    let is_old = (parts.next()?, parts.next().unwrap_or(0)) < OLDEST_VERSION;
    is_old.then(|| {
        error(
            format!("Redis at {} has version {version}", server.name),
            "commands that relays and consumers use came with Redis 6.2",
            "install Redis 6.2 or newer; it reads the data of the older one",
        )
    })
}

fn unwritable(server: &ServerFacts) -> Option<Finding> {
    if server.field("role") == Some("slave") {
        let master = format!("{}:{}", server.field("master_host").unwrap_or("?"), server.field("master_port").unwrap_or("?"));
        return Some(error(
            format!("Redis at {} is a replica of {master}", server.name),
            "nothing can be written there",
            of_the_master(&master),
        ));
    }
    let why = server.unable.as_deref()?;
    let mend = match why {
        why if why.contains("OOM") => "give it memory (see redis-memory), or trim: commitstream cleanup".to_owned(),
        why if why.contains("MISCONF") => {
            format!("give its disk space and rights, then: {}", redis_cli(server.place.as_ref(), &[&["BGSAVE"]]))
        }
        why if why.contains("NOREPLICAS") => {
            format!("start its replicas; who is there: {}", redis_cli(server.place.as_ref(), &[&["INFO", "replication"]]))
        }
        // READONLY of one that does not say whose replica it is.
        _ => of_the_master("host:6379"),
    };
    Some(error(
        format!("Redis at {} refuses to write: {why}", server.name),
        "nothing is published; relays keep trying, and nothing is lost",
        mend,
    ))
}

fn of_the_master(master: &str) -> String {
    format!("give the address of the master: REDIS_URL=redis://user:password@{master}; or ask Sentinels: redis-sentinel://…#name")
}

fn lacking(server: &ServerFacts) -> Vec<Finding> {
    let unknown = (!server.unknown.is_empty()).then(|| {
        error(
            format!("Redis at {} does not know {}", server.name, server.unknown.join(", ")),
            "events wait, or streams are not trimmed",
            "take its rename-command out of redis.conf and restart it, or use Redis 6.2 or newer",
        )
    });
    denied(server).into_iter().chain(unknown).collect()
}

fn denied(server: &ServerFacts) -> Option<Finding> {
    let commands: Vec<String> =
        server.denied.iter().map(|command| format!("+{}", command.to_lowercase().replace(' ', "|"))).collect();
    let mut lacks = Vec::new();
    if !commands.is_empty() {
        lacks.push(format!("run {} on the keys of streams", server.denied.join(", ")));
    }
    if !server.denied_keys.is_empty() {
        lacks.push(format!("use the keys {}", server.denied_keys.join(" and ")));
    }
    let mut words = vec!["ACL", "SETUSER", "the_user"];
    words.extend(server.denied_keys.iter().chain(&commands).map(String::as_str));
    (words.len() > 3).then(|| {
        error(
            format!("this user may not {} at {}", lacks.join(", nor "), server.name),
            "events wait (NOPERM), or streams are not trimmed",
            format!(
                "{} (as an administrator, with the user of REDIS_URL; all that it needs is in docs/acl.md)",
                redis_cli(server.place.as_ref(), &[&words])
            ),
        )
    })
}

fn eviction(server: &ServerFacts) -> Option<Finding> {
    let policy = server.field("maxmemory_policy").filter(|policy| *policy != "noeviction")?;
    let mend = config_set(server.place.as_ref(), "maxmemory-policy", "noeviction");
    let seen = format!("maxmemory-policy of Redis at {} is {policy}", server.name);
    Some(if server.number("maxmemory").unwrap_or(0) > 0 {
        let why =
            "when memory is short Redis deletes streams with unread events, or the markers that tell a relay what was appended";
        error(seen, why, mend)
    } else {
        note(seen, "it takes effect as soon as somebody sets maxmemory: then Redis deletes streams or markers", mend)
    })
}

fn persistence(server: &ServerFacts) -> Vec<Finding> {
    let config = |name: &str| server.config.as_ref().ok().and_then(|config| config.get(name)).map(String::as_str);
    let place = server.place.as_ref();
    let at = format!("Redis at {}", server.name);
    let mut found = Vec::new();
    let aof = config_set(place, "appendonly", "yes");
    if server.field("aof_enabled") == Some("0") {
        let snapshots = config("save").is_none_or(|save| !save.is_empty());
        let lost = "after a crash the relay publishes again what it settled within the last minutes only";
        found.push(match (snapshots, server.replicas()) {
            (true, _) => warning(
                format!("{at} has snapshots, and no append-only file"),
                format!("a crash loses what came after the last snapshot; {lost}"),
                aof,
            ),
            (false, 0) => error(
                format!("{at} keeps nothing on disk, and has no replica"),
                format!("a restart loses all streams; {lost}"),
                aof,
            ),
            (false, _) => {
                warning(format!("{at} keeps nothing on disk"), "a master that restarts empty empties its replicas, too", aof)
            }
        });
    } else if config("appendfsync") == Some("no") {
        let why = "a crash of the machine loses up to half a minute of events; what was settled within the last minutes is published again";
        found.push(warning(
            format!("{at} leaves it to the system when its append-only file comes to disk (appendfsync no)"),
            why,
            config_set(place, "appendfsync", "everysec"),
        ));
    }
    if server.field("aof_last_write_status") == Some("err") {
        found.push(error(
            format!("{at} cannot write its append-only file"),
            "it takes no writes",
            "give its disk space; it goes on by itself",
        ));
    }
    if server.field("rdb_last_bgsave_status") == Some("err") {
        let why = "a restart may lose what came since; with stop-writes-on-bgsave-error Redis takes no writes";
        found.push(error(
            format!("the last snapshot of {at} failed"),
            why,
            format!("give its disk space and rights, then: {}", redis_cli(place, &[&["BGSAVE"]])),
        ));
    }
    found
}

fn memory(server: &ServerFacts) -> Option<Finding> {
    let used = server.number("used_memory")?;
    let (most, what) = match server.number("maxmemory").filter(|most| *most > 0) {
        Some(most) => (most, "maxmemory"),
        None => (server.number("total_system_memory").filter(|most| *most > 0)?, "the machine's memory, and no maxmemory"),
    };
    let share = used.saturating_mul(100) / most;
    let severity = match share {
        TOO_MUCH_MEMORY.. => Severity::Error,
        MUCH_MEMORY.. => Severity::Warning,
        _ => return None,
    };
    let more = most.saturating_mul(2).to_string();
    Some(finding(
        severity,
        format!("Redis at {} uses {} of {} ({share} % of {what})", server.name, size(used), size(most)),
        "when memory is full Redis takes no more events: they wait in the outbox, and those that go straight to streams fail",
        format!(
            "commitstream cleanup (trims what is read); then more memory: {}",
            config_set(server.place.as_ref(), "maxmemory", &more)
        ),
    ))
}

fn replicas(server: &ServerFacts, wanted: u32) -> Option<Finding> {
    let (there, wanted) = (server.replicas(), wanted as usize);
    let seen = format!("Redis at {} has {there} replicas in step, and redis.waitReplicas is {wanted}", server.name);
    if there < wanted {
        let mend = format!("start its replicas, or set app.redis.waitReplicas = {there} and restart the relays");
        return Some(error(seen, "no batch can be settled: relays wait for replicas that are not there", mend));
    }
    (there > wanted).then(|| {
        let why = "a failover may lose events that only the master had; the relay publishes those of the last minutes again, after a pause";
        note(seen, why, format!("app.redis.waitReplicas = {there} in application.conf, then restart the relays; publishing then pauses while a replica is away"))
    })
}
