//! What may be typed or set wrongly: the exit code, and what the message must mention.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::support::{Answer, World, bare_command, finish};

const PUBLISH: [&str; 7] = ["publish", "--type", "A", "--aggregate-type", "a", "--aggregate-id", "1"];

fn check(case: &str, answer: &Answer, code: i32, mentions: &[&str]) {
    assert_eq!(answer.code, Some(code), "{case}: {answer:?}");
    // Only a relay says something before: which servers it is about to use.
    let errors = answer.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(errors == 1 && (answer.stderr.starts_with("error: ") || case.contains("relay")), "{case}: {answer:?}");
    assert_eq!(answer.stdout, "", "{case}");
    for text in mentions {
        assert!(answer.stderr.contains(text), "{case}: {text:?} is missing in\n{}", answer.stderr);
    }
    let lines: Vec<_> = answer.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    for (i, line) in lines.iter().enumerate() {
        assert!(!lines[..i].contains(line), "{case}: said twice: {line}");
    }
}

#[test]
fn settings_from_the_environment() -> Result<()> {
    let world = World::new()?;
    for (variable, value, mentions) in [
        ("OUTBOX_BATCH_SIZE", "0", ["app.outbox.processor.batchSize", "OUTBOX_BATCH_SIZE", "1 to 10,000"].as_slice()),
        ("OUTBOX_BATCH_SIZE", "many", &["batchSize = many", "not a whole number"]),
        ("OUTBOX_RETENTION_DAYS", "-1", &["retentionDays = -1", "0 to 36,500"]),
        ("OUTBOX_POLL_INTERVAL", "5", &["pollInterval = 5", "needs a unit", "HOCON would take milliseconds", "500ms"]),
        ("OUTBOX_POLL_INTERVAL", "5 parsecs", &["5 parsecs", "500ms"]),
        ("EVENT_PUBLISHING_STRATEGY", "both", &["both", "hybrid, outbox, streams"]),
        ("STREAM_PREFIX", "{a}", &["streamPrefix", "Redis Cluster"]),
        ("OUTBOX_ENABLED", "perhaps", &["OUTBOX_ENABLED", "perhaps"]),
    ] {
        let mut command = world.command(&["relay"]);
        command.env(variable, value);
        check(variable, &finish(command)?, 2, mentions);
    }
    let mut command = world.command(&["relay"]);
    command.env("OUTBOX_ENABLED", "false");
    command.env_remove("DATABASE_URL").env_remove("REDIS_URL");
    let answer = finish(command)?;
    check("without outbox", &answer, 2, &["the outbox is disabled", "OUTBOX_ENABLED=true"]);
    Ok(())
}

#[test]
fn settings_from_a_file() -> Result<()> {
    let world = World::new()?;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mistakes.conf");
    for (text, mentions) in [
        ("app.outbox.procesor.batchSize = 5", ["app.outbox.procesor.batchSize", "mistakes.conf:1", "did you mean"].as_slice()),
        ("app.outbox.cleanup {\n  retentionDays = -3\n}", &["retentionDays = -3", "mistakes.conf:2"]),
        ("app.outbox {", &["mistakes.conf:1", "never closed"]),
    ] {
        std::fs::write(&path, text)?;
        check(text, &world.run(&["stats", "--config", "mistakes.conf"])?, 2, mentions);
    }
    std::fs::remove_file(&path)?;
    check("no such file", &world.run(&["--config", "absent.conf", "stats"])?, 2, &["absent.conf", "no such file"]);
    Ok(())
}

#[test]
fn options() -> Result<()> {
    let world = World::new()?;
    for (args, mentions) in [
        (["relay", "--batch-size", "0"].as_slice(), ["batchSize = 0", "the command line", "1 to 10,000"].as_slice()),
        (&["relay", "--poll-interval", "5"], &["pollInterval = 5", "needs a unit"]),
        (&["cleanup", "--retention-days", "-1"], &["retentionDays = -1", "0 to 36,500"]),
        (&["stats", "--watch", "0"], &["--watch"]),
        (&["stats", "--watch", "--json"], &["--watch", "--json"]),
        (&["tail", "--limit", "0"], &["--limit"]),
        (&["failed", "retry"], &["<ID|--all>"]),
        (&["failed", "retry", "42"], &["42", "UUID"]),
        (&["failed", "retry", "--all", "0190b8a4-5c1e-7c3a-9c53-0d8f6a1f2b3c"], &["cannot be used with"]),
        (&["failed", "discard", "--type", "A"], &["--all"]),
        (&["--color", "red", "stats"], &["red", "auto, always, never"]),
        (&["statistics"], &["statistics"]),
        (&["--database-url", "mysql://h/d", "stats"], &["mysql://h/d", "postgres://"]),
    ] {
        check(&format!("{args:?}"), &world.run(args)?, 2, mentions);
    }
    Ok(())
}

#[test]
fn events() -> Result<()> {
    let world = World::new()?;
    let long = "x".repeat(256);
    let large = format!("\"{}\"", "x".repeat(2_000));
    let small = Path::new(env!("CARGO_TARGET_TMPDIR")).join("small.conf");
    std::fs::write(&small, "app.eventPublishing.maxPayloadBytes = 1KiB")?;
    for (change, mentions) in [
        (["--payload", "{\"a\":}"].as_slice(), ["--payload", "line 1, column 6", "{\"a\":}\n       ^"].as_slice()),
        (&["--payload", ""], &["it is empty"]),
        (&["--payload", r#"{"a":"\u0000"}"#], &["payload", "NUL"]),
        (&["--payload", r#""\ud800""#], &["payload", "surrogate"]),
        (&["--payload-file", "absent.json"], &["absent.json", "cannot read"]),
        (&["--payload", "1", "--payload-file", "-"], &["--payload-file"]),
        (&["--payload", &large, "--config", "small.conf"], &["2002 bytes", "1024", "maxPayloadBytes"]),
        (&["--header", "nothing"], &["nothing", "NAME=VALUE"]),
        (&["--occurred-at", "yesterday"], &["yesterday", "2026-01-31T12:00:00Z"]),
        (&["--lane", "slow"], &["slow", "critical, high-frequency"]),
    ] {
        check(&format!("{change:?}"), &world.run(&[&PUBLISH, change].concat())?, 2, mentions);
    }
    for (at, value, mentions) in [
        (2, "", ["event_type is empty", "1 to 255 bytes"].as_slice()),
        (4, "", &["aggregate_type is empty"]),
        (6, "", &["aggregate_id is empty"]),
        (6, &long, &["aggregate_id has 256 bytes", "at most 255"]),
        (4, "a{b}", &["a{b}", "brace"]),
        (4, "user:dead", &["user:dead", "dead letters"]),
    ] {
        let mut args = PUBLISH;
        args[at] = value;
        check(&format!("{args:?}"), &world.run(&args)?, 2, mentions);
    }
    std::fs::remove_file(&small)?;
    assert_eq!(world.stats()?["pending"], 0);
    Ok(())
}

#[test]
fn a_database_without_tables() -> Result<()> {
    let world = World::unmigrated()?;
    for args in [
        ["relay"].as_slice(),
        &["relay", "--until-empty"],
        &PUBLISH,
        &["stats"],
        &["failed", "list"],
        &["failed", "retry", "--all"],
        &["cleanup"],
    ] {
        check(&format!("{args:?}"), &world.run(args)?, 1, &["commitstream migrate", "\"public\""]);
    }
    world.database.psql("CREATE TABLE event_outbox (id int)")?;
    check("a foreign table", &world.run(&["migrate"])?, 1, &["nothing was changed", "did not create"]);
    Ok(())
}

/// Once, and in PostgreSQL's own words.
#[test]
fn a_user_without_rights() -> Result<()> {
    let world = World::new()?;
    let role = format!("m_{}", world.database.name());
    world.database.psql(&format!("CREATE ROLE {role} LOGIN PASSWORD 'p';"))?;
    let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
    for args in [["stats"].as_slice(), &["failed", "list"], &["relays"], &PUBLISH] {
        let mut command = world.command(args);
        command.env("DATABASE_URL", format!("postgres://{role}:p@{place}"));
        let answer = finish(command)?;
        check(&format!("{args:?}"), &answer, 1, &["permission denied for table ", "`commitstream doctor` says which rights"]);
        assert!(answer.stderr.matches("permission denied").count() == 1 && !answer.stderr.contains("at line"), "{answer:?}");
    }
    world.database.psql(&format!("DROP ROLE {role};"))?;
    Ok(())
}

#[test]
fn a_database_with_tables_of_an_earlier_version() -> Result<()> {
    let world = World::unmigrated()?;
    world.database.psql(include_str!("../../../../migrations/V3__create_outbox_table.sql"))?;
    for args in [["relay"].as_slice(), &["relay", "--until-empty"], &["stats"], &["failed", "list"]] {
        let mentions = ["\"public\" have version 3, and this build needs ", "run `commitstream migrate`"];
        check(&format!("{args:?}"), &world.run(args)?, 1, &mentions);
    }
    world.ok(&["migrate"])?;
    world.ok(&["stats"])?;
    Ok(())
}

#[test]
fn a_missing_url() -> Result<()> {
    let commands = [["migrate"].as_slice(), &["relay"], &PUBLISH, &["stats"], &["failed", "list"], &["cleanup"]]
        .map(|args| (args, "DATABASE_URL"));
    for (args, variable) in commands.into_iter().chain([(["tail"].as_slice(), "REDIS_URL")]) {
        check(&format!("{args:?}"), &finish(bare_command(args))?, 2, &[variable, "set "]);
    }
    Ok(())
}

#[test]
fn servers_that_are_not_there() -> Result<()> {
    let world = World::new()?;
    for args in [["stats"].as_slice(), &["migrate"], &PUBLISH, &["relay", "--until-empty"]] {
        let mut command = world.command(args);
        command.env("DATABASE_URL", "postgres://app@127.0.0.1:1/app");
        check(&format!("{args:?}"), &finish(command)?, 1, &["postgres://app@127.0.0.1:1/app", "DATABASE_URL", "refused"]);
    }
    let fast = [PUBLISH.as_slice(), &["--lane", "high-frequency"]].concat();
    for args in [["tail"].as_slice(), &fast, &["relay", "--until-empty"]] {
        let mut command = world.command(args);
        command.env("REDIS_URL", "redis://127.0.0.1:1");
        check(&format!("{args:?}"), &finish(command)?, 1, &["redis://127.0.0.1:1", "REDIS_URL", "refused"]);
    }
    Ok(())
}

/// A server that takes connections and never says a word.
#[test]
fn servers_that_do_not_answer() -> Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let address = silent.local_addr()?;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("impatient.conf");
    std::fs::write(&path, "app { database.timeout = 300ms, redis { connectTimeout = 300ms, responseTimeout = 300ms } }")?;
    for (args, mentions) in
        [(["stats"].as_slice(), "app.database.timeout"), (&PUBLISH, "app.database.timeout"), (&["tail"], "unavailable")]
    {
        let mut command = bare_command(&[args, &["--config", "impatient.conf"]].concat());
        command.env("DATABASE_URL", format!("postgres://app@{address}/app")).env("REDIS_URL", format!("redis://{address}"));
        let started = Instant::now();
        let answer = finish(command)?;
        check(&format!("{args:?}"), &answer, 1, &[mentions, &address.to_string()]);
        assert!(started.elapsed() < Duration::from_secs(20), "{args:?} took {:?}", started.elapsed());
    }
    std::fs::remove_file(&path)?;
    Ok(())
}
