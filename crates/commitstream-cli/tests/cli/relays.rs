//! `commitstream relays`: who is there, what each does, and what is wrong.

use anyhow::{Context, Result};
use commitstream_sandbox::Redis;
use serde_json::{Value, json};

use crate::support::{Running, World, eventually};

fn relays(world: &World) -> Result<Vec<Value>> {
    Ok(world.json(&["relays"])?.as_array().context("an array")?.clone())
}

#[test]
fn where_no_relay_runs_it_says_how_to_start_one() -> Result<()> {
    let world = World::new()?;
    assert_eq!(world.ok(&["relays"])?, "no relay runs: start one with `commitstream relay`\n");
    assert!(relays(&world)?.is_empty());
    Ok(())
}

#[test]
fn it_lists_each_relay_with_its_share() -> Result<()> {
    let world = World::new()?;
    let running = [Running::new(world.command(&["relay"]))?, Running::new(world.command(&["relay"]))?];
    eventually("two relays to share the partitions", || {
        Ok(relays(&world)?.iter().filter(|relay| relay["partitions"] == 32 && relay["state"] == "active").count() == 2)
    })?;
    for relay in relays(&world)? {
        assert_eq!((relay["alive"].as_bool(), relay["version"].as_str()), (Some(true), Some(env!("CARGO_PKG_VERSION"))));
        assert!(relay["pid"].as_i64() > Some(0) && relay["host"].as_str().is_some_and(|host| !host.is_empty()), "{relay}");
        assert!(relay["heartbeat_age_ms"].as_i64() < Some(10_000) && relay["events_per_second"].is_number(), "{relay}");
    }
    let text = world.ok(&["relays"])?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].starts_with("HOST") && lines[0].contains("PARTITIONS") && lines[1].contains(" ago"), "{text}");

    let [first, mut second] = running;
    first.signal("KILL")?;
    eventually("the other one to have all", || {
        let listed = relays(&world)?;
        Ok(listed.iter().any(|r| r["partitions"] == 64) && listed.iter().any(|r| r["state"] == "gone"))
    })?;
    second.signal("TERM")?;
    assert_eq!(second.ended()?.code, Some(0));
    let text = world.ok(&["relays"])?;
    assert!(text.contains("gone") && text.contains("64 of 64 partitions have no living relay"), "{text}");
    drop(first);
    Ok(())
}

#[test]
fn they_are_paused_and_resumed_with_an_audit() -> Result<()> {
    let world = World::new()?;
    let mut relay = Running::new(world.command(&["relay"]))?;
    relay.says("relay is active")?;
    assert_eq!(world.ok(&["relays", "resume"])?, "nothing to do: relays are not paused\n");
    let paused = world.ok(&["relays", "pause"])?;
    assert!(paused.starts_with("paused: ") && paused.contains("commitstream relays resume"), "{paused}");
    relay.says("relay is paused")?;
    let again = world.ok(&["relays", "pause"])?;
    assert!(again.starts_with("nothing to do: already paused by cli:") && again.contains(" UTC"), "{again}");
    world.publish_user("1")?;
    let listed = world.ok(&["relays"])?;
    assert!(listed.contains("paused by cli:") && listed.contains("until `commitstream relays resume`"), "{listed}");
    let pause = &relays(&world)?[0]["pause"];
    let who = pause["who"].as_str().context("who")?.to_owned();
    assert!(who.starts_with("cli:") && pause["since"].is_string(), "{pause}");
    assert_eq!(world.stats()?["pending"], 1);

    assert_eq!(world.json(&["relays", "resume"])?, json!({ "changed": true, "pause": null }));
    eventually("what waited to be published", || Ok(world.stats()?["published"] == 1))?;
    assert_eq!(relays(&world)?[0]["pause"], Value::Null);
    assert_eq!(world.deeds()?, ["pause", "resume"].map(|action| format!("{who}|{action}|all relays|0|0")));
    Ok(())
}

#[test]
fn it_says_why_a_relay_cannot_work() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(&redis)?;
    let mut relay = Running::new(world.command(&["relay"]))?;
    eventually("the relay to be active", || Ok(relays(&world)?.iter().any(|relay| relay["state"] == "active")))?;
    redis.stop()?;
    eventually("the list to say why", || {
        let text = world.ok(&["relays"])?;
        Ok(text.contains("unable") && text.contains("cannot work: Redis at 127.0.0.1:") && !text.contains("***"))
    })?;
    redis.restart()?;
    eventually("the relay to be active again", || Ok(relays(&world)?.iter().any(|relay| relay["state"] == "active")))?;
    relay.signal("TERM")?;
    assert_eq!(relay.ended()?.code, Some(0));
    Ok(())
}
