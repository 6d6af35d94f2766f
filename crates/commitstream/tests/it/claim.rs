//! The claim by itself, against what may happen beside it.

use std::time::{Duration, Instant};

use anyhow::Result;
use commitstream::outbox::{self, AfterPublishing, Batch, OutboxEvent, Partitions, Refusal, Settlement};
use commitstream::streams::{Marker, Presence, StreamsError};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::support::{World, eventually_waits};

/// Settles all batches of a claim as if so many events of each had been appended, without refusals.
async fn settle(world: &World, connection: &mut PgConnection, claimed: &[Batch], appended: i32) -> Result<()> {
    let settlement = |batch: &Batch| Settlement { batch_id: batch.id, appended, last_entry: None, refusals: Vec::new() };
    let settlements: Vec<_> = claimed.iter().map(settlement).collect();
    world.outbox.settle(connection, &settlements, AfterPublishing::Keep).await?;
    Ok(())
}

fn events(batches: &[Batch]) -> Vec<&OutboxEvent> {
    batches.iter().flat_map(|batch| &batch.events).collect()
}

/// A claim reads for some milliseconds. An event may fall due while it reads, after its own turn and before that of a later event
/// of its aggregate.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_falls_due_during_a_claim_is_not_overtaken() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let request = world.everything(&mut connection, Uuid::now_v7()).await?;
    // The refused event, much between, and the one that waits behind it.
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'E', 'user', CASE WHEN n IN (1, 2000) THEN 'A' ELSE 'n' || n END, to_jsonb(repeat(md5(n::text), 100))
         FROM generate_series(1, 2000) n;",
    )?;
    let started = Instant::now();
    let claimed = world.outbox.claim(&mut connection, &request).await?.batches;
    let taken = started.elapsed();
    assert_eq!(events(&claimed).len(), 2_000);
    settle(&world, &mut connection, &claimed, 0).await?;
    for round in 0..20 {
        sqlx::query(
            "UPDATE event_outbox SET next_retry_at = clock_timestamp() + CASE seq WHEN 1 THEN $1 ELSE -1 END * interval '1 second'
             WHERE aggregate_id = 'A'",
        )
        .bind(taken.as_secs_f64() * f64::from(round) / 20.0)
        .execute(&mut connection)
        .await?;
        let claimed = world.outbox.claim(&mut connection, &request).await?.batches;
        let of_a: Vec<i64> = events(&claimed).into_iter().filter(|e| e.aggregate_id == "A").map(|e| e.seq).collect();
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
    let request = world.everything(&mut connection, Uuid::now_v7()).await?;
    world.insert(6, 6).await?;
    let claimed = world.outbox.claim(&mut connection, &request).await?.batches;
    let ids: Vec<Uuid> = events(&claimed).iter().map(|e| e.id).collect();
    world.database.psql(&format!(
        "DELETE FROM event_outbox WHERE id IN ('{}', '{}');
         UPDATE event_outbox SET status = 'FAILED', last_error = 'by hand' WHERE id IN ('{}', '{}');",
        ids[0], ids[4], ids[1], ids[5]
    ))?;
    let refusal = |n: usize| Refusal { event_id: ids[n], error: "refused\0".into(), retry_after: None };
    let settlement =
        Settlement { batch_id: claimed[0].id, appended: 3, last_entry: None, refusals: vec![refusal(3), refusal(4), refusal(5)] };
    let all = world.outbox.settle(&mut connection, std::slice::from_ref(&settlement), AfterPublishing::Keep).await;
    assert!(all.is_err_and(|error| error.is_about_rows()));
    let done = world.outbox.settle_rows(&mut connection, &settlement).await?;
    assert!(done.settled && done.stuck.is_none() && done.unwritten.is_empty(), "{done:?}");
    let rows = world.database.psql("SELECT seq, status, last_error, published_at IS NOT NULL FROM event_outbox ORDER BY seq;")?;
    assert_eq!(rows, "2|FAILED|by hand|f\n3|PUBLISHED||t\n4|FAILED|refused?|f\n6|FAILED|by hand|f\n");
    assert!(world.outbox.open_batches(&mut connection, Partitions::ALL).await?.is_empty());
    Ok(())
}

/// Two relays, one of which does not know yet that the other has taken over.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_lost_its_lease_claims_nothing() -> Result<()> {
    let world = World::new().await?;
    let (mut old, mut new) = (world.connect().await?, world.connect().await?);
    world.insert(10, 10).await?;
    let was = world.everything(&mut old, Uuid::now_v7()).await?;
    let is = world.everything(&mut new, Uuid::now_v7()).await?;
    let claim = world.outbox.claim(&mut old, &was).await?;
    assert!(!claim.held && claim.batches.is_empty());
    assert!(world.outbox.open_batches(&mut new, Partitions::ALL).await?.is_empty(), "an empty claim leaves no batch");
    assert_eq!(world.outbox.claim(&mut new, &is).await?.batches[0].events.len(), 10);
    Ok(())
}

/// A relay that lost part of its partitions must not claim the others either, before it knows: its batches would name both.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_lost_one_partition_claims_nothing_until_it_knows() -> Result<()> {
    let world = World::new().await?;
    let (mut old, mut new) = (world.connect().await?, world.connect().await?);
    world.insert(100, 100).await?;
    let mut request = world.everything(&mut old, Uuid::now_v7()).await?;
    let taken = world.outbox.take_partitions(&mut new, Uuid::now_v7(), &[(5, Some(request.lease.relay_id))]).await?;
    assert_eq!(taken.partitions.iter().collect::<Vec<_>>(), [5]);
    assert!(!world.outbox.claim(&mut old, &request).await?.held);
    request.lease.partitions = request.lease.partitions.without(taken.partitions);
    let of_old = world.outbox.claim(&mut old, &request).await?;
    request.lease = taken;
    let of_new = world.outbox.claim(&mut new, &request).await?;
    assert!(of_old.held && of_new.held);
    assert_eq!(events(&of_old.batches).len() + events(&of_new.batches).len(), 100);
    let sql = "SELECT count(*) FROM event_outbox WHERE partition_no = 5";
    assert_eq!(sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut new).await?, i64::try_from(events(&of_new.batches).len())?);
    Ok(())
}

/// The same relay after it took partitions once more: a claim under the earlier epoch that arrives late must not leave a batch that
/// nobody appends.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_of_an_earlier_epoch_claims_nothing() -> Result<()> {
    let world = World::new().await?;
    let (mut old, mut new) = (world.connect().await?, world.connect().await?);
    world.insert(10, 10).await?;
    let late = world.everything(&mut old, Uuid::now_v7()).await?;
    let current = world.everything(&mut new, late.lease.relay_id).await?;
    assert!(!world.outbox.claim(&mut old, &late).await?.held);
    assert_eq!(world.outbox.claim(&mut new, &current).await?.batches[0].events.len(), 10);
    Ok(())
}

/// A batch of several partitions that Redis has lost: the owner of one has published its events again when it becomes the owner of
/// the others too.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_batch_is_unsent_again_once_per_partition() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    world.insert(100, 100).await?;
    let request = world.everything(&mut connection, Uuid::now_v7()).await?;
    let claimed = world.outbox.claim(&mut connection, &request).await?.batches;
    settle(&world, &mut connection, &claimed, 100).await?;
    let lost = [claimed[0].id];
    let some: Partitions = (0..32).collect();
    let first = world.outbox.requeue_lost(&mut connection, &lost, some).await?.unsent;
    let again = world.outbox.claim(&mut connection, &request).await?.batches;
    assert!(first > 0 && i64::try_from(events(&again).len())? == first);
    settle(&world, &mut connection, &again, 100).await?;
    let others = world.outbox.requeue_lost(&mut connection, &lost, Partitions::ALL).await?.unsent;
    assert_eq!(first + others, 100, "each once");
    assert_eq!(world.outbox.requeue_lost(&mut connection, &lost, Partitions::ALL).await?.unsent, 0);
    Ok(())
}

/// A relay gave the partition of its last batch away, Redis lost that batch, and the relay went on with the others. Whoever owns them
/// all afterwards must not take the lost batch for one that stands before those that came later.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_batch_of_partitions_that_were_given_away_is_found() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let mut request = world.everything(&mut connection, Uuid::now_v7()).await?;
    request.stream_prefix.clone_from(&world.settings.redis.stream_prefix);
    world.insert(1_000, 1_000).await?;
    world.database.psql("UPDATE event_outbox SET status = 'FAILED' WHERE partition_no <> 5;")?;
    let lost = world.outbox.claim(&mut connection, &request).await?.batches;
    settle(&world, &mut connection, &lost, 1).await?;
    request.lease = world.outbox.give_partitions(&mut connection, request.lease.relay_id, [5].into_iter().collect()).await?;
    assert_eq!(request.lease.partitions.len(), 63);

    world.database.psql("UPDATE event_outbox SET status = 'PENDING' WHERE status = 'FAILED';")?;
    let later = world.outbox.claim(&mut connection, &request).await?.batches;
    let life = Duration::from_secs(60);
    world.streams.append(&later[0], &[], later[0].events.len(), life).await?;
    settle(&world, &mut connection, &later, 1).await?;

    let last = world.outbox.last_batches(&mut connection, Partitions::ALL, life).await?;
    let presence = world.streams.presence(&world.user_stream(), &last).await?;
    let found: Vec<_> = last.iter().map(|batch| batch.batch_id).zip(presence).collect();
    assert!(found.contains(&(lost[0].id, Presence::Lost)), "{found:?}");
    assert!(found.contains(&(later[0].id, Presence::Marked)), "{found:?}");
    Ok(())
}

/// A failover of Redis has lost a batch, and a new owner that found it open has aborted it since: its marker is there, its entries are not.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_batch_that_was_aborted_since_is_lost() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    world.insert(2, 2).await?;
    let mut request = world.everything(&mut connection, Uuid::now_v7()).await?;
    (request.batch_size, request.stream_prefix) = (1, world.settings.redis.stream_prefix.clone());
    let claimed = world.outbox.claim(&mut connection, &request).await?.batches;
    let (stream, lost, next) = (&claimed[0].stream, claimed[0].id, &claimed[1]);
    let life = Duration::from_secs(60);
    assert_eq!(world.streams.resolve(stream, lost, life).await?, Marker::Aborted);
    settle(&world, &mut connection, &claimed[..1], 1).await?;
    let appended = world.streams.append(next, &[lost], 1, life).await;
    assert!(matches!(appended, Err(StreamsError::Lost { .. })), "{appended:?}");
    let checked = world.streams.check(&[(stream.clone(), vec![lost])]).await;
    assert!(matches!(checked, Err(StreamsError::Lost { .. })), "{checked:?}");
    let last = world.outbox.last_batches(&mut connection, Partitions::ALL, life).await?;
    assert_eq!(world.streams.presence(stream, &last).await?, [Presence::Lost]);
    Ok(())
}

/// While a claim is under way heartbeats pass, and its partitions cannot be taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_holds_a_takeover_off() -> Result<()> {
    let world = World::new().await?;
    let (mut claims, mut other) = (world.connect().await?, world.connect().await?);
    let request = world.everything(&mut claims, Uuid::now_v7()).await?;
    world.insert(1, 1).await?;
    let mut open = claims.begin().await?;
    assert_eq!(world.outbox.claim(&mut open, &request).await?.batches[0].events.len(), 1);
    sqlx::raw_sql("SET lock_timeout = '200ms'").execute(&mut other).await?;
    let taken = world.take_all(&mut other, Uuid::now_v7()).await;
    assert!(taken.is_err(), "the claim holds its rows: {taken:?}");
    open.commit().await?;
    world.take_all(&mut other, Uuid::now_v7()).await?;
    assert_eq!(world.outbox.open_batches(&mut other, Partitions::ALL).await?.len(), 1);
    Ok(())
}

/// A claim that began before a takeover was committed sees the leases as they were; it waits for the takeover and looks again.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_waited_for_a_takeover_claims_nothing() -> Result<()> {
    let world = World::new().await?;
    let (mut claims, mut other, mut eye) = (world.connect().await?, world.connect().await?, world.connect().await?);
    world.insert(10, 10).await?;
    let request = world.everything(&mut claims, Uuid::now_v7()).await?;
    let mut takeover = other.begin().await?;
    world.take_all(&mut takeover, Uuid::now_v7()).await?;
    let outbox = world.outbox.clone();
    let claim = tokio::spawn(async move { outbox.claim(&mut claims, &request).await });
    eventually_waits(&mut eye, "WITH open AS").await?;
    takeover.commit().await?;
    let claim = claim.await??;
    assert!(!claim.held && claim.batches.is_empty(), "{claim:?}");
    assert!(world.outbox.open_batches(&mut eye, Partitions::ALL).await?.is_empty());
    Ok(())
}

/// An idle relay looks again and again: that must not cost a commit that waits for the disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_finds_nothing_writes_nothing() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let request = world.everything(&mut connection, Uuid::now_v7()).await?;
    let mut look = connection.begin().await?;
    assert!(world.outbox.claim(&mut look, &request).await?.held);
    let written = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL";
    assert!(!sqlx::query_scalar::<_, bool>(written).fetch_one(&mut *look).await?);
    Ok(())
}

/// A batch must be on disk before it is sent, also where the commits of the application need not be.
#[tokio::test(flavor = "multi_thread")]
async fn claims_are_durable_whatever_the_database_says_of_commits() -> Result<()> {
    let world = World::new().await?;
    for (of_database, expected) in [("off", "on"), ("on", "on"), ("remote_apply", "remote_apply")] {
        let database =
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = ', current_database()) || '{}'; END $$;";
        world.database.psql(&database.replace("{}", of_database))?;
        let mut connection = outbox::connect(world.database.url(), "claims", Duration::from_secs(10)).await?;
        let setting: String = sqlx::query_scalar("SHOW synchronous_commit").fetch_one(&mut connection).await?;
        assert_eq!(setting, expected);
    }
    Ok(())
}

/// Of two relays that saw the same owner, one gets the partition.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_taken_by_whoever_comes_first() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let [dead, first, second] = [1, 2, 3].map(Uuid::from_u128);
    world.outbox.take_partitions(&mut connection, dead, &[(3, None), (4, None)]).await?;
    let taken = world.outbox.take_partitions(&mut connection, first, &[(3, Some(dead))]).await?;
    assert_eq!(taken.partitions.iter().collect::<Vec<_>>(), [3]);
    let late = world.outbox.take_partitions(&mut connection, second, &[(3, Some(dead)), (4, Some(dead)), (7, None)]).await?;
    assert_eq!(late.partitions.iter().collect::<Vec<_>>(), [4, 7]);
    Ok(())
}

/// A transaction drew its `seq` before one that the relay has seen, and commits after it. It is found by its transaction, with and
/// without anything newer, and not twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_commits_late_is_found_by_its_transaction() -> Result<()> {
    let world = World::new().await?;
    let (mut connection, mut late, mut other) = (world.connect().await?, world.connect().await?, world.connect().await?);
    let mut request = world.everything(&mut connection, Uuid::now_v7()).await?;
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', $1, '{}')";
    for newer in [false, true] {
        let mut open = late.begin().await?;
        sqlx::query(insert).bind("late").execute(&mut *open).await?;
        sqlx::query(insert).bind("early").execute(&mut other).await?;
        let seen = world.outbox.claim(&mut connection, &request).await?;
        assert_eq!(events(&seen.batches).iter().map(|e| e.aggregate_id.as_str()).collect::<Vec<_>>(), ["early"]);
        (request.after, request.snapshot) = (seen.batches[0].events[0].seq, seen.snapshot);
        open.commit().await?;
        if newer {
            sqlx::query(insert).bind("newer").execute(&mut other).await?;
        }
        let found = world.outbox.claim(&mut connection, &request).await?;
        let expected: &[&str] = if newer { &["late", "newer"] } else { &["late"] };
        assert_eq!(events(&found.batches).iter().map(|e| e.aggregate_id.as_str()).collect::<Vec<_>>(), expected);
        (request.after, request.snapshot) = (i64::MAX, found.snapshot);
        let again = world.outbox.claim(&mut connection, &request).await?;
        assert!(again.batches.is_empty() && again.cut_at.is_none());
        request.snapshot = again.snapshot;
    }
    Ok(())
}
