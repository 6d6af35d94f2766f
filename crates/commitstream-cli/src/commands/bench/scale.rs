//! `scale`: how the rate holds with what waits and with the number of relays, and how much memory a relay takes. Relays are processes
//! of their own, and are timed from when they begin to claim until the last event is in its stream.

use std::time::{Duration, Instant};

use anyhow::ensure;
use sqlx::{Connection, PgConnection};

use super::figure::{Aim, Figure, Measured, Round, median};
use super::process::RelayProcess;
use super::stage::{Stage, per_second};
use crate::output::count;

const ROUNDS: u32 = 3;
/// Waiting rows. The first is the baseline of the others.
const BACKLOGS: [u64; 4] = [10_000, 100_000, 1_000_000, 5_000_000];
/// Up to this, a drain takes a moment only, and its rate is the median of so many.
const SHORT: u64 = 100_000;
const REPEATED: usize = 5;

const RELAYS: [usize; 3] = [1, 2, 4];
const SHARED_EVENTS: u64 = 100_000;

const LARGE_EVENTS: u64 = 200;
/// With a little less than 1 MiB, which is the most that the default settings take.
const FILL_LARGE: &str = r#"
    INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
    SELECT 'OrderPlaced', 'order', 'order-' || n, jsonb_build_object('scan', repeat('x', 1048500)) FROM generate_series(1, $1::bigint) AS n"#;
const MOST_MIB: f64 = 64.0;

/// Between two looks at the length of the stream.
const PAUSE: Duration = Duration::from_millis(2);
/// Longest wait for the next entry, or for the shares of the relays.
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("scale").await?;
    let mut rates = BACKLOGS.map(|_| Vec::new());
    let mut shared = RELAYS.map(|_| Vec::new());
    let (mut memory, mut large) = (Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        for (rates, &events) in rates.iter_mut().zip(&BACKLOGS) {
            let what = format!("scale, {} waiting, round {round}", count(events));
            let (rate, peak) = backlog(stage, &mut connection, events, &what).await?;
            rates.push(rate);
            memory.extend(peak.filter(|_| BACKLOGS.last() == Some(&events)).map(Round::alone));
        }
        for (rates, relays) in shared.iter_mut().zip(RELAYS) {
            rates.push(several(stage, &mut connection, relays, &format!("scale, relays: {relays}, round {round}")).await?);
        }
        large.extend(large_payloads(stage, &mut connection).await?.map(Round::alone));
    }
    stage.clear(&mut connection).await?;

    let mut figures = Vec::new();
    for (&events, rates_of) in BACKLOGS.iter().zip(&rates).skip(1).rev() {
        let aim = (BACKLOGS.last() == Some(&events)).then_some(Aim::RatioAtLeast(0.9));
        figures.push(against(format!("scale, {} waiting", count(events)), aim, rates_of, &rates[0]));
    }
    for (relays, rates) in RELAYS.iter().zip(&shared).skip(1) {
        figures.push(against(format!("scale, {relays} relays"), None, rates, &shared[0]));
    }
    let mut notes = vec![format!("the baselines are {} waiting and 1 relay", count(BACKLOGS[0]))];
    if memory.is_empty() {
        notes.push("memory is left out: this system has no /proc".to_owned());
    } else {
        figures.push(Figure::new("scale, peak memory", "MiB", Some(Aim::AtMost(MOST_MIB)), memory));
        figures.push(Figure::new("scale, peak memory, payloads of 1 MiB", "MiB", Some(Aim::AtMost(MOST_MIB)), large));
    }
    Ok(Measured { name: "scale", figures, notes })
}

fn against(name: String, aim: Option<Aim>, rates: &[f64], baselines: &[f64]) -> Figure {
    let rounds = rates.iter().zip(baselines).map(|(rate, baseline)| Round::new(*rate, *baseline));
    Figure::new(name, "events/s", aim, rounds.collect())
}

/// The rate of one relay that finds this many, and its peak memory in MiB.
async fn backlog(stage: &Stage, connection: &mut PgConnection, events: u64, what: &str) -> anyhow::Result<(f64, Option<f64>)> {
    let times = if events <= SHORT { REPEATED } else { 1 };
    let (events, mut rates, mut peak) = (stage.events(events), Vec::new(), None);
    for _ in 0..times {
        stage.prepare(connection, events, what).await?;
        let relay = RelayProcess::start(stage).await?;
        let started = Instant::now();
        all_entries(stage, events, what).await?;
        rates.push(per_second(events, started.elapsed()));
        peak = relay.peak_mib();
        relay.stop().await?;
        none_is_left(connection).await?;
    }
    Ok((median(rates.into_iter()).unwrap_or(f64::NAN), peak))
}

/// The rate of so many relays, which share the work evenly when one transaction brings it all at once.
async fn several(stage: &Stage, connection: &mut PgConnection, relays: usize, what: &str) -> anyhow::Result<f64> {
    let events = stage.events(SHARED_EVENTS);
    stage.prepare(connection, 0, what).await?;
    let mut running = Vec::new();
    for _ in 0..relays {
        running.push(RelayProcess::start(stage).await?);
    }
    even_shares(connection, relays).await?;
    let mut transaction = connection.begin().await?;
    stage.fill(&mut transaction, events, what).await?;
    transaction.commit().await?;
    let started = Instant::now();
    all_entries(stage, events, what).await?;
    let rate = per_second(events, started.elapsed());
    for relay in running {
        relay.stop().await?;
    }
    none_is_left(connection).await?;
    Ok(rate)
}

async fn even_shares(connection: &mut PgConnection, relays: usize) -> anyhow::Result<()> {
    let sql = "SELECT count(*) FROM (SELECT relay_id FROM outbox_lease WHERE relay_id IS NOT NULL
               GROUP BY relay_id HAVING count(*) = 64 / $1) AS owners";
    let relays = i64::try_from(relays)?;
    let deadline = Instant::now() + PATIENCE;
    while sqlx::query_scalar::<_, i64>(sql).bind(relays).fetch_one(&mut *connection).await? < relays {
        ensure!(Instant::now() < deadline, "{relays} relays did not come to even shares");
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Peak memory of a relay, in MiB.
async fn large_payloads(stage: &Stage, connection: &mut PgConnection) -> anyhow::Result<Option<f64>> {
    let (events, what) = (stage.events(LARGE_EVENTS), "scale, payloads of 1 MiB");
    stage.clear(connection).await?;
    sqlx::query(FILL_LARGE).bind(events.cast_signed()).execute(&mut *connection).await?;
    stage.settle(connection).await?;
    let relay = RelayProcess::start(stage).await?;
    all_entries(stage, events, what).await?;
    let peak = relay.peak_mib();
    relay.stop().await?;
    none_is_left(connection).await?;
    Ok(peak)
}

/// Waits until the stream has this many entries.
pub async fn all_entries(stage: &Stage, events: u64, what: &str) -> anyhow::Result<()> {
    let (mut last, mut deadline) = (0, Instant::now() + PATIENCE);
    while last < events {
        tokio::time::sleep(PAUSE).await;
        let entries = stage.entries().await?;
        ensure!(Instant::now() < deadline, "relays came to a stop at {entries} of {events} events");
        if entries > last {
            (last, deadline) = (entries, Instant::now() + PATIENCE);
        }
        stage.tell(|| format!("{what}: {} of {} published", count(entries), count(events)));
    }
    ensure!(last == events, "{last} entries came of {events} events");
    Ok(())
}

/// A relay that was stopped has settled what it had in flight.
pub async fn none_is_left(connection: &mut PgConnection) -> anyhow::Result<()> {
    let sql = "SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED'";
    let left: i64 = sqlx::query_scalar(sql).fetch_one(connection).await?;
    ensure!(left == 0, "{left} events are unsent");
    Ok(())
}
