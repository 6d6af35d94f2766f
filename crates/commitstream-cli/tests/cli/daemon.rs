//! The relay as a daemon: signals, outages, a log that nobody reads.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result};
use commitstream_sandbox::Redis;
use serde_json::Value;

use crate::support::{Running, World, eventually, signal, wait};

const UNSENT: &str = "SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED'";

fn sent(world: &World) -> Result<bool> {
    Ok(world.database.psql(UNSENT)? == "0\n")
}

#[test]
fn it_publishes_until_it_is_told_to_stop() -> Result<()> {
    for name in ["TERM", "INT"] {
        let world = World::new()?;
        let mut relay = Running::new(world.command(&["relay", "--poll-interval", "100ms", "--batch-size", "7"]))?;
        let start = relay.says("starts")?;
        for text in [env!("CARGO_PKG_VERSION"), "postgres:***@", "redis://default:***@", &world.prefix, "100ms", "batch_size=7"] {
            assert!(start.contains(text), "{text} is missing in {start}");
        }
        relay.says("relay is active")?;
        world.publish_user("1")?;
        eventually("the event to be published", || sent(&world))?;
        relay.signal(name)?;
        let answer = relay.ended()?;
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(0), ""), "{name}: {answer:?}");
        assert!(answer.stderr.contains(&format!("SIG{name}")) && answer.stderr.contains("published=1"), "{answer:?}");
    }
    Ok(())
}

#[test]
fn its_log_is_json_for_programs() -> Result<()> {
    let world = World::new()?;
    let mut relay = Running::new(world.command(&["relay", "--json"]))?;
    let active = relay.says("relay is active")?;
    relay.signal("TERM")?;
    let answer = relay.ended()?;
    assert_eq!(answer.code, Some(0));
    for line in answer.stderr.lines().chain([active.as_str()]) {
        let entry: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        assert!(entry["level"].is_string() && entry["message"].is_string(), "{line}");
    }
    Ok(())
}

#[test]
fn a_second_signal_stops_it_at_once() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(&redis)?;
    let mut relay = Running::new(world.command(&["relay"]))?;
    relay.says("relay is active")?;
    redis.pause()?;
    world.publish_user("1")?;
    eventually("a batch to be in flight", || Ok(world.database.psql("SELECT count(*) FROM outbox_batch")? == "1\n"))?;
    relay.signal("TERM")?;
    relay.says("a second signal stops at once")?;
    relay.signal("TERM")?;
    assert_eq!(relay.ended()?.code, Some(1));

    // Nothing is lost: the next relay sends it.
    redis.resume()?;
    world.ok(&["relay", "--until-empty"])?;
    assert!(sent(&world)?);
    assert_eq!(world.ok(&["tail", "--no-follow", "--json"])?.lines().count(), 1);
    Ok(())
}

#[test]
fn it_waits_for_a_redis_that_is_down() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(&redis)?;
    world.publish_user("1")?;
    redis.stop()?;
    let mut relay = Running::new(world.command(&["relay"]))?;
    relay.says("the relay waits for a server: cannot use redis://")?;
    relay.says("keeps trying")?;
    redis.restart()?;
    eventually("the event to be published", || sent(&world))?;
    relay.signal("TERM")?;
    assert_eq!(relay.ended()?.code, Some(0));
    Ok(())
}

#[test]
fn it_outlives_the_reader_of_its_log() -> Result<()> {
    let world = World::new()?;
    let mut relay = world.command(&["relay", "-v"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut log = BufReader::new(relay.stderr.take().context("standard error is piped")?);
    let mut line = String::new();
    log.read_line(&mut line)?;
    drop(log);
    world.publish_user("1")?;
    let published = eventually("the event to be published", || sent(&world));
    signal(&relay, "TERM")?;
    let status = wait(&mut relay)?;
    published?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}

#[test]
fn until_empty_is_content_with_the_work_of_another_relay() -> Result<()> {
    let world = World::new()?;
    let mut owner = Running::new(world.command(&["relay"]))?;
    owner.says("relay is active")?;
    world.publish_user("1")?;
    let drained = world.json(&["relay", "--until-empty"])?;
    assert_eq!(drained["published"], 0);
    assert!(sent(&world)?);
    owner.signal("TERM")?;
    assert_eq!(owner.ended()?.code, Some(0));
    Ok(())
}
