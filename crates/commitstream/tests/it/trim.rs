//! Trimming removes what every group has acknowledged, and nothing else before a cap says so.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::outbox;
use commitstream::relay::cleanup;
use commitstream::streams::{Excess, Streams, StreamsError, Trimmed};
use commitstream::verify;
use commitstream_sandbox::{Redis, Sandbox};
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamMaxlen, StreamReadOptions, StreamReadReply};

use crate::support::{World, eventually};

const WEEK: Duration = Duration::from_secs(7 * 86_400);

/// A stream of a test, as its consumers see it.
struct Stream {
    name: String,
    redis: MultiplexedConnection,
    streams: Streams,
}

impl Stream {
    async fn new(world: &World) -> Result<Self> {
        world.note(&["user"]).await?;
        Ok(Self { name: world.user_stream(), redis: world.redis().await?, streams: world.streams.clone() })
    }

    /// Entries of eight days ago.
    async fn add_old(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        let time = chrono::Utc::now().timestamp_millis() - 8 * 86_400_000;
        let mut pipeline = redis::pipe();
        for n in numbers {
            pipeline.xadd(&self.name, format!("{time}-{n}"), &[("n", n)]).ignore();
        }
        Ok(pipeline.exec_async(&mut self.redis).await?)
    }

    async fn add(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        let mut pipeline = redis::pipe();
        for n in numbers {
            pipeline.xadd(&self.name, "*", &[("n", n)]).ignore();
        }
        Ok(pipeline.exec_async(&mut self.redis).await?)
    }

    async fn group(&mut self, group: &str) -> Result<()> {
        Ok(self.redis.xgroup_create_mkstream(&self.name, group, "0").await?)
    }

    /// Reads this many entries for a group; returns their ids.
    async fn read(&mut self, group: &str, count: usize) -> Result<Vec<String>> {
        let options = StreamReadOptions::default().group(group, "consumer").count(count);
        let reply: Option<StreamReadReply> = self.redis.xread_options(&[&self.name], &[">"], &options).await?;
        let keys = reply.map(|reply| reply.keys).unwrap_or_default();
        Ok(keys.into_iter().flat_map(|key| key.ids).map(|entry| entry.id).collect())
    }

    async fn acknowledge(&mut self, group: &str, ids: &[String]) -> Result<()> {
        Ok(self.redis.xack(&self.name, group, ids).await?)
    }

    async fn handle(&mut self, group: &str, count: usize) -> Result<()> {
        let ids = self.read(group, count).await?;
        self.acknowledge(group, &ids).await
    }

    /// Trims with a retention of a week and without a cap; returns how many went.
    async fn trim(&self) -> Result<u64> {
        let trimmed = self.streams.trim(&self.name, WEEK, 0).await?;
        assert_eq!(trimmed.unread, 0);
        Ok(trimmed.acknowledged)
    }

    async fn cap(&self, max_entries: u64) -> Result<(u64, u64)> {
        let Trimmed { acknowledged, unread } = self.streams.trim(&self.name, WEEK, max_entries).await?;
        Ok((acknowledged, unread))
    }

    /// The numbers of the entries that are left.
    async fn left(&mut self) -> Result<Vec<u32>> {
        let reply: redis::streams::StreamRangeReply = self.redis.xrange_all(&self.name).await?;
        reply.ids.iter().map(|entry| entry.get("n").context("a number")).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_group_has_not_acknowledged_stays_whatever_others_did() -> Result<()> {
    let mut stream = Stream::new(&World::new().await?).await?;
    stream.add_old(0..10).await?;
    stream.add(10..20).await?;
    stream.group("fast").await?;
    assert_eq!(stream.trim().await?, 0, "nothing is read");
    stream.handle("fast", 100).await?;
    stream.group("slow").await?;
    assert_eq!(stream.trim().await?, 0, "a new group reads from the beginning");

    let ids = stream.read("slow", 6).await?;
    assert_eq!(stream.trim().await?, 0, "everything is pending");
    stream.acknowledge("slow", &[&ids[..3], &ids[4..5]].concat()).await?;
    assert_eq!(stream.trim().await?, 3);
    assert_eq!(stream.left().await?[..3], [3, 4, 5], "3 and 5 are pending");
    stream.acknowledge("slow", &ids[3..4]).await?;
    assert_eq!((stream.trim().await?, stream.left().await?[0]), (2, 5));
    stream.acknowledge("slow", &ids).await?;
    assert_eq!((stream.trim().await?, stream.left().await?[0]), (1, 6), "6 and on were never read");
    stream.handle("slow", 100).await?;
    assert_eq!(stream.trim().await?, 4);
    assert_eq!(stream.left().await?, (10..20).collect::<Vec<_>>(), "these are young");
    assert_eq!(stream.trim().await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_group_is_left_alone() -> Result<()> {
    let world = World::new().await?;
    let mut stream = Stream::new(&world).await?;
    stream.add_old(0..500).await?;
    assert_eq!(stream.trim().await?, 0);
    assert_eq!(stream.left().await?.len(), 500);
    let (nothing, there) = (Trimmed::default(), world.streams.stream_of("nothing"));
    assert_eq!(world.streams.trim(&there, WEEK, 1).await?, nothing, "there is no such stream");
    // A group without anything to read.
    stream.redis.del::<_, ()>(&stream.name).await?;
    stream.group("early").await?;
    assert_eq!((stream.trim().await?, stream.cap(1).await?), (0, (0, 0)));
    Ok(())
}

/// Ids are two numbers of 64 bits, which are not in the order of their text, and which no floating-point number can hold.
#[tokio::test(flavor = "multi_thread")]
async fn ids_are_compared_as_numbers() -> Result<()> {
    let ids = ["5-9", "5-10", "5-18446744073709551614", "5-18446744073709551615", "10-0", "10-1"];
    let mut stream = Stream::new(&World::new().await?).await?;
    for (n, id) in ids.iter().enumerate() {
        stream.redis.xadd::<_, _, _, _, ()>(&stream.name, *id, &[("n", n)]).await?;
    }
    stream.group("one").await?;
    stream.group("other").await?;
    for (place, id) in ids.iter().enumerate() {
        // Now the one is ahead, now the other.
        for group in if place % 2 == 0 { ["one", "other"] } else { ["other", "one"] } {
            assert_eq!(stream.trim().await?, 0, "{id}");
            stream.handle(group, 1).await?;
        }
        assert_eq!(stream.trim().await?, 1, "{id}");
    }
    assert!(stream.left().await?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_stream_is_trimmed_in_bounded_steps_to_the_very_entry() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    let mut stream = Stream::new(&world).await?;
    // Also with nodes of the stream that are larger than a step.
    for (entries_per_node, bytes_per_node) in [("100", "4096"), ("4000", "0")] {
        let set = |name: &'static str, value: &'static str| {
            let mut command = redis::cmd("CONFIG");
            command.arg("SET").arg(name).arg(value);
            command
        };
        set("stream-node-max-entries", entries_per_node).exec_async(&mut stream.redis).await?;
        set("stream-node-max-bytes", bytes_per_node).exec_async(&mut stream.redis).await?;
        stream.add_old(0..10_000).await?;
        stream.group("group").await?;
        stream.handle("group", 9_321).await?;
        stream.read("group", 1).await?;
        redis::cmd("CONFIG").arg("RESETSTAT").exec_async(&mut stream.redis).await?;
        assert_eq!(stream.trim().await?, 9_321);
        let stats: String = redis::cmd("INFO").arg("commandstats").query_async(&mut stream.redis).await?;
        let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")).context("no script ran")?;
        let calls: u32 = calls.split(',').next().unwrap_or_default().parse()?;
        assert!((10..=25).contains(&calls), "{calls} steps");
        assert_eq!(stream.left().await?, (9_321..10_000).collect::<Vec<_>>());
        stream.redis.del::<_, ()>(&stream.name).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cap_removes_acknowledged_entries_first_and_then_says_who_is_behind() -> Result<()> {
    let mut stream = Stream::new(&World::new().await?).await?;
    stream.add(0..3_000).await?;
    stream.group("fast").await?;
    stream.group("slow").await?;
    stream.handle("fast", 3_000).await?;
    stream.handle("slow", 130).await?;
    assert_eq!(stream.cap(3_000).await?, (0, 0));
    assert_eq!(stream.cap(2_990).await?, (10, 0), "no more than has to go");
    let behind = Some("slow".to_owned());
    assert_eq!(stream.streams.excess(&stream.name, 500).await?, Some(Excess { entries: 2_490, behind }));
    assert_eq!(stream.left().await?.len(), 2_990, "asking changes nothing");
    assert_eq!(stream.cap(500).await?, (120, 2_370));
    assert_eq!(stream.left().await?, (2_500..3_000).collect::<Vec<_>>());
    assert_eq!(stream.streams.excess(&stream.name, 500).await?, None);

    // What was cut while it was pending protects nothing any more.
    stream.read("slow", 10).await?;
    assert_eq!(stream.cap(495).await?, (0, 5));
    assert_eq!(stream.streams.trim(&stream.name, Duration::ZERO, 0).await?.acknowledged, 0, "2505 to 2509 are pending");
    stream.redis.xtrim::<_, ()>(&stream.name, StreamMaxlen::Equals(490)).await?;
    stream.handle("slow", 100).await?;
    assert_eq!(stream.streams.trim(&stream.name, Duration::ZERO, 0).await?.acknowledged, 100);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cap_holds_without_a_group_too() -> Result<()> {
    let mut stream = Stream::new(&World::new().await?).await?;
    stream.add(0..2_500).await?;
    assert_eq!(stream.streams.excess(&stream.name, 100).await?, Some(Excess { entries: 2_400, behind: None }));
    assert_eq!(stream.cap(100).await?, (0, 2_400));
    assert_eq!(stream.left().await?, (2_400..2_500).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_cannot_be_trimmed_stops_no_other() -> Result<()> {
    let mut world = World::new().await?;
    let mut stream = Stream::new(&world).await?;
    let mut connection = world.connect().await?;
    stream.redis.del::<_, ()>(world.streams.stream_of("{streams}")).await?;
    world.note(&["a", "b", "c"]).await?;
    for name in ["a", "b", "c"] {
        stream.name = world.streams.stream_of(name);
        stream.add_old(0..10).await?;
        stream.group("group").await?;
        stream.handle("group", 7).await?;
    }
    let user = world.database.name().to_owned();
    let mut acl = redis::cmd("ACL");
    acl.arg("SETUSER").arg(&user).arg("on").arg(">secret").arg("+@all");
    for name in ["a", "c", "{streams}"] {
        acl.arg(format!("~{}", world.streams.stream_of(name)));
    }
    acl.exec_async(&mut stream.redis).await?;
    let url = world.settings.redis.url.as_deref().context("a URL")?;
    let address = url.rsplit('@').next().unwrap_or(url).trim_start_matches("redis://");
    let limited = Streams::new(&format!("redis://{user}:secret@{address}"), &world.settings.redis)?;
    let mut seen = Vec::new();
    cleanup::trim(&world.outbox, &mut connection, &limited, &world.settings.streams, |_, trimmed| seen.push(trimmed)).await?;
    assert!(
        matches!(&seen[1], Err(error @ StreamsError::Refused { .. }) if error.to_string().contains("permission")),
        "{seen:?}"
    );
    let gone = [&seen[0], &seen[2]].map(|trimmed| trimmed.as_ref().ok().copied());
    assert_eq!(gone, [Some(Trimmed { acknowledged: 7, unread: 0 }); 2]);
    redis::cmd("ACL").arg("DELUSER").arg(&user).exec_async(&mut stream.redis).await?;

    world.settings.streams.trim = false;
    let nothing = |_: &str, _| unreachable!("nothing is to be trimmed");
    cleanup::trim(&world.outbox, &mut connection, &world.streams, &world.settings.streams, nothing).await?;
    world.settings.streams.max_entries = 2;
    let mut counts = Vec::new();
    let count = |_: &str, trimmed: Result<Trimmed, StreamsError>| counts.push(trimmed.unwrap());
    cleanup::trim(&world.outbox, &mut connection, &world.streams, &world.settings.streams, count).await?;
    let cut = |acknowledged, unread| Trimmed { acknowledged, unread };
    assert_eq!(counts, [cut(0, 1), cut(7, 1), cut(0, 1)], "only the cap holds");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_trims_by_itself() -> Result<()> {
    let world = World::new().await?;
    let mut stream = Stream::new(&world).await?;
    stream.add_old(0..10).await?;
    stream.group("group").await?;
    stream.handle("group", 7).await?;
    let relay = world.relay()?;
    eventually("the relay to trim", async || Ok(stream.left().await? == [7, 8, 9])).await?;
    relay.stop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_finds_no_fault_in_what_was_trimmed() -> Result<()> {
    let world = World::new().await?;
    let mut stream = Stream::new(&world).await?;
    world.insert(2_000, 20).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    stream.group("group").await?;
    stream.handle("group", 1_234).await?;
    assert_eq!(world.streams.trim(&stream.name, Duration::ZERO, 0).await?.acknowledged, 1_234);
    let mut connection = outbox::connect(world.database.url(), "verify", Duration::from_secs(10)).await?;
    let report = verify::run(&world.outbox, &mut connection, &world.streams, 10, |_| ()).await?;
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.trimmed, report.entries), (1_234, 766));
    Ok(())
}
