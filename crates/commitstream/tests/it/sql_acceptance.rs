//! The statements of the reference's operators, to the letter, on what the real system leaves in the table; and producers
//! that know nothing but SQL. All on both forms of the table.

use std::time::Duration;

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::support::{Form, World, eventually};

/// Five published `UserCreated`, three `OrderPlaced` that failed, two `TrainingStarted` that nobody has sent yet.
async fn world_of_all_states(form: Form) -> Result<World> {
    let mut world = World::of(form).await?;
    world.settings.outbox.processor.max_retries = 1;
    world.settings.outbox.processor.retry_base_delay = Duration::from_millis(20);
    world.settings.publishing.max_payload_bytes = 1_024;
    world.insert(5, 5).await?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'OrderPlaced', 'order', 'o' || n, jsonb_build_object('fill', repeat('x', 2000)) FROM generate_series(1, 3) n;",
    )?;
    let relay = world.relay()?;
    eventually("all to be published or failed", async || {
        let stats = world.stats().await?;
        Ok((stats.published, stats.failed) == (5, 3))
    })
    .await?;
    relay.stop().await?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         VALUES ('TrainingStarted', 'training', 't1', '{}'), ('TrainingStarted', 'training', 't2', '{}');",
    )?;
    Ok(world)
}

/// What a statement selects: rows of columns.
fn select(world: &World, sql: &str) -> Result<Vec<Vec<String>>> {
    let answer = world.database.psql(sql)?;
    Ok(answer.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_monitoring_statements_say_how_the_outbox_stands() -> Result<()> {
    for form in Form::BOTH {
        let world = world_of_all_states(form).await?;

        let mut by_status = select(&world, "SELECT status, COUNT(*) AS count FROM event_outbox GROUP BY status;")?;
        by_status.sort();
        assert_eq!(by_status, [["FAILED", "3"], ["PENDING", "2"], ["PUBLISHED", "5"]]);

        let pending = select(
            &world,
            "SELECT id, event_type, aggregate_id, created_at, retry_count FROM event_outbox
         WHERE status = 'PENDING' ORDER BY created_at LIMIT 10;",
        )?;
        let shown: Vec<_> = pending.iter().map(|row| (row[1].as_str(), row[2].as_str(), row[4].as_str())).collect();
        assert_eq!(shown, [("TrainingStarted", "t1", "0"), ("TrainingStarted", "t2", "0")]);

        let failed = select(
            &world,
            "SELECT id, event_type, aggregate_id, retry_count, last_error, created_at FROM event_outbox
         WHERE status = 'FAILED' ORDER BY created_at DESC LIMIT 10;",
        )?;
        let shown: Vec<_> = failed.iter().map(|row| (row[1].as_str(), row[2].as_str(), row[3].as_str())).collect();
        assert_eq!(shown, [("OrderPlaced", "o3", "1"), ("OrderPlaced", "o2", "1"), ("OrderPlaced", "o1", "1")], "newest first");
        assert!(failed.iter().all(|row| row[4].starts_with("too large")), "{failed:?}");

        let latency = select(
            &world,
            "SELECT event_type, AVG(EXTRACT(EPOCH FROM (published_at - created_at))) AS avg_latency_seconds
         FROM event_outbox WHERE status = 'PUBLISHED' AND published_at IS NOT NULL GROUP BY event_type;",
        )?;
        assert_eq!((latency.len(), latency[0][0].as_str()), (1, "UserCreated"));
        let seconds: f64 = latency[0][1].parse()?;
        assert!((0.0..60.0).contains(&seconds) && seconds > 0.0, "{seconds} s");

        let reasons = select(
            &world,
            "SELECT SUBSTRING(last_error, 1, 100) AS error_msg, COUNT(*) AS count FROM event_outbox
         WHERE status = 'FAILED' GROUP BY SUBSTRING(last_error, 1, 100) ORDER BY count DESC;",
        )?;
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert!(reasons[0][0].starts_with("too large: 20") && reasons[0][1] == "3", "{reasons:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_event_that_is_reset_by_hand_is_published() -> Result<()> {
    for form in Form::BOTH {
        let world = world_of_all_states(form).await?;
        let relay = world.relay()?;
        eventually("the backlog to be sent", async || Ok(world.stats().await?.published == 7)).await?;
        world.database.psql("UPDATE event_outbox SET payload = '{}' WHERE status = 'FAILED';")?;
        let id = world.database.psql("SELECT id FROM event_outbox WHERE aggregate_id = 'o2';")?;
        let id = id.trim();

        world.database.psql(&format!(
            "UPDATE event_outbox SET status = 'PENDING', retry_count = 0, next_retry_at = NULL, last_error = NULL
         WHERE status = 'FAILED' AND id = '{id}';"
        ))?;

        eventually("the event to be published", async || Ok(world.stats().await?.published == 8)).await?;
        relay.stop().await?;
        assert_eq!(world.stats().await?.failed, 2, "the other failed events stay as they are");
        let entries = world.raw_entries("order").await?;
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0][0], ("id".to_owned(), id.to_owned()));
        assert_eq!(world.audit().await?, 8);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manual_clean_up_removes_old_published_rows_only() -> Result<()> {
    for form in Form::BOTH {
        let world = world_of_all_states(form).await?;
        world.database.psql(
            "UPDATE event_outbox SET created_at = now() - interval '30 days';
         UPDATE event_outbox SET published_at = now() - interval '7 days 1 minute' WHERE status = 'PUBLISHED' AND seq <= 4;",
        )?;

        world
            .database
            .psql("DELETE FROM event_outbox WHERE status = 'PUBLISHED' AND published_at < NOW() - INTERVAL '7 days';")?;

        let stats = world.stats().await?;
        assert_eq!((stats.published, stats.failed, stats.pending), (1, 3, 2));
        let relay = world.relay()?;
        world.drained().await?;
        relay.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_in_plain_sql_publishes_in_its_transaction() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let relay = world.relay()?;
        let before = Utc::now();
        world.database.psql(
            r#"CREATE TABLE users (id int PRIMARY KEY, email text);
        BEGIN;
        INSERT INTO users VALUES (41, 'eve@example.org');
        INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('UserCreated', 'user', '41', '{}');
        ROLLBACK;
        BEGIN;
        INSERT INTO users VALUES (42, 'ada@example.org');
        INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
        VALUES ('UserCreated', 'user', '42', '{"user_id":42,"email":"ada@example.org"}');
        COMMIT;
        INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers, occurred_at)
        VALUES ('UserRenamed', 'user', '42', '[1.50, "\u00e4\n"]', '{"traceparent":"00-1"}', '2026-01-02 03:04:05.6+05:30');"#,
        )?;
        world.drained().await?;
        relay.stop().await?;

        let entries = world.raw_entries("user").await?;
        assert_eq!(entries.len(), 2, "what was rolled back is not published");
        let names = |entry: &[(String, String)]| entry.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>().join(",");
        let value = |entry: usize, field: usize| entries[entry][field].1.as_str();
        assert_eq!(names(&entries[0]), "id,type,aggregate_type,aggregate_id,occurred_at,payload", "no headers: no field");
        assert_eq!(names(&entries[1]), "id,type,aggregate_type,aggregate_id,occurred_at,payload,headers");
        assert_eq!((value(0, 1), value(0, 2), value(0, 3)), ("UserCreated", "user", "42"));
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(value(0, 5))?,
            serde_json::json!({"user_id": 42, "email": "ada@example.org"})
        );

        let id: Uuid = value(0, 0).parse()?;
        assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122), "{id}");
        let occurred_at = DateTime::parse_from_rfc3339(value(0, 4))?;
        assert!(value(0, 4).ends_with('Z') && (before..=Utc::now()).contains(&occurred_at.to_utc()), "{occurred_at}");
        let created_at =
            world.database.psql(&format!("SELECT created_at = '{}' FROM event_outbox WHERE id = '{id}';", value(0, 4)))?;
        assert_eq!(created_at, "t\n", "occurred_at is created_at unless it is given");

        assert_eq!(value(1, 4), "2026-01-01T21:34:05.600000Z", "in UTC, with microseconds");
        assert_eq!((value(1, 5), value(1, 6)), ("[1.50, \"\u{e4}\\n\"]", r#"{"traceparent": "00-1"}"#));
        assert_eq!(world.database.psql("SELECT id FROM users;")?, "42\n");
    }
    Ok(())
}

/// Whoever may insert into the table may publish, with any `search_path`.
#[tokio::test(flavor = "multi_thread")]
async fn a_producer_needs_no_more_than_the_right_to_insert() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let relay = world.relay()?;
        let role = format!("producer_{}", world.database.name());
        world.database.psql(&format!(
            "CREATE ROLE {role};
         GRANT INSERT ON event_outbox TO {role};
         SET ROLE {role};
         SET search_path TO '';
         INSERT INTO public.event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', 'null');
         RESET ROLE;
         DROP OWNED BY {role};
         DROP ROLE {role};"
        ))?;
        world.drained().await?;
        relay.stop().await?;
        assert_eq!(world.audit().await?, 1);
    }
    Ok(())
}

/// A transaction that inserts a thousand times, one row a statement, and rolls back to savepoints.
#[tokio::test(flavor = "multi_thread")]
async fn savepoints_that_are_rolled_back_publish_nothing() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let relay = world.relay()?;
        let insert = |n: u32| {
            format!(
                "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', 'a', '{{\"n\":{n}}}');\n"
            )
        };
        let mut sql = "BEGIN;\n".to_owned();
        for n in 0..500 {
            sql += &format!("{}SAVEPOINT s; {}ROLLBACK TO SAVEPOINT s;\n", insert(n), insert(10_000 + n));
        }
        world.database.psql(&(sql + "COMMIT;"))?;
        world.drained().await?;
        relay.stop().await?;
        assert_eq!(world.audit().await?, 500);
        for (n, entry) in world.raw_entries("user").await?.iter().enumerate() {
            let payload = &entry.iter().find(|(name, _)| name == "payload").context("no payload")?.1;
            assert_eq!(*payload, format!("{{\"n\": {n}}}"));
        }
    }
    Ok(())
}
