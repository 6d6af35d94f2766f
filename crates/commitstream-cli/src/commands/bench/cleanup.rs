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
use super::workload::State;
use crate::output::count;

const ROUNDS: u32 = 3;
/// Rows that are old for who removes them, but not for the running relay, which keeps them a day longer: its own clean-up, at its start and
/// every hour, must not come in between.
const OLD: u64 = 2_000_000;
const RETENTION_DAYS: u32 = 5;
/// How long ago the old rows were published, in days.
const AGE_DAYS: u64 = 6;
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

/// How old rows are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As the relay does it every hour.
    RowByRow,
    /// The same, where the table is partitioned.
    ByDay,
    /// As the reference has it for an operator.
    OneDelete,
}

impl Way {
    const ALL: [Self; 3] = [Self::RowByRow, Self::OneDelete, Self::ByDay];

    fn name(self) -> &'static str {
        match self {
            Self::RowByRow => "row by row",
            Self::ByDay => "by day",
            Self::OneDelete => "one DELETE",
        }
    }
}

/// One side of a round. Sizes are those of the table with its indexes, in MiB.
struct Run {
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

    fn describe(&self, what: &str) -> String {
        let Self { p99_before, p99_during, longest, empty, full, after, .. } = self;
        format!(
            "{what}: p99 {p99_before:.1} ms before and {p99_during:.1} ms during, the longest {longest:.0} ms; \
             table and indexes {empty:.0} MiB, {full:.0} MiB with the old rows, {after:.0} MiB after VACUUM"
        )
    }
}

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("cleanup").await?;
    let (mut rounds, mut notes) = (Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        let mut runs = Vec::new();
        for way in Way::ALL {
            if way == Way::ByDay {
                partition(stage, &mut connection).await?;
            }
            let what = format!("{}, round {round}", way.name());
            let run = one_side(stage, &mut connection, way, &format!("cleanup, {what}")).await?;
            notes.push(run.describe(&what));
            runs.push(run);
        }
        stage.start_anew(&mut connection).await?;
        let runs: [Run; 3] = runs.try_into().ok().context("a run of each way")?;
        rounds.push(runs);
    }
    Ok(Measured { name: "cleanup", figures: figures(&rounds), notes })
}

fn figures(rounds: &[[Run; 3]]) -> Vec<Figure> {
    let against_one_delete = |which: usize, of: fn(&Run) -> f64| {
        rounds.iter().map(|runs| Round::new(of(&runs[which]), of(&runs[1]))).collect::<Vec<_>>()
    };
    let of = |title: &str, which: usize| {
        let name = |what: &str| format!("{title}, {what}");
        let slowdown = against_one_delete(which, Run::slowdown);
        let returned = against_one_delete(which, Run::returned);
        [
            Figure::new(name("p99 during"), "times before", Some(Aim::AtMost(MOST_SLOWDOWN)), slowdown),
            Figure::new(name("removed"), "rows/s", None, against_one_delete(which, |run| run.removed_per_second)),
            Figure::new(name("room returned"), "%", Some(Aim::AtLeast(LEAST_RETURNED)), returned),
        ]
    };
    [of("cleanup", 0), of("cleanup by day", 2)].into_iter().flatten().collect()
}

async fn one_side(stage: &Stage, connection: &mut PgConnection, way: Way, what: &str) -> anyhow::Result<Run> {
    let old = stage.events(OLD);
    stage.prepare(connection, 0, what).await?;
    let empty = size(connection).await?;
    let relay = RelayProcess::start(stage).await?;
    stage.fill_with(connection, old, State::Old, what).await?;
    stage.settle(connection).await?;
    let full = size(connection).await?;
    let flow = Flow::start(stage, RATE, CONNECTIONS).await?;
    tokio::time::sleep(stage.time(WARM_UP)).await;
    flow.lap()?;
    tokio::time::sleep(stage.time(BEFORE)).await;
    let before = flow.lap()?;
    let started = Instant::now();
    match way {
        Way::OneDelete => delete(connection).await?,
        Way::RowByRow | Way::ByDay => clean_up(stage, what).await?,
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
    // The plain table has become the partition of all days until today.
    let (today, first): (NaiveDate, String) = sqlx::query_as(
        "SELECT (now() AT TIME ZONE 'UTC')::date, inhrelid::regclass::text FROM pg_inherits
         WHERE inhparent = 'event_outbox'::regclass AND inhrelid <> 'event_outbox_rest'::regclass ORDER BY 2 LIMIT 1",
    )
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query(AssertSqlSafe(format!("DROP TABLE {first}"))).execute(&mut *connection).await?;
    repository.make_day(connection, today - Days::new(AGE_DAYS)).await?.context("a partition for old rows")?;
    days::make_ahead(&repository, connection).await?.context("partitions for new rows")?;
    Ok(())
}

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
