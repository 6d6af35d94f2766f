//! What a relay does in time, whatever else it waits for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::relay::RelayState;
use commitstream_sandbox::FaultProxy;

use crate::support::{World, eventually};

/// The retry of the first event, and what waits behind it.
#[tokio::test(flavor = "multi_thread")]
async fn retries_are_made_when_they_are_due_however_seldom_the_relay_polls() -> Result<()> {
    let mut world = World::new().await?;
    let processor = &mut world.settings.outbox.processor;
    processor.poll_interval = Duration::from_secs(10 * 60);
    processor.retry_base_delay = Duration::from_millis(300);
    processor.max_retries = 100;
    processor.retry_max_delay = Duration::from_secs(1);
    world.settings.publishing.max_payload_bytes = 2_048;
    let mut redis = world.redis().await?;
    let relay = world.relay()?;
    for _ in 0..2 {
        world.database.psql(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
             SELECT 'E', 'user', (n % 10)::text, jsonb_build_object('fill', repeat('x', 5000)) FROM generate_series(1, 20) n;",
        )?;
        let retried = "SELECT count(*) >= 10 FROM event_outbox WHERE retry_count > 2;";
        eventually("retries", async || Ok(world.database.psql(retried)?.trim() == "t")).await?;
        world.database.psql("UPDATE event_outbox SET payload = '{}';")?;
        world.drained().await?;
        assert_eq!(world.audit().await?, 20);
        redis::cmd("DEL").arg(world.user_stream()).query_async::<()>(&mut redis).await?;
        world.database.psql("DELETE FROM event_outbox; DELETE FROM outbox_batch;")?;
    }
    relay.stop().await?;
    Ok(())
}

/// The markers of the test, and how long they live: at least so long and less than so long.
async fn lives(world: &World, at_least: Duration, less_than: Duration) -> Result<usize> {
    let mut redis = world.redis().await?;
    let keys: Vec<String> =
        redis::cmd("KEYS").arg(format!("{{{}}}:batch:*", world.user_stream())).query_async(&mut redis).await?;
    let mut count = 0;
    for key in keys {
        let left: u64 = redis::cmd("PTTL").arg(key).query_async(&mut redis).await?;
        count += usize::from((at_least..less_than).contains(&Duration::from_millis(left)));
    }
    Ok(count)
}

/// While there is nothing more to do, and at the end.
#[tokio::test(flavor = "multi_thread")]
async fn the_marker_of_the_last_batch_is_shortened_too() -> Result<()> {
    let world = World::new().await?;
    let settled = world.settings.outbox.processor.settled_marker_life;
    let short = async || lives(&world, settled / 2, settled).await;
    let relay = world.relay()?;
    world.insert(1, 1).await?;
    world.drained().await?;
    eventually("a marker to be shortened", async || Ok(short().await? == 1)).await?;
    world.insert(1, 1).await?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(short().await?, 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_takes_no_longer_than_it_may_though_a_server_does_not_answer() -> Result<()> {
    for server in ["PostgreSQL", "Redis"] {
        let mut world = World::new().await?;
        world.settings.outbox.processor.shutdown_timeout = Duration::from_secs(1);
        let (settings, stalled) = (&mut world.settings, |url: &Option<String>| {
            let url = url.as_deref().context("a URL")?;
            let (_, place) = url.rsplit_once('@').context("a login")?;
            let proxy = FaultProxy::start(place.split('/').next().unwrap_or_default())?;
            let url = proxy.url(url);
            anyhow::Ok((proxy, Some(url)))
        });
        let url = if server == "Redis" { &mut settings.redis.url } else { &mut settings.database.url };
        let (proxy, through) = stalled(url)?;
        *url = through;
        let relay = world.relay()?;
        eventually("the relay to be active", async || Ok(relay.status().state == RelayState::Active)).await?;
        proxy.stall();
        let began = Instant::now();
        relay.stop().await?;
        assert!(began.elapsed() < Duration::from_secs(10), "{server}: {:?}", began.elapsed());
    }
    Ok(())
}
