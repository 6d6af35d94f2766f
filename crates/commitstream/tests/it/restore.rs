//! PostgreSQL goes back in time, and Redis does not.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::outbox::{self, OutboxError};
use commitstream::relay::RelayState;
use commitstream::verify::{self, Report, VerifyError};
use commitstream_sandbox::Postgres;
use redis::AsyncCommands;
use sqlx::{Connection, Executor, PgConnection};

use crate::support::{World, eventually};

const INSERT: &str = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                      SELECT 'E', 'user', (n % 5)::text, '{}' FROM generate_series(1, $1::int) n";

async fn insert(connection: &mut PgConnection, events: i32) -> Result<()> {
    sqlx::query(INSERT).bind(events).execute(connection).await?;
    Ok(())
}

async fn unsent(connection: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED'").fetch_one(connection).await?)
}

/// All that is unsent is published by a relay that is gone then.
async fn publish(world: &World, connection: &mut PgConnection) -> Result<()> {
    let relay = world.relay()?;
    eventually("all to be published", async || Ok(unsent(&mut *connection).await? == 0)).await?;
    relay.stop().await?;
    Ok(())
}

async fn session(world: &World) -> Result<PgConnection> {
    let url = world.settings.database.url.as_deref().context("a URL")?;
    Ok(outbox::connect(url, "verify", Duration::from_secs(10)).await?)
}

async fn audit(world: &World, connection: &mut PgConnection) -> Result<Report> {
    Ok(verify::run(&world.outbox, connection, &world.streams, 100, |_| ()).await?)
}

fn counts(report: &Report) -> [u64; 5] {
    report.faults().map(|(_, findings)| findings.count)
}

/// A base backup becomes the database of the moment in which it is promoted; what its primary does since is in Redis and not in it.
/// 100 events were published by then and 50 not; 30 came later. One event FAILED by then, and was sent later.
async fn restored() -> Result<(Postgres, World, PgConnection)> {
    let primary = Postgres::start_with(&[("wal_level", "replica")])?;
    let mut world = World::unmigrated()?;
    world.settings.database.url = Some(primary.url());
    let mut connection = PgConnection::connect(&primary.url()).await?;
    world.outbox.migrate(&mut connection).await?;
    insert(&mut connection, 100).await?;
    publish(&world, &mut connection).await?;
    connection.execute("UPDATE event_outbox SET published_at = now() - interval '2 minutes' WHERE seq = 1").await?;
    insert(&mut connection, 50).await?;
    connection.execute("UPDATE event_outbox SET status = 'FAILED', last_error = 'why' WHERE seq = 150").await?;
    let backup = Postgres::start_standby_of(&primary)?;
    let rows = "SELECT count(*) FROM event_outbox";
    let mut restored = PgConnection::connect(&backup.url()).await?;
    eventually("the backup to have all", async || Ok(sqlx::query_scalar::<_, i64>(rows).fetch_one(&mut restored).await? == 150))
        .await?;
    backup.promote()?;

    connection.execute("UPDATE event_outbox SET status = 'PENDING' WHERE status = 'FAILED'").await?;
    insert(&mut connection, 30).await?;
    publish(&world, &mut connection).await?;
    primary.kill()?;
    world.settings.database.url = Some(backup.url());
    let restored = session(&world).await?;
    Ok((backup, world, restored))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_since_the_backup_is_settled_and_not_sent_again() -> Result<()> {
    let (_postgres, world, mut connection) = restored().await?;
    // Of the direct lane, in a stream to which the outbox does not write.
    let direct = [("id", "01a21000-8800-7000-8000-000000000001"), ("type", "M")];
    world.redis().await?.xadd::<_, _, _, _, ()>(world.streams.stream_of("metric"), "*", &direct).await?;

    let report = audit(&world, &mut connection).await?;
    assert_eq!(counts(&report), [0, 0, 0, 50, 0], "{report:?}");
    assert_eq!(report.rowless.count, 30, "lost by PostgreSQL");
    assert_eq!(report.rowless.first.len(), 30);
    assert_eq!(verify::settle(&world.outbox, &mut connection, "ada").await?, 50);
    assert_eq!(verify::settle(&world.outbox, &mut connection, "ada").await?, 0, "again is nothing");
    let action: (String, String, i64) =
        sqlx::query_as("SELECT who, action, events FROM outbox_audit").fetch_one(&mut connection).await?;
    assert_eq!(action, ("ada".to_owned(), "settle".to_owned(), 50));
    let odd = "SELECT count(*) FROM event_outbox WHERE seq > 1 AND (published_at IS NULL OR published_at < created_at OR published_at > now())";
    assert_eq!(sqlx::query_scalar::<_, i64>(odd).fetch_one(&mut connection).await?, 0);

    let report = audit(&world, &mut connection).await?;
    assert!(report.is_clean(), "{report:?}");
    insert(&mut connection, 20).await?;
    publish(&world, &mut connection).await?;
    let entries = world.entries(&world.user_stream()).await?;
    let different: HashSet<_> = entries.iter().filter_map(|entry| entry.field("id")).collect();
    assert_eq!((entries.len(), different.len()), (200, 200), "nothing was sent again");
    Ok(())
}

/// What a relay has claimed is its own, and nothing is marked while relays may claim.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_settled_beside_a_relay_at_work_or_out_of_its_hands() -> Result<()> {
    let (_postgres, world, mut connection) = restored().await?;
    let mut operator = PgConnection::connect(world.settings.database.url.as_deref().context("a URL")?).await?;
    world.outbox.pause(&mut operator, "ada").await?;
    let relay = world.relay()?;
    relay.watch().wait_for(|status| status.state == RelayState::Paused).await?;
    operator
        .execute(
            "INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids)
             SELECT gen_random_uuid(), gen_random_uuid(), 'x', array_agg(id) FROM event_outbox WHERE seq IN (101, 102)",
        )
        .await?;
    assert_eq!(counts(&audit(&world, &mut connection).await?), [0, 0, 0, 48, 0], "two are on their way");
    operator
        .execute(
            "UPDATE outbox_batch SET event_ids = event_ids || (SELECT id FROM event_outbox WHERE seq = 103) WHERE stream = 'x'",
        )
        .await?;
    assert_eq!(verify::settle(&world.outbox, &mut connection, "ada").await?, 47, "and a third since");
    operator.execute("DELETE FROM outbox_pause").await?;
    let refused = verify::settle(&world.outbox, &mut connection, "ada").await;
    assert!(matches!(refused, Err(VerifyError::Outbox(OutboxError::NotPaused))), "{refused:?}");
    relay.stop().await?;
    Ok(())
}
