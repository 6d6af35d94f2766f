//! `tail`: what it begins with, what it follows, how it ends.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::Redis;
use serde_json::Value;

use crate::support::{Running, World, wait};

/// Sends straight to the stream of this aggregate type; returns the event's id.
fn send(world: &World, aggregate_type: &str, id: &str) -> Result<String> {
    let args =
        ["publish", "--type", "Seen", "--aggregate-type", aggregate_type, "--aggregate-id", id, "--lane", "high-frequency"];
    Ok(world.json(&args)?["id"].as_str().context("no id")?.to_owned())
}

/// Appends events of one stream quickly, in order: aggregate ids 0, 1, 2, …
fn send_many(world: &World, aggregate_type: &str, events: u32) -> Result<()> {
    let mut pipeline = redis::pipe();
    for n in 0..events {
        let command = pipeline.cmd("XADD").arg(format!("{}{aggregate_type}", world.prefix)).arg("*");
        command
            .arg("id")
            .arg("01a206d6-f98b-7780-b3c6-d07e75fbc58f")
            .arg("type")
            .arg("Seen")
            .arg("aggregate_type")
            .arg(aggregate_type);
        command
            .arg("aggregate_id")
            .arg(n)
            .arg("occurred_at")
            .arg("2026-01-31T12:00:00Z")
            .arg("payload")
            .arg("{\"a\":\n1}")
            .ignore();
    }
    world.note(aggregate_type)?;
    Ok(pipeline.exec(&mut world.redis()?)?)
}

fn aggregate_ids(lines: &str) -> Result<Vec<String>> {
    let id = |line| -> Result<String> {
        let event: Value = serde_json::from_str(line)?;
        Ok(format!("{}{}", event["aggregate_type"].as_str().unwrap_or("?"), event["aggregate_id"].as_str().unwrap_or("?")))
    };
    lines.lines().map(id).collect()
}

#[test]
fn where_it_begins() -> Result<()> {
    let world = World::unmigrated()?;
    for (aggregate_type, id) in [("a", "1"), ("b", "2"), ("a", "3"), ("b", "4")] {
        send(&world, aggregate_type, id)?;
    }
    for (args, expected) in [
        (["--last", "3"].as_slice(), ["b2", "a3", "b4"].as_slice()),
        (&["--last", "0"], &[]),
        (&["--from-start"], &["a1", "b2", "a3", "b4"]),
        (&["--from-start", "--limit", "2"], &["a1", "b2"]),
        (&["a", "--last", "1"], &["a3"]),
        (&["b", &format!("{}a", world.prefix)], &["a1", "b2", "a3", "b4"]),
        (&["c"], &[]),
    ] {
        let lines = world.ok(&[&["tail", "--no-follow", "--json"], args].concat())?;
        assert_eq!(aggregate_ids(&lines)?, expected, "{args:?}");
    }
    Ok(())
}

#[test]
fn many_pages_stay_in_order() -> Result<()> {
    let world = World::unmigrated()?;
    for aggregate_type in ["a", "b"] {
        send_many(&world, aggregate_type, 1_200)?;
    }
    let lines = world.ok(&["tail", "--from-start", "--no-follow", "--json"])?;
    let order: Vec<_> = lines
        .lines()
        .map(|line| -> Result<(u64, u64)> {
            let event: Value = serde_json::from_str(line)?;
            let (millis, sequence) = event["entry_id"].as_str().and_then(|id| id.split_once('-')).context("an entry id")?;
            Ok((millis.parse()?, sequence.parse()?))
        })
        .collect::<Result<_>>()?;
    assert_eq!(order.len(), 2_400);
    assert!(order.is_sorted());
    Ok(())
}

#[test]
fn it_follows_streams_that_appear_later() -> Result<()> {
    let world = World::unmigrated()?;
    let mut tail = Running::new(world.command(&["tail", "--json", "--limit", "3"]))?;
    tail.says("no event yet")?;
    for (aggregate_type, id) in [("first", "1"), ("second", "2"), ("first", "3")] {
        let id = send(&world, aggregate_type, id)?;
        tail.prints(&id)?;
    }
    assert_eq!(tail.ended()?.code, Some(0));
    Ok(())
}

#[test]
fn it_outlives_an_outage_and_says_so_once() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(&redis)?;
    let before = send(&world, "a", "1")?;
    let mut tail = Running::new(world.command(&["tail", "--json", "--limit", "2"]))?;
    tail.prints(&before)?;
    redis.stop()?;
    tail.says("waiting for it")?;
    redis.restart()?;
    tail.says("answers again")?;
    let after = send(&world, "a", "2")?;
    tail.prints(&after)?;
    let answer = tail.ended()?;
    assert_eq!(answer.code, Some(0));
    assert_eq!(answer.stderr.matches("waiting for it").count(), 1, "{answer:?}");
    Ok(())
}

#[test]
fn a_closed_pipe_ends_it_quietly() -> Result<()> {
    let world = World::unmigrated()?;
    send_many(&world, "a", 5_000)?;
    let args = ["tail", "--from-start"];
    let mut tail = world.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(tail.stdout.take().context("standard output is piped")?).read_line(&mut line)?;
    let stderr = std::io::read_to_string(tail.stderr.take().context("standard error is piped")?)?;
    assert_eq!((wait(&mut tail)?.code(), stderr.as_str()), (Some(0), ""));
    Ok(())
}

#[test]
fn a_key_that_is_no_stream_is_explained() -> Result<()> {
    let world = World::unmigrated()?;
    redis::cmd("SET").arg(world.user_stream()).arg("x").exec(&mut world.redis()?)?;
    for args in [["tail", "user"].as_slice(), &["tail", "user", "--no-follow", "--from-start"], &["tail", "user", "--last", "0"]]
    {
        let answer = world.run(args)?;
        let is_explained = ["WRONGTYPE", "user", "hint: ", "commitstream doctor"].iter().all(|text| answer.stderr.contains(text));
        ensure!(answer.code == Some(1) && is_explained, "{args:?}: {answer:?}");
    }
    Ok(())
}

#[test]
fn lines_for_people() -> Result<()> {
    let world = World::unmigrated()?;
    send_many(&world, "a", 1)?;
    let text = world.ok(&["tail", "--no-follow"])?.replace(&world.prefix, "events:");
    insta::assert_snapshot!(text, @r#"2026-01-31 12:00:00.000  events:a  Seen  0  {"a": 1}"#);
    Ok(())
}

#[test]
fn an_entry_that_is_no_event_is_shown_as_such() -> Result<()> {
    let world = World::unmigrated()?;
    world.note("user")?;
    redis::cmd("XADD").arg(world.user_stream()).arg("1-1").arg("some").arg("thing").exec(&mut world.redis()?)?;
    let event: Value = serde_json::from_str(&world.ok(&["tail", "--no-follow", "--json"])?)?;
    assert_eq!(event["entry_id"], "1-1");
    assert!(event["error"].as_str().is_some_and(|error| error.contains("field `id` is missing")), "{event}");
    assert!(world.ok(&["tail", "--no-follow"])?.contains("1-1 is not an event"));
    Ok(())
}
