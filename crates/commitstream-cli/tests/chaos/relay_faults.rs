//! Faults of one relay or consumer, and of its own connections.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::faults::choose;
use crate::link_faults::LinkFault;
use crate::relay::{LONGER_THAN_LEASE_MILLIS, Relay, Role};
use crate::watch;
use crate::world::World;

/// Of the first of them.
const ACTOR: u64 = 10;

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill,
    /// For so long that others take over, and then it goes on.
    Pause,
    Restart,
    /// It leaves, and joins again later.
    Leave,
    PostgresLink,
    RedisLink,
}

const FAULTS: [(u32, Fault); 6] = [
    (4, Fault::Kill),
    (2, Fault::Pause),
    (2, Fault::Restart),
    (1, Fault::Leave),
    (3, Fault::PostgresLink),
    (3, Fault::RedisLink),
];

/// A process that has been through the storm, and runs.
pub struct Tormented {
    pub relay: Relay,
    /// For each kill of a relay, how long it took until all that had waited then was published.
    pub recovering: JoinSet<Option<Duration>>,
}

pub async fn torment(world: Arc<World>, role: Role, number: usize) -> Result<Tormented> {
    let name = role.name();
    let mut dice = world.dice(ACTOR + number as u64);
    let mut relay = Relay::new(world.clone(), role, number)?;
    let mut recovering = JoinSet::new();
    relay.start(&mut dice)?;
    while world.pause(&mut dice, 200..2_000).await {
        relay.expect_running(&mut dice)?;
        match choose(&FAULTS, &mut dice)? {
            Fault::Kill => {
                let waiting = watch::waiting(&world).await;
                relay.kill()?;
                world.faults.count(format!("{name} killed"));
                if role == Role::Relay {
                    recovering.spawn(watch::recovery(world.clone(), waiting));
                }
                sleep(millis(&mut dice, 0..2_000)).await;
                relay.start(&mut dice)?;
            }
            Fault::Pause => {
                world.faults.count(format!("{name} paused until others take over"));
                relay.signal("STOP")?;
                sleep(millis(&mut dice, LONGER_THAN_LEASE_MILLIS)).await;
                relay.signal("CONT")?;
            }
            Fault::Restart => {
                world.faults.count(format!("{name} restarted gracefully"));
                relay.end().await?;
                relay.start(&mut dice)?;
            }
            // The first one always comes back at once, so that there is one.
            Fault::Leave if number > 0 => {
                world.faults.count(format!("{name} left, and joined again"));
                relay.end().await?;
                world.pause(&mut dice, 2_000..8_000).await;
                relay.start(&mut dice)?;
            }
            Fault::Leave => {}
            Fault::PostgresLink => {
                let fault = LinkFault::draw(&mut dice)?;
                world.faults.count(format!("one {name}'s link to PostgreSQL: {}", fault.name()));
                fault.strike(&[&world.links[number].postgres], &mut dice).await?;
            }
            Fault::RedisLink => {
                let fault = LinkFault::draw(&mut dice)?;
                world.faults.count(format!("one {name}'s link to Redis: {}", fault.name()));
                fault.strike(&[&world.links[number].redis], &mut dice).await?;
            }
        }
    }
    relay.expect_running(&mut dice)?;
    Ok(Tormented { relay, recovering })
}

fn millis(dice: &mut StdRng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(dice.random_range(range))
}
