//! Migrations of tables that are in use.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::outbox::{Migrated, MigrationProgress, OutboxError};
use sqlx::{Executor, PgConnection};
use tokio::task::JoinHandle;

use crate::support::{Form, MIGRATIONS, World, eventually};

const EXPECTED: &str = include_str!("../../src/outbox/examine/definition.tsv");
const INSERT: &str =
    "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{}')";

type Reported = Arc<Mutex<Vec<MigrationProgress>>>;

/// An outbox of an earlier version, with rows.
async fn old(versions: usize) -> Result<World> {
    let world = World::unmigrated()?;
    world.database.psql(&MIGRATIONS[..versions].concat())?;
    world.insert(2_000, 100).await?;
    Ok(world)
}

/// A migration at work, and what it reports.
async fn migrate(world: &World, limit: Duration) -> Result<(JoinHandle<Result<Migrated, OutboxError>>, Reported)> {
    let (outbox, mut connection, reported) = (world.outbox.clone(), world.connect().await?, Reported::default());
    let reports = reported.clone();
    let migrating = tokio::spawn(async move {
        let mut report = |progress| reports.lock().unwrap_or_else(PoisonError::into_inner).push(progress);
        outbox.migrate_within(&mut connection, limit, &mut report).await
    });
    Ok((migrating, reported))
}

/// The longest that an insert takes within so long.
async fn slowest_insert(connection: &mut PgConnection, during: Duration) -> Result<Duration> {
    let (started, mut slowest) = (Instant::now(), Duration::ZERO);
    while started.elapsed() < during {
        let began = Instant::now();
        connection.execute(INSERT).await?;
        slowest = slowest.max(began.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(slowest)
}

async fn assert_complete(world: &World) -> Result<()> {
    assert_eq!(world.outbox.definition(&mut world.connect().await?).await?, EXPECTED);
    let leftovers = "SELECT relname FROM pg_class WHERE relname LIKE 'idx%new' OR relname LIKE '%ccnew%';";
    assert_eq!(world.database.psql(leftovers)?, "");
    Ok(())
}

/// An insert waited as long as the reader, behind the migration that waited for it.
#[tokio::test(flavor = "multi_thread")]
async fn inserts_go_on_while_a_migration_waits_for_a_long_reader() -> Result<()> {
    let world = old(5).await?;
    let (mut reader, mut producer) = (world.connect().await?, world.connect().await?);
    reader.execute("SET application_name = 'nightly backup'; BEGIN; SELECT count(*) FROM event_outbox").await?;
    let (migrating, reported) = migrate(&world, Duration::from_secs(600)).await?;
    let slowest = slowest_insert(&mut producer, Duration::from_secs(6)).await?;
    println!("the slowest insert took {slowest:?}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    assert!(!migrating.is_finished(), "it waits");
    reader.execute("COMMIT").await?;
    assert_eq!(migrating.await??, Migrated { from: Some(7), to: 9 });
    let reported = reported.lock().expect("no panic").clone();
    let Some(MigrationProgress::Waiting { holder: Some(holder) }) = reported.first() else { anyhow::bail!("{reported:?}") };
    assert!(holder.ends_with("of postgres, nightly backup"), "{holder}");
    assert_complete(&world).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_gives_up_when_its_time_is_over_and_changes_nothing() -> Result<()> {
    let world = old(5).await?;
    let mut reader = world.connect().await?;
    reader.execute("BEGIN; SELECT count(*) FROM event_outbox").await?;
    let (migrating, _) = migrate(&world, Duration::from_secs(2)).await?;
    let given_up = migrating.await?;
    assert!(matches!(given_up, Err(OutboxError::Busy { .. })), "{given_up:?}");
    assert_eq!(world.database.psql("SELECT max(version) FROM outbox_migration;")?, "7\n");
    reader.execute("COMMIT").await?;
    let mut connection = world.connect().await?;
    assert_eq!(world.outbox.migrate(&mut connection).await?, Migrated { from: Some(7), to: 9 }, "it is usable again");
    Ok(())
}

/// Of version 3, whose files since make five indexes on the table. A transaction that is open all the time is what an index waits for.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_of_a_table_with_rows_are_built_while_producers_go_on() -> Result<()> {
    let world = old(1).await?;
    let (mut open, mut producer) = (world.connect().await?, world.connect().await?);
    open.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1").await?;
    let (migrating, reported) = migrate(&world, Duration::from_secs(600)).await?;
    eventually("an index to be built", async || {
        let is_building = |progress: &MigrationProgress| matches!(progress, MigrationProgress::Building { .. });
        Ok(reported.lock().expect("no panic").iter().any(is_building))
    })
    .await?;
    let slowest = slowest_insert(&mut producer, Duration::from_secs(3)).await?;
    println!("the slowest insert took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    assert!(!migrating.is_finished(), "the index waits");
    open.execute("COMMIT").await?;
    assert_eq!(migrating.await??, Migrated { from: Some(3), to: 9 });
    assert_complete(&world).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    world.audit().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_that_a_broken_off_migration_left_are_completed_by_the_next() -> Result<()> {
    let world = World::of(Form::Whole).await?;
    let mut connection = world.connect().await?;
    connection
        .execute(
            "DROP INDEX idx_outbox_waiting, idx_outbox_txid, idx_outbox_failed;
             CREATE INDEX idx_outbox_waiting_new ON event_outbox (seq);
             CREATE INDEX idx_outbox_txid ON event_outbox (txid, seq) WHERE status IN ('PENDING', 'PROCESSING');
             CREATE INDEX idx_outbox_failed ON event_outbox (created_at) WHERE status = 'FAILED';
             UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_outbox_failed'::regclass",
        )
        .await?;
    assert_eq!(world.outbox.migrate(&mut connection).await?, Migrated { from: Some(9), to: 9 });
    assert_complete(&world).await?;
    let invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid;";
    assert_eq!(world.database.psql(invalid)?, "0\n");
    Ok(())
}

/// The conversion too, which locks the table for itself.
#[tokio::test(flavor = "multi_thread")]
async fn inserts_go_on_while_the_partitioning_waits_for_a_long_reader() -> Result<()> {
    let world = World::of(Form::Whole).await?;
    let (mut reader, mut producer) = (world.connect().await?, world.connect().await?);
    reader.execute("BEGIN; SELECT count(*) FROM event_outbox").await?;
    let (outbox, mut connection) = (world.outbox.clone(), world.connect().await?);
    let partitioning =
        tokio::spawn(async move { outbox.partition_by_day_within(&mut connection, Duration::from_secs(600), &mut |_| ()).await });
    let slowest = slowest_insert(&mut producer, Duration::from_secs(4)).await?;
    println!("the slowest insert took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    assert!(!partitioning.is_finished(), "it waits");
    reader.execute("COMMIT").await?;
    partitioning.await??.context("it was partitioned")?;
    Ok(())
}
