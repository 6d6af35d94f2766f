//! Events of transactions that are committed in two phases.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::doctor::Severity;
use commitstream_sandbox::Postgres;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use crate::doctor_report::{examine, only, passes};
use crate::support::{World, eventually};

/// A migrated outbox on a server where transactions can be prepared, and a session.
async fn world() -> Result<(Postgres, World, PgConnection)> {
    let postgres = Postgres::start_with(&[("max_prepared_transactions", "30")])?;
    let mut world = World::unmigrated()?;
    world.settings.database.url = Some(postgres.url());
    let mut connection = PgConnection::connect(&postgres.url()).await?;
    world.outbox.migrate(&mut connection).await?;
    connection.execute("CREATE TABLE account (id int PRIMARY KEY, n int); INSERT INTO account VALUES (1, 0)").await?;
    Ok((postgres, world, connection))
}

async fn set(world: &World, connection: &mut PgConnection, two_phase: bool) -> Result<bool> {
    Ok(world.outbox.set_two_phase(connection, two_phase, Duration::from_secs(60), &mut |_| ()).await?)
}

async fn published(connection: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT count(*) FROM event_outbox WHERE status = 'PUBLISHED'").fetch_one(connection).await?)
}

fn insert(aggregate: &str) -> String {
    format!(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '{aggregate}', '{{}}');"
    )
}

async fn prepare(connection: &mut PgConnection, before: &str, gid: &str) -> Result<(), sqlx::Error> {
    let sql = format!("BEGIN; {before} {} PREPARE TRANSACTION '{gid}'", insert(gid));
    let prepared = connection.execute(AssertSqlSafe(sql)).await.map(drop);
    connection.execute("ROLLBACK").await?;
    prepared
}

/// Waits until a relay sleeps: it holds the wake-up lock, which is one for the session.
async fn asleep(connection: &mut PgConnection) -> Result<()> {
    eventually("the relay to sleep", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = 1129139027 AND granted
                                  AND mode = 'ExclusiveLock' AND objid = 'event_outbox'::regclass)";
        Ok(sqlx::query_scalar(sql).fetch_one(&mut *connection).await?)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_for_two_phases_takes_prepared_transactions_while_a_relay_sleeps() -> Result<()> {
    let (_postgres, mut world, mut connection) = world().await?;
    world.settings.outbox.processor.poll_interval = Duration::from_millis(300);
    let relay = world.relay()?;
    asleep(&mut connection).await?;
    let refused = prepare(&mut connection, "", "a").await.expect_err("the trigger notifies");
    assert!(refused.to_string().contains("NOTIFY"), "{refused}");
    let report = examine(&world).await;
    only(&report, "two-phase", Severity::Note, "may be prepared here (max_prepared_transactions = 30)");

    assert!(set(&world, &mut connection, true).await? && !set(&world, &mut connection, true).await?);
    passes(&examine(&world).await, "two-phase");
    passes(&examine(&world).await, "schema");
    for n in 0..20 {
        asleep(&mut connection).await?;
        prepare(&mut connection, "", &format!("t{n}")).await?;
    }
    assert_eq!(published(&mut connection).await?, 0);
    for n in 0..20 {
        connection.execute(AssertSqlSafe(format!("COMMIT PREPARED 't{n}'"))).await?;
    }
    eventually("what was prepared to be published", async || Ok(published(&mut connection).await? == 20)).await?;
    relay.stop().await?;

    assert!(set(&world, &mut connection, false).await?);
    assert!(!world.outbox.is_two_phase(&mut connection).await?);
    world.settings.outbox.processor.poll_interval = Duration::from_secs(60);
    let relay = world.relay()?;
    asleep(&mut connection).await?;
    connection.execute(AssertSqlSafe(insert("b"))).await?;
    let woken = Instant::now();
    eventually("the relay to be woken", async || Ok(published(&mut connection).await? == 21)).await?;
    assert!(woken.elapsed() < Duration::from_secs(30), "not by its own look");
    relay.stop().await?;
    Ok(())
}

/// Also across the partitioning, which makes the table anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_stays_one_for_two_phases() -> Result<()> {
    let (_postgres, world, mut connection) = world().await?;
    set(&world, &mut connection, true).await?;
    world.outbox.partition_by_day(&mut connection).await?.context("it was partitioned")?;
    assert!(world.outbox.is_two_phase(&mut connection).await?);
    assert!(set(&world, &mut connection, false).await? && set(&world, &mut connection, true).await?);
    prepare(&mut connection, "", "a").await?;
    connection.execute("ROLLBACK PREPARED 'a'").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_variable_does_it_for_one_transaction() -> Result<()> {
    let (_postgres, world, mut connection) = world().await?;
    let relay = world.relay()?;
    for value in ["on", "true", "1", "YES"] {
        asleep(&mut connection).await?;
        prepare(&mut connection, &format!("SET LOCAL commitstream.two_phase = '{value}';"), "a").await?;
        connection.execute("COMMIT PREPARED 'a'").await?;
    }
    eventually("them to be published", async || Ok(published(&mut connection).await? == 4)).await?;
    for value in ["off", ""] {
        asleep(&mut connection).await?;
        let before = format!("SET LOCAL commitstream.two_phase = '{value}';");
        prepare(&mut connection, &before, "a").await.expect_err("the trigger notifies");
    }
    relay.stop().await?;
    Ok(())
}

/// It was prepared before the relay started, and holds the wake-up lock in common with producers that are awake. Others are published meanwhile,
/// and woken; and when it is committed, its event comes before that of the transaction that waited for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_stays_prepared_for_long_starves_nobody_and_keeps_its_place() -> Result<()> {
    let (postgres, mut world, mut connection) = world().await?;
    world.settings.outbox.processor.poll_interval = Duration::from_secs(60);
    let lock = "UPDATE account SET n = n + 1 WHERE id = 1;";
    prepare(&mut connection, lock, "first").await?;
    let relay = world.relay()?;
    for n in 1..=10 {
        connection.execute(AssertSqlSafe(insert("other"))).await?;
        let began = Instant::now();
        eventually("others to be published", async || Ok(published(&mut connection).await? == n)).await?;
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}: it was not woken", began.elapsed());
    }
    relay.stop().await?;

    // A relay that was not there when it was prepared.
    let relay = world.relay()?;
    let mut second = PgConnection::connect(&postgres.url()).await?;
    let follows = format!("BEGIN; {lock} {} {} COMMIT", insert("first"), insert("other"));
    let waits = tokio::spawn(async move { second.execute(AssertSqlSafe(follows)).await.map(drop) });
    crate::support::eventually_waits(&mut PgConnection::connect(&postgres.url()).await?, "UPDATE account").await?;
    connection.execute("COMMIT PREPARED 'first'").await?;
    waits.await??;
    eventually("all to be published", async || Ok(published(&mut connection).await? == 13)).await?;
    let ids: Vec<String> = sqlx::query_scalar("SELECT id::text FROM event_outbox WHERE aggregate_id = 'first' ORDER BY seq")
        .fetch_all(&mut connection)
        .await?;
    assert_eq!(ids.len(), 2);
    let entries = world.entries(&world.user_stream()).await?;
    let streamed: Vec<&str> =
        entries.iter().filter(|e| e.field("aggregate_id") == Some("first")).filter_map(|e| e.field("id")).collect();
    assert_eq!(streamed, ids);
    relay.stop().await?;
    Ok(())
}
