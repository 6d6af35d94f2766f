//! `event_outbox` becomes a table that is partitioned by day, with what is in it and beside whoever uses it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream::outbox::OutboxError;
use commitstream::relay::{RelayState, days};
use tokio::task::JoinSet;

use crate::days::{count, partitions};
use crate::support::{Form, MIGRATIONS, World};

const PARTITION: &str = include_str!("../../../../migrations/partition_event_outbox.sql");

/// Columns, constraints, indexes and triggers of the table, as they are seen from outside.
fn definition(world: &World) -> Result<String> {
    Ok(world.database.psql(
        "SELECT column_name, data_type, column_default, is_nullable, is_generated, is_identity FROM information_schema.columns
         WHERE table_name = 'event_outbox' ORDER BY ordinal_position;
         SELECT replace(indexdef, ' ON ONLY ', ' ON ') FROM pg_indexes WHERE tablename = 'event_outbox' ORDER BY 1;
         SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'event_outbox'::regclass ORDER BY 1;
         SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'event_outbox'::regclass ORDER BY 1;
         SELECT pg_get_serial_sequence('event_outbox', 'seq'), pg_get_userbyid(relowner), relacl, attacl
         FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'status' WHERE c.oid = 'event_outbox'::regclass;",
    )?)
}

#[tokio::test(flavor = "multi_thread")]
async fn partitioning_keeps_rows_definitions_and_grants() -> Result<()> {
    let world = World::unmigrated()?;
    let mut connection = world.connect().await?;
    world.outbox.migrate(&mut connection).await?;
    world.insert(1_000, 20).await?;
    let (owner, producer) = (format!("owner_{}", world.database.name()), format!("producer_{}", world.database.name()));
    world.database.psql(&format!(
        "CREATE ROLE {owner}; CREATE ROLE {producer}; GRANT CREATE ON SCHEMA public TO {owner};
         GRANT INSERT ON event_outbox TO {producer} WITH GRANT OPTION; GRANT UPDATE (status) ON event_outbox TO PUBLIC;
         ALTER TABLE event_outbox OWNER TO {owner};
         UPDATE event_outbox SET status = 'FAILED', last_error = 'why' WHERE seq = 7;
         INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload)
         VALUES ('ffffffff-ffff-4fff-bfff-ffffffffffff', 'E', 'user', '1', '{{}}');"
    ))?;
    let rows = "SELECT * FROM event_outbox ORDER BY seq;";
    let before = (definition(&world)?, world.database.psql(rows)?);
    let file = "SELECT relfilenode FROM pg_class WHERE oid = 'event_outbox'::regclass;";
    let file = world.database.psql(file)?;

    assert_eq!(world.outbox.partition_by_day(&mut connection).await?, Some(1), "the one that is no UUIDv7");
    assert_eq!((definition(&world)?, world.database.psql(rows)?), before);
    let of_the_partition = "SELECT relfilenode FROM pg_class WHERE relname LIKE 'event_outbox_p________';";
    assert_eq!(world.database.psql(of_the_partition)?, file, "nothing was copied");
    let indexes = "SELECT DISTINCT count(*) FROM pg_index JOIN pg_class c ON c.oid = indrelid WHERE relname LIKE 'event_outbox%' GROUP BY c.oid;";
    assert_eq!(world.database.psql(indexes)?.lines().count(), 1, "nor was an index made anew");
    let made = days::make_ahead(&world.outbox, &mut connection).await?.context("it has partitions")?;
    assert_eq!(made.made.len(), 3, "{made:?}");
    let counts = partitions(&world)?.iter().map(|name| count(&world, name)).collect::<Result<Vec<_>>>()?;
    assert_eq!(counts, [1_000, 0, 0, 0, 1]);
    let owners =
        "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relname LIKE 'event_outbox%' AND relkind IN ('r', 'p');";
    assert_eq!(world.database.psql(owners)?, format!("{owner}\n"));
    let checks = "SELECT DISTINCT count(*) FROM pg_constraint JOIN pg_class c ON c.oid = conrelid
                  WHERE contype = 'c' AND relname LIKE 'event_outbox%' GROUP BY c.oid;";
    assert_eq!(world.database.psql(checks)?.lines().count(), 1, "each has all constraints");
    // Parameters of the storage are each partition's own.
    let parameters = "SELECT DISTINCT reloptions FROM pg_class WHERE relname LIKE 'event_outbox_%' AND relkind = 'r';";
    assert_eq!(world.database.psql(parameters)?.lines().count(), 1);
    assert!(world.database.psql(parameters)?.contains("autovacuum_vacuum_scale_factor=0.02"));

    for _ in 0..2 {
        assert_eq!(world.outbox.partition_by_day(&mut connection).await?, None);
        world.outbox.migrate(&mut connection).await?;
        world.database.psql(PARTITION)?;
        let made = days::make_ahead(&world.outbox, &mut connection).await?.context("it has partitions")?;
        assert_eq!(made, days::DaysChanged::default());
    }
    assert_eq!((definition(&world)?, world.database.psql(rows)?), before);
    world.database.psql(&format!("SET ROLE {producer}; INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{{}}');"))?;
    assert_eq!(world.database.psql("SELECT max(seq) FROM event_outbox;")?, "1002\n", "seq goes on");
    world.database.psql(&format!("DROP OWNED BY {owner}, {producer}; DROP ROLE {owner}, {producer};"))?;
    Ok(())
}

/// The file by itself, in whatever schema, on each version; and the migrations that follow it.
#[tokio::test(flavor = "multi_thread")]
async fn migrations_apply_to_a_partitioned_table() -> Result<()> {
    let whole = World::of(Form::Whole).await?;
    for versions in 1..=MIGRATIONS.len() {
        let world = World::unmigrated()?;
        let mut connection = world.connect().await?;
        let before = MIGRATIONS[..versions].concat();
        world.database.psql(&format!(
            "{before} INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
            SELECT 'E', 'user', n::text, '{{}}' FROM generate_series(1, 100) n; BEGIN; {PARTITION} COMMIT;"
        ))?;
        world.outbox.migrate(&mut connection).await?;
        days::make_ahead(&world.outbox, &mut connection).await?;
        assert_eq!(definition(&world)?, definition(&whole)?, "partitioned after {versions}");
        let relay = world.relay()?;
        world.insert(100, 100).await?;
        world.drained().await?;
        relay.stop().await?;
        assert_eq!(world.audit().await?, 200);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_miss_the_new_rows_stands_in_the_way() -> Result<()> {
    let world = World::of(Form::Whole).await?;
    let mut connection = world.connect().await?;
    let before = definition(&world)?;
    for (create, name, drop) in [
        ("CREATE VIEW report AS SELECT id FROM event_outbox", "view report", "DROP VIEW report"),
        ("CREATE TABLE sent (id uuid REFERENCES event_outbox)", "table sent", "DROP TABLE sent"),
        ("CREATE FUNCTION of(e event_outbox) RETURNS text LANGUAGE sql AS 'SELECT 1'", "of(event_outbox)", "DROP FUNCTION of"),
        ("CREATE POLICY mine ON event_outbox USING (true)", "policy mine", "DROP POLICY mine ON event_outbox"),
        ("CREATE PUBLICATION p FOR TABLE event_outbox", "publication p", "DROP PUBLICATION p"),
        ("CREATE TABLE child () INHERITS (event_outbox)", "table child", "DROP TABLE child"),
    ] {
        world.database.psql(&format!("{create};"))?;
        let error = world.outbox.partition_by_day(&mut connection).await.err().with_context(|| create.to_owned())?;
        let OutboxError::Database { source, .. } = &error else { anyhow::bail!("{create}: {error:?}") };
        ensure!(source.to_string().contains(name), "{create}: {source}");
        world.database.psql(&format!("{drop};"))?;
        assert_eq!(definition(&world)?, before);
    }
    assert_eq!(world.outbox.partition_by_day(&mut connection).await?, Some(0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_at_once_partition_and_make_days_once() -> Result<()> {
    let world = World::of(Form::Whole).await?;
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let (mut connection, outbox) = (world.connect().await?, world.outbox.clone());
        tasks.spawn(async move {
            let converted = outbox.partition_by_day(&mut connection).await?.is_some();
            let made = days::make_ahead(&outbox, &mut connection).await?.context("it has partitions")?;
            ensure!(!made.postponed, "{made:?}");
            Ok((usize::from(converted), made.made.len()))
        });
    }
    let done = tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    let sums = done.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    assert_eq!(sums, (1, 3), "{done:?}");
    Ok(())
}

/// A relay that slept when the table was replaced notices, and is woken by the next commit: its poll interval is a minute.
#[tokio::test(flavor = "multi_thread")]
async fn relays_and_producers_go_on_while_the_table_is_partitioned() -> Result<()> {
    let mut world = World::of(Form::Whole).await?;
    world.settings.outbox.processor.poll_interval = Duration::from_secs(60);
    world.settings.outbox.processor.batch_size = 50;
    let relay = world.relay()?;
    let mut status = relay.watch();
    let mut producers = JoinSet::new();
    for producer in 0..4_i32 {
        let mut connection = world.connect().await?;
        producers.spawn(async move {
            let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                          SELECT 'E', 'user', $1, '{}' FROM generate_series(1, 5)";
            for _ in 0..500 {
                sqlx::query(insert).bind(producer.to_string()).execute(&mut connection).await?;
            }
            anyhow::Ok(())
        });
    }
    status.wait_for(|status| status.published > 500).await?;
    assert!(world.outbox.partition_by_day(&mut world.connect().await?).await?.is_some());
    producers.join_all().await.into_iter().collect::<Result<()>>()?;
    world.drained().await?;
    status.wait_for(|status| status.state == RelayState::Active).await?;
    for n in 1..=20 {
        world.insert(1, 1).await?;
        let sent = tokio::time::timeout(Duration::from_secs(10), world.drained()).await;
        sent.with_context(|| format!("event {n} was not noticed"))??;
    }
    relay.stop().await?;
    assert_eq!(world.audit().await?, 10_020);
    Ok(())
}
