//! `sustained`: 16 producers that commit as fast as they can beside a relay, against the same producers with nothing to wake.

use std::time::{Duration, Instant};

use commitstream::publisher::{DomainEventPublisher, PostgresOutboxPublisher};
use sqlx::PgConnection;
use tokio::task::JoinSet;

use super::figure::{Aim, Figure, Measured, Round, median};
use super::process::RelayProcess;
use super::stage::{Stage, per_second};
use super::workload::{self, OrderPlaced};

const PRODUCERS: u64 = 16;
const ROUNDS: u32 = 3;
const TIME: Duration = Duration::from_secs(8);
/// Of the commits of the second half, so many percent may be added to the backlog: it is never the same at two moments.
const MOST_GROWTH: f64 = 1.0;

/// One side of a round.
struct Run {
    commits_per_second: f64,
    /// Events that waited at the half and at the end.
    backlog: [i64; 2],
    /// Committed between the two.
    second_half: u64,
}

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("sustained").await?;
    let (mut rounds, mut growth, mut backlogs) = (Vec::new(), Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("sustained, round {round}"));
        let with = with_relay(stage, &mut connection).await?;
        let without = by_hand(stage, &mut connection).await?;
        rounds.push(Round::new(with.commits_per_second, without.commits_per_second));
        let grown = (with.backlog[1] - with.backlog[0]) as f64;
        growth.push(Round::alone(grown.max(0.0) / with.second_half.max(1) as f64 * 100.0));
        backlogs.push(with.backlog);
    }
    stage.clear(&mut connection).await?;
    let figures = vec![
        Figure::new("sustained", "commits/s", Some(Aim::RatioAtLeast(0.85)), rounds),
        Figure::new("sustained, backlog growth", "% of commits", Some(Aim::AtMost(MOST_GROWTH)), growth),
    ];
    let at = |which: usize| median(backlogs.iter().map(|backlog| backlog[which] as f64)).unwrap_or(f64::NAN);
    let notes = vec![format!("{:.0} events waited at the half and {:.0} at the end of a round", at(0), at(1))];
    Ok(Measured { name: "sustained", figures, notes })
}

async fn with_relay(stage: &Stage, connection: &mut PgConnection) -> anyhow::Result<Run> {
    stage.prepare(connection, 0, "sustained").await?;
    let relay = RelayProcess::start(stage).await?;
    let run = produce(stage, connection, true).await?;
    relay.stop().await?;
    Ok(run)
}

/// The same statement as a good engineer writes it, on the same table without the trigger that wakes relays.
async fn by_hand(stage: &Stage, connection: &mut PgConnection) -> anyhow::Result<Run> {
    stage.prepare(connection, 0, "sustained").await?;
    sqlx::raw_sql("ALTER TABLE event_outbox DISABLE TRIGGER event_outbox_wake_relay").execute(&mut *connection).await?;
    let run = produce(stage, connection, false).await;
    sqlx::raw_sql("ALTER TABLE event_outbox ENABLE TRIGGER event_outbox_wake_relay").execute(&mut *connection).await?;
    run
}

/// Lets the producers run for the time of one side.
async fn produce(stage: &Stage, connection: &mut PgConnection, publish: bool) -> anyhow::Result<Run> {
    let publisher = publish.then(|| PostgresOutboxPublisher::new(&stage.settings));
    let mut sessions = Vec::new();
    for _ in 0..PRODUCERS {
        sessions.push(stage.connect("producer").await?);
    }
    let start = Instant::now();
    let (half, end) = (start + stage.time(TIME) / 2, start + stage.time(TIME));
    let mut producers = JoinSet::new();
    for (session, number) in sessions.into_iter().zip(0..) {
        producers.spawn(produce_until(session, publisher.clone(), number, half, end));
    }
    tokio::time::sleep_until(half.into()).await;
    let at_half = backlog(connection).await?;
    let (mut commits, mut second_half) = (0, 0);
    while let Some(ended) = producers.join_next().await {
        let (in_first, in_second) = ended??;
        commits += in_first + in_second;
        second_half += in_second;
    }
    let backlog = [at_half, backlog(connection).await?];
    Ok(Run { commits_per_second: per_second(commits, end - start), backlog, second_half })
}

/// Transaction after transaction, of one INSERT of one event each. Returns how many in each half.
async fn produce_until(
    mut session: PgConnection,
    publisher: Option<PostgresOutboxPublisher>,
    first: u64,
    half: Instant,
    end: Instant,
) -> anyhow::Result<(u64, u64)> {
    let (mut commits, mut number) = ((0, 0), first);
    loop {
        let event = OrderPlaced::new(number);
        match &publisher {
            Some(publisher) => drop(publisher.publish(&mut session, &event).await?),
            None => workload::insert_by_hand(&mut session, &event).await?,
        }
        number += PRODUCERS;
        match Instant::now() {
            now if now >= end => return Ok(commits),
            now if now >= half => commits.1 += 1,
            _ => commits.0 += 1,
        }
    }
}

async fn backlog(connection: &mut PgConnection) -> anyhow::Result<i64> {
    let sql = "SELECT count(*) FROM event_outbox WHERE status IN ('PENDING', 'PROCESSING')";
    Ok(sqlx::query_scalar(sql).fetch_one(connection).await?)
}
