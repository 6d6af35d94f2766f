//! `commitstream demo`: an example service under load, a relay, and an audit of the streams at the end.
//!
//! ```text
//!   load ──► service ─┬─► outbox ─► relay ─┬─► streams ──► watch (tail: latency, live line)
//!     │               └────────────────────┘      └──────► audit (every entry, at the end)
//!     └─ notes: what was committed, sent, rolled back ─► watch ─► ledger ─► audit
//! ```

mod audit;
mod events;
mod live;
mod load;
mod receipts;
mod report;
mod service;
mod tail;
mod watch;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use commitstream::outbox::{self, OutboxRepository};
use commitstream::relay::{OutboxProcessor, RelayHandle, RelayState};
use commitstream::streams::Streams;

use super::interrupt::{INTERRUPTED, Interrupt};
use super::servers::{Purpose, Servers};
use crate::context::Context;
use crate::failure::WrongUse;
use crate::output::{Output, Style, count};
use live::Live;
use load::Plan;
use receipts::{Receipts, Receiver};
use report::Report;
use service::{ROLLBACK_EVERY, Service};
use watch::{Watched, Watcher};

/// Every event is remembered until the audit, in some hundred bytes.
const MOST_EVENTS: u64 = 20_000_000;
/// Longest wait for the relay to take up its work, and for the last events to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
const PURPOSE: Purpose = Purpose { name: "demo", called: "the demonstration", postgres: &[], optional_postgres: &[], redis: &[] };

/// See it work: an example service under load, a relay, and an audit of what arrived
///
/// Starts a private PostgreSQL and Redis, or uses those of DATABASE_URL and REDIS_URL when both are set, in a schema and under a
/// key prefix of its own. All that it made is removed at the end.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long the example service runs
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    pub seconds: u32,

    /// Events a second in all: one in four is critical, the others are high-frequency
    #[arg(long, value_name = "EVENTS", default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(4..=100_000))]
    pub rate: u32,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    if u64::from(args.seconds) * u64::from(args.rate) > MOST_EVENTS {
        let most = count(MOST_EVENTS);
        return Err(WrongUse::new(format!("--seconds times --rate is more than {most} events: lower one of them")).into());
    }
    let (output, configured, plan) = (context.output, context.settings()?, Plan::new(&args));
    let interrupt = Interrupt::listen()?;
    introduce(&output, &plan)?;
    let servers = tokio::select! {
        servers = Servers::obtain(&configured, &PURPOSE) => servers?,
        () = interrupt.first() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    if !output.json {
        output.line(&format!("{}\n", servers.describe()?))?;
    }
    // Whatever happens in between, nothing is left behind.
    let shown = demonstrate(plan, &servers, &interrupt, &output).await;
    let removed = servers.remove().await;
    let report = shown?;
    removed?;
    if !output.json {
        output.line(&next_steps(&output))?;
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything between the start of the servers and their end.
async fn demonstrate(plan: Plan, servers: &Servers, interrupt: &Interrupt, output: &Output) -> anyhow::Result<Report> {
    let settings = &servers.settings;
    let url = settings.database.url.as_deref().context("the demonstration has a database")?;
    let mut connection = outbox::connect(url, "commitstream demo: set-up", settings.database.timeout).await?;
    OutboxRepository::new(&settings.database.schema).migrate(&mut connection).await?;
    let streams = servers.streams()?;
    streams.ping().await?;

    let relay = OutboxProcessor::new(settings.clone())?.start();
    let watched = observe(plan, servers, &streams, &relay, interrupt, output).await;
    // Before any error is passed on: nobody must work on tables that are about to be removed.
    let stopped = relay.stop().await;
    let (watched, receipts, took) = watched?;
    stopped?;

    let verdict = audit::read(&streams, &watched.ledger).await?;
    let report = Report::new(plan, &verdict, receipts, &watched, servers.are_private(), took);
    report.print(output)?;
    Ok(report)
}

/// Runs the load and waits until what it published has arrived. Returns how long the load ran.
async fn observe(
    plan: Plan,
    servers: &Servers,
    streams: &Streams,
    relay: &RelayHandle,
    interrupt: &Interrupt,
    output: &Output,
) -> anyhow::Result<(Watched, Receipts, Duration)> {
    let service = Arc::new(Service::open(&servers.settings, relay.waker(), plan.connections()).await?);
    let receiver = Receiver::start(&servers.settings).await?;
    tokio::select! {
        active = is_active(relay) => active?,
        // The load then ends as it begins.
        () = interrupt.first() => {}
    }
    let (mut watcher, notes) = Watcher::start(streams, Live::new(*output))?;
    let loaded = load::run(plan, &service, notes, interrupt.stop()).await;
    watcher.caught_up(PATIENCE).await;
    let receipts = receiver.finish(PATIENCE).await;
    let mut watched = watcher.finish().await?;
    settle_doubts(&service, &mut watched).await?;
    service.close().await;
    Ok((watched, receipts?, loaded?))
}

async fn is_active(relay: &RelayHandle) -> anyhow::Result<()> {
    let mut status = relay.watch();
    let active = status.wait_for(|status| status.state == RelayState::Active);
    match tokio::time::timeout(PATIENCE, active).await {
        Ok(Ok(_)) => Ok(()),
        _ => anyhow::bail!("the relay did not take up its work within {} s: {:?}", PATIENCE.as_secs(), relay.status().state),
    }
}

/// A commit without an answer was carried out if its business row is there.
async fn settle_doubts(service: &Service, watched: &mut Watched) -> anyhow::Result<()> {
    if watched.commits_in_doubt.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = watched.commits_in_doubt.keys().copied().collect();
    for row in service.rows_found(&rows).await? {
        if let Some(event) = watched.commits_in_doubt.remove(&row) {
            watched.ledger.committed.insert(event, commitstream::Lane::Critical);
        }
    }
    watched.ledger.rolled_back.extend(watched.commits_in_doubt.drain().map(|(_, event)| event));
    Ok(())
}

fn introduce(output: &Output, plan: &Plan) -> anyhow::Result<()> {
    if output.json {
        return Ok(());
    }
    let (critical, fast) = (count(u64::from(plan.critical_rate)), count(u64::from(plan.high_frequency_rate)));
    let seconds = plan.seconds;
    let title = output.paint(Style::Label, "Commitstream: transactional events from PostgreSQL to Redis Streams");
    output.line(&format!(
        "{title}\n\n\
         For {seconds} s an example service commits {critical} transactions a second, each of business\n\
         data and a critical event, and sends {fast} high-frequency events a second straight\n\
         to Redis; one transaction in {ROLLBACK_EVERY} is rolled back on purpose.\n\
         A relay moves what was committed to Redis Streams: watch how long that takes (p50,\n\
         p99) and how many events wait (backlog).\n\
         A consumer writes a receipt for each payment, in a transaction of its own.\n\
         At the end every stream is read back and compared with what was committed. Ctrl-C\n\
         ends the load early.\n"
    ))?;
    Ok(())
}

fn next_steps(output: &Output) -> String {
    format!(
        "\n{}\n  \
         make demo SECONDS=60 RATE=5000               a longer, harder run\n  \
         commitstream demo --seconds 60 --rate 5000   the same without make\n  \
         commitstream --help                          the other commands\n  \
         README.md                                    how to use it in a service of your own",
        output.paint(Style::Label, "Next:")
    )
}
