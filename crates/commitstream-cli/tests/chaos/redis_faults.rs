//! Redis with a replica, its faults, and those of all connections to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::Redis;
use rand::Rng;
use rand::rngs::StdRng;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use tokio::time::sleep;

use crate::faults::choose;
use crate::link_faults::LinkFault;
use crate::world::{Outage, PREFIX, TYPES, World, address, blocking};

const ACTOR: u64 = 2;

/// How long a replica may take until it has everything.
const IN_STEP_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill,
    Pause,
    FailOver,
    FailOverWithLoss,
    Links,
}

const FAULTS: [(u32, Fault); 5] =
    [(2, Fault::Kill), (2, Fault::Pause), (2, Fault::FailOver), (4, Fault::FailOverWithLoss), (4, Fault::Links)];

/// Two servers with the same data, of which one is the master.
pub struct RedisPair {
    servers: [Redis; 2],
    /// How many times the other one has become the master.
    failovers: AtomicUsize,
    /// Entries that had been acknowledged and were lost in a failover.
    lost: AtomicU64,
}

impl RedisPair {
    pub fn start() -> Result<Self> {
        let master = Redis::start()?;
        let replica = Redis::start_replica_of(&master)?;
        Ok(Self { servers: [master, replica], failovers: AtomicUsize::new(0), lost: AtomicU64::new(0) })
    }

    pub fn failovers(&self) -> usize {
        self.failovers.load(Ordering::SeqCst)
    }

    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }

    pub fn master(&self) -> &Redis {
        &self.servers[self.failovers() % 2]
    }

    fn replica(&self) -> &Redis {
        &self.servers[(self.failovers() + 1) % 2]
    }

    /// Waits until the replica has everything, or will have it in a moment.
    async fn in_step(&self) -> Result<()> {
        let deadline = Instant::now() + IN_STEP_LIMIT;
        loop {
            let mut replica = connect(self.replica()).await?;
            let info: String = redis::cmd("INFO").arg("replication").query_async(&mut replica).await?;
            if info.contains("master_link_status:up") {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the Redis replica is not in step after {IN_STEP_LIMIT:?}: {info}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

pub async fn connect(server: &Redis) -> Result<MultiplexedConnection> {
    let patience = Some(Duration::from_secs(10));
    let config = AsyncConnectionConfig::new().set_connection_timeout(patience).set_response_timeout(patience);
    Ok(Client::open(server.url())?.get_multiplexed_async_connection_with_config(&config).await?)
}

/// How many entries all streams have.
pub async fn entries(connection: &mut MultiplexedConnection) -> Result<u64> {
    let mut lengths = redis::pipe();
    for aggregate_type in TYPES {
        lengths.xlen(format!("{PREFIX}{aggregate_type}"));
    }
    let lengths: Vec<u64> = lengths.query_async(connection).await?;
    Ok(lengths.iter().sum())
}

pub async fn torment(world: Arc<World>) -> Result<()> {
    let mut dice = world.dice(ACTOR);
    while world.pause(&mut dice, 500..4_000).await {
        match choose(&FAULTS, &mut dice)? {
            Fault::Kill => {
                world.faults.count("Redis killed");
                let _outage = world.outage();
                blocking(|| world.redis.master().kill())?;
                sleep(Duration::from_millis(dice.random_range(0..1_000))).await;
                blocking(|| world.redis.master().restart())?;
            }
            Fault::Pause => {
                world.faults.count("Redis paused");
                let _outage = world.outage();
                blocking(|| world.redis.master().pause())?;
                sleep(Duration::from_millis(dice.random_range(200..3_000))).await;
                blocking(|| world.redis.master().resume())?;
            }
            Fault::FailOver => {
                world.redis.in_step().await?;
                world.faults.count("Redis failover");
                let outage = world.outage();
                catch_up(&world).await?;
                blocking(|| world.redis.replica().promote())?;
                change_master(&world, outage, &mut dice).await?;
            }
            Fault::FailOverWithLoss => {
                world.redis.in_step().await?;
                world.faults.count("Redis failover with loss");
                lose_a_suffix(&world, &mut dice).await?;
            }
            Fault::Links => {
                let fault = LinkFault::draw(&mut dice)?;
                world.faults.count(format!("all links to Redis: {}", fault.name()));
                let _outage = fault.is_outage().then(|| world.outage());
                let links: Vec<_> = world.links.iter().map(|links| &links.redis).collect();
                fault.strike(&links, &mut dice).await?;
            }
        }
    }
    Ok(())
}

/// No client can write any more, and the replica has all that they wrote.
async fn catch_up(world: &World) -> Result<()> {
    let mut master = connect(world.redis.master()).await?;
    redis::cmd("CLIENT").arg("PAUSE").arg(60_000).arg("WRITE").exec_async(&mut master).await?;
    let replicas: u64 = redis::cmd("WAIT").arg(1).arg(8_000).query_async(&mut master).await?;
    ensure!(replicas == 1, "the Redis replica did not confirm what the master has");
    Ok(())
}

/// The replica stops replicating; what the master acknowledges from then on is lost with it.
async fn lose_a_suffix(world: &World, dice: &mut StdRng) -> Result<()> {
    let mut master = connect(world.redis.master()).await?;
    let mut replica = connect(world.redis.replica()).await?;
    blocking(|| world.redis.replica().promote())?;
    sleep(Duration::from_millis(dice.random_range(50..500))).await;
    let outage = world.outage();
    // What comes between this count and the kill is lost too, and not counted.
    let lost = entries(&mut master).await?.saturating_sub(entries(&mut replica).await?);
    world.redis.lost.fetch_add(lost, Ordering::SeqCst);
    change_master(world, outage, dice).await
}

/// The replica has been promoted. The master dies, all links lead to the new one after a while, and the former master comes back as its
/// replica.
async fn change_master(world: &World, outage: Outage<'_>, dice: &mut StdRng) -> Result<()> {
    let (former, new) = (world.redis.master(), world.redis.replica());
    blocking(|| former.kill())?;
    sleep(Duration::from_millis(dice.random_range(0..1_000))).await;
    let upstream = address(&new.url())?;
    for links in &world.links {
        blocking(|| links.redis.retarget(upstream.as_str()))?;
    }
    world.redis.failovers.fetch_add(1, Ordering::SeqCst);
    drop(outage);
    blocking(|| former.restart().and_then(|()| former.follow(new))).context("the former master follows the new one")
}
