//! `latency`: from the return of the commit until a blocking reader has the entry, beside one round trip to Redis and one commit.

use std::time::{Duration, Instant};

use super::figure::{Aim, Figure, Measured, Round};
use super::flow::{Flow, Lap};
use super::process::RelayProcess;
use super::stage::Stage;
use crate::commands::latency::Latency;

const ROUNDS: u32 = 3;
/// Of the baseline.
const BASELINE_TIME: Duration = Duration::from_secs(4);
/// Of a flow before what counts.
const WARM_UP: Duration = Duration::from_secs(1);
/// A quantile says something when this many events are beyond it.
const BEYOND: f64 = 2.0;
const QUANTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

struct Rate {
    per_second: u32,
    connections: u32,
    time: Duration,
    /// Most milliseconds, for each of the quantiles.
    most: [Option<f64>; 3],
}

/// The one of the headline comes first.
const RATES: [Rate; 3] = [
    Rate { per_second: 500, connections: 8, time: Duration::from_secs(7), most: [Some(1.5), Some(5.0), None] },
    Rate { per_second: 20, connections: 4, time: Duration::from_secs(10), most: [Some(1.5), Some(5.0), None] },
    Rate { per_second: 2_000, connections: 16, time: Duration::from_secs(7), most: [None, Some(10.0), None] },
];

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("latency").await?;
    stage.prepare(&mut connection, 0, "latency").await?;
    let mut measured = Measured { name: "latency", figures: Vec::new(), notes: Vec::new() };
    for rate in &RATES {
        let mut laps = Vec::new();
        for round in stage.rounds(ROUNDS) {
            stage.tell(|| format!("latency, {} events a second, round {round}", rate.per_second));
            let baseline = servers_alone(stage, rate).await?;
            laps.push((flow(stage, rate).await?, baseline));
        }
        measured.figures.extend(figures(rate, &laps));
        measured.notes.push(note(rate, &laps));
        stage.clear(&mut connection).await?;
    }
    Ok(measured)
}

async fn flow(stage: &Stage, rate: &Rate) -> anyhow::Result<Lap> {
    let relay = RelayProcess::start(stage).await?;
    let flow = Flow::start(stage, rate.per_second, rate.connections).await?;
    tokio::time::sleep(stage.time(WARM_UP)).await;
    flow.lap()?;
    tokio::time::sleep(stage.time(rate.time)).await;
    let lap = flow.finish().await?;
    relay.stop().await?;
    Ok(lap)
}

/// One round trip to Redis and one commit of one small row, one after the other, at the pace of the flow and with nothing else at work:
/// many disks and processors are slower after a pause.
async fn servers_alone(stage: &Stage, rate: &Rate) -> anyhow::Result<Latency> {
    let mut connection = stage.connect("latency: baseline").await?;
    let mut latency = Latency::new()?;
    let mut pace = tokio::time::interval(Duration::from_secs(1) / rate.per_second);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let samples = u64::from(rate.per_second) * stage.time(BASELINE_TIME).as_secs().max(1);
    for number in 0..samples {
        pace.tick().await;
        let started = Instant::now();
        stage.streams.ping().await?;
        sqlx::query("INSERT INTO bench_row (number) VALUES ($1)").bind(number.cast_signed()).execute(&mut connection).await?;
        latency.record(started.elapsed());
    }
    Ok(latency)
}

fn figures(rate: &Rate, laps: &[(Lap, Latency)]) -> Vec<Figure> {
    let fewest = laps.iter().map(|(lap, _)| lap.events).min().unwrap_or(0) as f64;
    let mut figures = Vec::new();
    for ((name, quantile), most) in QUANTILES.into_iter().zip(rate.most) {
        let rounds = laps.iter().map(|(lap, baseline)| Round::new(lap.after_commit.millis(quantile), baseline.millis(quantile)));
        if fewest * (1.0 - quantile) >= BEYOND || most.is_some() {
            figures.push(Figure::new(
                format!("latency {}/s {name}", rate.per_second),
                "ms",
                most.map(Aim::AtMost),
                rounds.collect(),
            ));
        }
    }
    figures
}

/// What a caller waits who counts from the moment at which the transaction was due.
fn note(rate: &Rate, laps: &[(Lap, Latency)]) -> String {
    let events: u64 = laps.iter().map(|(lap, _)| lap.events).sum();
    let median = |quantile| super::figure::median(laps.iter().map(|(lap, _)| lap.after_due.millis(quantile))).unwrap_or(f64::NAN);
    let (p50, p99) = (median(0.5), median(0.99));
    format!(
        "{events} events at {}/s; counted from when each transaction was due, p50 is {p50:.2} ms and p99 {p99:.2} ms",
        rate.per_second
    )
}
