//! `drain`: waiting rows to their stream, against a loop in bare SQL that sends nothing.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use commitstream::relay::{OutboxProcessor, RelayState, RelayStatus};
use sqlx::PgConnection;
use tokio::sync::watch;

use super::figure::{Aim, Figure, Measured, Round};
use super::poller;
use super::stage::{Stage, per_second};
use crate::output::count;

const EVENTS: u64 = 300_000;
const ROUNDS: u32 = 3;
/// Most events in one append, as the settings advise for throughput. The loop beside it has batches of the same size.
pub const BATCH_SIZE: u32 = 1_000;
/// Longest wait for the next settled batch.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sent rows are kept for so many days, for each of `retentions`; 0 deletes them at once.
pub async fn measure(stage: &Stage, retentions: &[u32]) -> anyhow::Result<Measured> {
    let mut measured = Measured { name: "drain", figures: Vec::new(), notes: Vec::new() };
    for &retention in retentions {
        let (name, least) = if retention == 0 { ("drain, retention 0", 1.4) } else { ("drain", 1.3) };
        let mut rounds = Vec::new();
        for round in stage.rounds(ROUNDS) {
            let what = format!("{name}, round {round}");
            rounds.push(one_round(stage, retention, &what).await?);
        }
        measured.figures.push(Figure::new(name, "events/s", Some(Aim::RatioAtLeast(least)), rounds));
    }
    Ok(measured)
}

async fn one_round(stage: &Stage, retention: u32, what: &str) -> anyhow::Result<Round> {
    let events = stage.events(EVENTS);
    let mut connection = stage.connect("drain").await?;
    stage.prepare(&mut connection, events, what).await?;
    let figure = by_relay(stage, &mut connection, events, retention, what).await?;
    stage.prepare(&mut connection, events, what).await?;
    let baseline = poller::drain(stage, &mut connection, events, retention, what).await?;
    stage.clear(&mut connection).await?;
    Ok(Round::new(per_second(events, figure), per_second(events, baseline)))
}

/// Drains what waits with a relay in this process, and returns the time from its start until the last event was settled.
/// `events` wait, and no others.
pub async fn by_relay(
    stage: &Stage,
    connection: &mut PgConnection,
    events: u64,
    retention: u32,
    what: &str,
) -> anyhow::Result<Duration> {
    let mut settings = stage.settings.clone();
    settings.outbox.processor.batch_size = BATCH_SIZE;
    settings.outbox.cleanup.retention_days = retention;
    let before = stage.entries().await?;
    let processor = OutboxProcessor::new(settings)?;
    let started = Instant::now();
    let relay = processor.start();
    let drained = published(stage, relay.watch(), events, what).await;
    let took = started.elapsed();
    relay.stop().await?;
    drained?;
    // Without retention, nothing may be left at all.
    let sql = "SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED' OR $1";
    let left: i64 = sqlx::query_scalar(sql).bind(retention == 0).fetch_one(connection).await?;
    let entries = stage.entries().await? - before;
    ensure!(left == 0 && entries == events, "of {events} events, {left} are left in the table and {entries} are in the stream");
    Ok(took)
}

/// Waits until the relay has settled this many.
async fn published(stage: &Stage, mut relay: watch::Receiver<RelayStatus>, events: u64, what: &str) -> anyhow::Result<()> {
    loop {
        let RelayStatus { published, state, .. } = relay.borrow_and_update().clone();
        stage.tell(|| format!("{what}: {} of {} published", count(published), count(events)));
        if published >= events {
            return Ok(());
        }
        let changed = tokio::time::timeout(PATIENCE, relay.changed()).await;
        if state == RelayState::Stopped || !matches!(changed, Ok(Ok(()))) {
            bail!("the relay has stopped at {published} of {events} events: {state:?}");
        }
    }
}
