//! `cleanup`: old rows are removed while events flow, from a plain table and from one that is partitioned by day. What it does to
//! their latency, against one DELETE of all.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use chrono::{Days, NaiveDate};
use commitstream::outbox::{self, OutboxRepository};
use commitstream::relay::{cleanup, days};
use sqlx::{AssertSqlSafe, PgConnection};

use super::figure::{Aim, Figure, Measured, Round};
use super::flow::Flow;
use super::process::RelayProcess;
use super::stage::{Stage, per_second};
use super::workload::{AGE_DAYS, State};
use crate::output::count;

const ROUNDS: u32 = 3;
/// Rows that are old for who removes them, but not for the running relay, which keeps them a day longer: its own clean-up, at its start and
/// every hour, must not come in between.
const OLD: u64 = 2_000_000;
const RETENTION_DAYS: u32 = 5;
/// Events a second, and the connections that bring them.
const RATE: u32 = 500;
const CONNECTIONS: u32 = 8;
/// Of the flow that nothing disturbs.
const BEFORE: Duration = Duration::from_secs(10);
/// Of the flow from when the removal begins, as long for all ways: one that takes only a moment disturbs only that moment.
const LEAST_DURING: Duration = Duration::from_secs(30);
const WARM_UP: Duration = Duration::from_secs(2);
/// Times the p99 of before.
const MOST_SLOWDOWN: f64 = 2.0;
/// Percent of the room that the old rows took.
const LEAST_RETURNED: f64 = 90.0;

/// One side of a round. Sizes are those of the table with its indexes, in MiB.
struct Run {
    /// How the rows were removed, and in which round.
    what: String,
    removed_per_second: f64,
    p99_before: f64,
    p99_during: f64,
    longest: f64,
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

    fn describe(&self) -> String {
        let Self { what, p99_before, p99_during, longest, empty, full, after, .. } = self;
        format!(
            "{what}: p99 {p99_before:.1} ms before and {p99_during:.1} ms during, the longest {longest:.0} ms; \
             table and indexes {empty:.0} MiB, {full:.0} MiB with the old rows, {after:.0} MiB after VACUUM"
        )
    }
}

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("cleanup").await?;
    let (mut row_by_row, mut one_delete, mut by_day) = (Vec::new(), Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        row_by_row.push(one_side(stage, &mut connection, true, format!("row by row, round {round}")).await?);
        one_delete.push(one_side(stage, &mut connection, false, format!("one DELETE, round {round}")).await?);
        partition(stage, &mut connection).await?;
        by_day.push(one_side(stage, &mut connection, true, format!("by day, round {round}")).await?);
        stage.start_anew(&mut connection).await?;
    }
    let figures = [figures("cleanup", &row_by_row, &one_delete), figures("cleanup by day", &by_day, &one_delete)];
    let notes = row_by_row.iter().chain(&one_delete).chain(&by_day).map(Run::describe).collect();
    Ok(Measured { name: "cleanup", figures: figures.into_iter().flatten().collect(), notes })
}

fn figures(title: &str, runs: &[Run], baselines: &[Run]) -> [Figure; 3] {
    let rounds =
        |of: fn(&Run) -> f64| runs.iter().zip(baselines).map(|(run, baseline)| Round::new(of(run), of(baseline))).collect();
    [
        Figure::new(format!("{title}, p99 during"), "times before", Some(Aim::AtMost(MOST_SLOWDOWN)), rounds(Run::slowdown)),
        Figure::new(format!("{title}, removed"), "rows/s", None, rounds(|run| run.removed_per_second)),
        Figure::new(format!("{title}, room returned"), "%", Some(Aim::AtLeast(LEAST_RETURNED)), rounds(Run::returned)),
    ]
}

async fn one_side(stage: &Stage, connection: &mut PgConnection, by_clean_up: bool, what: String) -> anyhow::Result<Run> {
    let told = format!("cleanup, {what}");
    let old = stage.events(OLD);
    stage.prepare(connection, 0, &told).await?;
    let empty = size(connection).await?;
    let relay = RelayProcess::start(stage).await?;
    stage.fill_with(connection, old, State::Old, &told).await?;
    stage.settle(connection).await?;
    let full = size(connection).await?;
    let flow = Flow::start(stage, RATE, CONNECTIONS).await?;
    tokio::time::sleep(stage.time(WARM_UP)).await;
    flow.lap()?;
    tokio::time::sleep(stage.time(BEFORE)).await;
    let before = flow.lap()?;
    let started = Instant::now();
    if by_clean_up {
        clean_up(stage, &told).await?
    } else {
        delete(connection).await?
    }
    let took = started.elapsed();
    tokio::time::sleep(stage.time(LEAST_DURING).saturating_sub(took)).await;
    let during = flow.finish().await?;
    relay.stop().await?;
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM event_outbox WHERE published_at < now() - make_interval(days => $1)")
            .bind(i32::try_from(RETENTION_DAYS)?)
            .fetch_one(&mut *connection)
            .await?;
    ensure!(left == 0, "{left} of {old} old rows were not removed");
    stage.settle(connection).await?;
    Ok(Run {
        what,
        removed_per_second: per_second(old, took),
        p99_before: before.after_due.millis(0.99),
        p99_during: during.after_due.millis(0.99),
        longest: during.after_due.millis(1.0),
        empty,
        full,
        after: size(connection).await?,
    })
}

/// Partitions the table, with a partition for the old rows alone.
async fn partition(stage: &Stage, connection: &mut PgConnection) -> anyhow::Result<()> {
    stage.clear(connection).await?;
    let repository = OutboxRepository::new(&stage.settings.database.schema);
    repository.partition_by_day(connection).await?.context("benchmarks have a plain table")?;
    let today: NaiveDate = sqlx::query_scalar("SELECT (now() AT TIME ZONE 'UTC')::date").fetch_one(&mut *connection).await?;
    // The plain table has become the partition of all days until today.
    let drop = today.format("DROP TABLE event_outbox_p%Y%m%d").to_string();
    sqlx::query(AssertSqlSafe(drop)).execute(&mut *connection).await?;
    repository.make_day(connection, today - Days::new(AGE_DAYS)).await?.context("a partition for old rows")?;
    days::make_ahead(&repository, connection).await?.context("partitions for new rows")?;
    Ok(())
}

/// As the relay does it every hour.
async fn clean_up(stage: &Stage, what: &str) -> anyhow::Result<()> {
    let mut settings = stage.settings.clone();
    settings.outbox.cleanup.retention_days = RETENTION_DAYS;
    let url = settings.database.url.as_deref().context("benchmarks have a database")?;
    let mut connection = outbox::connect(url, "commitstream bench: clean-up", settings.database.timeout).await?;
    let repository = OutboxRepository::new(&settings.database.schema);
    let told = |cleaned: &cleanup::Cleaned| stage.tell(|| format!("{what}: {} removed", count(cleaned.events)));
    cleanup::run_once(&repository, &mut connection, &settings, told).await?;
    Ok(())
}

/// As the reference has it for an operator.
async fn delete(connection: &mut PgConnection) -> anyhow::Result<()> {
    let sql = "DELETE FROM event_outbox WHERE status = 'PUBLISHED' AND published_at < now() - make_interval(days => $1)";
    sqlx::query(sql).bind(i32::try_from(RETENTION_DAYS)?).execute(connection).await?;
    Ok(())
}

/// Of the table with all its partitions.
async fn size(connection: &mut PgConnection) -> anyhow::Result<f64> {
    let sql = "SELECT pg_total_relation_size('event_outbox') + COALESCE(sum(pg_total_relation_size(relid)), 0)::bigint
               FROM pg_partition_tree('event_outbox') WHERE level > 0";
    let bytes: i64 = sqlx::query_scalar(sql).fetch_one(connection).await?;
    Ok(bytes as f64 / f64::from(1 << 20))
}
