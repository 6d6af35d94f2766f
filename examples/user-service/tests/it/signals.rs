//! A program ends when it is told to, whatever its handlers do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::EventEnvelope;
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError};
use commitstream_examples::process::{self, Signals};

use crate::support::World;

/// Settings as lines of `key=value`.
const SETTINGS: &str = "COMMITSTREAM_TEST_SIGNALS";

/// Holds its thread for longer than anybody waits.
struct Holds;

impl Handler<EventEnvelope> for Holds {
    async fn handle(&self, event: EventEnvelope, _delivery: &Delivery) -> Result<(), HandlerError> {
        tracing::info!("holds {}", event.aggregate_id);
        std::thread::sleep(Duration::from_secs(300));
        Ok(())
    }
}

/// Not a test by itself: the program that is told to end.
#[test]
fn program_that_is_held() -> Result<()> {
    let Ok(text) = std::env::var(SETTINGS) else { return Ok(()) };
    process::start_log();
    process::run(async {
        let signals = Signals::catch()?;
        let flags: Vec<(String, String)> =
            text.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let settings = Settings::load(None, |_| None, &flags)?.settings;
        let consumer = Consumer::new("held", &settings)?.on_any("user", Holds).start()?;
        process::consume(consumer, signals).await
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_ends_in_time_though_handlers_hold_all_its_threads() -> Result<()> {
    let world = World::new().await?;
    let threads = std::thread::available_parallelism()?.get();
    for n in 0..threads.max(2) {
        let statement =
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('Made', 'user', $1, '{}')";
        let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(world.database.url()).await?;
        sqlx::query(statement).bind(n.to_string()).execute(&mut connection).await?;
    }
    let settings = [
        ("app.redis.url", world.settings.redis.url.clone().context("the world has a Redis")?),
        ("app.redis.streamPrefix", world.settings.redis.stream_prefix.clone()),
        ("app.consumer.shutdownTimeout", "1s".to_owned()),
    ];
    let settings = settings.map(|(key, value)| format!("{key}={value}")).join("\n");
    let program = std::env::current_exe()?;
    let arguments = ["--exact", "signals::program_that_is_held", "--nocapture"];
    let mut held = world.start_with(&program.display().to_string(), &arguments, &[(SETTINGS, &settings)])?;
    held.logs("a handler holds its thread").await?;
    let begun = Instant::now();
    let ended = held.terminate().await?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(10), "it took {took:?}");
    ensure!(!ended.success(), "it says that a handler did not end");
    Ok(())
}
