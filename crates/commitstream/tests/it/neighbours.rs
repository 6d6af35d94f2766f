//! Streams of others are left alone: of a prefix that begins with ours, and of another database under the same one.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::doctor::Severity;
use commitstream::relay::cleanup;
use commitstream::streams::{GroupInfo, Streams};
use commitstream_sandbox::{Redis, Sandbox};
use redis::AsyncCommands;
use redis::streams::StreamMaxlen;

use crate::doctor_report::{examine, found, only};
use crate::events::envelope;
use crate::support::{World, eventually};

/// Worlds with databases of their own and these prefixes, on one Redis.
async fn worlds<const N: usize>(redis: &Redis, prefixes: [&str; N]) -> Result<Vec<World>> {
    let mut worlds = Vec::new();
    for prefix in prefixes {
        let world = World::on(Sandbox::shared().database()?, &redis.url(), prefix.to_owned())?;
        world.outbox.migrate(&mut world.connect().await?).await?;
        worlds.push(world);
    }
    Ok(worlds)
}

/// Everything that is inserted is published.
async fn publish(world: &World, aggregate_type: &str, events: i32) -> Result<()> {
    let sql = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
               SELECT 'E', $2, n::text, '{}' FROM generate_series(1, $1) n";
    sqlx::query(sql).bind(events).bind(aggregate_type).execute(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    Ok(())
}

/// What a clean-up with this cap trims: each stream, and how many entries.
async fn trim(world: &World, max_entries: u32) -> Result<Vec<(String, u64)>> {
    let mut settings = world.settings.streams.clone();
    settings.max_entries = max_entries;
    let mut trimmed = Vec::new();
    let note = |stream: &str, result: Result<commitstream::streams::Trimmed, _>| trimmed.push((stream.to_owned(), result));
    cleanup::trim(&world.outbox, &mut world.connect().await?, &world.streams, &settings, note).await?;
    trimmed.into_iter().map(|(stream, result)| Ok((stream, result.map(|trimmed| trimmed.unread)?))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_that_begins_with_another_is_left_alone() -> Result<()> {
    let redis = Redis::start()?;
    let worlds = worlds(&redis, ["app:", "app:two:"]).await?;
    let [ours, other] = worlds.as_slice() else { anyhow::bail!("two worlds") };
    publish(ours, "user", 300).await?;
    publish(other, "user", 3_000).await?;
    assert_eq!(ours.streams.list().await?, ["app:user"]);
    assert_eq!(trim(ours, 100).await?, [("app:user".to_owned(), 200)]);
    assert_eq!((ours.streams.len("app:user").await?, ours.streams.len("app:two:user").await?), (100, 3_000));
    let report = examine(ours).await;
    only(&report, "neighbours", Severity::Note, "the prefixes app: and app:two: of another outbox begin alike");
    let report = examine(other).await;
    only(&report, "neighbours", Severity::Note, "the prefixes app:two: and app: of another outbox begin alike");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_databases_under_one_prefix_each_trims_its_own() -> Result<()> {
    let redis = Redis::start()?;
    let worlds = worlds(&redis, ["app:", "app:"]).await?;
    let [ours, other] = worlds.as_slice() else { anyhow::bail!("two worlds") };
    publish(ours, "user", 300).await?;
    ours.streams.publish(&[envelope("tick", "1", &())?]).await.map_err(|e| e.error)?;
    let both = ["app:tick".to_owned(), "app:user".to_owned()];
    assert_eq!(trim(ours, 200).await?, [(both[0].clone(), 0), (both[1].clone(), 100)], "while it is alone");
    publish(other, "order", 3_000).await?;
    publish(other, "user", 100).await?;
    assert_eq!(trim(ours, 100).await?, [("app:user".to_owned(), 200)]);
    assert_eq!(trim(other, 1_000).await?, [("app:order".to_owned(), 2_000)], "the other wrote to app:user first");
    assert_eq!(ours.streams.list().await?, ["app:order", "app:tick", "app:user"]);
    let name = other.database.name().to_owned();
    only(&examine(ours).await, "neighbours", Severity::Warning, &format!("schema public of database {name}"));
    found(&examine(other).await, "neighbours").first().context("the other sees us, too")?;

    // The owner of a stream is gone for a day.
    let owner = ours.outbox.owner(&mut ours.connect().await?).await?;
    let seen = format!("{} {}", chrono::Utc::now().timestamp_millis() - 25 * 3_600_000, owner.name);
    let field = format!("{{owner}}:{}", owner.id);
    ours.redis().await?.hset::<_, _, _, ()>("app:{streams}", field, seen).await?;
    let trimmed: Vec<_> = trim(other, 100).await?.into_iter().map(|(stream, _)| stream).collect();
    assert_eq!(trimmed, ["app:order", "app:tick", "app:user"]);
    Ok(())
}

/// What was written before there was a list, and where the list was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_list_comes_back_from_the_tables() -> Result<()> {
    let world = World::new().await?;
    publish(&world, "user", 10).await?;
    let (known, list) = ([world.user_stream()], world.streams.stream_of("{streams}"));
    assert_eq!(world.streams.list().await?, known);
    world.redis().await?.del::<_, ()>(&list).await?;
    assert!(world.streams.list().await?.is_empty());
    let relay = world.relay()?;
    eventually("the relay to note its streams", async || Ok(world.streams.list().await? == known)).await?;
    relay.stop().await?;
    world.redis().await?.del::<_, ()>(&list).await?;
    assert_eq!(trim(&world, 4).await?, [(world.user_stream(), 6)]);
    // As it was before V9.
    world.database.psql("DELETE FROM outbox_migration WHERE version = 9; DROP TABLE outbox_stream")?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    world.redis().await?.del::<_, ()>(&list).await?;
    assert_eq!(trim(&world, 3).await?, [(world.user_stream(), 1)]);
    Ok(())
}

/// A user of Redis that may not write the list publishes all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_may_not_be_written_stops_nothing() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = worlds(&redis, ["events:"]).await?.pop().context("a world")?;
    let mut admin = world.redis().await?;
    let rights = ["SETUSER", "relay", "on", ">p", "~events:*", "~{events:*", "+@all", "-hset", "-@dangerous", "+info"];
    redis::cmd("ACL").arg(&rights).exec_async(&mut admin).await?;
    let (_, place) = redis.url().rsplit_once('@').map(|(a, b)| (a.to_owned(), b.to_owned())).context("a login")?;
    world.settings.redis.url = Some(format!("redis://relay:p@{place}"));
    publish(&world, "user", 10).await?;
    let streams = Streams::new(world.settings.redis.url.as_deref().context("a URL")?, &world.settings.redis)?;
    streams.publish(&[envelope("tick", "1", &())?]).await.map_err(|e| e.error)?;
    assert_eq!((streams.len("events:user").await?, streams.len("events:tick").await?), (10, 1));
    only(&examine(&world).await, "redis-permissions", Severity::Error, "may not run HSET on");
    Ok(())
}

/// The lag that Redis 7.0 tells of a group is a wrong number after entries were removed, and after the group was set back.
#[tokio::test(flavor = "multi_thread")]
async fn the_lag_of_a_group_is_right_whatever_was_removed() -> Result<()> {
    let world = World::new().await?;
    let (stream, mut redis) = (world.user_stream(), world.redis().await?);
    let envelopes: Vec<_> = (0..10).map(|n| envelope("user", &n.to_string(), &n)).collect::<Result<_>>()?;
    world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    let ids: Vec<String> = world.entries(&stream).await?.into_iter().map(|entry| entry.id).collect();
    redis::cmd("XGROUP").arg(&["CREATE", &stream, "mail", "0"]).exec_async(&mut redis).await?;
    let is_behind = async |entries: u64, what: &str| {
        let group = world.streams.groups(&stream).await?.pop().context("a group")?;
        assert_eq!(group.behind, Some(entries), "{what}");
        let lag = world.streams.lags(&stream).await?.pop().context("a lag")?;
        assert_eq!(lag.events, entries + group.pending, "{what}");
        anyhow::Ok(())
    };
    let read = async |count: usize| {
        let options = redis::streams::StreamReadOptions::default().group("mail", "c").count(count);
        let mut redis = world.redis().await?;
        redis.xread_options::<_, _, redis::Value>(&[&stream], &[">"], &options).await.map(drop)?;
        anyhow::Ok(())
    };
    is_behind(10, "new").await?;
    read(2).await?;
    is_behind(8, "read").await?;
    redis.xtrim::<_, ()>(&stream, StreamMaxlen::Equals(4)).await?;
    is_behind(4, "trimmed unread").await?;
    read(1).await?;
    is_behind(3, "read after that").await?;
    redis.xdel::<_, _, ()>(&stream, &[&ids[8]]).await?;
    is_behind(2, "deleted").await?;
    redis::cmd("XGROUP").arg(&["SETID", &stream, "mail", &ids[0]]).exec_async(&mut redis).await?;
    is_behind(3, "set back").await?;
    redis::cmd("XGROUP").arg(&["SETID", &stream, "mail", "0", "ENTRIESREAD", "3"]).exec_async(&mut redis).await?;
    is_behind(3, "set back, with a number").await?;
    read(10).await?;
    is_behind(0, "all is read").await?;
    redis.xtrim::<_, ()>(&stream, StreamMaxlen::Equals(0)).await?;
    is_behind(0, "nothing is left").await?;
    Ok(())
}

/// Above the bound they are not counted; a number that cannot be is not told.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_lag_is_told_where_it_can_be() -> Result<()> {
    const MANY: usize = GroupInfo::COUNTED + 2_000;
    let world = World::new().await?;
    let (stream, mut redis) = (world.user_stream(), world.redis().await?);
    let envelopes: Vec<_> = (0..MANY).map(|n| envelope("user", "1", &n)).collect::<Result<_>>()?;
    world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    redis::cmd("XGROUP").arg(&["CREATE", &stream, "mail", "0"]).exec_async(&mut redis).await?;
    let behind = async || anyhow::Ok(world.streams.groups(&stream).await?.pop().context("a group")?.behind);
    assert_eq!(behind().await?, Some(MANY as u64));
    redis.xtrim::<_, ()>(&stream, StreamMaxlen::Equals(GroupInfo::COUNTED + 1_000)).await?;
    let told = behind().await?;
    assert!(told.is_none_or(|entries| entries <= GroupInfo::COUNTED as u64 + 1_000), "{told:?}");
    assert_eq!(world.streams.excess(&stream, 1).await?.map(|excess| excess.entries), Some(GroupInfo::COUNTED as u64 + 999));
    world.streams.trim(&stream, Duration::ZERO, GroupInfo::COUNTED as u64 - 1).await?;
    assert_eq!(behind().await?, Some(GroupInfo::COUNTED as u64 - 1));
    Ok(())
}
