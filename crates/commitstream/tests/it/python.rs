//! The wire form serves others: programs in Python and Node with nothing but a client of Redis.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use commitstream::EventEnvelope;
use commitstream::publisher::DomainEventPublisher;
use commitstream_sandbox::{Redis, Sandbox};
use serde_json::{Value, json};

use crate::events::{envelope, user};
use crate::support::World;

/// A Python that has the client, in the places where `scripts/install-servers.sh --tests` looks.
fn python() -> Result<&'static str> {
    let places = [concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/python/bin/python3"), "python3", "/usr/bin/python3"];
    let has_client =
        |python: &&str| Command::new(python).args(["-c", "import redis"]).output().is_ok_and(|output| output.status.success());
    places.into_iter().find(has_client).context("no Python has redis-py: run scripts/install-servers.sh --tests")
}

/// The example for Node, beside the client that `scripts/install-servers.sh --tests` installs; `None` without it.
fn node_program() -> Result<Option<PathBuf>> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/node");
    let has_node = Command::new("node").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has_node || !place.join("node_modules/redis").exists() {
        println!("left out: no Node with the package redis; scripts/install-servers.sh --tests installs it");
        return Ok(None);
    }
    let program = place.join("read_stream.mjs");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/read_stream.mjs"), &program)?;
    Ok(Some(program))
}

/// The programs, each with the name of its consumer.
fn programs() -> Result<Vec<(&'static str, &'static str, PathBuf)>> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/read_stream.py");
    let mut programs = vec![("python", self::python()?, python)];
    programs.extend(node_program()?.map(|program| ("node", "node", program)));
    Ok(programs)
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_in_other_languages_finish_what_they_began_and_leave_alone_what_is_for_others() -> Result<()> {
    // Alone, so that connections can be counted.
    let redis = Redis::start()?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    let (stream, mut client) = (world.user_stream(), world.redis().await?);
    let events: Vec<EventEnvelope> = (0..3).map(|n| envelope("user", "7", &n)).collect::<Result<_>>()?;
    world.streams.publish(&events).await.map_err(|unsent| unsent.error)?;
    let other = ["XADD", &stream, "*", "id", "x", "type", "Lost", "payload", "{}", "group", "others"];
    redis::cmd(other[0]).arg(&other[1..]).query_async::<()>(&mut client).await?;
    for (name, runner, program) in programs()? {
        redis::cmd("XGROUP").arg(&["CREATE", &stream, name, "0"]).query_async::<()>(&mut client).await?;
        // Two were given to it before it ended.
        let read = ["GROUP", name, name, "COUNT", "2", "STREAMS", &stream, ">"];
        redis::cmd("XREADGROUP").arg(&read).query_async::<()>(&mut client).await?;
        let before = connections(&mut client).await?;
        // A longer wait than the 5 s after which redis-py 8 gives a connection up by itself.
        let output = Command::new(runner).arg(&program).args([&redis.url(), &stream, name, "6"]).output()?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(connections(&mut client).await? - before, 1, "{name} has opened another connection");
        let lines = String::from_utf8(output.stdout)?;
        let read: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        assert_eq!(read.iter().map(|event| &event["payload"]).collect::<Vec<_>>(), [&json!(0), &json!(1), &json!(2)], "{name}");
        let pending: (u64, redis::Value, redis::Value, redis::Value) =
            redis::cmd("XPENDING").arg(&stream).arg(name).query_async(&mut client).await?;
        assert_eq!(pending.0, 0, "{name}");
    }
    Ok(())
}

/// How many the server has had.
async fn connections(client: &mut redis::aio::MultiplexedConnection) -> Result<u64> {
    let info: String = redis::cmd("INFO").arg("stats").query_async(client).await?;
    let count = info.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
    Ok(count.context("connections")?.trim().parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_program_reads_both_lanes() -> Result<()> {
    let world = World::new().await?;
    let ada = user(7);
    let critical = world.publisher()?.publish(&mut world.connect().await?, &ada).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let direct = envelope("user", "8", &json!({ "text": "\u{1f44b} \"quoted\"\n", "none": null }))?.with_header("trace", "abc");
    world.streams.publish(std::slice::from_ref(&direct)).await.map_err(|e| e.error)?;

    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/read_stream.py");
    let url = world.settings.redis.url.as_deref().context("the world has a Redis")?;
    let output = Command::new(python()?).arg(program).args([url, &world.user_stream(), "readers"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let events: Vec<Value> = String::from_utf8(output.stdout)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(events.len(), 2);
    assert_eq!(events[0]["id"], critical.to_string());
    assert_eq!((&events[0]["type"], &events[0]["aggregate_id"]), (&json!("UserCreated"), &json!("7")));
    assert_eq!(events[0]["payload"], serde_json::to_value(&ada)?);
    assert_eq!(events[0]["headers"], json!({}));
    assert_eq!(events[1]["id"], direct.id.to_string());
    assert_eq!(events[1]["payload"], json!({ "text": "\u{1f44b} \"quoted\"\n", "none": null }));
    assert_eq!(events[1]["headers"], json!({ "trace": "abc" }));
    assert_eq!(events[1]["occurred_at"], direct.occurred_at_text());
    Ok(())
}
