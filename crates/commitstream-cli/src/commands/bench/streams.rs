//! `streams`: the lane straight to Redis, against `redis-benchmark` with XADD commands of the same fields.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use commitstream::DomainEvent;
use commitstream::publisher::RedisStreamsPublisher;
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::figure::{Aim, Figure, Measured, Round};
use super::stage::{Stage, per_second};
use super::workload::OrderPlaced;

const ROUNDS: u32 = 5;
const EVENTS: u64 = 200_000;
/// Events of one call.
const AT_ONCE: u64 = 500;
const TASKS: u64 = 64;

/// As the sandbox looks for Redis.
const COMMON: [&str; 3] = ["/opt/homebrew/bin", "/usr/local/bin", "/usr/bin"];

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut measured = Measured { name: "streams", figures: Vec::new(), notes: Vec::new() };
    let baseline = match Baseline::new(stage)? {
        Ok(baseline) => baseline,
        Err(why) => {
            measured.notes.push(format!("skipped, for there is no baseline: {why}"));
            return Ok(measured);
        }
    };
    let events = stage.events(EVENTS).next_multiple_of(AT_ONCE);
    let (mut together, mut single) = (Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("streams, round {round}"));
        let figure = publish_all(stage, events).await?;
        together.push(Round::new(figure, baseline.run(events, "1", "100").await?));
        stage.streams.remove_all().await?;
        let figure = publish_single(stage, events).await?;
        single.push(Round::new(figure, baseline.run(events, "64", "1").await?));
        stage.streams.remove_all().await?;
    }
    measured.figures.push(Figure::new("streams, 500 at once", "events/s", Some(Aim::RatioAtLeast(0.8)), together));
    measured.figures.push(Figure::new("streams, 64 tasks", "events/s", Some(Aim::RatioAtLeast(0.6)), single));
    let how = "the baselines are redis-benchmark with 1 client and a pipeline of 100, and with 64 clients and no pipeline";
    measured.notes.push(how.to_owned());
    Ok(measured)
}

/// One task, a call for every 500 events, one after the other.
async fn publish_all(stage: &Stage, events: u64) -> anyhow::Result<f64> {
    let publisher = RedisStreamsPublisher::new(&stage.settings)?;
    let batch: Vec<OrderPlaced> = (0..AT_ONCE).map(OrderPlaced::new).collect();
    let borrowed: Vec<&dyn DomainEvent> = batch.iter().map(|event| -> &dyn DomainEvent { event }).collect();
    publisher.publish_all(&borrowed).await?;
    let started = Instant::now();
    for _ in 0..events / AT_ONCE {
        publisher.publish_all(&borrowed).await?;
    }
    Ok(per_second(events, started.elapsed()))
}

/// Tasks that share a publisher, each with one event at a time.
async fn publish_single(stage: &Stage, events: u64) -> anyhow::Result<f64> {
    let publisher = RedisStreamsPublisher::new(&stage.settings)?;
    publisher.publish(&OrderPlaced::new(0)).await?;
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    for _ in 0..TASKS {
        let (publisher, next) = (publisher.clone(), next.clone());
        tasks.spawn(async move {
            loop {
                match next.fetch_add(1, Ordering::Relaxed) {
                    number if number < events => drop(publisher.publish(&OrderPlaced::new(number)).await?),
                    _ => return anyhow::Ok(()),
                }
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(per_second(events, started.elapsed()))
}

/// `redis-benchmark`, and what it is called with.
struct Baseline {
    program: PathBuf,
    server: Vec<String>,
    command: Vec<String>,
}

impl Baseline {
    /// Why there is none, if it cannot be had.
    fn new(stage: &Stage) -> anyhow::Result<Result<Self, &'static str>> {
        let url = stage.settings.redis.url.as_deref().context("benchmarks have a Redis")?;
        let Some(program) = find() else { return Ok(Err("redis-benchmark is not installed; it comes with Redis (redis-tools)")) };
        if !url.starts_with("redis://") {
            return Ok(Err("redis-benchmark speaks to one server, without TLS"));
        }
        let info = url.into_connection_info()?;
        // Passwords in arguments can be read by others; that of a private server is of no use to them.
        if info.redis_settings().password().is_some() && !stage.is_private {
            return Ok(Err("redis-benchmark takes a password on its command line only, which other users can read"));
        }
        let Some(server) = server_options(&info) else { return Ok(Err("redis-benchmark speaks to a TCP port here")) };
        let envelope = OrderPlaced::new(1).envelope()?;
        let (id, occurred_at) = (envelope.id.to_string(), envelope.occurred_at.to_rfc3339());
        let stream = stage.streams.stream_of(&envelope.aggregate_type);
        let command = ["XADD", &stream, "*", "id", &id, "type", &envelope.event_type, "aggregate_type", &envelope.aggregate_type];
        let rest = ["aggregate_id", &envelope.aggregate_id, "occurred_at", &occurred_at, "payload", envelope.payload.get()];
        let command = command.into_iter().chain(rest).map(str::to_owned).collect();
        Ok(Ok(Self { program, server, command }))
    }

    /// Commands a second.
    async fn run(&self, commands: u64, clients: &str, pipeline: &str) -> anyhow::Result<f64> {
        let mut program = Command::new(&self.program);
        program.args(&self.server).args(["-q", "-n", &commands.to_string(), "-c", clients, "-P", pipeline]).args(&self.command);
        let output = program.stdin(Stdio::null()).kill_on_drop(true).output().await.context("cannot run redis-benchmark")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "redis-benchmark failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        rate_in(&text).with_context(|| format!("redis-benchmark prints no rate: {}", text.trim()))
    }
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(COMMON.map(PathBuf::from));
    directories.map(|directory| directory.join("redis-benchmark")).find(|program| program.is_file())
}

fn server_options(info: &ConnectionInfo) -> Option<Vec<String>> {
    let ConnectionAddr::Tcp(host, port) = info.addr() else { return None };
    let mut options = ["-h", host, "-p", &port.to_string()].map(str::to_owned).to_vec();
    let redis = info.redis_settings();
    if let Some(password) = redis.password() {
        options.extend(["-a".to_owned(), password.to_owned()]);
        options.extend(redis.username().into_iter().flat_map(|user| ["--user".to_owned(), user.to_owned()]));
    }
    options.extend(["--dbnum".to_owned(), redis.db().to_string()]);
    Some(options)
}

/// The number before the last `requests per second`; what it prints before is progress.
fn rate_in(text: &str) -> Option<f64> {
    let (before, _) = text.rsplit_once("requests per second")?;
    before.split_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::rate_in;

    #[test]
    fn the_rate_is_read_from_what_redis_benchmark_prints() {
        let text = "XADD events:order * id: rps=0.0 (overall: nan) avg_msec=nan\rXADD events:order * id: 123456.79 requests per second, p50=0.103 msec\n";
        assert_eq!(rate_in(text), Some(123_456.79));
        assert_eq!(rate_in("Could not connect"), None);
    }
}
