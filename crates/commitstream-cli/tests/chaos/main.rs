//! The randomised fault test: producers, relays, consumers and faults for as long as one likes, from one seed; then the recorded
//! history is judged.
//!
//! | variable | what | default |
//! |---|---|---|
//! | `COMMITSTREAM_CHAOS_SECONDS` | how long faults happen | 30; `make chaos`: 60 |
//! | `COMMITSTREAM_CHAOS_SEED` | what everything random comes from | random, and printed |
//!
//! Each actor (a producer, a relay, a consumer, PostgreSQL, Redis) draws from dice of its own, so the seed fixes what each of them does. How these
//! meet is up to the machine: a seed makes a defect likely to be seen again, not certain.

mod consumers;
mod evidence;
mod faults;
mod history;
mod judge;
mod link_faults;
mod postgres_faults;
mod producers;
mod redis_faults;
mod relay;
mod relay_faults;
mod report;
mod watch;
mod world;

#[allow(dead_code)] // the program has more words to say
#[path = "../../src/output/words.rs"]
mod words;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand::Rng;
use tokio::task::JoinSet;

use crate::history::Ledger;
use crate::relay::Role;
use crate::relay_faults::Tormented;
use crate::report::Report;
use crate::world::{Phase, World};

const RELAYS: usize = 4;
const CONSUMERS: usize = 3;
const PRODUCERS: usize = 6;

/// How long the relays have for what is left once all is well again.
const DRAIN_LIMIT: Duration = Duration::from_secs(180);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_doubled_or_out_of_order_whatever_fails_when() -> Result<()> {
    let duration = Duration::from_secs(variable("COMMITSTREAM_CHAOS_SECONDS")?.unwrap_or(30));
    let seed = variable("COMMITSTREAM_CHAOS_SEED")?.unwrap_or_else(|| rand::rng().random_range(0..1_000_000_000));
    println!("{} of faults, seed {seed}", words::age(duration));
    let world = Arc::new(World::start(seed, RELAYS + CONSUMERS).await?);
    let outcome = run(&world, duration).await;
    let again = format!("make chaos SECONDS={} SEED={seed}", duration.as_secs());
    let directory = world.directory.display();
    let verdict = match outcome {
        Ok(report) if report.is_clean() => {
            println!("{report}");
            return world.remove();
        }
        Ok(report) => {
            println!("{report}");
            evidence::collect(&world, &report.judgement).await?
        }
        Err(error) => format!("{error:#}"),
    };
    let logs = evidence::tails_of_logs(&world)?;
    std::fs::write(world.directory.join("findings"), &verdict)?;
    bail!("seed {seed}: {verdict}\n{logs}\nagain: {again}\nfindings and logs: {directory}")
}

/// A number from the environment; one that is set and empty counts as absent.
fn variable(name: &str) -> Result<Option<u64>> {
    let text = std::env::var(name).unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    Ok(Some(text.parse().with_context(|| format!("{name} is no whole number: {text}"))?))
}

async fn run(world: &Arc<World>, duration: Duration) -> Result<Report> {
    let started = Instant::now();
    let watching = tokio::spawn(watch::watch(world.clone()));
    let mut producing = JoinSet::new();
    for number in 0..PRODUCERS {
        producing.spawn(producers::produce(world.clone(), number));
    }
    let mut striking = JoinSet::new();
    striking.spawn(postgres_faults::torment(world.clone()));
    striking.spawn(redis_faults::torment(world.clone()));
    let mut relays = JoinSet::new();
    for number in 0..RELAYS + CONSUMERS {
        let role = if number < RELAYS { Role::Relay } else { Role::Consumer };
        relays.spawn(relay_faults::torment(world.clone(), role, number));
    }

    // Whatever ends early has failed.
    tokio::select! {
        () = tokio::time::sleep(duration) => {}
        Some(ended) = producing.join_next() => drop(ended?.context("a producer")?),
        Some(ended) = striking.join_next() => ended?.context("faults of a server")?,
        Some(ended) = relays.join_next() => drop(ended?.context("faults of a relay or consumer")?),
        else => {}
    }
    world.enter(Phase::Calm);
    while let Some(ended) = striking.join_next().await {
        ended?.context("faults of a server")?;
    }
    let mut tormented = Vec::new();
    while let Some(ended) = relays.join_next().await {
        tormented.push(ended?.context("faults of a relay or consumer")?);
    }
    world.enter(Phase::Drain);
    let mut ledger = Ledger::default();
    while let Some(ended) = producing.join_next().await {
        ledger.add(ended?.context("a producer")?);
    }
    let took = started.elapsed();
    world.drained(DRAIN_LIMIT).await?;
    world.enter(Phase::Over);
    let watched = watching.await?;
    consumers::caught_up(world, &mut tormented, DRAIN_LIMIT).await?;
    let Stopped { relays, consumers, recoveries } = stop(world, tormented).await?;

    let effects = consumers::judge(world).await?;
    let judgement = judge::judge(world, &ledger).await?;
    let longest_truce = Duration::from_millis(world.longest_truce.load(Ordering::Relaxed));
    let (faults, redis_lost) = (world.faults.counts(), world.redis.lost());
    Ok(Report { took, ledger, judgement, effects, watched, longest_truce, relays, consumers, recoveries, faults, redis_lost })
}

/// How many processes had been started, and how long it took after each kill of a relay until all that had waited then was published.
struct Stopped {
    relays: u64,
    consumers: u64,
    recoveries: Vec<Duration>,
}

/// Stops relays and consumers, which must end well now that nothing is in the way.
async fn stop(world: &World, tormented: Vec<Tormented>) -> Result<Stopped> {
    let mut stopped = Stopped { relays: 0, consumers: 0, recoveries: Vec::new() };
    for Tormented { mut relay, mut recovering } in tormented {
        while let Some(recovery) = recovering.join_next().await {
            stopped.recoveries.extend(recovery?);
        }
        match relay.role {
            Role::Relay => stopped.relays += relay.started(),
            Role::Consumer => stopped.consumers += relay.started(),
        }
        let status = relay.end().await?;
        if !status.success() {
            world.findings.add(format!("{relay} ended with {status} at a graceful stop when all was well"));
        }
    }
    stopped.recoveries.sort_unstable();
    Ok(stopped)
}
