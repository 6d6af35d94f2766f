//! What doctor finds of a PostgreSQL server and can only be had of one of the test's own.

use std::time::Duration;

use anyhow::{Context, Result};
use chrono::{TimeZone, Utc};
use commitstream::doctor::Severity;
use commitstream_sandbox::{FaultProxy, Postgres};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use crate::doctor_report::{eventually_passes, examine, found, mend, only, passes};
use crate::support::{World, eventually};

fn world(url: String) -> Result<World> {
    let mut world = World::unmigrated()?;
    world.settings.database.url = Some(url);
    Ok(world)
}

/// The URL of another user, whose password is `p`.
fn login(url: &str, user: &str) -> Result<String> {
    let (_, place) = url.rsplit_once('@').context("a login")?;
    Ok(format!("postgres://{user}:p@{place}"))
}

/// Nobody has to wait for a thousand million transactions: PostgreSQL is told that they were.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_run_out_are_found_in_time_and_mended() -> Result<()> {
    // Vacuum comes by itself, too, and not within this test.
    let postgres = Postgres::start_with(&[("autovacuum_naptime", "1h")])?;
    let world = world(postgres.url())?;
    passes(&examine(&world).await, "postgres-wraparound");
    for (transactions, severity) in [(1_100_000_000, Severity::Warning), (1_600_000_000, Severity::Error)] {
        postgres.advance_transactions(transactions)?;
        only(&examine(&world).await, "postgres-wraparound", severity, " transactions ago");
    }
    let report = examine(&world).await;
    mend(&world.settings, found(&report, "postgres-wraparound")[0])?;
    passes(&examine(&world).await, "postgres-wraparound");
    Ok(())
}

/// 100,000 transactions begin while a standby and a session look at what was before them.
#[tokio::test(flavor = "multi_thread")]
async fn what_holds_vacuum_back_without_a_time_is_found_by_transactions() -> Result<()> {
    let primary = Postgres::start()?;
    let standby = Postgres::start_standby_of(&primary)?;
    let world = world(primary.url())?;
    let mut there = PgConnection::connect(&standby.url()).await?;
    for sql in ["hot_standby_feedback = on", "wal_receiver_status_interval = '1s'"] {
        there.execute(AssertSqlSafe(format!("ALTER SYSTEM SET {sql}"))).await?;
    }
    there.execute("SELECT pg_reload_conf()").await?;
    let mut here = PgConnection::connect(&primary.url()).await?;
    here.execute("CREATE ROLE app LOGIN PASSWORD 'p'").await?;
    let mut readers = [PgConnection::connect(&standby.url()).await?, PgConnection::connect(&primary.url()).await?];
    for reader in &mut readers {
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        reader.execute("SELECT 1").await?;
    }
    let told = "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE xmin IS NOT NULL)";
    eventually("the standby to say what it needs", async || Ok(sqlx::query_scalar(told).fetch_one(&mut here).await?)).await?;
    passes(&examine(&world).await, "vacuum-held-back");
    here.execute("SET synchronous_commit = off").await?;
    here.execute("DO $$ BEGIN FOR i IN 1..100010 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$").await?;

    let report = examine(&world).await;
    let finding = only(&report, "vacuum-held-back", Severity::Warning, "the active replication slot standby_");
    assert!(finding.mend.starts_with("on the standby that uses it, end the old queries: SELECT pid"), "{finding:?}");
    // The session is young, and who may not see that goes by transactions.
    let mut blind = self::world(login(&primary.url(), "app")?)?;
    let report = examine(&blind).await;
    let told = found(&report, "vacuum-held-back");
    assert_eq!(told.len(), 2, "{told:#?}");
    let session = told.iter().find(|finding| finding.seen.starts_with("the session ")).context("a session")?;
    assert!(session.seen.contains(" of postgres is in a transaction and holds vacuum back for 1000"), "{session:?}");
    assert!(!session.seen.contains("last query"), "it may not be seen: {session:?}");
    blind.settings.database.url.clone_from(&world.settings.database.url);
    mend(&blind.settings, session)?;

    // The slot stays behind when the standby does not use it any more, and goes on holding vacuum back.
    there.execute("ALTER SYSTEM SET primary_slot_name = ''").await?;
    there.execute("SELECT pg_reload_conf()").await?;
    eventually(
        "the standby to go on without its slot",
        async || Ok(found(&examine(&world).await, "vacuum-held-back").len() == 2),
    )
    .await?;
    let report = examine(&world).await;
    let told = found(&report, "vacuum-held-back");
    let slot = told.iter().find(|finding| finding.seen.starts_with("the inactive replication slot ")).context("a slot")?;
    mend(&world.settings, slot)?;
    only(&examine(&world).await, "vacuum-held-back", Severity::Warning, "queries on the standby standby_");
    readers[0].execute("ROLLBACK").await?;
    eventually_passes(&world, "vacuum-held-back").await
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_run_out_are_found_before_and_when_there_are_none() -> Result<()> {
    let postgres = Postgres::start_with(&[("max_connections", "12")])?;
    let own = world(postgres.url())?;
    PgConnection::connect(&postgres.url()).await?.execute("CREATE ROLE app LOGIN PASSWORD 'p'").await?;
    let app = world(login(&postgres.url(), "app")?)?;
    let mut sessions = Vec::new();
    // Three are for superusers.
    eventually("all sessions to be taken", async || {
        match PgConnection::connect(&login(&postgres.url(), "app")?).await {
            Ok(session) => sessions.push(session),
            Err(error) => anyhow::ensure!(sessions.len() >= 8, "{error}"),
        }
        Ok(sessions.len() >= 9)
    })
    .await?;
    let report = examine(&app).await;
    let none = only(&report, "postgres-reachable", Severity::Error, "remaining connection slots are reserved");
    only(&examine(&own).await, "postgres-connections", Severity::Warning, " of 9 sessions are in use");
    mend(&own.settings, none)?;
    drop(sessions);
    postgres.restart()?;
    passes(&examine(&app).await, "postgres-reachable");
    passes(&examine(&own).await, "postgres-connections");
    Ok(())
}

/// What the server sends is changed on its way; what is asked of it and compared is not.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_postgresql_and_one_with_another_clock_are_found() -> Result<()> {
    let mut world = World::new().await?;
    let (direct, version) = (world.database.url().to_owned(), world.database.psql("SHOW server_version_num")?);
    let place = direct.rsplit_once('@').and_then(|(_, place)| place.split('/').next()).context("a place")?;
    let proxy = FaultProxy::start(place)?;
    world.settings.database.url = Some(proxy.url(&direct));
    let report = examine(&world).await;
    ["postgres-version", "clocks"].into_iter().for_each(|check| passes(&report, check));

    // A number of four bytes, with its length before it.
    let number = |number: i32| [&[0, 0, 0, 4], &number.to_be_bytes()[..]].concat();
    proxy.rewrite(number(version.trim().parse()?), number(130_021));
    only(&examine(&world).await, "postgres-version", Severity::Error, "this is PostgreSQL 13");

    // A time is a number of microseconds in eight bytes: one more in the first two is nine years.
    let since = Utc.with_ymd_and_hms(2000, 1, 1, 0, 0, 0).single().context("a time")?;
    let micros = (Utc::now() - since).num_microseconds().context("a number")?;
    let time = |first: i64| [&[0, 0, 0, 8], &((first << 48).to_be_bytes())[..2]].concat();
    proxy.rewrite(time(micros >> 48), time((micros >> 48) + 1));
    let report = examine(&world).await;
    let told: Vec<_> = found(&report, "clocks").into_iter().map(|finding| finding.seen.as_str()).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].starts_with("the clock of PostgreSQL is 8years ") && told[0].ends_with(" ahead of that of this machine"),
        "{told:?}"
    );
    assert!(told[1].starts_with("the clock of Redis at ") && told[1].ends_with(" behind that of PostgreSQL"), "{told:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_leads_nowhere_and_a_server_that_says_nothing_are_found() -> Result<()> {
    let postgres = Postgres::start()?;
    let mut world = world("mysql//nowhere".into())?;
    let report = examine(&world).await;
    let finding = only(&report, "postgres-reachable", Severity::Error, "the database URL is not usable");
    assert!(finding.mend.starts_with("export DATABASE_URL="), "{finding:?}");
    world.settings.database.url = Some(postgres.url());
    world.settings.database.timeout = Duration::from_millis(500);
    postgres.pause()?;
    let report = examine(&world).await;
    let finding = only(&report, "postgres-reachable", Severity::Error, "did not answer within 500ms while connecting");
    assert!(finding.mend.contains("pg_isready"), "{finding:?}");
    postgres.resume()?;
    eventually_passes(&world, "postgres-reachable").await
}
