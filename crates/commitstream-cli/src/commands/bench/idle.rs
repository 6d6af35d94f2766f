//! `idle`: what a relay costs when there is nothing to do.

use std::time::{Duration, Instant};

use sqlx::PgConnection;

use super::figure::{Aim, Figure, Measured, Round};
use super::process::RelayProcess;
use super::stage::Stage;

const ROUNDS: u32 = 1;
const TIME: Duration = Duration::from_secs(30);
/// A relay that just came still has things to do. It also must publish something once: then it has a batch to watch over.
const SETTLING: Duration = Duration::from_secs(3);
const EVENTS: u64 = 100;

/// Of the difference of two counts, what the first one is itself.
const OWN: i64 = 1;
const STATEMENTS: &str = "SELECT sum(calls)::bigint FROM pg_stat_statements
    WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())";
const TRANSACTIONS: &str = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("idle").await?;
    let counter = Counter::new(&mut connection).await;
    let (mut statements, mut cpu) = (Vec::new(), Vec::new());
    for _ in stage.rounds(ROUNDS) {
        stage.prepare(&mut connection, stage.events(EVENTS), "idle").await?;
        let relay = RelayProcess::start(stage).await?;
        tokio::time::sleep(stage.time(SETTLING)).await;
        stage.tell(|| format!("idle, {} s", TIME.as_secs()));
        let (started, cpu_before) = (Instant::now(), relay.cpu_seconds());
        let before = counter.read(&mut connection).await?;
        tokio::time::sleep(stage.time(TIME)).await;
        let after = counter.read(&mut connection).await?;
        let (took, cpu_after) = (started.elapsed().as_secs_f64(), relay.cpu_seconds());
        relay.stop().await?;
        statements.push(Round::alone((after - before - OWN).max(0) as f64 / took));
        cpu.extend(cpu_before.zip(cpu_after).map(|(before, after)| Round::alone((after - before) / took * 100.0)));
    }
    stage.clear(&mut connection).await?;
    let mut measured = Measured { name: "idle", figures: Vec::new(), notes: Vec::new() };
    measured.figures.push(Figure::new("idle", counter.unit(), Some(Aim::AtMost(2.0)), statements));
    if counter == Counter::Transactions {
        measured.notes.push("without pg_stat_statements on the server, transactions are counted".to_owned());
    }
    if cpu.is_empty() {
        measured.notes.push("processor time is left out: this system has no /proc".to_owned());
    } else {
        measured.figures.push(Figure::new("idle, processor time", "% of a core", Some(Aim::AtMost(0.5)), cpu));
    }
    Ok(measured)
}

/// What is counted in the whole database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counter {
    Statements,
    Transactions,
}

impl Counter {
    async fn new(connection: &mut PgConnection) -> Self {
        // It belongs to our schema, and goes with it. Neither exists everywhere, nor for everybody.
        let created = sqlx::raw_sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").execute(&mut *connection).await;
        let counted = sqlx::query(STATEMENTS).execute(connection).await;
        if created.is_ok() && counted.is_ok() { Self::Statements } else { Self::Transactions }
    }

    async fn read(self, connection: &mut PgConnection) -> anyhow::Result<i64> {
        let sql = if self == Self::Statements { STATEMENTS } else { TRANSACTIONS };
        Ok(sqlx::query_scalar::<_, Option<i64>>(sql).fetch_one(connection).await?.unwrap_or(0))
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Statements => "statements/s",
            Self::Transactions => "transactions/s",
        }
    }
}
