//! `cleanup`: old rows are removed while events flow. What it does to their latency, against one DELETE of all.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use commitstream::outbox::{self, OutboxRepository};
use commitstream::relay::cleanup;
use sqlx::PgConnection;

use super::figure::{Aim, Figure, Measured, Round};
use super::flow::Flow;
use super::process::RelayProcess;
use super::stage::{Stage, per_second};
use super::workload::{self, State};
use crate::output::count;

const ROUNDS: u32 = 1;
/// Rows that are old for who removes them, but not for the running relay, which keeps them a day longer: its own clean-up, at its start and
/// every hour, must not come in between.
const OLD: u64 = 2_000_000;
const RETENTION_DAYS: u32 = 5;
/// Events a second, and the connections that bring them.
const RATE: u32 = 500;
const CONNECTIONS: u32 = 8;
/// Of the flow that nothing disturbs.
const BEFORE: Duration = Duration::from_secs(10);
const WARM_UP: Duration = Duration::from_secs(2);
/// Percent of the room that the old rows took.
const LEAST_RETURNED: f64 = 90.0;

/// One side of a round. Sizes are those of the table with its indexes, in MiB.
struct Run {
    removed_per_second: f64,
    p99_before: f64,
    p99_during: f64,
    empty: f64,
    full: f64,
    /// After VACUUM.
    after: f64,
}

impl Run {
    fn slowdown(&self) -> f64 {
        self.p99_during / self.p99_before.max(f64::MIN_POSITIVE)
    }

    fn returned(&self) -> f64 {
        (self.full - self.after) / (self.full - self.empty) * 100.0
    }

    fn describe(&self, who: &str) -> String {
        let Self { p99_before, p99_during, empty, full, after, .. } = self;
        format!(
            "{who}: p99 {p99_before:.1} ms before and {p99_during:.1} ms during; \
             table and indexes {empty:.0} MiB, {full:.0} MiB with the old rows, {after:.0} MiB after VACUUM"
        )
    }
}

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("cleanup").await?;
    let (mut slowdown, mut rate, mut returned, mut notes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        let ours = one_side(stage, &mut connection, true, &format!("cleanup, round {round}")).await?;
        let plain = one_side(stage, &mut connection, false, &format!("cleanup, round {round}, baseline")).await?;
        slowdown.push(Round::new(ours.slowdown(), plain.slowdown()));
        rate.push(Round::new(ours.removed_per_second, plain.removed_per_second));
        returned.push(Round::new(ours.returned(), plain.returned()));
        notes.extend([ours.describe("clean-up"), plain.describe("one DELETE")]);
    }
    stage.clear(&mut connection).await?;
    let figures = vec![
        Figure::new("cleanup, p99 during", "times before", Some(Aim::AtMost(2.0)), slowdown),
        Figure::new("cleanup, removed", "rows/s", None, rate),
        Figure::new("cleanup, room returned", "%", Some(Aim::AtLeast(LEAST_RETURNED)), returned),
    ];
    Ok(Measured { name: "cleanup", figures, notes })
}

async fn one_side(stage: &Stage, connection: &mut PgConnection, by_clean_up: bool, what: &str) -> anyhow::Result<Run> {
    let old = stage.events(OLD);
    stage.prepare(connection, 0, what).await?;
    let empty = size(connection).await?;
    let relay = RelayProcess::start(stage).await?;
    let told = |filled| stage.tell(|| format!("{what}: filling, {} of {}", count(filled), count(old)));
    workload::fill(connection, old, State::Old, told).await?;
    stage.settle(connection).await?;
    let full = size(connection).await?;
    let flow = Flow::start(stage, RATE, CONNECTIONS).await?;
    tokio::time::sleep(stage.time(WARM_UP)).await;
    flow.lap()?;
    tokio::time::sleep(stage.time(BEFORE)).await;
    let before = flow.lap()?;
    let started = Instant::now();
    let removed = if by_clean_up { clean_up(stage, what).await? } else { delete(connection).await? };
    let took = started.elapsed();
    let during = flow.finish().await?;
    relay.stop().await?;
    ensure!(removed == old, "{removed} of {old} old rows were removed");
    stage.settle(connection).await?;
    Ok(Run {
        removed_per_second: per_second(removed, took),
        p99_before: before.after_commit.millis(0.99),
        p99_during: during.after_commit.millis(0.99),
        empty,
        full,
        after: size(connection).await?,
    })
}

/// As the relay does it every hour.
async fn clean_up(stage: &Stage, what: &str) -> anyhow::Result<u64> {
    let mut settings = stage.settings.clone();
    settings.outbox.cleanup.retention_days = RETENTION_DAYS;
    let url = settings.database.url.as_deref().context("benchmarks have a database")?;
    let mut connection = outbox::connect(url, "commitstream bench: clean-up", settings.database.timeout).await?;
    let repository = OutboxRepository::new(&settings.database.schema);
    let told = |cleaned: &cleanup::Cleaned| stage.tell(|| format!("{what}: {} removed", count(cleaned.events)));
    Ok(cleanup::run_once(&repository, &mut connection, &settings, told).await?.events)
}

/// As the reference has it for an operator.
async fn delete(connection: &mut PgConnection) -> anyhow::Result<u64> {
    let sql = "DELETE FROM event_outbox WHERE status = 'PUBLISHED' AND published_at < now() - make_interval(days => $1)";
    Ok(sqlx::query(sql).bind(i32::try_from(RETENTION_DAYS)?).execute(connection).await?.rows_affected())
}

async fn size(connection: &mut PgConnection) -> anyhow::Result<f64> {
    let bytes: i64 = sqlx::query_scalar("SELECT pg_total_relation_size('event_outbox')").fetch_one(connection).await?;
    Ok(bytes as f64 / f64::from(1 << 20))
}
