//! The inbox: an effect happens once, however often its event is delivered.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::relay::cleanup;
use sqlx::Connection;
use uuid::Uuid;

use crate::support::{World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_new_to_a_consumer_once() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let event = Uuid::now_v7();
    assert!(world.outbox.remember(&mut connection, "mailer", event).await?);
    assert!(!world.outbox.remember(&mut connection, "mailer", event).await?);
    assert!(world.outbox.remember(&mut connection, "billing", event).await?, "another consumer has not handled it");
    assert!(world.outbox.remember(&mut connection, "mailer", Uuid::now_v7()).await?);
    for name in [String::new(), "x".repeat(256)] {
        let error =
            world.outbox.remember(&mut connection, &name, event).await.err().context("a name of 0 or 256 bytes was taken")?;
        assert!(format!("{:?}", anyhow::Error::from(error)).contains("event_inbox_consumer_has_1_to_255_bytes"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_handler_waits_for_the_first_and_finds_what_it_did() -> Result<()> {
    for first_commits in [true, false] {
        let world = World::new().await?;
        let (mut one, mut other) = (world.connect().await?, world.connect().await?);
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut other).await?;
        let event = Uuid::now_v7();
        let mut first = one.begin().await?;
        assert!(world.outbox.remember(&mut first, "mailer", event).await?);

        let outbox = world.outbox.clone();
        let second = tokio::spawn(async move {
            let mut second = other.begin().await?;
            let is_new = outbox.remember(&mut second, "mailer", event).await?;
            second.commit().await?;
            anyhow::Ok(is_new)
        });
        let mut watcher = world.connect().await?;
        eventually("the second to wait for the first", async || {
            let waits = "SELECT cardinality(pg_blocking_pids($1)) > 0";
            Ok(sqlx::query_scalar(waits).bind(pid).fetch_one(&mut watcher).await?)
        })
        .await?;
        if first_commits {
            first.commit().await?;
        } else {
            first.rollback().await?;
        }
        assert_eq!(second.await??, !first_commits, "what was rolled back was not handled");
        assert_eq!(world.database.psql("SELECT count(*) FROM event_inbox")?, "1\n");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clean_up_forgets_what_was_handled_long_ago_only() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.cleanup.batch_size = 100;
    world.insert(10, 1).await?;
    world.database.psql(
        "INSERT INTO event_inbox (consumer, event_id, handled_at)
         SELECT 'mailer', gen_random_uuid(), now() - CASE WHEN n <= 250 THEN interval '31 days' ELSE interval '29 days' END
         FROM generate_series(1, 300) n",
    )?;
    let mut connection = world.connect().await?;
    let (mut steps, mut most, mut before) = (0, 0, 0);
    let cleaned = cleanup::run_once(&world.outbox, &mut connection, &world.settings, |cleaned| {
        steps += 1;
        most = most.max(cleaned.inbox - before);
        before = cleaned.inbox;
    })
    .await?;
    assert_eq!((cleaned.events, cleaned.batches, cleaned.inbox), (0, 0, 250));
    assert_eq!((steps, most), (3, 100), "a bounded number at a time");
    assert_eq!(world.database.psql("SELECT count(*), (SELECT count(*) FROM event_outbox) FROM event_inbox")?, "50|10\n");
    world.database.psql("INSERT INTO event_inbox VALUES ('oldest', gen_random_uuid(), now() - interval '39 days')")?;
    assert_eq!(world.outbox.forget(&mut connection, Duration::ZERO, 1).await?, 1);
    assert_eq!(world.database.psql("SELECT DISTINCT consumer FROM event_inbox")?, "mailer\n", "the oldest first");
    Ok(())
}
