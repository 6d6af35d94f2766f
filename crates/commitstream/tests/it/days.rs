//! The partitions of a table that is partitioned by day: made ahead and dropped, and nothing lost by it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chrono::{Days, NaiveDate, Utc};
use commitstream::outbox::{AfterPublishing, Fate, OutboxError, Partitions, Settlement};
use commitstream::relay::{cleanup, days};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::{FUNCTIONS, Form, World, eventually, eventually_waits};

pub fn partitions(world: &World) -> Result<Vec<String>> {
    let sql = "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'event_outbox'::regclass ORDER BY inhrelid::regclass::text;";
    Ok(world.database.psql(sql)?.lines().map(str::to_owned).collect())
}

fn day(from_today: i64) -> NaiveDate {
    let today = Utc::now().date_naive();
    if from_today < 0 { today - Days::new(from_today.unsigned_abs()) } else { today + Days::new(from_today.unsigned_abs()) }
}

fn name(from_today: i64) -> String {
    day(from_today).format("event_outbox_p%Y%m%d").to_string()
}

/// Inserts events with ids of a day, counted from today, and other columns as given.
fn insert_on(world: &World, from_today: i64, numbers: std::ops::RangeInclusive<u32>, columns: &str, values: &str) -> Result<()> {
    let (first, last) = numbers.into_inner();
    world.database.psql(&format!(
        "INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload, {columns})
         SELECT outbox_test_id({from_today}, n), 'E', 'user', n::text, jsonb_build_object('n', n), {values}
         FROM generate_series({first}, {last}) n;"
    ))?;
    Ok(())
}

pub fn count(world: &World, table: &str) -> Result<u64> {
    Ok(world.database.psql(&format!("SELECT count(*) FROM {table};"))?.trim().parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_came_before_their_partition_move_into_it() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    let mut connection = world.connect().await?;
    insert_on(&world, 5, 1..=100, "headers", r#"'{"a": 1}'"#)?;
    insert_on(&world, 6, 1..=10_001, "headers", "'{}'")?;
    let rows = "SELECT * FROM event_outbox ORDER BY seq;";
    let before = world.database.psql(rows)?;

    assert_eq!(world.outbox.make_day(&mut connection, day(5)).await?, Some(name(5)));
    assert_eq!(world.outbox.make_day(&mut connection, day(5)).await?, None, "it is there");
    assert_eq!(world.outbox.make_day(&mut connection, day(6)).await?, None, "too many rows to move");
    assert_eq!(world.outbox.make_day(&mut connection, day(7)).await?, Some(name(7)));

    assert_eq!(world.database.psql(rows)?, before);
    assert_eq!((count(&world, &name(5))?, count(&world, "event_outbox_rest")?), (100, 10_001));
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 10_101);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_day_is_dropped_and_what_is_not_done_outlives_it() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    let mut connection = world.connect().await?;
    insert_on(&world, -9, 1..=1_000, "status, published_at", "'PUBLISHED', now() - interval '9 days'")?;
    insert_on(&world, -9, 1_001..=1_010, "status, published_at", "'PUBLISHED', now() - interval '6 days'")?;
    insert_on(&world, -9, 1_011..=1_012, "status", "'PUBLISHED'")?;
    insert_on(&world, -9, 1_013..=1_015, "status, last_error, retry_count", "'FAILED', 'why', 3")?;
    insert_on(&world, -9, 1_016..=1_016, "status", "'PROCESSING'")?;
    insert_on(&world, -9, 1_017..=1_030, "next_retry_at, headers", r#"now(), '{"a": 1}'"#)?;
    insert_on(&world, -7, 1..=100, "status, published_at", "'PUBLISHED', now() - interval '8 days'")?;
    insert_on(&world, 0, 1..=100, "status, published_at", "'PUBLISHED', now() - interval '8 days'")?;
    let alive = "SELECT * FROM event_outbox WHERE seq > 1000 ORDER BY seq;";
    let before = world.database.psql(alive)?;

    let cleaned = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |_| ()).await?;
    let changed = cleaned.days.context("it has partitions")?;
    assert_eq!((cleaned.events, changed.moved), (0, 30), "younger days wait for their turn");
    assert_eq!(changed.dropped, [name(-10), name(-9), name(-8)]);
    assert!(changed.bytes > 100_000 && changed.kept.is_empty() && !changed.postponed, "{changed:?}");
    assert_eq!(world.database.psql(alive)?, before, "with all their columns");
    assert_eq!(count(&world, "event_outbox_rest")?, 30);
    assert_eq!(world.database.psql("SELECT to_regclass(outbox_test_name(-9)) IS NULL;")?, "t\n");

    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.raw_entries("user").await?.len(), 15);
    // What is in event_outbox_rest goes row by row.
    world.database.psql(
        "UPDATE event_outbox SET published_at = now() - interval '8 days' WHERE published_at > now() - interval '7 days';",
    )?;
    let cleaned = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |_| ()).await?;
    assert_eq!((cleaned.events, cleaned.days), (25, Some(days::DaysChanged::default())));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_clean_ups_at_once_drop_each_day_once() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    for from_today in [-10, -9, -8] {
        insert_on(&world, from_today, 1..=100, "headers", "'{}'")?;
    }
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let (mut connection, outbox, settings) = (world.connect().await?, world.outbox.clone(), world.settings.clone());
        tasks.spawn(async move {
            let cleaned = cleanup::run_once(&outbox, &mut connection, &settings, |_| ()).await?;
            cleaned.days.context("it has partitions")
        });
    }
    let done = tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    let mut dropped: Vec<_> = done.iter().flat_map(|changed| changed.dropped.clone()).collect();
    dropped.sort();
    assert_eq!(dropped, [name(-10), name(-9), name(-8)], "{done:?}");
    assert_eq!((done.iter().map(|changed| changed.moved).sum(), count(&world, "event_outbox_rest")?), (300, 300));
    Ok(())
}

/// Days that would take too long to empty are kept, and say so; what stands in them for good does not keep the other rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_day_with_too_much_to_move_is_kept() -> Result<()> {
    let mut world = World::of(Form::ByDay).await?;
    world.settings.outbox.cleanup.batch_size = 100;
    let mut connection = world.connect().await?;
    for from_today in [-9, -8] {
        insert_on(&world, from_today, 1..=250, "status, published_at", "'PUBLISHED', now() - interval '8 days'")?;
    }
    insert_on(&world, -9, 1_000..=11_000, "status", "'FAILED'")?;
    insert_on(&world, -8, 1_000..=11_000, "status, published_at", "'PUBLISHED', now()")?;
    let week = Duration::from_secs(7 * 86_400);
    let fates = world.outbox.overdue(&mut connection, week).await?.into_iter().map(|day| day.fate).collect::<Vec<_>>();
    assert_eq!(fates, [Fate::Drop, Fate::RowByRow, Fate::Wait]);

    let cleaned = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |_| ()).await?;
    let changed = cleaned.days.context("it has partitions")?;
    assert_eq!((cleaned.events, changed.moved), (250, 0));
    assert_eq!((changed.dropped, changed.kept), (vec![name(-10)], vec![name(-9), name(-8)]));
    assert_eq!((count(&world, &name(-9))?, count(&world, &name(-8))?), (10_001, 10_251));
    Ok(())
}

/// A settle that is asked for while a day is dropped waits, and then finds the row in its new place, whether its plan was made
/// before or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_settle_that_waited_for_a_drop_finds_its_rows() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    let (mut settles, mut drops) = (world.connect().await?, world.connect().await?);
    let (mut blocks, mut watches) = (world.connect().await?, world.connect().await?);
    let overdue = world.outbox.overdue(&mut drops, Duration::ZERO).await?;
    let mut waited = 0;
    // From the sixth time on, PostgreSQL may keep one plan.
    for (round, overdue) in (0_i64..).zip(&overdue) {
        let from_today = round - 10;
        assert_eq!(overdue.name, name(from_today));
        insert_on(&world, from_today, 1..=10, "headers", "'{}'")?;
        let batch_id = claim(&world, &mut settles).await?;
        let settlement = [Settlement { batch_id, appended: 10, last_entry: None, refusals: Vec::new() }];
        // With the table locked, the drop waits for its last lock until this transaction ends.
        let mut block = blocks.begin().await?;
        sqlx::query("LOCK TABLE ONLY event_outbox_rest IN ACCESS SHARE MODE").execute(&mut *block).await?;
        let drop = world.outbox.drop_day(&mut drops, overdue, Duration::from_secs(60));
        let settle = async {
            eventually_waits(&mut watches, "DETACH PARTITION").await?;
            let settle = world.outbox.settle(&mut settles, &settlement, AfterPublishing::Keep);
            let release = async {
                eventually_waits(&mut watches, "settled AS").await?;
                block.commit().await?;
                anyhow::Ok(())
            };
            let (settled, released) = tokio::join!(settle, release);
            released?;
            anyhow::Ok(settled?)
        };
        let (dropped, settled) = tokio::join!(drop, settle);
        assert_eq!(settled?, 1);
        match dropped {
            Ok(moved) => {
                assert_eq!(moved, Some(10));
                waited += 1;
            }
            Err(OutboxError::Busy { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        assert_eq!(world.stats().await?.published, 10 * (round + 1), "round {round}");
        assert_eq!(world.stats().await?.pending, 0, "round {round}");
    }
    assert!(waited >= 3, "only {waited} settles waited for a drop");
    Ok(())
}

/// Claims everything there is as one batch.
async fn claim(world: &World, connection: &mut PgConnection) -> Result<Uuid> {
    let request = world.everything(connection, Uuid::now_v7()).await?;
    let claimed = world.outbox.claim(connection, &request).await?.batches;
    Ok(claimed.first().context("a batch")?.id)
}

/// A relay at work on events of all days, while one day after the other is dropped.
#[tokio::test(flavor = "multi_thread")]
async fn dropping_days_loses_and_doubles_nothing_that_is_on_its_way() -> Result<()> {
    let mut world = World::of(Form::ByDay).await?;
    world.settings.outbox.processor.batch_size = 10;
    world.settings.outbox.cleanup.enabled = false;
    let relay = world.relay()?;
    let mut producer = world.connect().await?;
    let (outbox, mut drops) = (world.outbox.clone(), world.connect().await?);
    let producing = async {
        let insert = "INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload)
                      SELECT outbox_test_id(-(n % 11), $1 * 100 + n), 'E', 'user', (n % 20)::text, '{}' FROM generate_series(1, 22) n";
        for round in 0..300_i64 {
            sqlx::query(insert).bind(round).execute(&mut producer).await?;
        }
        anyhow::Ok(())
    };
    let dropping = async {
        let mut moved = 0;
        for day in outbox.overdue(&mut drops, Duration::ZERO).await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
            moved += outbox.drop_day(&mut drops, &day, Duration::from_secs(600)).await?.context("few rows")?;
        }
        anyhow::Ok(moved)
    };
    let (produced, moved) = tokio::join!(producing, dropping);
    produced?;
    let moved = moved?;
    world.drained().await?;
    relay.stop().await?;
    println!("{moved} of 6,600 events moved");
    assert!(moved > 100);
    assert_eq!(world.audit().await?, 6_600);
    assert!(world.outbox.open_batches(&mut world.connect().await?, Partitions::ALL).await?.is_empty());
    Ok(())
}

/// While somebody reads the table in a long transaction, partitions are left as they are, and producers hardly notice the tries.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_transaction_postpones_changes_and_producers_go_on() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    let (mut reads, mut cleans, mut writes) = (world.connect().await?, world.connect().await?, world.connect().await?);
    world.database.psql("DO $$ BEGIN EXECUTE format('DROP TABLE %s', outbox_test_name(3)); END $$;")?;
    let mut reading = reads.begin().await?;
    sqlx::query("SELECT count(*) FROM event_outbox").execute(&mut *reading).await?;
    let is_done = AtomicBool::new(false);
    let clean = async {
        let cleaned = cleanup::run_once(&world.outbox, &mut cleans, &world.settings, |_| ()).await;
        is_done.store(true, Ordering::Relaxed);
        cleaned
    };
    let produce = async {
        let mut longest = Duration::ZERO;
        let insert =
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{}')";
        while !is_done.load(Ordering::Relaxed) {
            let started = Instant::now();
            sqlx::query(insert).execute(&mut writes).await?;
            longest = longest.max(started.elapsed());
        }
        anyhow::Ok(longest)
    };
    let (cleaned, longest) = tokio::join!(clean, produce);
    let changed = cleaned?.days.context("it has partitions")?;
    assert!(changed.postponed && changed.made.is_empty() && changed.dropped.is_empty(), "{changed:?}");
    let longest = longest?;
    assert!(longest > Duration::from_millis(100) && longest < Duration::from_secs(2), "{longest:?}");

    reading.rollback().await?;
    let cleaned = cleanup::run_once(&world.outbox, &mut cleans, &world.settings, |_| ()).await?;
    let changed = cleaned.days.context("it has partitions")?;
    assert_eq!((changed.made, changed.dropped), (vec![name(3)], vec![name(-10), name(-9), name(-8)]));
    Ok(())
}

/// The point of it: dropping days gives the space back and leaves nothing to vacuum; deleting rows does neither.
#[tokio::test(flavor = "multi_thread")]
async fn dropping_gives_space_back_at_once_and_deleting_does_not() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let mut connection = world.connect().await?;
        if form == Form::Whole {
            world.database.psql(FUNCTIONS)?;
        }
        world.database.psql(
            "DO $$ DECLARE leaf regclass; BEGIN
                 FOR leaf IN SELECT oid FROM pg_class WHERE relname LIKE 'event_outbox%' AND relkind = 'r' LOOP
                     EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off)', leaf);
                 END LOOP;
             END $$;",
        )?;
        let size = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname LIKE 'event_outbox%' AND relkind = 'r'";
        let size = async |connection: &mut PgConnection| -> Result<i64> {
            Ok(sqlx::query_scalar(AssertSqlSafe(format!("SELECT ({size})::bigint"))).fetch_one(connection).await?)
        };
        let empty = size(&mut connection).await?;
        insert_on(&world, -9, 1..=50_000, "status, published_at", "'PUBLISHED', now() - interval '8 days'")?;
        let full = size(&mut connection).await?;
        let cleaned = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |_| ()).await?;
        assert_eq!(count(&world, "event_outbox")?, 0);
        let after = size(&mut connection).await?;
        connection.close().await?;
        let dead: i64 = dead_rows(&world, if form == Form::Whole { 50_000 } else { 0 }).await?;
        println!("{form:?}: {empty} bytes empty, {full} full, {after} cleaned up, {dead} dead rows");
        match form {
            Form::Whole => assert!(cleaned.events == 50_000 && after >= full && dead == 50_000),
            Form::ByDay => assert!(cleaned.events == 0 && after <= empty && dead == 0),
        }
    }
    Ok(())
}

/// What the statistics come to say of dead rows; they arrive when the session that made them is gone.
async fn dead_rows(world: &World, expected: i64) -> Result<i64> {
    let sql = "SELECT COALESCE(sum(n_dead_tup), 0)::bigint FROM pg_stat_user_tables WHERE relname LIKE 'event_outbox%'";
    let (mut connection, mut dead) = (world.connect().await?, -1);
    eventually("the statistics", async || {
        dead = sqlx::query_scalar(sql).fetch_one(&mut connection).await?;
        Ok(dead == expected)
    })
    .await?;
    Ok(dead)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_makes_and_drops_days_by_itself() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    world.database.psql("DO $$ BEGIN EXECUTE format('DROP TABLE %s', outbox_test_name(3)); END $$;")?;
    let relay = world.relay()?;
    eventually("the days to change", async || {
        let names = partitions(&world)?;
        Ok(names.contains(&name(3)) && !names.contains(&name(-8)) && names.contains(&name(-7)))
    })
    .await?;
    relay.stop().await?;
    Ok(())
}

/// Whoever may delete rows need not own the table: the rows go, and the error says what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_owners_rights_rows_are_cleaned_up_all_the_same() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    let mut connection = world.connect().await?;
    world.database.psql(
        "INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload, status, published_at)
         VALUES (gen_random_uuid(), 'E', 'user', '1', '{}', 'PUBLISHED', now() - interval '8 days');",
    )?;
    let role = format!("relay_{}", world.database.name());
    world.database.psql(&format!("CREATE ROLE {role}; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};"))?;
    sqlx::query(AssertSqlSafe(format!("SET ROLE {role}"))).execute(&mut connection).await?;
    let error = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |_| ()).await.unwrap_err();
    let OutboxError::Database { source, .. } = &error else { anyhow::bail!("{error:?}") };
    assert!(source.to_string().contains("must be owner of table event_outbox"), "{source}");
    assert_eq!(count(&world, "event_outbox")?, 0);
    world.database.psql(&format!("DROP OWNED BY {role}; DROP ROLE {role};"))?;
    Ok(())
}
