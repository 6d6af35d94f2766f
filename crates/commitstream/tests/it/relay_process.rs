//! Relays in processes of their own, to be killed.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::config::Settings;
use commitstream::relay::OutboxProcessor;

use crate::support::World;

/// Settings as lines of `key=value`.
const SETTINGS: &str = "COMMITSTREAM_TEST_RELAY";
/// Where the relay dies by itself: the name of a failpoint, and how many times it is passed before.
const CRASH: &str = "COMMITSTREAM_TEST_RELAY_CRASH";

/// Starts this test binary as a relay for `world`. It ends when it is killed.
pub fn spawn(world: &World) -> Result<Child> {
    Ok(command(world)?.spawn()?)
}

/// The same, but it dies, as if killed, when it has passed the failpoint `passes` times and comes there once more.
pub fn spawn_to_crash(world: &World, failpoint: &str, passes: u32) -> Result<Child> {
    Ok(command(world)?.env(CRASH, format!("{failpoint} {passes}")).spawn()?)
}

fn command(world: &World) -> Result<Command> {
    let url = |url: &Option<String>| url.clone().context("the world has both URLs");
    let millis = |duration: Duration| format!("{}ms", duration.as_millis());
    let settings = [
        ("app.database.url", url(&world.settings.database.url)?),
        ("app.redis.url", url(&world.settings.redis.url)?),
        ("app.redis.streamPrefix", world.settings.redis.stream_prefix.clone()),
        ("app.outbox.processor.leaseDuration", millis(world.settings.outbox.processor.lease_duration)),
        ("app.outbox.processor.batchSize", world.settings.outbox.processor.batch_size.to_string()),
    ];
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "relay_process::relay_process", "--nocapture"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.env(SETTINGS, settings.map(|(key, value)| format!("{key}={value}")).join("\n"));
    Ok(command)
}

/// Not a test by itself: the body of a spawned relay.
#[tokio::test(flavor = "multi_thread")]
async fn relay_process() -> Result<()> {
    let Ok(text) = std::env::var(SETTINGS) else { return Ok(()) };
    let flags: Vec<(String, String)> =
        text.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    if let Some((failpoint, passes)) = std::env::var(CRASH).ok().as_deref().and_then(|crash| crash.split_once(' ')) {
        let left = std::sync::atomic::AtomicU32::new(passes.parse()?);
        let crash = move || {
            if left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_err() {
                std::process::abort();
            }
        };
        fail::cfg_callback(failpoint, crash).map_err(anyhow::Error::msg)?;
    }
    let settings = Settings::load(None, |_| None, &flags)?.settings;
    Ok(OutboxProcessor::new(settings)?.start().ended().await?)
}
