//! A stream that is deleted, renamed or replaced behind the relay's back is noticed, and what is missing is published again.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::doctor::Severity;
use commitstream::outbox;
use commitstream::verify::{self, Report, VerifyError};
use redis::AsyncCommands;
use redis::streams::StreamMaxlen;
use sqlx::PgConnection;

use crate::doctor_report::{examine, only, passes};
use crate::support::{World, eventually};

async fn session(world: &World) -> Result<PgConnection> {
    Ok(outbox::connect(world.database.url(), "verify", Duration::from_secs(10)).await?)
}

async fn audit(world: &World, connection: &mut PgConnection) -> Result<Report> {
    Ok(verify::run(&world.outbox, connection, &world.streams, 10, |_| ()).await?)
}

/// The relay has written down how the stream of users stands, with all entries by now.
async fn looked_at(world: &World) -> Result<()> {
    let newest = world.streams.newest(&world.user_stream(), 1).await?.pop().context("an entry")?.id;
    let sql = "SELECT coalesce(last_entry, '') FROM outbox_stream";
    eventually("a look", async || Ok(world.database.psql(sql)?.trim() == newest)).await
}

async fn noticed(world: &World, part: &str) -> Result<()> {
    let sql = "SELECT coalesce(lost, '') FROM outbox_stream";
    eventually(part, async || Ok(world.database.psql(sql)?.contains(part))).await
}

/// The stream goes while the relay publishes, in each way that there is; then all comes back, once and in order among itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_deleted_or_renamed_is_noticed_and_published_again() -> Result<()> {
    for (command, before_first_look) in [("DEL", false), ("RENAME", false), ("DEL", true)] {
        let world = World::new().await?;
        let (stream, mut redis) = (world.user_stream(), world.redis().await?);
        passes(&examine(&world).await, "lost-entries");
        let relay = world.relay()?;
        world.insert(600, 20).await?;
        world.drained().await?;
        if !before_first_look {
            looked_at(&world).await?;
        }
        let mut gone = redis::cmd(command);
        gone.arg(&stream);
        if command == "RENAME" {
            gone.arg(format!("{stream}-was"));
        }
        gone.exec_async(&mut redis).await?;
        world.insert(400, 20).await?;
        world.drained().await?;
        noticed(&world, "the stream").await?;
        only(&examine(&world).await, "lost-entries", Severity::Error, &format!("{stream}: "));

        let mut connection = session(&world).await?;
        let report = audit(&world, &mut connection).await?;
        assert_eq!((report.missing.count, report.entries), (600, 400), "{command}");
        assert_eq!(verify::republishable(&world.outbox, &mut connection, &world.streams).await?, 600);
        assert_eq!(world.streams.len(&stream).await?, 400, "nothing was done");
        assert_eq!(verify::republish(&world.outbox, &mut connection, &world.streams, "ada").await?, 600);
        world.drained().await?;
        relay.stop().await?;
        let report = audit(&world, &mut connection).await?;
        assert_eq!((report.missing.count, report.duplicated.count, report.entries), (0, 0, 1_000), "{command}");
        // What was published meanwhile is before it; among itself it is in order.
        assert_eq!(report.out_of_order.count, 600);
        let seqs = "SELECT string_agg(id::text, ' ' ORDER BY seq) FROM event_outbox WHERE seq <= (SELECT min(seq) + 599 FROM event_outbox)";
        let expected = world.database.psql(seqs)?;
        let again: Vec<_> =
            world.entries(&stream).await?.iter().skip(400).filter_map(|e| Some(e.field("id")?.to_owned())).collect();
        let of = |ids: Vec<&str>| ids.iter().map(|id| (*id).to_owned()).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(of(again.iter().map(String::as_str).collect()), of(expected.split_whitespace().collect()));
        passes(&examine(&world).await, "lost-entries");
        let noted = world.database.psql("SELECT who, action, sum(events) FROM outbox_audit GROUP BY 1, 2")?;
        assert_eq!(noted, "ada|republish|600\n");
        assert_eq!(verify::republish(&world.outbox, &mut connection, &world.streams, "ada").await?, 0, "a second time");
    }
    Ok(())
}

/// Without a relay: `doctor` sees it by itself.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_sees_what_no_relay_has_seen() -> Result<()> {
    let world = World::new().await?;
    let relay = world.relay()?;
    world.insert(100, 5).await?;
    world.drained().await?;
    looked_at(&world).await?;
    relay.stop().await?;
    passes(&examine(&world).await, "lost-entries");
    world.redis().await?.del::<_, ()>(world.user_stream()).await?;
    only(&examine(&world).await, "lost-entries", Severity::Error, "the stream is not there any more");
    Ok(())
}

/// What every group had acknowledged and a clean-up had trimmed is not published again when the rest is lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_trimmed_before_is_not_published_again() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 50;
    let (stream, mut redis) = (world.user_stream(), world.redis().await?);
    let relay = world.relay()?;
    world.insert(1_000, 20).await?;
    world.drained().await?;
    redis.xtrim::<_, ()>(&stream, StreamMaxlen::Equals(300)).await?;
    let first = world.entries(&stream).await?.first().context("an entry")?.id.clone();
    // A look takes the next entry for its occasion.
    world.insert(1, 1).await?;
    world.drained().await?;
    let sql = "SELECT coalesce(first_entry, '') FROM outbox_stream";
    eventually("a look", async || Ok(world.database.psql(sql)?.trim() == first)).await?;
    redis.del::<_, ()>(&stream).await?;
    noticed(&world, "not there any more").await?;
    world.insert(100, 20).await?;
    world.drained().await?;
    redis.xtrim::<_, ()>(&stream, StreamMaxlen::Equals(90)).await?;
    let mut connection = session(&world).await?;
    let report = audit(&world, &mut connection).await?;
    // A batch that was cut in two counts as a whole.
    assert!((301..=350).contains(&report.missing.count), "{report:?}");
    assert_eq!(report.missing.count + report.trimmed, 1_001 + 10, "{report:?}");
    relay.stop().await?;
    Ok(())
}

/// Everything would be sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_published_again_for_the_wrong_redis_or_prefix() -> Result<()> {
    let mut world = World::new().await?;
    let relay = world.relay()?;
    world.insert(100, 5).await?;
    world.drained().await?;
    relay.stop().await?;
    let mut connection = session(&world).await?;
    let prefix = std::mem::replace(&mut world.settings.redis.stream_prefix, "elsewhere:".into());
    let url = world.settings.redis.url.clone().context("a URL")?;
    let other = commitstream::streams::Streams::new(&url, &world.settings.redis)?;
    assert_eq!(verify::run(&world.outbox, &mut connection, &other, 1, |_| ()).await?.missing.count, 100);
    let error = verify::republish(&world.outbox, &mut connection, &other, "ada").await.err().context("refused")?;
    assert!(matches!(&error, VerifyError::OtherPrefix { stream, .. } if *stream == format!("{prefix}user")), "{error:?}");

    let empty = commitstream_sandbox::Redis::start()?;
    world.settings.redis.stream_prefix = prefix;
    let other = commitstream::streams::Streams::new(&empty.url(), &world.settings.redis)?;
    assert_eq!(verify::run(&world.outbox, &mut connection, &other, 1, |_| ()).await?.missing.count, 100);
    let error = verify::republish(&world.outbox, &mut connection, &other, "ada").await.err().context("refused")?;
    assert!(matches!(error, VerifyError::NotOurRedis { .. }), "{error:?}");
    assert_eq!(world.stats().await?.pending, 0);
    Ok(())
}

/// The list of streams in Redis is a convenience: without it nothing counts as missing that is there.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_without_the_list_of_streams_finds_them() -> Result<()> {
    let world = World::new().await?;
    let relay = world.relay()?;
    world.insert(100, 5).await?;
    world.drained().await?;
    relay.stop().await?;
    world.redis().await?.del::<_, ()>(world.streams.stream_of("{streams}")).await?;
    world.database.psql("DELETE FROM outbox_stream")?;
    let report = audit(&world, &mut session(&world).await?).await?;
    assert!(report.is_clean() && report.entries == 100, "{report:?}");
    Ok(())
}

/// 1,200 streams took 60 s, since each COPY's end waited for a delayed acknowledgement.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_of_1_200_streams_takes_seconds() -> Result<()> {
    let world = World::new().await?;
    let sql = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
               SELECT 'E', 'type-' || n % 1200, n::text, '{}' FROM generate_series(1, 3600) n";
    world.database.psql(sql)?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let mut connection = session(&world).await?;
    let started = std::time::Instant::now();
    let report = audit(&world, &mut connection).await?;
    println!("audited 1,200 streams in {:?}", started.elapsed());
    assert!(report.is_clean() && report.streams == 1_200 && report.entries == 3_600, "{report:?}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    Ok(())
}
