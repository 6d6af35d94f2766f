//! The verdict on facts that are made up: limits, margins, and what no server of a test can be made to show.

use std::collections::BTreeMap;

use super::*;
use crate::outbox::examine::{DirectFacts, Holder, HolderKind, Recorded, Rights, ServerFacts, SizeFacts, TableFacts};
use crate::streams::examine::{KeyFacts, Place, RegistryFacts, ServerFacts as RedisServer};

fn server() -> ServerFacts {
    ServerFacts {
        version: 150_018,
        in_recovery: false,
        read_only: false,
        read_only_source: "default".into(),
        fsync: true,
        full_page_writes: true,
        synchronous_commit: "on".into(),
        synchronous_commit_source: "default".into(),
        autovacuum: true,
        track_counts: true,
        connections: 10,
        max_connections: 97,
        max_prepared: 0,
        frozen_age: 1_000,
        sees_sessions: true,
        user: "app".into(),
        database: "app".into(),
        encoding: "UTF8".into(),
    }
}

fn in_step() -> Clock {
    Clock { ahead_ms: 0, margin_ms: 1 }
}

fn postgres(server: ServerFacts, horizon: Vec<Holder>, clock: Clock) -> PostgresFacts {
    let rights = Rights { user: "app".into(), denied: Vec::new(), denied_to_operators: Vec::new() };
    let (clock, server, horizon, rights) = (Ok(clock), Ok(server), Ok(horizon), Ok(rights));
    PostgresFacts::Direct(Box::new(DirectFacts { clock, server, horizon, rights, recorded: Ok(Recorded::Nothing), outbox: None }))
}

fn redis(info: &[(&str, &str)], clock: Clock) -> RedisFacts {
    let info: BTreeMap<_, _> = info.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let server = RedisServer {
        name: "cache:6379".into(),
        place: None,
        clock: Ok(clock),
        info: Ok(info),
        config: Ok(BTreeMap::new()),
        denied: Vec::new(),
        denied_keys: Vec::new(),
        unknown: Vec::new(),
        unable: None,
    };
    RedisFacts {
        servers: vec![server],
        keys: Ok(KeyFacts::default()),
        registry: Ok(RegistryFacts::default()),
        streams: Ok(Vec::new()),
        states: BTreeMap::new(),
    }
}

/// Severity and text of what a check found.
fn found(report: &Report, check: &str) -> Vec<(Severity, String)> {
    let told = report.findings.iter().filter(|finding| finding.check == check);
    told.map(|finding| (finding.severity, format!("{} | {}", finding.seen, finding.mend))).collect()
}

fn judged(postgres: PostgresFacts, redis: RedisFacts) -> Report {
    judge(&Settings::default(), &Facts { postgres: Some(Ok(postgres)), redis: Some(Ok(redis)) })
}

fn of_server(server: ServerFacts) -> Report {
    judged(postgres(server, Vec::new(), in_step()), redis(&[], in_step()))
}

#[test]
fn clocks_are_compared_pair_by_pair_and_within_their_margins() {
    let of = |first, second| judged(postgres(server(), Vec::new(), first), redis(&[], second));
    let clock = |ahead_ms, margin_ms| Clock { ahead_ms, margin_ms };
    assert!(found(&of(clock(900, 1), clock(-50, 1)), "clocks").is_empty());
    assert!(found(&of(clock(5_000, 4_500), clock(0, 1)), "clocks").is_empty(), "nobody knows for certain");
    let report = of(clock(90_000, 1), clock(0, 1));
    let told = found(&report, "clocks");
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].1.starts_with("the clock of PostgreSQL is 1m 30s ahead of that of this machine | "), "{told:?}");
    assert!(told[1].1.starts_with("the clock of Redis at cache:6379 is 1m 30s behind that of PostgreSQL | "), "{told:?}");
    let took = Clock::measured(DateTime::UNIX_EPOCH, Duration::from_millis(100), DateTime::UNIX_EPOCH);
    assert_eq!(took, clock(-50, 50));
}

#[test]
fn old_servers_are_errors() {
    let report = of_server(ServerFacts { version: 130_009, ..server() });
    assert_eq!(found(&report, "postgres-version")[0].0, Severity::Error);
    for (version, is_old) in [("6.0.16", true), ("6.2.0", false), ("7.0.15", false), ("5.9", true), ("strange", false)] {
        let report = judged(postgres(server(), Vec::new(), in_step()), redis(&[("redis_version", version)], in_step()));
        assert_eq!(found(&report, "redis-version").len(), usize::from(is_old), "{version}");
    }
}

#[test]
fn transactions_that_run_out_are_told_in_time() {
    for (age, expected) in [(200_000_000, None), (1_200_000_000, Some(Severity::Warning)), (1_900_000_000, Some(Severity::Error))]
    {
        let report = of_server(ServerFacts { frozen_age: age, ..server() });
        assert_eq!(found(&report, "postgres-wraparound").first().map(|(severity, _)| *severity), expected);
    }
    let report = of_server(ServerFacts { connections: 95, ..server() });
    assert!(found(&report, "postgres-connections")[0].1.starts_with("95 of 97 sessions"));
}

#[test]
fn slots_and_standbys_hold_vacuum_back_by_transactions() {
    let holder = |kind, name: &str, transactions| Holder {
        kind,
        name: name.into(),
        user: None,
        application: None,
        state: Some("inactive".into()),
        query: None,
        age_ms: None,
        transactions,
    };
    let horizon = vec![
        holder(HolderKind::Slot, "it's old", 2_000_000),
        holder(HolderKind::Standby, "reports", 200_000),
        holder(HolderKind::Slot, "young", 500),
    ];
    let report = judged(postgres(server(), horizon, in_step()), redis(&[], in_step()));
    let told = found(&report, "vacuum-held-back");
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].1.contains(r#"psql "$DATABASE_URL" -c 'SELECT pg_drop_replication_slot('\''it'\'''\''s old'\'')'"#),
        "{told:?}"
    );
    assert!(told[1].1.contains("the standby reports"), "{told:?}");
}

#[test]
fn tables_and_indexes_that_are_mostly_empty_are_told() {
    let table = |name: &str, bytes, live, dead| TableFacts {
        name: name.into(),
        bytes,
        live,
        dead,
        autovacuum_off: false,
        vacuumed_ms_ago: Some(3_600_000),
    };
    let sizes = SizeFacts {
        tables: vec![
            table("full", 9 << 30, 10_000_000, 1_000_000),
            table("empty", 9 << 30, 1_000, 0),
            table("late", 1 << 20, 10, 200_000),
        ],
        indexes: vec![("good".into(), 2 << 30, 30_000_000), ("hollow".into(), 2 << 30, 1_000)],
    };
    let told: Vec<_> = schema::bloat(&Settings::default(), &sizes).into_iter().map(|f| (f.severity, f.seen)).collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(told[0], (Severity::Note, "the table empty takes 9.0 GiB for 1000 rows".to_owned()));
    assert!(told[1].1.starts_with("the table late has 200000 dead rows"));
    assert_eq!(told[2], (Severity::Warning, "the index hollow takes 2.0 GiB for 1000 entries".to_owned()));
}

#[test]
fn a_disk_that_redis_cannot_write_is_an_error() {
    let info = [("aof_enabled", "1"), ("aof_last_write_status", "err"), ("rdb_last_bgsave_status", "err")];
    let report = judged(postgres(server(), Vec::new(), in_step()), redis(&info, in_step()));
    assert_eq!(found(&report, "redis-persistence").iter().filter(|(severity, _)| *severity == Severity::Error).count(), 2);
}

#[test]
fn an_examination_that_takes_too_long_is_not_a_server_that_is_away() {
    let late = OutboxError::Timeout { doing: EXAMINING, limit: LIMIT };
    let source = ::redis::RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
    let slow = StreamsError::Unavailable { server: "cache".into(), doing: "examining Redis", source };
    let report = judge(&Settings::default(), &Facts { postgres: Some(Err(late)), redis: Some(Err(slow)) });
    for check in ["postgres-reachable", "redis-reachable"] {
        let told = found(&report, check);
        assert!(
            told.len() == 1 && told[0].1.contains(": not all questions were answered within a minute | see what it is busy with")
        );
    }
}

#[test]
fn many_findings_of_one_check_are_told_in_part() {
    let mut report = Report::default();
    report.check("schema", (0..12).map(|n| warning(format!("finding {n}"), "", "")));
    let seen: Vec<_> = report.findings.iter().map(|finding| finding.seen.as_str()).collect();
    assert_eq!(seen, ["finding 0", "finding 1", "finding 2", "finding 3", "finding 4 (and 7 more like this)"]);
    assert!(report.passed.is_empty());
}

#[test]
fn every_check_is_described() {
    let page = include_str!("../../../../docs/doctor.md");
    for part in page.split("## How it is known") {
        for check in CHECKS {
            assert!(part.contains(&format!("| `{check}` |")), "docs/doctor.md lacks {check}");
        }
        assert_eq!(part.lines().filter(|line| line.starts_with("| `")).count(), CHECKS.len(), "and describes no other");
    }
}

#[test]
fn commands_survive_a_shell_and_sql() {
    assert_eq!(advice::psql(&["SELECT 'a$(b)'"]), r#"psql "$DATABASE_URL" -c 'SELECT '\''a$(b)'\'''"#);
    assert_eq!(advice::identifier("odd\"name"), "\"odd\"\"name\"");
    assert_eq!(advice::redis_cli(None, &[&["GET", "a b"]]), r#"redis-cli -u "$REDIS_URL" GET 'a b'"#);
    assert_eq!([advice::age(52), advice::age(90_061_000)], ["52ms", "1day 1h"]);
}

#[test]
fn a_server_that_others_named_is_reached_with_the_login_of_the_url() {
    let mut place =
        Place { host: "::1".into(), port: 6380, tls: true, user: Some("it's".into()), has_password: true, of_cluster: true };
    let expected = r"with its password in REDISCLI_AUTH: redis-cli -h ::1 -p 6380 --user 'it'\''s' --tls -c A && redis-cli -h ::1 -p 6380 --user 'it'\''s' --tls -c B";
    assert_eq!(advice::redis_cli(Some(&place), &[&["A"], &["B"]]), expected);
    (place.tls, place.user, place.has_password, place.of_cluster) = (false, None, false, false);
    assert_eq!(advice::redis_cli(Some(&place), &[&["A"]]), "redis-cli -h ::1 -p 6380 A");
}

/// A server that shows the findings runs this in a task.
#[test]
fn an_examination_may_move_between_threads() {
    fn is_send(_: &impl Send) {}
    is_send(&examine(&Settings::default()));
}
