//! The relay dies in each window of the protocol; those that follow find out what it had done.

use std::process::Child;

use anyhow::{Result, ensure};
use commitstream::relay::RelayState;
use commitstream_sandbox::{Redis, Sandbox};

use crate::relay_process;
use crate::support::{World, eventually};

/// Windows that every relay comes through.
const AT_WORK: [&str; 6] = ["before-claim", "after-claim", "before-append", "after-append", "before-settle", "after-settle"];
/// Windows of a relay that finds batches which another has left open.
const AT_RECOVERY: [&str; 3] = ["after-take", "after-resolve", "after-recovery"];

async fn crash(world: &World, window: &str, passes: u32) -> Result<()> {
    crashed(relay_process::spawn_to_crash(world, window, passes)?, window).await
}

async fn crashed(mut relay: Child, window: &str) -> Result<()> {
    let mut ended = None;
    let waited = eventually(window, async || {
        ended = relay.try_wait()?;
        Ok(ended.is_some())
    });
    if let Err(error) = waited.await {
        relay.kill()?;
        return Err(error);
    }
    ensure!(ended.is_some_and(|status| status.code().is_none()), "{window}: the relay ended by itself: {ended:?}");
    Ok(())
}

async fn finish(world: &World, events: usize, what: &str) -> Result<()> {
    let relay = world.relay()?;
    // Before it is active it may have to make events unsent again.
    relay.watch().wait_for(|s| s.state == RelayState::Active).await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, events, "{what}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_in_any_window_of_the_work_loses_and_doubles_nothing() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 50;
    let mut events = 0;
    for window in AT_WORK {
        for passes in [0, 1, 3] {
            world.insert(2_000, 40).await?;
            events += 2_000;
            crash(&world, window, passes).await?;
        }
        finish(&world, events, window).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_in_any_window_of_the_recovery_loses_and_doubles_nothing() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 50;
    let mut events = 0;
    for window in AT_RECOVERY {
        for left_open_at in ["after-claim", "after-append"] {
            world.insert(2_000, 40).await?;
            events += 2_000;
            crash(&world, left_open_at, 1).await?;
            crash(&world, window, 0).await?;
        }
        finish(&world, events, window).await?;
    }
    Ok(())
}

/// A relay joins and another gives it half of its partitions; it dies when it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_while_partitions_change_hands_loses_and_doubles_nothing() -> Result<()> {
    let world = World::new().await?;
    let giver = relay_process::spawn_to_crash(&world, "after-give", 0)?;
    world.insert(5_000, 40).await?;
    let relay = world.relay()?;
    crashed(giver, "after-give").await?;
    relay.watch().wait_for(|s| s.partitions == 64).await?;
    world.insert(5_000, 40).await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 10_000);
    Ok(())
}

/// Redis has lost everything, and the relays that make it unsent again die over it.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_while_lost_events_are_made_unsent_again_loses_and_doubles_nothing() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    let mut events = 0;
    for window in ["before-requeue", "after-requeue"] {
        world.insert(1_000, 40).await?;
        events += 1_000;
        finish(&world, events, window).await?;
        redis::cmd("FLUSHALL").query_async::<()>(&mut world.redis().await?).await?;
        crash(&world, window, 0).await?;
        finish(&world, events, window).await?;
    }
    Ok(())
}
