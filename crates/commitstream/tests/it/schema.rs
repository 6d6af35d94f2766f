//! The migration: run twice, at once, beside other things and by other tools; and what the table itself refuses.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use commitstream::outbox::{Migrated, OutboxError, OutboxRepository};
use sqlx::PgConnection;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::{Form, MIGRATIONS, World};

const FRESH: Migrated = Migrated { from: None, to: 9 };
const UNCHANGED: Migrated = Migrated { from: Some(9), to: 9 };

#[tokio::test(flavor = "multi_thread")]
async fn migrating_again_changes_nothing_and_keeps_what_is_there() -> Result<()> {
    let world = World::unmigrated()?;
    let mut connection = world.connect().await?;
    world.database.psql("CREATE TABLE users (id int); INSERT INTO users SELECT generate_series(1, 1000);")?;
    assert_eq!(world.outbox.migrate(&mut connection).await?, FRESH);
    world.insert(10, 3).await?;
    let before = definition(&world)?;
    for _ in 0..3 {
        assert_eq!(world.outbox.migrate(&mut connection).await?, UNCHANGED);
    }
    assert_eq!(definition(&world)?, before);
    assert_eq!(world.database.psql("SELECT count(*), (SELECT count(*) FROM event_outbox) FROM users;")?, "1000|10\n");
    let path: String = sqlx::query_scalar("SHOW search_path").fetch_one(&mut connection).await?;
    assert_eq!(path, "\"$user\", public", "the session's search_path is its own");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_migrations_at_once_take_turns() -> Result<()> {
    let world = World::unmigrated()?;
    for schema in ["public", "made_by_it"] {
        let mut tasks = JoinSet::new();
        for _ in 0..8 {
            let mut connection = world.connect().await?;
            tasks.spawn(async move { OutboxRepository::new(schema).migrate(&mut connection).await });
        }
        let done = tasks.join_all().await.into_iter().collect::<Result<Vec<_>, _>>()?;
        let fresh = done.iter().filter(|migrated| **migrated == FRESH).count();
        assert_eq!((fresh, done.iter().filter(|migrated| **migrated == UNCHANGED).count()), (1, 7), "{done:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_schemas_in_one_database_have_a_relay_each() -> Result<()> {
    let first = World::new().await?;
    let mut settings = first.settings.clone();
    let odd = "Other \"schema\"; it's";
    settings.database.schema = odd.into();
    settings.redis.stream_prefix = format!("{}other:", first.settings.redis.stream_prefix);
    let other = OutboxRepository::new(odd);
    let mut connection = first.connect().await?;
    assert_eq!(other.migrate(&mut connection).await?, FRESH);
    assert_eq!(other.migrate(&mut connection).await?, UNCHANGED);

    let relays = [first.relay()?, commitstream::relay::OutboxProcessor::new(settings.clone())?.start()];
    for (schema, aggregate_type) in [("public", "in_public"), ("\"Other \"\"schema\"\"; it's\"", "in_other")] {
        let insert = format!(
            "INSERT INTO {schema}.event_outbox (event_type, aggregate_type, aggregate_id, payload)
             VALUES ('E', '{aggregate_type}', '1', '{{}}');"
        );
        first.database.psql(&insert.repeat(3))?;
    }
    for relay in &relays {
        relay.watch().wait_for(|status| status.published == 3).await?;
    }
    for relay in relays {
        relay.stop().await?;
    }
    assert_eq!(first.raw_entries("in_public").await?.len(), 3);
    assert_eq!(first.raw_entries("other:in_other").await?.len(), 3);
    assert_eq!(
        first.streams.list().await?,
        [first.streams.stream_of("in_public")],
        "the prefix of the other begins with this one's"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_another_making_is_left_alone() -> Result<()> {
    let world = World::unmigrated()?;
    world
        .database
        .psql("CREATE TABLE event_outbox (id int PRIMARY KEY, note text); INSERT INTO event_outbox VALUES (1, 'ours');")?;
    let before = definition(&world)?;
    let mut connection = world.connect().await?;
    let error = world.outbox.migrate(&mut connection).await.unwrap_err();
    assert!(matches!(&error, OutboxError::ForeignTable { schema } if schema == "public"), "{error:?}");
    assert_eq!(definition(&world)?, before);
    assert_eq!(world.database.psql("SELECT * FROM event_outbox;")?, "1|ours\n");
    assert!(world.outbox.check_migrated(&mut connection).await.is_err_and(|e| e.is_not_migrated()));
    Ok(())
}

/// A renamed table keeps the names of its indexes, which are ours too where it comes from the reference system. In a schema of its
/// own it takes them along.
#[tokio::test(flavor = "multi_thread")]
async fn the_way_out_that_the_refusal_names_works() -> Result<()> {
    let world = World::unmigrated()?;
    world.database.psql(
        "CREATE TABLE event_outbox (id uuid PRIMARY KEY, status text, created_at timestamptz);
         CREATE INDEX idx_outbox_pending_for_processing ON event_outbox (created_at) WHERE status = 'PENDING';",
    )?;
    let mut connection = world.connect().await?;
    let error = world.outbox.migrate(&mut connection).await.unwrap_err().to_string();
    assert!(error.contains("ALTER TABLE event_outbox SET SCHEMA"), "{error}");
    world.database.psql("CREATE SCHEMA old; ALTER TABLE event_outbox SET SCHEMA old;")?;
    assert_eq!(world.outbox.migrate(&mut connection).await?, FRESH);
    Ok(())
}

/// Half a migration must not stay when something is in its way.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_fails_leaves_nothing_behind() -> Result<()> {
    let world = World::unmigrated()?;
    world.database.psql("CREATE TABLE outbox_lease (n int);")?;
    let before = definition(&world)?;
    let mut connection = world.connect().await?;
    let error = world.outbox.migrate(&mut connection).await.unwrap_err();
    assert!(matches!(error, OutboxError::Database { .. }), "{error:?}");
    assert_eq!(definition(&world)?, before);
    world.database.psql("DROP TABLE outbox_lease;")?;
    assert_eq!(world.outbox.migrate(&mut connection).await?, FRESH, "the connection is still usable");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_files_applied_by_other_tools_are_the_same_migration() -> Result<()> {
    let world = World::unmigrated()?;
    let mut connection = world.connect().await?;
    for file in MIGRATIONS {
        world.database.psql(file)?;
    }
    assert_eq!(world.outbox.migrate(&mut connection).await?, UNCHANGED);
    // As Flyway does: in a transaction, with the schema first in the search_path.
    let files = MIGRATIONS.map(|file| format!("BEGIN; {file} COMMIT;")).concat();
    world.database.psql(&format!("CREATE SCHEMA flyway; SET search_path TO flyway, public; {files}"))?;
    let outbox = OutboxRepository::new("flyway");
    assert_eq!(outbox.migrate(&mut connection).await?, UNCHANGED);
    outbox.check_migrated(&mut connection).await?;
    OutboxRepository::new("ours").migrate(&mut connection).await?;
    assert_eq!(columns(&world, "flyway")?, columns(&world, "public")?);
    assert_eq!(columns(&world, "ours")?, columns(&world, "public")?);
    // Names a fourth schema with nothing in it.
    let error = OutboxRepository::new("nowhere").stats(&mut connection).await.unwrap_err();
    assert!(error.is_not_migrated() && error.to_string().contains("\"nowhere\""), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_refuses_what_cannot_be_sent_and_says_why() -> Result<()> {
    let long = format!("repeat('x', {})", 256);
    let umlauts = "repeat('\u{e4}', 128)";
    let cases = [
        ("status", "'SENT'", "event_outbox_status_is_known"),
        ("status", "'pending'", "event_outbox_status_is_known"),
        ("event_type", "''", "event_outbox_event_type_has_1_to_255_bytes"),
        ("event_type", &long, "event_outbox_event_type_has_1_to_255_bytes"),
        ("aggregate_type", "''", "event_outbox_aggregate_type_has_1_to_255_bytes"),
        ("aggregate_type", umlauts, "event_outbox_aggregate_type_has_1_to_255_bytes"),
        ("aggregate_type", "'a{b'", "event_outbox_aggregate_type_has_no_brace"),
        ("aggregate_type", "'}'", "event_outbox_aggregate_type_has_no_brace"),
        ("aggregate_type", "'user:dead'", "event_outbox_aggregate_type_does_not_end_in_dead"),
        ("aggregate_type", "':dead'", "event_outbox_aggregate_type_does_not_end_in_dead"),
        ("aggregate_id", "''", "event_outbox_aggregate_id_has_1_to_255_bytes"),
        ("aggregate_id", &long, "event_outbox_aggregate_id_has_1_to_255_bytes"),
        ("headers", "'[]'", "event_outbox_headers_is_an_object"),
        ("headers", "'null'", "event_outbox_headers_is_an_object"),
        ("retry_count", "-1", "event_outbox_retry_count_is_not_negative"),
        ("occurred_at", "'infinity'", "event_outbox_times_have_four_digit_years"),
        ("occurred_at", "'-infinity'", "event_outbox_times_have_four_digit_years"),
        ("occurred_at", "'10000-01-01'", "event_outbox_times_have_four_digit_years"),
        ("occurred_at", "'0044-03-15 BC'", "event_outbox_times_have_four_digit_years"),
        ("created_at", "'infinity'", "event_outbox_times_have_four_digit_years"),
    ];
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let mut connection = world.connect().await?;
        for (column, value, constraint) in cases {
            let refused = insert_with(&mut connection, column, value).await;
            let error = refused.err().with_context(|| format!("{column} = {value} was taken"))?;
            let named = error.as_database_error().and_then(|e| e.constraint());
            assert_eq!(named, Some(constraint), "{column} = {value}: {error}");
        }
        for column in
            ["event_type", "aggregate_type", "aggregate_id", "payload", "headers", "status", "retry_count", "created_at"]
        {
            let refused = insert_with(&mut connection, column, "NULL").await;
            let error = refused.err().with_context(|| format!("{column} NULL was taken"))?;
            assert_eq!(error.as_database_error().and_then(|e| e.code()).as_deref(), Some("23502"), "{column}: {error}");
        }
        for (column, value) in [
            ("event_type", "repeat('x', 255)"),
            ("aggregate_type", "'user:deadline'"),
            ("aggregate_type", "'dead'"),
            ("aggregate_id", "'{}'"),
            ("aggregate_id", "'user:dead'"),
            ("occurred_at", "'0001-01-02Z'"),
        ] {
            insert_with(&mut connection, column, value).await.with_context(|| format!("{column} = {value}"))?;
        }
    }
    Ok(())
}

/// Inserts a row that is valid but for the one column.
async fn insert_with(connection: &mut PgConnection, column: &str, value: &str) -> Result<(), sqlx::Error> {
    let mut columns = vec![("event_type", "'E'"), ("aggregate_type", "'user'"), ("aggregate_id", "'1'"), ("payload", "'{}'")];
    match columns.iter_mut().find(|(name, _)| *name == column) {
        Some(place) => place.1 = value,
        None => columns.push((column, value)),
    }
    let (names, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    let sql = format!("INSERT INTO event_outbox ({}) VALUES ({})", names.join(", "), values.join(", "));
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_stable_and_spread() -> Result<()> {
    let world = World::new().await?;
    world.insert(20_000, 10_000).await?;
    let spread = "SELECT min(partition_no), max(partition_no), count(DISTINCT partition_no),
                         count(DISTINCT (aggregate_id, partition_no)) FROM event_outbox;";
    assert_eq!(world.database.psql(spread)?, "0|63|64|10000\n", "an aggregate is in one partition");
    let most = "SELECT max(n), min(n) FROM (SELECT count(*) AS n FROM event_outbox GROUP BY partition_no) AS p;";
    let counts = world.database.psql(most)?;
    let (most, least) = counts.trim().split_once('|').context("two columns")?;
    assert!(most.parse::<u32>()? < 500 && least.parse::<u32>()? > 150, "{counts} of 312 on average");
    // Rows that are stored keep these numbers, so they may never change.
    let known = "TRUNCATE event_outbox;
        INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
        VALUES ('E', 'user', '42', '{}'), ('E', 'order', 'A-1', '{}'), ('E', '\u{e4}', '\u{1f600}', '{}');
        SELECT string_agg(partition_no::text, ',' ORDER BY seq) FROM event_outbox;";
    assert_eq!(world.database.psql(known)?, "42,1,45\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn default_ids_are_uuid_version_7_in_order_of_time() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let before = chrono::Utc::now().timestamp_millis();
    let ids: Vec<Uuid> =
        sqlx::query_scalar("SELECT outbox_uuid_v7() FROM generate_series(1, 50000)").fetch_all(&mut connection).await?;
    let after = chrono::Utc::now().timestamp_millis();
    assert!(ids.iter().all(|id| id.get_version_num() == 7 && id.get_variant() == uuid::Variant::RFC4122));
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "all different");
    let times: Vec<i64> = ids.iter().map(|id| i64::try_from(id.as_u128() >> 80)).collect::<Result<_, _>>()?;
    assert!(times.is_sorted(), "by millisecond");
    // The function rounds to the nearest millisecond.
    assert!(times[0] >= before && times[times.len() - 1] <= after + 1, "{before} {times:?} {after}");
    assert!(times[0] < times[times.len() - 1], "the clock is read for each row");
    Ok(())
}

/// Everything in the user's schemas: relations with their columns, indexes, constraints, functions.
fn definition(world: &World) -> Result<String> {
    Ok(world.database.psql(
        "SELECT table_schema, table_name, column_name, data_type, column_default FROM information_schema.columns
         WHERE table_schema NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2, ordinal_position;
         SELECT indexdef FROM pg_indexes WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1;
         SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint ORDER BY 1, 2;
         SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1;
         SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' ORDER BY 1;",
    )?)
}

fn columns(world: &World, schema: &str) -> Result<String> {
    Ok(world.database.psql(&format!(
        "SELECT table_name, column_name, data_type, is_nullable, is_generated, is_identity
         FROM information_schema.columns WHERE table_schema = '{schema}' ORDER BY 1, ordinal_position;
         SELECT replace(indexdef, '{schema}.', '') FROM pg_indexes WHERE schemaname = '{schema}' ORDER BY indexname;"
    ))?)
}

/// An outbox of an earlier build, with events and a batch that was left open, goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_of_an_earlier_version_is_carried_on() -> Result<()> {
    for (version, files) in (3..).zip(1..MIGRATIONS.len()) {
        let world = World::unmigrated()?;
        let mut connection = world.connect().await?;
        world.database.psql(&MIGRATIONS[..files].concat())?;
        world.insert(1_000, 20).await?;
        world.database.psql(&format!(
            "INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids)
             SELECT gen_random_uuid(), gen_random_uuid(), '{}', array_agg(id ORDER BY seq) FROM event_outbox WHERE seq <= 100;",
            world.user_stream()
        ))?;
        assert!(world.outbox.check_migrated(&mut connection).await.is_err_and(|e| e.is_not_migrated()));
        assert_eq!(world.outbox.migrate(&mut connection).await?, Migrated { from: Some(version), to: 9 });
        let relay = world.relay()?;
        world.insert(1_000, 20).await?;
        world.drained().await?;
        relay.stop().await?;
        assert_eq!(world.audit().await?, 2_000);
    }
    Ok(())
}
