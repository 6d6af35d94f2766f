//! The claim by itself, against what may happen beside it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::outbox::{ClaimRequest, OutboxEvent, Refusal, SeqRange, Settlement};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::support::World;

fn everything(relay_id: Uuid) -> ClaimRequest {
    ClaimRequest {
        relay_id,
        ranges: vec![SeqRange { after: 0, to: i64::MAX }],
        epoch: 0,
        open: Vec::new(),
        max_events: 10_000,
        max_bytes: 1 << 30,
        batch_size: 10_000,
        max_payload_bytes: 1 << 20,
        stream_prefix: "events:".into(),
    }
}

/// Takes the lease for a request.
async fn take(world: &World, connection: &mut PgConnection, request: &mut ClaimRequest) -> Result<()> {
    let epoch = world.outbox.take_leases(connection, request.relay_id, Duration::from_secs(600)).await?;
    request.epoch = epoch.context("the lease is free")?;
    Ok(())
}

/// Settles all batches of a claim as if so many events of each had been appended, without refusals.
async fn settle(world: &World, connection: &mut PgConnection, claimed: &[OutboxEvent], appended: i32) -> Result<()> {
    let mut batches: Vec<Uuid> = claimed.iter().map(|e| e.batch_id).collect();
    batches.dedup();
    let settlements: Vec<_> =
        batches.into_iter().map(|batch_id| Settlement { batch_id, appended, refusals: Vec::new() }).collect();
    world.outbox.settle(connection, &settlements).await?;
    Ok(())
}

/// A claim reads for some milliseconds. An event may fall due while it reads, after its own turn and before that of a later event
/// of its aggregate.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_falls_due_during_a_claim_is_not_overtaken() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let mut request = everything(Uuid::now_v7());
    take(&world, &mut connection, &mut request).await?;
    // The refused event, much between, and the one that waits behind it.
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'E', 'user', CASE WHEN n IN (1, 2000) THEN 'A' ELSE 'n' || n END, to_jsonb(repeat(md5(n::text), 100))
         FROM generate_series(1, 2000) n;",
    )?;
    let started = Instant::now();
    let claimed = world.outbox.claim(&mut connection, &request).await?.events;
    let taken = started.elapsed();
    assert_eq!(claimed.len(), 2_000);
    settle(&world, &mut connection, &claimed, 0).await?;
    for round in 0..20 {
        sqlx::query(
            "UPDATE event_outbox SET next_retry_at = clock_timestamp() + CASE seq WHEN 1 THEN $1 ELSE -1 END * interval '1 second'
             WHERE aggregate_id = 'A'",
        )
        .bind(taken.as_secs_f64() * f64::from(round) / 20.0)
        .execute(&mut connection)
        .await?;
        let claimed = world.outbox.claim(&mut connection, &request).await?.events;
        let of_a: Vec<i64> = claimed.iter().filter(|e| e.aggregate_id == "A").map(|e| e.seq).collect();
        assert!(of_a.is_empty() || of_a == [1, 2_000], "round {round}: {of_a:?} is claimed, the refused event is not");
        settle(&world, &mut connection, &claimed, 0).await?;
    }
    Ok(())
}

/// Operators change and delete rows while these are in flight.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_changed_meanwhile_is_left_as_it_is() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let mut request = everything(Uuid::now_v7());
    take(&world, &mut connection, &mut request).await?;
    world.insert(6, 6).await?;
    let claimed = world.outbox.claim(&mut connection, &request).await?.events;
    let ids: Vec<Uuid> = claimed.iter().map(|e| e.id).collect();
    world.database.psql(&format!(
        "DELETE FROM event_outbox WHERE id IN ('{}', '{}');
         UPDATE event_outbox SET status = 'FAILED', last_error = 'by hand' WHERE id IN ('{}', '{}');",
        ids[0], ids[4], ids[1], ids[5]
    ))?;
    let refusal = |n: usize| Refusal { event_id: ids[n], error: "refused\0".into(), retry_after: None };
    let settlement =
        Settlement { batch_id: claimed[0].batch_id, appended: 3, refusals: vec![refusal(3), refusal(4), refusal(5)] };
    assert_eq!(world.outbox.settle(&mut connection, &[settlement]).await?, 1);
    let rows = world.database.psql("SELECT seq, status, last_error, published_at IS NOT NULL FROM event_outbox ORDER BY seq;")?;
    assert_eq!(rows, "2|FAILED|by hand|f\n3|PUBLISHED||t\n4|FAILED|refused\u{fffd}|f\n6|FAILED|by hand|f\n");
    assert!(world.outbox.open_batches(&mut connection).await?.is_empty());
    Ok(())
}

/// Two relays, one of which does not know yet that the other has taken over.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_lost_its_lease_claims_nothing() -> Result<()> {
    let world = World::new().await?;
    let (mut old, mut new) = (world.connect().await?, world.connect().await?);
    let (mut was, mut is) = (everything(Uuid::now_v7()), everything(Uuid::now_v7()));
    world.insert(10, 10).await?;
    take(&world, &mut old, &mut was).await?;
    assert_eq!(world.outbox.take_leases(&mut new, is.relay_id, Duration::from_secs(600)).await?, None, "the owner lives");
    assert!(world.outbox.claim(&mut new, &is).await?.events.is_empty());
    sqlx::query("UPDATE outbox_lease SET expires_at = now() - interval '1 second'").execute(&mut new).await?;
    take(&world, &mut new, &mut is).await?;
    assert!(world.outbox.claim(&mut old, &was).await?.events.is_empty());
    assert!(!world.outbox.renew_leases(&mut old, was.relay_id, Duration::from_secs(600)).await?);
    assert!(world.outbox.open_batches(&mut new).await?.is_empty(), "an empty claim leaves no batch");
    assert_eq!(world.outbox.claim(&mut new, &is).await?.events.len(), 10);
    Ok(())
}

/// The same relay in a new session: a claim of the old one that arrives late must not leave a batch that nobody appends.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_of_an_earlier_session_claims_nothing() -> Result<()> {
    let world = World::new().await?;
    let (mut old, mut new) = (world.connect().await?, world.connect().await?);
    let mut late = everything(Uuid::now_v7());
    world.insert(10, 10).await?;
    take(&world, &mut old, &mut late).await?;
    let mut current = late.clone();
    take(&world, &mut new, &mut current).await?;
    assert!(world.outbox.claim(&mut old, &late).await?.events.is_empty());
    assert_eq!(world.outbox.claim(&mut new, &current).await?.events.len(), 10);
    Ok(())
}

/// While a claim is under way its lease can be renewed, but not taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_lets_the_renewal_pass_and_holds_a_takeover_off() -> Result<()> {
    let world = World::new().await?;
    let (mut claims, mut lease, mut other) = (world.connect().await?, world.connect().await?, world.connect().await?);
    let mut request = everything(Uuid::now_v7());
    take(&world, &mut lease, &mut request).await?;
    world.insert(1, 1).await?;
    let mut open = claims.begin().await?;
    assert_eq!(world.outbox.claim(&mut open, &request).await?.events.len(), 1);
    assert!(world.outbox.renew_leases(&mut lease, request.relay_id, Duration::from_millis(1)).await?);
    sqlx::raw_sql("SET lock_timeout = '200ms'").execute(&mut other).await?;
    let taken = world.outbox.take_leases(&mut other, Uuid::now_v7(), Duration::from_secs(1)).await;
    assert!(taken.is_err(), "the claim holds its rows: {taken:?}");
    open.commit().await?;
    assert!(world.outbox.take_leases(&mut other, Uuid::now_v7(), Duration::from_secs(1)).await?.is_some());
    Ok(())
}
