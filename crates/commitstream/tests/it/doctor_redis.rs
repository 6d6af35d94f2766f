//! Each finding about Redis and the streams, provoked on real servers; where a command mends it, the command is run.

use anyhow::{Context, Result};
use commitstream::doctor::Severity;
use commitstream_sandbox::{Redis, RedisCluster, RedisSentinel, Sandbox};

use crate::doctor_report::{examine, found, mend, only, passes};
use crate::support::World;

pub const HEALTHY: [(&str, &str); 1] = [("appendfsync", "everysec")];

/// Without tables, since only Redis is looked at.
pub fn world(redis: &Redis) -> Result<World> {
    World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())
}

pub async fn run(world: &World, command: &str) -> Result<()> {
    let words: Vec<&str> = command.split(' ').collect();
    Ok(redis::cmd(words[0]).arg(&words[1..]).exec_async(&mut world.redis().await?).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_evicts_is_found_and_mended() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let world = world(&redis)?;
    passes(&examine(&world).await, "redis-eviction");
    run(&world, "CONFIG SET maxmemory-policy volatile-lru").await?;
    only(&examine(&world).await, "redis-eviction", Severity::Note, "is volatile-lru");
    run(&world, "CONFIG SET maxmemory 1gb").await?;
    let report = examine(&world).await;
    mend(&world.settings, only(&report, "redis-eviction", Severity::Error, "is volatile-lru"))?;
    passes(&examine(&world).await, "redis-eviction");
    redis.restart()?;
    passes(&examine(&world).await, "redis-eviction");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn persistence_that_loses_events_is_found_and_mended() -> Result<()> {
    let redis = Redis::start_with(&[("appendonly", "no")])?;
    let world = world(&redis)?;
    only(&examine(&world).await, "redis-persistence", Severity::Error, "keeps nothing on disk, and has no replica");
    redis::cmd("CONFIG").arg(&["SET", "save", "60 1"]).exec_async(&mut world.redis().await?).await?;
    let report = examine(&world).await;
    mend(&world.settings, only(&report, "redis-persistence", Severity::Warning, "has snapshots, and no append-only file"))?;
    let report = examine(&world).await;
    mend(&world.settings, only(&report, "redis-persistence", Severity::Warning, "(appendfsync no)"))?;
    passes(&examine(&world).await, "redis-persistence");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_runs_out_is_found_before_and_when_nothing_can_be_written() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let world = world(&redis)?;
    run(&world, "SETRANGE other 20000000 x").await?;
    let info: String = redis::cmd("INFO").arg("memory").query_async(&mut world.redis().await?).await?;
    let used: u64 = info.lines().find_map(|line| line.strip_prefix("used_memory:")).context("a figure")?.trim().parse()?;
    run(&world, &format!("CONFIG SET maxmemory {}", used * 5 / 4)).await?;
    only(&examine(&world).await, "redis-memory", Severity::Warning, "% of maxmemory)");
    passes(&examine(&world).await, "redis-writable");
    run(&world, &format!("CONFIG SET maxmemory {}", used / 2)).await?;
    let report = examine(&world).await;
    only(&report, "redis-memory", Severity::Error, "% of maxmemory)");
    only(&report, "redis-writable", Severity::Error, "refuses to write: ");
    passes(&report, "redis-permissions");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_are_compared_with_the_setting_and_a_replica_is_no_master() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let mut world = world(&redis)?;
    passes(&examine(&world).await, "redis-replicas");
    world.settings.redis.wait_replicas = 1;
    only(&examine(&world).await, "redis-replicas", Severity::Error, "has 0 replicas in step, and redis.waitReplicas is 1");
    let replica = Redis::start_replica_of(&redis)?;
    passes(&examine(&world).await, "redis-replicas");
    world.settings.redis.wait_replicas = 0;
    only(&examine(&world).await, "redis-replicas", Severity::Note, "has 1 replicas in step");
    world.settings.redis.url = Some(replica.url());
    only(&examine(&world).await, "redis-writable", Severity::Error, "is a replica of 127.0.0.1:");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_that_may_not_do_what_a_relay_does_is_found() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let mut world = world(&redis)?;
    run(&world, "ACL SETUSER relay on >p ~events:* ~{events:* +@all -xadd -script -xtrim -@dangerous").await?;
    let (_, place) =
        redis.url().rsplit_once('@').map(|(login, place)| (login.to_owned(), place.to_owned())).context("a login")?;
    world.settings.redis.url = Some(format!("redis://relay:p@{place}"));
    let report = examine(&world).await;
    let finding = only(&report, "redis-permissions", Severity::Error, "may not run SCRIPT LOAD, XADD, XTRIM on");
    assert!(finding.mend.contains("ACL SETUSER the_user '+script|load' +xadd +xtrim"), "{finding:?}");
    let notes = found(&report, "redis-information");
    assert!(notes.len() == 2 && notes.iter().all(|note| note.severity == Severity::Note), "{notes:?}");
    assert!(notes[0].seen.contains("does not answer INFO") && notes[1].seen.contains("does not answer CONFIG GET"), "{notes:?}");
    assert!(found(&report, "redis-version").is_empty() && !report.passed.contains(&"redis-version"), "not examined");
    passes(&report, "clocks");

    // The rights on commands are there, those on the keys of markers are not.
    run(&self::world(&redis)?, "ACL SETUSER relay reset on >p ~events:* +@all").await?;
    only(&examine(&world).await, "redis-permissions", Severity::Error, "may not use the keys ~{events:* at");
    run(&self::world(&redis)?, "ACL SETUSER relay ~{events:*").await?;
    let report = examine(&world).await;
    passes(&report, "redis-permissions");
    passes(&report, "redis-information");
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut world.redis().await?).await.unwrap_or_default();
    assert!(keys.is_empty(), "nothing was written: {keys:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_way_of_a_stream_is_found_and_mended() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let world = world(&redis)?;
    for command in ["SET events:it's x", "XADD events:user * id x", "XADD events:user:dead * id x", "SET other x"] {
        run(&world, command).await?;
    }
    let report = examine(&world).await;
    mend(&world.settings, only(&report, "stream-keys", Severity::Warning, "the key events:it's is a string, not a stream"))?;
    passes(&examine(&world).await, "stream-keys");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_that_stand_still_and_dead_letters_are_found() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let world = world(&redis)?;
    for command in [
        "HSET events:{streams} user nobody",
        "XADD events:user 1-0 id x",
        "XADD events:user 2-0 id x",
        "XGROUP CREATE events:user audit 0",
        "XGROUP CREATE events:user mail 0",
        "XREADGROUP GROUP mail c1 COUNT 2 STREAMS events:user >",
        "ZADD {events:user}:group:mail:members 99999999999999 c1",
        "XADD events:user:dead * group mail entry 1-0 reason no attempts 5 history [] dead_at x",
    ] {
        run(&world, command).await?;
    }
    let report = examine(&world).await;
    let told: Vec<_> = found(&report, "consumer-groups").iter().map(|finding| finding.seen.clone()).collect();
    assert_eq!(told.len(), 2, "{told:#?}");
    assert_eq!(told[0], "the group audit of events:user has no living consumer; 0 entries are pending, 2 not delivered");
    assert!(told[1].starts_with("the group mail of events:user has 2 entries pending, the oldest written "), "{told:?}");
    only(&report, "dead-letters", Severity::Warning, "the group mail of events:user gave 1 events up: they are dead letters");
    only(&report, "trimming", Severity::Warning, "the stream events:user goes back ");
    mend(&world.settings, found(&report, "consumer-groups")[0])?;
    assert_eq!(found(&examine(&world).await, "consumer-groups").len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_not_trimmed_are_found() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let mut world = world(&redis)?;
    run(&world, "HSET events:{streams} user nobody").await?;
    run(&world, "XADD events:user 1-0 id x").await?;
    only(&examine(&world).await, "trimming", Severity::Note, "the stream events:user goes back ");
    run(&world, "XGROUP CREATE events:user mail 0").await?;
    let report = examine(&world).await;
    let finding = only(&report, "trimming", Severity::Warning, "the stream events:user goes back ");
    assert!(finding.why.starts_with("the group mail has not acknowledged its beginning"), "{finding:?}");
    mend(&world.settings, finding)?;
    only(&examine(&world).await, "trimming", Severity::Note, "the stream events:user goes back ");
    for command in
        ["XGROUP CREATE events:user mail 0", "XREADGROUP GROUP mail c1 STREAMS events:user >", "XACK events:user mail 1-0"]
    {
        run(&world, command).await?;
    }
    let report = examine(&world).await;
    let finding = only(&report, "trimming", Severity::Warning, "the stream events:user goes back ");
    assert_eq!(finding.mend, "commitstream cleanup");
    passes(&report, "consumer-groups");
    world.settings.streams.trim = false;
    assert!(found(&examine(&world).await, "trimming").is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_master_of_a_cluster_is_examined() -> Result<()> {
    let cluster = RedisCluster::start()?;
    let world = World::on(Sandbox::shared().database()?, &cluster.url(), "events:".into())?;
    let streams = commitstream::streams::Streams::new(&cluster.url(), &world.settings.redis)?;
    let facts = streams.examine().await?;
    assert_eq!(facts.servers.len(), 3);
    let report = examine(&world).await;
    for check in ["redis-information", "redis-permissions", "redis-writable", "redis-version", "redis-memory", "stream-keys"] {
        passes(&report, check);
    }
    assert_eq!(found(&report, "redis-replicas").len(), 3, "each master has a replica that is not waited for");
    let told = found(&report, "redis-persistence");
    assert_eq!(told.len(), 3, "appendfsync is off in the sandbox");
    told.into_iter().try_for_each(|finding| mend(&world.settings, finding))?;
    for key in ["events:a", "events:b", "events:c", "events:d"] {
        let node = &cluster.nodes()[cluster.master_of(key)?];
        run(&self::world(node)?, &format!("SET {key} x")).await?;
    }
    let report = examine(&world).await;
    passes(&report, "redis-persistence");
    let told = found(&report, "stream-keys");
    assert_eq!(told.len(), 4, "{told:#?}");
    told.into_iter().try_for_each(|finding| mend(&world.settings, finding))?;
    passes(&examine(&world).await, "stream-keys");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_master_that_sentinels_name_is_examined() -> Result<()> {
    let redis = RedisSentinel::start(1)?;
    let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.settings.redis.wait_replicas = 1;
    let report = examine(&world).await;
    for check in ["redis-reachable", "redis-permissions", "redis-writable", "redis-replicas", "redis-eviction"] {
        passes(&report, check);
    }
    mend(&world.settings, only(&report, "redis-persistence", Severity::Warning, "(appendfsync no)"))?;
    passes(&examine(&world).await, "redis-persistence");
    Ok(())
}
