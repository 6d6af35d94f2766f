//! The audit finds what is done to streams and rows behind the relay's back, and nothing where all is well.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::outbox;
use commitstream::publisher::RedisStreamsPublisher;
use commitstream::relay::cleanup;
use commitstream::verify::{self, Progress, Report};
use redis::AsyncCommands;
use uuid::Uuid;

use crate::events::envelope;
use crate::support::World;

const EVENTS: u32 = 4_000;
const AGGREGATES: u32 = 50;

/// An audit on a session of the kind that commands have.
async fn audit(world: &World) -> Result<Report> {
    let mut connection = outbox::connect(world.database.url(), "verify", Duration::from_secs(10)).await?;
    Ok(verify::run(&world.outbox, &mut connection, &world.streams, 10, |_| ()).await?)
}

fn counts(report: &Report) -> [u64; 5] {
    report.faults().map(|(_, findings)| findings.count)
}

/// Everything that was inserted is published, and the relay is gone.
async fn publish(world: &World, events: u32) -> Result<()> {
    world.insert(events, AGGREGATES).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    Ok(())
}

async fn published() -> Result<World> {
    let world = World::new().await?;
    publish(&world, EVENTS).await?;
    Ok(world)
}

/// The entry at this place of the user stream, from 0: Redis's id and the event's.
async fn entry(world: &World, place: usize) -> Result<(String, Uuid)> {
    let entries = world.entries(&world.user_stream()).await?;
    let entry = entries.get(place).context("no entry there")?;
    Ok((entry.id.clone(), entry.envelope()?.id))
}

/// Appends the event at this place once more.
async fn append_again(world: &World, place: usize, stream: &str) -> Result<String> {
    let fields = world.raw_entries("user").await?.swap_remove(place);
    world.note(&["other"]).await?;
    Ok(world.redis().await?.xadd(stream, "*", &fields).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_publishes_passes_the_audit() -> Result<()> {
    let world = published().await?;
    world.insert(3, 3).await?;
    let mut connection = outbox::connect(world.database.url(), "verify", Duration::from_secs(10)).await?;
    let mut told = Vec::new();
    // Twice on one session: nothing of the first stays.
    for _ in 0..2 {
        let report = verify::run(&world.outbox, &mut connection, &world.streams, 10, |progress| told.push(progress)).await?;
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.streams, report.entries, report.published, report.pending), (1, 4_000, 4_000, 3));
        assert_eq!((report.trimmed, report.later, report.unknown, report.open_batches), (0, 0, 0, 0));
    }
    let all = u64::from(EVENTS);
    assert!(told.contains(&Progress::Reading { entries: all, total: all }), "{told:?}");
    assert_eq!(told.last(), Some(&Progress::Comparing { entries: all }));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_entry_is_missing_wherever_it_stood() -> Result<()> {
    let world = published().await?;
    let mut expected = Vec::new();
    for place in [3, 1_500, 3_990] {
        let (entry, event) = entry(&world, place).await?;
        world.redis().await?.xdel::<_, _, ()>(world.user_stream(), &[entry]).await?;
        expected.push(event);
    }
    world.database.psql(&format!("UPDATE event_outbox SET published_at = 'infinity' WHERE id = '{}';", expected[2]))?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.trimmed, report.later), ([3, 0, 0, 0, 0], 0, 0));
    let named: Vec<_> = report.missing.first.iter().map(|finding| finding.event_id).collect();
    assert_eq!(named, expected);
    let first = &report.missing.first[0];
    assert_eq!((&first.stream, &first.entry_id), (&world.user_stream(), &None));
    assert_eq!(first.aggregate_type.as_deref(), Some("user"));

    // The journal still names it when its row is gone.
    world.database.psql(&format!("DELETE FROM event_outbox WHERE id = '{}'", expected[1]))?;
    let report = audit(&world).await?;
    assert_eq!(counts(&report), [3, 0, 0, 0, 0]);
    assert!(report.missing.first.iter().any(|finding| finding.event_id == expected[1] && finding.aggregate_id.is_none()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_stream_is_missing_as_a_whole() -> Result<()> {
    let world = published().await?;
    world.redis().await?.del::<_, ()>(world.user_stream()).await?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.streams), ([4_000, 0, 0, 0, 0], 0));
    assert_eq!(report.missing.first.len(), 10);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_entry_is_duplicated_and_nothing_else() -> Result<()> {
    let world = published().await?;
    let again = append_again(&world, 100, &world.user_stream()).await?;
    append_again(&world, 200, &world.streams.stream_of("other")).await?;
    let report = audit(&world).await?;
    assert_eq!(counts(&report), [0, 2, 0, 0, 0]);
    let (_, event) = entry(&world, 100).await?;
    assert!(report.duplicated.first.iter().any(|f| f.event_id == event && f.entry_id.as_deref() == Some(&again)), "{report:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_entry_is_out_of_order_once() -> Result<()> {
    let world = published().await?;
    // To the end, behind some seventy others of its aggregate.
    let (moved, event) = entry(&world, 500).await?;
    let again = append_again(&world, 500, &world.user_stream()).await?;
    world.redis().await?.xdel::<_, _, ()>(world.user_stream(), &[moved]).await?;
    let report = audit(&world).await?;
    assert_eq!(counts(&report), [0, 0, 1, 0, 0]);
    let finding = &report.out_of_order.first[0];
    assert_eq!((finding.event_id, finding.entry_id.as_deref()), (event, Some(again.as_str())));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_whose_row_is_to_be_sent_again_is_unsettled() -> Result<()> {
    let world = published().await?;
    let pending = entry(&world, 10).await?.1;
    let failed = entry(&world, 20).await?.1;
    world.database.psql(&format!("UPDATE event_outbox SET status = 'PENDING', published_at = NULL WHERE id = '{pending}'"))?;
    world.database.psql(&format!("UPDATE event_outbox SET status = 'FAILED', published_at = NULL WHERE id = '{failed}'"))?;
    let report = audit(&world).await?;
    assert_eq!(counts(&report), [0, 0, 0, 2, 0]);
    let named: Vec<_> = report.unsettled.first.iter().map(|finding| finding.event_id).collect();
    assert_eq!(named, [pending, failed]);

    // On its way in an open batch, it is neither published nor at fault.
    world.database.psql(&format!(
        "INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids)
         VALUES (gen_random_uuid(), gen_random_uuid(), '{}', ARRAY['{pending}', '{failed}']::uuid[])",
        world.user_stream()
    ))?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.open_batches), ([0; 5], 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_in_another_stream_is_misplaced() -> Result<()> {
    let world = published().await?;
    let (last, event) = entry(&world, 3_999).await?;
    append_again(&world, 3_999, &world.streams.stream_of("other")).await?;
    world.redis().await?.xdel::<_, _, ()>(world.user_stream(), &[last]).await?;
    let report = audit(&world).await?;
    assert_eq!(counts(&report), [0, 0, 0, 0, 1]);
    let finding = &report.misplaced.first[0];
    assert_eq!((finding.event_id, &finding.stream), (event, &world.streams.stream_of("other")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_trimmed_away_is_no_fault_and_what_is_missing_behind_it_is() -> Result<()> {
    let world = published().await?;
    world.redis().await?.xtrim::<_, ()>(world.user_stream(), redis::streams::StreamMaxlen::Equals(1_050)).await?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.trimmed, report.entries), ([0; 5], 2_950, 1_050));

    let (entry_id, event) = entry(&world, 20).await?;
    world.redis().await?.xdel::<_, _, ()>(world.user_stream(), &[entry_id]).await?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.trimmed), ([1, 0, 0, 0, 0], 2_950));
    assert_eq!(report.missing.first[0].event_id, event);

    // Without a journal, the time of its row has to do: it was created after what is there was published.
    publish(&world, 1).await?;
    let (entry_id, event) = entry(&world, 1_049).await?;
    world.database.psql("DELETE FROM outbox_batch")?;
    publish(&world, 1).await?;
    world.redis().await?.xdel::<_, _, ()>(world.user_stream(), &[entry_id]).await?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.missing.first[0].event_id), ([1, 0, 0, 0, 0], event));

    world.redis().await?.xtrim::<_, ()>(world.user_stream(), redis::streams::StreamMaxlen::Equals(0)).await?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.trimmed, report.entries), ([0; 5], 4_002, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_were_cleaned_up_are_no_fault() -> Result<()> {
    let mut world = published().await?;
    world.redis().await?.xadd::<_, _, _, _, ()>(world.user_stream(), "*", &[("id", "of somebody else"), ("a", "b")]).await?;
    world.settings.outbox.cleanup.retention_days = 0;
    cleanup::run_once(&world.outbox, &mut world.connect().await?, &world.settings, |_| ()).await?;
    let report = audit(&world).await?;
    assert_eq!((counts(&report), report.unknown, report.published), ([0; 5], 4_001, 0));
    Ok(())
}

/// Producers of both lanes, whose stream is trimmed all the time, a relay and the clean-up, and audits meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_beside_everything_else_finds_nothing() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 20;
    let relay = world.relay()?;
    let mut producers = tokio::task::JoinSet::new();
    for producer in 0..4_u32 {
        let (mut connection, mut redis) = (world.connect().await?, world.redis().await?);
        let (direct, stream) = (RedisStreamsPublisher::new(&world.settings)?, world.user_stream());
        producers.spawn(async move {
            let sql = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                       SELECT 'E', (ARRAY['user', 'order'])[n % 2 + 1], $1, '{}' FROM generate_series(1, 10) n";
            for _ in 0..1_000 {
                sqlx::query(sql).bind(producer.to_string()).execute(&mut connection).await?;
                direct.publish(&envelope("user", "direct", &())?).await?;
                if producer == 0 {
                    redis.xtrim::<_, ()>(&stream, redis::streams::StreamMaxlen::Equals(2_000)).await?;
                }
            }
            anyhow::Ok(())
        });
    }
    let (mut connection, mut rounds) = (world.connect().await?, 0);
    while !producers.is_empty() {
        let report = audit(&world).await?;
        assert!(report.is_clean(), "round {rounds}: {report:?}");
        world.outbox.delete_published(&mut connection, Duration::from_millis(500), 100).await?;
        while let Some(ended) = producers.try_join_next() {
            ended??;
        }
        rounds += 1;
    }
    println!("{rounds} audits meanwhile");
    world.drained().await?;
    relay.stop().await?;
    let report = audit(&world).await?;
    assert!(report.is_clean() && report.trimmed > 0 && report.unknown > 0, "{report:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_of_200_000_takes_seconds() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 1_000;
    publish(&world, 200_000).await?;
    let started = std::time::Instant::now();
    let report = audit(&world).await?;
    println!("audited 200,000 events in {:?}", started.elapsed());
    assert!(report.is_clean() && report.entries == 200_000, "{report:?}");
    // A nested loop without an index would take hours.
    assert!(started.elapsed() < Duration::from_secs(60));
    Ok(())
}
