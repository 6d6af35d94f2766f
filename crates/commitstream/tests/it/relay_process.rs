//! Relays in processes of their own, to be killed.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use commitstream::config::Settings;
use commitstream::relay::OutboxProcessor;

use crate::support::World;

const DATABASE: &str = "COMMITSTREAM_TEST_RELAY_DATABASE";
const REDIS: &str = "COMMITSTREAM_TEST_RELAY_REDIS";
const PREFIX: &str = "COMMITSTREAM_TEST_RELAY_PREFIX";

/// Starts this test binary as a relay for `world`. It ends when it is killed.
pub fn spawn(world: &World) -> Result<Child> {
    let url = |url: &Option<String>| url.clone().context("the world has both URLs");
    let child = Command::new(std::env::current_exe()?)
        .args(["--exact", "relay_process::relay_process", "--nocapture"])
        .env(DATABASE, url(&world.settings.database.url)?)
        .env(REDIS, url(&world.settings.redis.url)?)
        .env(PREFIX, &world.settings.redis.stream_prefix)
        .stdout(Stdio::null())
        .spawn()?;
    Ok(child)
}

/// Not a test by itself: the body of a spawned relay.
#[tokio::test(flavor = "multi_thread")]
async fn relay_process() -> Result<()> {
    let Ok(prefix) = std::env::var(PREFIX) else { return Ok(()) };
    let mut settings = Settings::default();
    settings.database.url = Some(std::env::var(DATABASE)?);
    settings.redis.url = Some(std::env::var(REDIS)?);
    settings.redis.stream_prefix = prefix;
    Ok(OutboxProcessor::new(settings)?.start().ended().await?)
}
