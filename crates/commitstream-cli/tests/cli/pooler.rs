//! Commands through a pooler in transaction mode: what one leaves in its session, the next application finds in its own.

use anyhow::{Context, Result, ensure};

use crate::pgbouncer::PgBouncer;
use crate::support::World;

/// What is set in the sessions behind the pooler, and what else is left in them. There is one of them, which all share.
const LEFT: &str = "
SELECT 'setting ' || name || ' = ' || setting FROM pg_settings
WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'extra_float_digits', 'standard_conforming_strings')
UNION ALL SELECT 'statement ' || name FROM pg_prepared_statements
UNION ALL SELECT 'table ' || relname FROM pg_class WHERE relpersistence = 't'
UNION ALL SELECT 'lock' FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
UNION ALL SELECT 'channel ' || channel FROM pg_listening_channels() AS channel;";

fn psql(url: &str, sql: &str) -> Result<String> {
    let output =
        std::process::Command::new("psql").args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Defaults of the database that disturb whoever relies on others.
const DEFAULTS: &str = "
ALTER DATABASE {db} SET default_transaction_isolation = 'serializable';
ALTER DATABASE {db} SET statement_timeout = '300ms';
ALTER DATABASE {db} SET lock_timeout = '10ms';
ALTER DATABASE {db} SET idle_in_transaction_session_timeout = '20ms';
ALTER DATABASE {db} SET DateStyle = 'German, DMY';
ALTER DATABASE {db} SET TimeZone = 'Asia/Kathmandu';
ALTER DATABASE {db} SET search_path = 'nowhere';
ALTER DATABASE {db} SET default_transaction_read_only = on;";

#[test]
fn commands_leave_nothing_in_sessions_that_a_pooler_shares() -> Result<()> {
    let world = World::new()?;
    world.fail_users()?;
    world.publish_user("4")?;
    let settings = "pool_mode = transaction\ndefault_pool_size = 1\nserver_reset_query =";
    let Some(pooler) = PgBouncer::start(&world.database, settings)? else { return Ok(()) };
    pooler.listens()?;
    let url = format!("{}?sslmode=disable", pooler.url);
    ensure!(psql(&url, LEFT)?.is_empty());
    psql(&url, "SET enable_seqscan = off")?;
    ensure!(psql(&url, LEFT)?.contains("enable_seqscan"), "the session is not shared, and this shows nothing");
    psql(&url, "RESET ALL")?;
    let run = |args: &[&str]| {
        let mut command = world.command(args);
        command.env("DATABASE_URL", &url);
        crate::support::finish(command)
    };
    let works: [&[&str]; 11] = [
        &["stats", "--json"],
        &["stats"],
        &["relays"],
        &["relays", "pause"],
        &["relays", "resume"],
        &["failed", "list"],
        &["failed", "retry", "--all", "--yes"],
        &["failed", "discard", "--all", "--yes"],
        &["cleanup"],
        &["publish", "--type", "UserCreated", "--aggregate-type", "user", "--aggregate-id", "5"],
        &["dead", "retry", "--all", "--yes"],
    ];
    for round in 0..2 {
        for args in works {
            let answer = run(args)?;
            ensure!(answer.code == Some(0), "{args:?}: {answer:?}");
            ensure!(psql(&url, LEFT)?.is_empty(), "{args:?} leaves {}", psql(&url, LEFT)?);
        }
        // These cannot do without a session of their own, and say so before they set anything.
        for args in [&["verify"][..], &["migrate"], &["console", "--listen", "127.0.0.1:0"], &["relay"]] {
            let answer = run(args)?;
            ensure!(answer.code != Some(0) && answer.stderr.contains("the address of PostgreSQL itself"), "{args:?}: {answer:?}");
            ensure!(psql(&url, LEFT)?.is_empty(), "{args:?} leaves {}", psql(&url, LEFT)?);
        }
        let answer = run(&["doctor", "--json"])?;
        let finding = answer.json()?.to_string();
        ensure!(finding.contains("postgres-pooler"), "{answer:?}");
        ensure!(psql(&url, LEFT)?.is_empty(), "doctor, round {round}, leaves {}", psql(&url, LEFT)?);
    }
    Ok(())
}

/// Commands, and the sessions that they have for themselves.
#[test]
fn defaults_of_the_database_do_not_reach_commands() -> Result<()> {
    let world = World::new()?;
    world.fail_users()?;
    world.database.psql(&DEFAULTS.replace("{db}", world.database.name()))?;
    let stats = world.stats()?;
    ensure!(stats["failed"] == 3, "{stats}");
    for args in [
        &["relays", "pause"][..],
        &["relays", "resume"],
        &["failed", "list"],
        &["failed", "retry", "--all", "--yes"],
        &["cleanup"],
        &["migrate"],
        &["relay", "--until-empty"],
        &["verify"],
    ] {
        world.ok(args).with_context(|| format!("{args:?}"))?;
    }
    let stats = world.stats()?;
    ensure!(stats["published"] == 3, "{stats}");
    Ok(())
}
