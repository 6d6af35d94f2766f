//! `commitstream relay`

mod drain;
mod monitor;
mod progress;

use std::process::ExitCode;
use std::sync::Arc;

use commitstream::config::{Settings, redact_url};
use commitstream::outbox::OutboxError;
use commitstream::relay::{OutboxProcessor, RelayHandle};
use commitstream::streams::StreamsError;
use monitor::Monitor;
pub use progress::Progress;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::console;
use crate::context::{self, Context};
use crate::failure::{self, WrongUse};
use crate::http::{self, HttpServer, Shared};
use crate::output::{age, plural};
use crate::spans::Spans;

/// Publish the outbox to Redis Streams, until stopped
///
/// Any number of relays may run, up to 64 of them at work: they share the aggregates evenly and take over from one that is gone.
/// SIGINT (Ctrl-C) or SIGTERM stops it after what is in flight is settled; a second one stops it at once, which loses and duplicates
/// nothing either.
/// Needs a direct connection to PostgreSQL, not a transaction-mode pooler.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream relay
  commitstream relay --batch-size 500 --poll-interval 500ms
  commitstream relay --until-empty      publish what is there, then stop")]
pub struct Args {
    /// Most events in one append [environment: OUTBOX_BATCH_SIZE]
    #[arg(long, value_name = "EVENTS", allow_hyphen_values = true)]
    batch_size: Option<String>,
    /// Longest sleep, for example 500ms [environment: OUTBOX_POLL_INTERVAL]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    poll_interval: Option<String>,
    /// Stop with exit code 0 as soon as no event is pending or processing
    #[arg(long)]
    until_empty: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let flags = [
        ("app.outbox.processor.batchSize", args.batch_size.as_ref()),
        ("app.outbox.processor.pollInterval", args.poll_interval.as_ref()),
    ];
    let loaded = context.load(&flags)?;
    let settings = loaded.settings.clone();
    let processor = OutboxProcessor::new(settings.clone())?;
    announce(&settings)?;
    if settings.console.enabled
        && let Some(address) = settings.http.listen.filter(|_| !args.until_empty)
    {
        console::check(&settings, address)?;
    }
    let listener = if args.until_empty { None } else { http::listen(&loaded).await? };
    check_servers(&settings, args.until_empty).await?;
    let spans = Spans::start(&settings)?;
    let ended = relay(&processor, &settings, listener, args.until_empty, context).await;
    spans.stop();
    ended
}

async fn relay(
    processor: &OutboxProcessor,
    settings: &Settings,
    listener: Option<TcpListener>,
    until_empty: bool,
    context: &Context,
) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    // Before the relay starts: it looks its metrics up once.
    let metrics = listener.is_some().then(http::record_metrics).transpose()?;
    let mut relay = processor.start();
    let status = relay.watch();
    let monitor = if until_empty { None } else { Monitor::start(settings, status.clone(), metrics.clone())? };
    let server = match (listener, metrics, &monitor) {
        (Some(listener), Some(metrics), Some(monitor)) => {
            let settings = Arc::new(settings.clone());
            let (progress, verdict) = (monitor.progress(), monitor.verdict());
            let shared = Shared { settings, status: status.clone(), progress, verdict, metrics };
            Some(HttpServer::start(listener, shared)?)
        }
        _ => None,
    };
    tokio::select! {
        ended = relay.ended() => return ended.map(|()| ExitCode::SUCCESS).map_err(Into::into),
        drained = drain::wait(settings, status.clone()), if until_empty => return stop_drained(context, relay, drained).await,
        name = signals.next() => tracing::info!("{name}: settling what is in flight, then stopping; a second signal stops at once"),
    }
    if let Some(monitor) = &monitor {
        monitor.stopping();
    }
    tokio::select! {
        ended = relay.stop() => ended?,
        name = signals.next() => {
            tracing::warn!("{name}: stopped at once; the next relay finds out what became of the batches in flight");
            return Ok(ExitCode::FAILURE);
        }
    }
    if let Some(server) = server {
        server.stop().await;
    }
    let (published, failed) = {
        let status = status.borrow();
        (status.published, status.failed)
    };
    tracing::info!(published, failed, "events of this run");
    Ok(ExitCode::SUCCESS)
}

/// What waiting cannot mend is refused before the relay starts. A server that is down is no such thing: a daemon waits for it.
/// With --until-empty somebody waits for an answer, so there it is.
async fn check_servers(settings: &Settings, until_empty: bool) -> anyhow::Result<()> {
    let checks = [context::own_migrated(settings, "relay").await.map(drop), context::redis(settings).await.map(drop)];
    for error in checks.into_iter().filter_map(Result::err) {
        if until_empty || !may_pass(&error) {
            return Err(error);
        }
        tracing::warn!("the relay waits for a server: {}", failure::on_one_line(&error));
    }
    Ok(())
}

/// False for mistakes: missing tables, a login that is refused, a database that does not exist, a malformed URL.
fn may_pass(error: &anyhow::Error) -> bool {
    let of_postgres = |error: &OutboxError| match error {
        OutboxError::Unreachable { .. } | OutboxError::NoHost { .. } | OutboxError::Timeout { .. } => true,
        error @ OutboxError::Database { .. } => !failure::is_refused_login(error),
        _ => false,
    };
    let of_redis = |error: &StreamsError| error.is_outage() && !failure::is_refused_by_redis(error);
    error.downcast_ref().is_some_and(of_postgres) || error.downcast_ref().is_some_and(of_redis)
}

fn announce(settings: &Settings) -> Result<(), WrongUse> {
    let processor = &settings.outbox.processor;
    tracing::info!(
        database = redact_url(&context::database_url(settings)?),
        redis = redact_url(context::redis_url(settings)?),
        prefix = settings.redis.stream_prefix,
        poll_interval = ?processor.poll_interval,
        batch_size = processor.batch_size,
        "commitstream {} starts",
        env!("CARGO_PKG_VERSION"),
    );
    Ok(())
}

/// The outbox is empty: stops the relay and says what it did.
async fn stop_drained(
    context: &Context,
    relay: RelayHandle,
    drained: anyhow::Result<drain::Drained>,
) -> anyhow::Result<ExitCode> {
    let status = relay.watch();
    relay.stop().await?;
    let drained = drained?;
    let (published, refused, failed) = {
        let status = status.borrow();
        (status.published, status.refused, status.failed)
    };
    if context.output.json {
        context.output.json(&json!({ "published": published, "refused": refused, "failed": failed }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("published {} in {}; nothing is pending", plural(published, "event"), age(drained.took));
    if drained.failed > 0 {
        text += &format!("; {} in the outbox failed: `commitstream failed list`", plural(drained.failed, "event"));
    }
    context.output.line(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The signals that end a daemon.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The name of the next signal.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
