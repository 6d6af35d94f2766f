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
/// Between two looks at the backlog, which is never the same at two moments: what counts is the median of each half.
const PAUSE: Duration = Duration::from_millis(400);
/// Percent of the commits of a half.
const MOST_GROWTH: f64 = 1.0;

/// One side of a round.
struct Run {
    commits_per_second: f64,
    /// Events that waited, in the first half and in the second.
    backlog: [f64; 2],
    commits: u64,
}

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("sustained").await?;
    let (mut rounds, mut growth, mut backlogs) = (Vec::new(), Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("sustained, round {round}"));
        let with = with_relay(stage, &mut connection).await?;
        let without = by_hand(stage, &mut connection).await?;
        rounds.push(Round::new(with.commits_per_second, without.commits_per_second));
        let (grown, half) = (with.backlog[1] - with.backlog[0], with.commits as f64 / 2.0);
        growth.push(Round::alone(grown.max(0.0) / half.max(1.0) * 100.0));
        backlogs.push(with.backlog);
    }
    stage.clear(&mut connection).await?;
    let figures = vec![
        Figure::new("sustained", "commits/s", Some(Aim::RatioAtLeast(0.85)), rounds),
        Figure::new("sustained, backlog growth", "% of commits", Some(Aim::AtMost(MOST_GROWTH)), growth),
    ];
    let at = |which: usize| median(backlogs.iter().map(|backlog| backlog[which])).unwrap_or(f64::NAN);
    let notes = vec![format!("{:.0} events waited in the first half of a round and {:.0} in the second", at(0), at(1))];
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
    let time = stage.time(TIME);
    let end = Instant::now() + time;
    let mut producers = JoinSet::new();
    for (session, number) in sessions.into_iter().zip(0..) {
        producers.spawn(produce_until(session, publisher.clone(), number, end));
    }
    let mut backlogs = [Vec::new(), Vec::new()];
    for backlogs_of_half in &mut backlogs {
        let looks = time.as_millis() / PAUSE.as_millis() / 2;
        for _ in 0..looks {
            tokio::time::sleep(PAUSE).await;
            backlogs_of_half.push(backlog(connection).await? as f64);
        }
    }
    let mut commits = 0;
    while let Some(ended) = producers.join_next().await {
        commits += ended??;
    }
    let backlog = backlogs.map(|of_half| median(of_half.into_iter()).unwrap_or(0.0));
    Ok(Run { commits_per_second: per_second(commits, time), backlog, commits })
}

/// Transaction after transaction, of one INSERT of one event each. Returns how many.
async fn produce_until(
    mut session: PgConnection,
    publisher: Option<PostgresOutboxPublisher>,
    first: u64,
    end: Instant,
) -> anyhow::Result<u64> {
    let (mut commits, mut number) = (0, first);
    loop {
        let event = OrderPlaced::new(number);
        match &publisher {
            Some(publisher) => drop(publisher.publish(&mut session, &event).await?),
            None => workload::insert_by_hand(&mut session, &event).await?,
        }
        if Instant::now() >= end {
            return Ok(commits);
        }
        (commits, number) = (commits + 1, number + PRODUCERS);
    }
}

async fn backlog(connection: &mut PgConnection) -> anyhow::Result<i64> {
    let sql = "SELECT count(*) FROM event_outbox WHERE status IN ('PENDING', 'PROCESSING')";
    Ok(sqlx::query_scalar(sql).fetch_one(connection).await?)
}
