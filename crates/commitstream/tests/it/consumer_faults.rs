//! Consumers in processes of their own, killed at random: each effect happens once, and in order.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, Delivery, HandlerError, TransactionalHandler};
use commitstream::{DomainEvent, EventEnvelope};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, Row};

use crate::support::World;

/// Settings as lines of `key=value`.
const SETTINGS: &str = "COMMITSTREAM_TEST_CONSUMER";
const GROUP: &str = "ledger";
const CONCURRENCY: u32 = 8;

const EVENTS: u64 = 50_000;
const AGGREGATES: u64 = 500;
const PROCESSES: usize = 3;

#[derive(Debug, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
struct Counted {
    #[event(key)]
    user: u64,
    n: i64,
}

struct Ledger;

impl TransactionalHandler<Counted> for Ledger {
    async fn handle(&self, event: Counted, delivery: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        sqlx::query("INSERT INTO effects (event_id, aggregate, n, process) VALUES ($1, $2, $3, $4)")
            .bind(delivery.event_id())
            .bind(i64::try_from(event.user)?)
            .bind(event.n)
            .bind(i64::from(std::process::id()))
            .execute(transaction)
            .await?;
        Ok(())
    }
}

/// Not a test by itself: the body of a spawned consumer.
#[tokio::test(flavor = "multi_thread")]
async fn consumer_process() -> Result<()> {
    let Ok(text) = std::env::var(SETTINGS) else { return Ok(()) };
    let flags: Vec<(String, String)> =
        text.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let settings = Settings::load(None, |_| None, &flags)?.settings;
    let url = settings.database.url.clone().context("the test has a database")?;
    let pool = PgPoolOptions::new().max_connections(CONCURRENCY + 1).connect(&url).await?;
    let consumer = Consumer::new(GROUP, &settings)?.on_transaction(&pool, Ledger).start()?;
    consumer.wait_for(|_| false).await;
    Ok(())
}

fn spawn(world: &World) -> Result<Child> {
    let url = |url: &Option<String>| url.clone().context("the world has both URLs");
    let settings = [
        ("app.database.url", url(&world.settings.database.url)?),
        ("app.redis.url", url(&world.settings.redis.url)?),
        ("app.redis.streamPrefix", world.settings.redis.stream_prefix.clone()),
        ("app.consumer.claimIdle", "1s".to_owned()),
        ("app.consumer.concurrency", CONCURRENCY.to_string()),
    ];
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "consumer_faults::consumer_process", "--nocapture"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.env(SETTINGS, settings.map(|(key, value)| format!("{key}={value}")).join("\n"));
    Ok(command.spawn()?)
}

/// Children that do not outlive the test.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended by itself.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

async fn effects(connection: &mut PgConnection) -> Result<u64> {
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(connection).await?;
    Ok(count.unsigned_abs())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_while_50_000_events_are_handled_each_effect_happens_once_and_in_order() -> Result<()> {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let table = "CREATE TABLE effects (number bigint GENERATED ALWAYS AS IDENTITY, event_id uuid, aggregate bigint, n bigint, process bigint)";
    sqlx::raw_sql(table).execute(&mut connection).await?;
    for chunk in 0..EVENTS / 5_000 {
        let event = |n: u64| Counted { user: n % AGGREGATES, n: (n / AGGREGATES).cast_signed() }.envelope();
        let envelopes: Vec<EventEnvelope> = (chunk * 5_000..(chunk + 1) * 5_000).map(event).collect::<Result<_, _>>()?;
        world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    }

    let begun = Instant::now();
    let mut processes = Processes((0..PROCESSES).map(|_| spawn(&world)).collect::<Result<_>>()?);
    let (mut kills, mut last) = (0, (0, Instant::now()));
    loop {
        tokio::time::sleep(Duration::from_millis(dice.random_range(200..1_500))).await;
        let done = effects(&mut connection).await?;
        if done >= EVENTS {
            break;
        }
        if done > last.0 {
            last = (done, Instant::now());
        }
        ensure!(last.1.elapsed() < Duration::from_secs(60), "no progress at {done} effects, seed {seed}");
        let victim = dice.random_range(0..PROCESSES);
        processes.0[victim].kill()?;
        processes.0[victim].wait()?;
        processes.0[victim] = spawn(&world)?;
        kills += 1;
    }
    println!("{kills} kills in {:.1?}", begun.elapsed());
    drop(processes);

    let sql = "SELECT count(*), count(DISTINCT event_id), count(DISTINCT process),
                   (SELECT count(*) FROM (SELECT n <> row_number() OVER (PARTITION BY aggregate ORDER BY number) - 1 AS late FROM effects) o
                    WHERE late)
               FROM effects";
    let row = sqlx::query(sql).fetch_one(&mut connection).await?;
    let number = |at: usize| row.try_get::<i64, _>(at).map(i64::unsigned_abs);
    println!("{} effects of {} events by {} processes, {} out of order", number(0)?, number(1)?, number(2)?, number(3)?);
    ensure!(kills >= 5, "only {kills} kills");
    assert_eq!((number(0)?, number(1)?, number(3)?), (EVENTS, EVENTS, 0), "seed {seed}");
    let dead = world.streams.len(&commitstream::streams::dead_stream(&world.user_stream())).await?;
    assert_eq!(dead, 0);
    Ok(())
}
