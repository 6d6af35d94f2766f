//! Consumers in processes of their own: one that a poison event ends again and again, and one that is paused.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use commitstream::EventEnvelope;
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError};
use commitstream::streams::dead_stream;

use crate::consumer_book::{GROUP, pending};
use crate::events::envelope;
use crate::support::{World, eventually};

/// Settings as lines of `key=value`.
const SETTINGS: &str = "COMMITSTREAM_TEST_POISON";

/// Takes its time for each event, and writes down what it did, twice if it does it twice; but for the poison, which ends the process.
struct Slow(File, Duration);

impl Slow {
    /// One line, at once: nothing is waited for between the decision and the effect.
    fn write(&self, what: &str, event: &EventEnvelope) -> io::Result<()> {
        let line = format!("{what} {} {} {}\n", event.aggregate_id, event.payload.get(), std::process::id());
        (&self.0).write_all(line.as_bytes())
    }
}

impl Handler<EventEnvelope> for Slow {
    async fn handle(&self, event: EventEnvelope, _delivery: &Delivery) -> Result<(), HandlerError> {
        if event.aggregate_id == "poison" {
            std::process::exit(9);
        }
        self.write("begun", &event)?;
        tokio::time::sleep(self.1).await;
        self.write("done", &event)?;
        Ok(())
    }
}

/// Not a test by itself: the body of a spawned consumer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poisoned_process() -> Result<()> {
    let Ok(text) = std::env::var(SETTINGS) else { return Ok(()) };
    let (first, rest) = text.split_once('\n').context("the first line is ours")?;
    let (work, path) = first.split_once(' ').context("how long the work takes, and where it is written down")?;
    let flags: Vec<(String, String)> =
        rest.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let settings = Settings::load(None, |_| None, &flags)?.settings;
    let handler = Slow(File::options().append(true).open(path)?, Duration::from_millis(work.parse()?));
    let consumer = Consumer::new(GROUP, &settings)?.on_any("user", handler).start()?;
    consumer.wait_for(|_| false).await;
    Ok(())
}

/// A child that does not outlive the test.
struct Process(Child);

impl Process {
    fn spawn(world: &World, work: Duration, ledger: &Ledger) -> Result<Self> {
        let settings = [
            ("app.redis.url", world.settings.redis.url.clone().context("the world has a Redis")?),
            ("app.redis.streamPrefix", world.settings.redis.stream_prefix.clone()),
            ("app.consumer.claimIdle", "1s".to_owned()),
        ];
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "consumer_poison::poisoned_process", "--nocapture"]).stdout(Stdio::null()).stderr(Stdio::null());
        let settings = settings.map(|(key, value)| format!("{key}={value}")).join("\n");
        command.env(SETTINGS, format!("{} {}\n{settings}", work.as_millis(), ledger.0.display()));
        Ok(Self(command.spawn()?))
    }

    fn signal(&self, name: &str) -> Result<()> {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.0.id().to_string()).status()?;
        ensure!(sent.success(), "kill -{name}: {sent}");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

async fn publish(world: &World, aggregates: impl Iterator<Item = String>, events: u32) -> Result<()> {
    for aggregate in aggregates {
        let envelopes: Vec<EventEnvelope> = (0..events).map(|n| envelope("user", &aggregate, &n)).collect::<Result<_>>()?;
        world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    }
    Ok(())
}

/// What the processes have written.
struct Ledger(PathBuf);

impl Ledger {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("commitstream-ledger-{}", uuid::Uuid::new_v4()));
        File::create_new(&path)?;
        Ok(Self(path))
    }

    /// Aggregate, number and process of each line of this kind.
    fn lines(&self, what: &str) -> Result<Vec<(String, String, u32)>> {
        let text = fs::read_to_string(&self.0)?;
        let fields = text.lines().filter_map(|line| line.strip_prefix(what)).map(|rest| {
            let fields: Vec<&str> = rest.split_whitespace().collect();
            let [aggregate, n, process] = fields.as_slice() else { bail!("a line with {rest:?}") };
            Ok(((*aggregate).to_owned(), (*n).to_owned(), process.parse()?))
        });
        fields.collect()
    }

    /// Those that were handled, each once.
    fn done(&self) -> Result<BTreeSet<(String, String)>> {
        Ok(self.lines("done")?.into_iter().map(|(aggregate, n, _)| (aggregate, n)).collect())
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // In the directory for what may be lost.
        fs::remove_file(&self.0).ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_ends_its_process_is_the_only_dead_letter() -> Result<()> {
    let (world, ledger) = (World::new().await?, Ledger::new()?);
    publish(&world, (0..7).map(|n| format!("innocent-{n}")), 3).await?;
    publish(&world, std::iter::once("poison".to_owned()), 1).await?;
    publish(&world, (7..15).map(|n| format!("innocent-{n}")), 3).await?;
    let (begun, mut deaths, work) = (Instant::now(), 0, Duration::from_millis(300));
    let mut process = Process::spawn(&world, work, &ledger)?;
    let dead = dead_stream(&world.user_stream());
    loop {
        ensure!(begun.elapsed() < Duration::from_secs(240), "not over after {deaths} deaths");
        tokio::time::sleep(Duration::from_millis(50)).await;
        if process.0.try_wait()?.is_some() {
            deaths += 1;
            process = Process::spawn(&world, work, &ledger)?;
        }
        if ledger.done()?.len() == 45 && world.streams.len(&dead).await? > 0 && pending(&world).await? == 0 {
            break;
        }
    }
    println!("{deaths} deaths in {:.1?}", begun.elapsed());
    let letters = world.streams.dead_letters(&world.user_stream(), "0", 100).await?;
    let given_up: Vec<_> = letters.iter().map(|letter| letter.aggregate_id.clone().unwrap_or_default()).collect();
    assert_eq!(given_up, ["poison"], "{:?}", letters.first().map(|letter| &letter.history));
    ensure!(letters[0].reason.contains("died"), "{}", letters[0].reason);
    ensure!(deaths <= 12, "{deaths} deaths");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_paused_past_claim_idle_does_nothing_that_others_have_done() -> Result<()> {
    let (world, ledger) = (World::new().await?, Ledger::new()?);
    publish(&world, (0..10).map(|n| n.to_string()), 2).await?;
    let paused = Process::spawn(&world, Duration::from_secs(2), &ledger)?;
    eventually("its handlers to begin", async || Ok(ledger.lines("begun")?.len() >= 10)).await?;
    paused.signal("STOP")?;
    let _other = Process::spawn(&world, Duration::from_millis(20), &ledger)?;
    eventually("the other one to take over", async || Ok(ledger.done()?.len() == 20)).await?;
    paused.signal("CONT")?;
    // It is there again when it handles what comes.
    let (mut round, by_paused) = (0, |ledger: &Ledger| {
        let done = ledger.lines("done")?;
        anyhow::Ok(done.into_iter().filter(|(.., process)| *process == paused.0.id()).collect::<Vec<_>>())
    });
    eventually("the one that was paused to work again", async || {
        round += 1;
        publish(&world, (0..16).map(|n| format!("later-{round}-{n}")), 1).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(!by_paused(&ledger)?.is_empty())
    })
    .await?;
    let done = ledger.lines("done")?;
    assert_eq!(done.len(), ledger.done()?.len(), "twice: {done:?}");
    let late = by_paused(&ledger)?.into_iter().filter(|(aggregate, ..)| !aggregate.starts_with("later")).count();
    assert_eq!(late, 0, "{done:?}");
    Ok(())
}
