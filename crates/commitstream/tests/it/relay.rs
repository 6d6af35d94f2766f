//! The relay does its work: order, retries, late commits, clean-up.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::outbox::Partitions;
use commitstream::relay::{OutboxProcessor, RelayError, RelayState, cleanup};
use sqlx::Connection;

use crate::support::{Form, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_100_000_rows_by_plain_sql_is_drained_once_and_in_order() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 1_000;
    world.insert(100_000, 1_000).await?;
    let started = std::time::Instant::now();
    let relay = world.relay()?;
    world.drained().await?;
    let seconds = started.elapsed().as_secs_f64();
    println!("drained 100,000 rows in {seconds:.2} s: {:.0} events/s", 100_000.0 / seconds);
    relay.stop().await?;
    assert_eq!(world.audit().await?, 100_000);
    Ok(())
}

#[test]
fn a_relay_of_a_disabled_outbox_is_refused() -> Result<()> {
    let mut world = World::unmigrated()?;
    world.settings.outbox.enabled = false;
    let refused = OutboxProcessor::new(world.settings.clone()).err().context("it must be refused")?;
    assert!(matches!(refused, RelayError::OutboxDisabled), "{refused:?}");
    assert!(refused.to_string().contains("set OUTBOX_ENABLED=true"), "{refused}");
    world.settings.outbox.enabled = true;
    OutboxProcessor::new(world.settings)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_retention_rows_go_as_they_are_published() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.cleanup.retention_days = 0;
    world.insert(10_000, 50).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.rows().await?, [""; 0]);
    let entries = world.entries(&world.user_stream()).await?;
    assert_eq!(entries.len(), 10_000);
    let mut last = std::collections::HashMap::new();
    for entry in entries {
        let event = entry.envelope()?;
        let number = serde_json::from_str::<serde_json::Value>(event.payload.get())?["n"].as_i64();
        assert!(last.insert(event.aggregate_id, number).is_none_or(|before| before < number), "each once and in order");
    }
    Ok(())
}

/// The poll interval is a minute, so only a notification can be in time. Pauses are random, to meet the relay
/// awake, asking for the sleep lock, and asleep.
#[tokio::test(flavor = "multi_thread")]
async fn every_commit_wakes_a_sleeping_relay() -> Result<()> {
    use rand::{Rng, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let mut world = World::new().await?;
    world.settings.outbox.processor.poll_interval = Duration::from_secs(60);
    let relay = world.relay()?;
    let mut status = relay.watch();
    status.wait_for(|s| s.state == RelayState::Active).await?;
    for n in 1..=200 {
        world.insert(1, 1).await?;
        let seen = tokio::time::timeout(Duration::from_secs(5), status.wait_for(|s| s.published >= n)).await;
        assert!(seen.is_ok(), "event {n} was not noticed (seed {seed})");
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..20_000))).await;
    }
    relay.stop().await?;
    assert_eq!(world.audit().await?, 200);
    Ok(())
}

/// A transaction that commits late has a `seq` below the cursor; one that waited for it has one above.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_commit_is_published_before_what_waited_for_it() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let relay = world.relay()?;
        let mut status = relay.watch();
        let (mut late, mut other) = (world.connect().await?, world.connect().await?);
        let insert =
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', $1, '{}')";
        for round in 0..50_u64 {
            let mut first = late.begin().await?;
            sqlx::query(insert).bind("late").execute(&mut *first).await?;
            for _ in 0..3 {
                sqlx::query(insert).bind("other").execute(&mut other).await?;
            }
            // The cursor is past the late event now.
            status.wait_for(|s| s.published >= round * 6 + 3).await?;
            first.commit().await?;
            sqlx::query(insert).bind("late").execute(&mut other).await?;
            sqlx::query(insert).bind("late").execute(&mut other).await?;
            status.wait_for(|s| s.published >= round * 6 + 6).await?;
        }
        relay.stop().await?;
        assert_eq!(world.audit().await?, 300);
    }
    Ok(())
}

/// Sixteen producers that lock their aggregate, hold transactions open for a while, and sometimes roll back.
#[tokio::test(flavor = "multi_thread")]
async fn order_per_aggregate_holds_with_concurrent_producers() -> Result<()> {
    for form in Form::BOTH {
        use rand::{Rng, SeedableRng};
        let seed: u64 = rand::rng().random();
        println!("seed {seed}");
        let world = World::of(form).await?;
        sqlx::raw_sql("CREATE TABLE account (id int PRIMARY KEY); INSERT INTO account SELECT generate_series(0, 19)")
            .execute(&mut world.connect().await?)
            .await?;
        let relay = world.relay()?;
        let mut producers = tokio::task::JoinSet::new();
        for producer in 0..16 {
            let mut connection = world.connect().await?;
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed.wrapping_add(producer));
            producers.spawn(async move {
                let mut committed = 0;
                for _ in 0..100 {
                    let account: i32 = rng.random_range(0..20);
                    let mut tx = connection.begin().await?;
                    sqlx::query("SELECT id FROM account WHERE id = $1 FOR UPDATE").bind(account).execute(&mut *tx).await?;
                    let events = rng.random_range(1..4);
                    sqlx::query(
                        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                     SELECT 'E', 'user', $1, '{}' FROM generate_series(1, $2)",
                    )
                    .bind(account.to_string())
                    .bind(events)
                    .execute(&mut *tx)
                    .await?;
                    tokio::time::sleep(Duration::from_micros(rng.random_range(0..5_000))).await;
                    if rng.random_bool(0.9) {
                        tx.commit().await?;
                        committed += usize::try_from(events)?;
                    } else {
                        tx.rollback().await?;
                    }
                }
                anyhow::Ok(committed)
            });
        }
        let committed: usize = producers.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.into_iter().sum();
        world.drained().await?;
        relay.stop().await?;
        assert_eq!(world.audit().await?, committed, "seed {seed}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_sent_holds_back_its_aggregate_only() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.retry_base_delay = Duration::from_millis(200);
    world.settings.publishing.max_payload_bytes = 2_048;
    let mut connection = world.connect().await?;
    // Events 1 to 300 of thirty aggregates; number 31, of aggregate 1, is too large.
    sqlx::query(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'E', 'user', (n % 30)::text,
                jsonb_build_object('n', n, 'fill', CASE WHEN n = 31 THEN repeat('x', 5000) ELSE '' END)
         FROM generate_series(1, 300) n",
    )
    .execute(&mut connection)
    .await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    status.wait_for(|s| s.published >= 291).await?;
    let held: Vec<String> = sqlx::query_scalar("SELECT DISTINCT aggregate_id FROM event_outbox WHERE status = 'PENDING'")
        .fetch_all(&mut connection)
        .await?;
    assert!(held.is_empty() || held == ["1"], "{held:?}");
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 299);
    let failed = world.stats().await?.recent_failures;
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].retry_count, 3);
    assert!(failed[0].last_error.as_ref().is_some_and(|e| e.starts_with("too large: ") && e.contains("2048")), "{failed:?}");
    Ok(())
}

/// A refused event is published by a later attempt, and what waited behind it follows in order.
#[tokio::test(flavor = "multi_thread")]
async fn order_survives_retries() -> Result<()> {
    for form in Form::BOTH {
        let mut world = World::of(form).await?;
        world.settings.outbox.processor.retry_base_delay = Duration::from_millis(100);
        world.settings.outbox.processor.max_retries = 50;
        world.settings.outbox.processor.retry_max_delay = Duration::from_millis(300);
        world.settings.publishing.max_payload_bytes = 2_048;
        let relay = world.relay()?;
        world.insert(100, 20).await?;
        world.drained().await?;
        let mut connection = world.connect().await?;
        for _ in 0..5 {
            // Every seventh is too large, until somebody makes it smaller.
            sqlx::raw_sql(
                "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                 SELECT 'E', 'user', (n % 20)::text, jsonb_build_object('fill', CASE WHEN n % 7 = 0 THEN repeat('x', 5000) END)
                 FROM generate_series(1, 1000) n",
            )
            .execute(&mut connection)
            .await?;
            eventually("some events to be refused", async || {
                let refused = "SELECT count(*) FROM event_outbox WHERE status = 'PENDING' AND retry_count > 0";
                Ok(sqlx::query_scalar::<_, i64>(refused).fetch_one(&mut connection).await? > 0)
            })
            .await?;
            sqlx::raw_sql("UPDATE event_outbox SET payload = '{}' WHERE status = 'PENDING' AND payload_bytes > 2048")
                .execute(&mut connection)
                .await?;
            world.insert(500, 20).await?;
            world.drained().await?;
        }
        relay.stop().await?;
        assert_eq!(world.audit().await?, 7_600);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_an_older_processor_left_processing_are_sent() -> Result<()> {
    let world = World::new().await?;
    world.insert(10, 3).await?;
    sqlx::raw_sql("UPDATE event_outbox SET status = 'PROCESSING' WHERE seq % 2 = 0").execute(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 10);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_settles_what_is_in_flight() -> Result<()> {
    let world = World::new().await?;
    world.insert(50_000, 100).await?;
    for _ in 0..5 {
        let relay = world.relay()?;
        let mut status = relay.watch();
        status.wait_for(|s| s.published > 0).await?;
        relay.stop().await?;
        let open = world.outbox.open_batches(&mut world.connect().await?, Partitions::ALL).await?;
        assert!(open.is_empty(), "{open:?}");
    }
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 50_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_up_removes_what_is_old_in_small_batches() -> Result<()> {
    // By day it drops most of it as a whole.
    let mut world = World::of(Form::Whole).await?;
    world.settings.outbox.cleanup.batch_size = 100;
    world.insert(1_000, 10).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let mut connection = world.connect().await?;
    sqlx::raw_sql("UPDATE event_outbox SET published_at = now() - interval '8 days' WHERE seq <= 750")
        .execute(&mut connection)
        .await?;
    let mut steps = 0;
    let cleaned = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |_| steps += 1).await?;
    assert_eq!((cleaned.events, cleaned.batches), (750, 0), "batches are younger than the retention");
    assert!(steps >= 7, "{steps} transactions");
    sqlx::raw_sql("UPDATE outbox_batch SET settled_at = now() - interval '8 days'").execute(&mut connection).await?;
    // The relay does the same by itself when it starts, and every interval.
    let relay = world.relay()?;
    eventually("the relay to clean up", async || {
        Ok(sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox_batch").fetch_one(&mut connection).await? == 0)
    })
    .await?;
    relay.stop().await?;
    assert_eq!(world.stats().await?.published, 250);
    Ok(())
}

/// Thousands of events behind one refused event: they are passed over at once, not a claim a second.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_queue_behind_one_event_does_not_hold_up_the_others() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.poll_interval = Duration::from_secs(60);
    world.insert(1, 1).await?;
    let mut connection = world.connect().await?;
    sqlx::raw_sql("UPDATE event_outbox SET retry_count = 1, next_retry_at = now() + interval '1 hour'")
        .execute(&mut connection)
        .await?;
    world.insert(20_000, 1).await?;
    sqlx::raw_sql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'other', '1', '{}')",
    )
    .execute(&mut connection)
    .await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    tokio::time::timeout(Duration::from_secs(20), status.wait_for(|s| s.published == 1)).await??;
    // When the first is free, the rest follows in its order.
    sqlx::raw_sql("UPDATE event_outbox SET next_retry_at = now() WHERE retry_count = 1").execute(&mut connection).await?;
    relay.stop().await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 20_002);
    Ok(())
}

/// Payloads that producers wrote with SQL beyond the limit are not even read, so they hold nothing up.
#[tokio::test(flavor = "multi_thread")]
async fn huge_payloads_written_with_sql_fail_without_being_read() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.max_retries = 0;
    let mut connection = world.connect().await?;
    sqlx::raw_sql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'E', 'huge', n::text, to_jsonb(repeat('x', 20000000)) FROM generate_series(1, 30) n;
         INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{}')",
    )
    .execute(&mut connection)
    .await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let stats = world.stats().await?;
    assert_eq!((stats.published, stats.failed), (1, 30));
    let over = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                VALUES ('E', 'huge', '1', to_jsonb(repeat('x', 70000000)))";
    let refused = sqlx::raw_sql(over).execute(&mut connection).await.unwrap_err().to_string();
    assert!(refused.contains("payload_and_headers_have_at_most_64_mib"), "{refused}");
    Ok(())
}

/// Somebody looks at a row with FOR UPDATE and goes to lunch.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_locked_by_somebody_else_stops_no_other_event() -> Result<()> {
    let world = World::new().await?;
    world.insert(2, 1).await?;
    let (mut connection, mut locker) = (world.connect().await?, world.connect().await?);
    sqlx::raw_sql("UPDATE event_outbox SET next_retry_at = now() + interval '1 hour' WHERE seq = 1")
        .execute(&mut connection)
        .await?;
    let mut locked = locker.begin().await?;
    sqlx::raw_sql("SELECT id FROM event_outbox WHERE seq = 2 FOR UPDATE").execute(&mut *locked).await?;
    let relay = world.relay()?;
    sqlx::raw_sql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'other', '1', '{}')",
    )
    .execute(&mut connection)
    .await?;
    let mut status = relay.watch();
    tokio::time::timeout(Duration::from_secs(5), status.wait_for(|s| s.published == 1)).await??;
    locked.commit().await?;
    sqlx::raw_sql("UPDATE event_outbox SET next_retry_at = now() WHERE seq = 1").execute(&mut connection).await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 3);
    Ok(())
}
