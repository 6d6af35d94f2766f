//! The wire form serves others: a Python program with plain redis-py.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use commitstream::publisher::DomainEventPublisher;
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
