//! Connections of long-running commands to Redis die in silence: nothing is passed on, and new connections are served.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::{FaultProxy, Redis};

use crate::console_site::{PASSWORD, Site};
use crate::support::{Running, World, eventually};

/// Some seconds each, on a busy machine.
const BOUND: Duration = Duration::from_secs(15);

#[test]
fn relay_tail_and_console_go_on_past_dead_connections() -> Result<()> {
    let redis = Redis::start()?;
    let url = redis.url();
    let proxy = FaultProxy::start(url.rsplit_once('@').context("a login")?.1)?;
    let world = World { redis_url: proxy.url(&url), ..World::new()? };
    let mut relay = Running::new(world.command(&["relay"]))?;
    relay.says("relay is active")?;
    let mut tail = Running::new(world.command(&["tail", "--json"]))?;
    let first = world.publish_user("0")?;
    tail.prints(&first)?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    for round in 1..=3 {
        proxy.swallow();
        let id = world.publish_user(&round.to_string())?;
        let began = Instant::now();
        eventually("the event to be published", || {
            Ok(world.database.psql("SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED'")? == "0\n")
        })?;
        let published = began.elapsed();
        tail.prints(&id)?;
        let followed = began.elapsed();
        let asked = Instant::now();
        eventually("the console to show the stream", || Ok(site.get(&cookie, "/streams")?.body.contains(&world.user_stream())))?;
        let shown = asked.elapsed();
        println!("round {round}: relay {published:?}, tail {followed:?}, console {shown:?}");
        ensure!(published < BOUND && followed < 2 * BOUND && shown < BOUND, "{published:?} {followed:?} {shown:?}");
    }
    Ok(())
}
