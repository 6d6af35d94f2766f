//! The commands of `commitstream` that doctor advises: each is run as it is printed, and what it was for is gone.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::{World, finish};

/// What doctor finds of this check; `None` if it passes.
fn advice(world: &World, check: &str) -> Result<Option<String>> {
    let report = world.run(&["doctor", "--json"])?.json()?;
    let findings = report["findings"].as_array().context("findings")?;
    let mend =
        findings.iter().find(|finding| finding["check"] == check).map(|finding| finding["mend"].as_str().unwrap_or_default());
    let passed = report["passed"].as_array().is_some_and(|passed| passed.contains(&Value::from(check)));
    ensure!(mend.is_some() || passed, "{check} is in neither list: {report}");
    Ok(mend.map(str::to_owned))
}

/// Runs this part of the advice in a shell.
fn follow(world: &World, check: &str, command: &str) -> Result<()> {
    let mend = advice(world, check)?.with_context(|| format!("{check} passes"))?;
    ensure!(mend.contains(command), "{check}: {mend}");
    let program = Path::new(env!("CARGO_BIN_EXE_commitstream")).parent().context("a directory")?;
    let path = format!("{}:{}", program.display(), std::env::var("PATH")?);
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).env("PATH", path).env("DATABASE_URL", world.database.url()).env("REDIS_URL", &world.redis_url);
    shell.env("STREAM_PREFIX", &world.prefix).current_dir(env!("CARGO_TARGET_TMPDIR"));
    let answer = finish(shell)?;
    ensure!(answer.code == Some(0), "{command}: {answer:?}");
    let still = advice(world, check)?;
    ensure!(still.is_none(), "{check} after {command}: {still:?}");
    Ok(())
}

#[test]
fn migrations_that_are_missing_old_or_of_others_are_mended() -> Result<()> {
    let world = World::unmigrated()?;
    follow(&world, "migration", "commitstream migrate")?;
    let old = World::unmigrated()?;
    old.database.psql(include_str!("../../../../migrations/V3__create_outbox_table.sql"))?;
    follow(&old, "migration", "commitstream migrate")?;
    let foreign = World::unmigrated()?;
    foreign.database.psql("CREATE TABLE event_outbox (id int);")?;
    let mend = advice(&foreign, "migration")?.context("a finding")?;
    follow(&foreign, "migration", mend.split(", then ").next().unwrap_or_default())
}

#[test]
fn what_failed_is_retried_and_what_is_old_is_cleaned_up() -> Result<()> {
    let world = World::new()?;
    world.fail_users()?;
    follow(&world, "failed-events", "commitstream failed retry --all")?;
    world.ok(&["relay", "--until-empty"])?;
    world.database.psql("UPDATE event_outbox SET published_at = now() - interval '20 days';")?;
    follow(&world, "cleanup", "commitstream cleanup")?;
    let stream = format!("{}old", world.prefix);
    world.note("old")?;
    let mut redis = world.redis()?;
    for command in [&["XADD", &stream, "1-0", "id", "x"][..], &["XGROUP", "CREATE", &stream, "mail", "0"]] {
        redis::cmd(command[0]).arg(&command[1..]).exec(&mut redis)?;
    }
    redis::cmd("XREADGROUP").arg(&["GROUP", "mail", "one", "STREAMS", &stream, ">"]).exec(&mut redis)?;
    redis::cmd("XACK").arg(&[&stream, "mail", "1-0"]).exec(&mut redis)?;
    follow(&world, "trimming", "commitstream cleanup")
}

#[test]
fn days_without_a_partition_are_made() -> Result<()> {
    let world = World::new()?;
    world.ok(&["migrate", "--partitioned"])?;
    let ahead = "SELECT format('DROP TABLE %s;', inhrelid::regclass) FROM pg_inherits JOIN pg_class ON oid = inhrelid
                 WHERE inhparent = 'event_outbox'::regclass AND pg_get_expr(relpartbound, oid) <> 'DEFAULT'
                 ORDER BY relname DESC LIMIT 3;";
    world.database.psql(&world.database.psql(ahead)?)?;
    follow(&world, "partitions-ahead", "commitstream cleanup")
}
