//! Faults of PostgreSQL, and of all connections to it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use tokio::time::sleep;

use crate::faults::choose;
use crate::link_faults::LinkFault;
use crate::world::{World, blocking};

const ACTOR: u64 = 1;

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill,
    Stop,
    Pause,
    /// The server ends the sessions of all relays.
    Terminate,
    Links,
}

const FAULTS: [(u32, Fault); 5] =
    [(2, Fault::Kill), (1, Fault::Stop), (2, Fault::Pause), (3, Fault::Terminate), (4, Fault::Links)];

pub async fn torment(world: Arc<World>) -> Result<()> {
    let mut dice = world.dice(ACTOR);
    while world.pause(&mut dice, 500..4_000).await {
        match choose(&FAULTS, &mut dice)? {
            Fault::Kill => restart(&world, &mut dice, "PostgreSQL killed").await?,
            Fault::Stop => restart(&world, &mut dice, "PostgreSQL stopped").await?,
            Fault::Pause => {
                world.faults.count("PostgreSQL paused");
                let _outage = world.outage();
                blocking(|| world.postgres.pause())?;
                sleep(Duration::from_millis(dice.random_range(200..4_000))).await;
                blocking(|| world.postgres.resume())?;
            }
            Fault::Terminate => {
                world.faults.count("PostgreSQL sessions ended");
                let sql =
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'commitstream relay%'";
                sqlx::raw_sql(sql).execute(&mut world.connect().await?).await?;
            }
            Fault::Links => {
                let fault = LinkFault::draw(&mut dice)?;
                world.faults.count(format!("all links to PostgreSQL: {}", fault.name()));
                let _outage = fault.is_outage().then(|| world.outage());
                let links: Vec<_> = world.links.iter().map(|links| &links.postgres).collect();
                fault.strike(&links, &mut dice).await?;
            }
        }
    }
    Ok(())
}

async fn restart(world: &World, dice: &mut StdRng, fault: &str) -> Result<()> {
    world.faults.count(fault);
    let _outage = world.outage();
    blocking(|| if fault.ends_with("killed") { world.postgres.kill() } else { world.postgres.stop() })?;
    sleep(Duration::from_millis(dice.random_range(0..1_000))).await;
    blocking(|| world.postgres.restart())
}
