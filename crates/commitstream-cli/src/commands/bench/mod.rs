//! `commitstream bench`: figures beside baselines that were measured in the same run, on the same servers.

mod chart;
mod cleanup;
mod console;
mod drain;
mod figure;
mod flow;
mod held;
mod idle;
mod latency;
mod machine;
mod markdown;
mod mixture;
mod observed;
mod poller;
mod process;
mod publish;
mod report;
mod scale;
mod stage;
mod streams;
mod sustained;
mod visitor;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use commitstream::config::Settings;

use super::interrupt::{INTERRUPTED, Interrupt};
use super::servers::{Purpose, Servers};
use crate::context::Context;
use crate::failure::WrongUse;
use figure::Measured;
use machine::Machine;
use markdown::{Page, try_to_write, write};
use report::Report;
use stage::{KEPT, MOST_ROUNDS, Scale, Stage};

/// Both sides of every figure have the same server.
const PURPOSE: Purpose = Purpose {
    name: "bench",
    called: "a benchmark",
    postgres: &[("shared_buffers", "1GB"), ("max_wal_size", "8GB"), ("checkpoint_timeout", "30min")],
    optional_postgres: &[("shared_preload_libraries", "pg_stat_statements")],
    redis: &[("auto-aof-rewrite-percentage", "0")],
};

/// What is still at work when it is interrupted has so long to end.
const PATIENCE: Duration = Duration::from_secs(15);

/// Measure how fast it is, beside baselines in the same run
///
/// Starts a private PostgreSQL and Redis, both durable, or uses those of DATABASE_URL and REDIS_URL when both are set, in a schema and
/// under a key prefix of its own. All that it made is removed at the end. Settings other than the servers' are the default
/// ones, but for batches of 1,000 events. Takes under ten minutes, unless asked for `scale`, `cleanup` and `console`, or for one benchmark only.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  commitstream bench                        all but scale, cleanup and console
  commitstream bench drain --retention 0
  commitstream bench latency sustained --json")]
pub struct Args {
    /// Which to run [default: all but scale, cleanup and console]
    #[arg(value_name = "NAME")]
    names: Vec<Name>,

    /// Days that drain keeps what was sent; 0 deletes it at once [default: 7, and without NAME both]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(..=36_500))]
    retention: Option<u32>,

    /// Rounds of each figure, which is their median [default: 2 to 5, as each needs]
    #[arg(long, value_name = "ROUNDS", value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_ROUNDS)))]
    rounds: Option<u32>,

    /// Run scale, cleanup and console, too: about half an hour more
    #[arg(long, conflicts_with = "names")]
    all: bool,

    /// At most so many events, and seconds instead of longer times: to try it, not to measure
    #[arg(long, value_name = "EVENTS", value_parser = clap::value_parser!(u64).range(100..))]
    events: Option<u64>,

    /// Also write the table into this file, between the two marks that it has, or into a new one
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// Also draw the figures into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Name {
    /// Waiting rows to streams, against a loop in bare SQL
    Drain,
    /// The same while a transaction stays open that began before everything else
    Held,
    /// From the commit to a reader of the stream
    Latency,
    /// 16 producers and a relay at the same time
    Sustained,
    /// A transaction that publishes, against the same statements by hand
    Publish,
    /// 500 events in one transaction, against one INSERT by hand
    #[value(alias = "publish-all")]
    PublishAll,
    /// Straight to Redis, against redis-benchmark
    Streams,
    /// The drain with metrics, tracing and an open console, against the drain without them
    Observed,
    /// A relay with nothing to do
    Idle,
    /// Up to 5,000,000 waiting rows, up to 4 relays, and memory (long)
    Scale,
    /// Old rows removed while events flow (long)
    Cleanup,
    /// Each page of the web console on 10,000,000 rows (long)
    Console,
}

impl Args {
    fn names(&self) -> Vec<Name> {
        let is_long = |name: &Name| matches!(name, Name::Scale | Name::Cleanup | Name::Console);
        let is_wanted = |name: &Name| if self.names.is_empty() { self.all || !is_long(name) } else { self.names.contains(name) };
        Name::value_variants().iter().copied().filter(is_wanted).collect()
    }

    fn retentions(&self) -> Vec<u32> {
        match (self.retention, self.names.as_slice()) {
            (Some(days), _) => vec![days],
            (None, []) => vec![KEPT, 0],
            (None, _) => vec![KEPT],
        }
    }
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let output = context.output;
    let configured = context.settings()?;
    let configured = servers_of(configured);
    if args.retention.is_some() && !args.names().contains(&Name::Drain) {
        return Err(WrongUse::new("--retention is for drain, which is not among the benchmarks to run").into());
    }
    let page = args.markdown.as_deref().map(Page::open).transpose()?;
    let svg = args.svg.clone();
    [&args.markdown, &args.svg].into_iter().flatten().try_for_each(|file| try_to_write(file))?;
    let interrupt = Interrupt::listen()?;
    let servers = tokio::select! {
        servers = Servers::obtain(&configured, &PURPOSE) => servers?,
        () = interrupt.first() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    output.remark(&servers.describe()?)?;
    // Whatever happens in between, nothing is left behind.
    let measured = measure(args, &servers, &interrupt).await;
    let removed = servers.remove().await;
    let measured = measured?;
    removed?;
    let Some(report) = measured else {
        output.remark("interrupted; what was made is removed")?;
        return Ok(ExitCode::from(INTERRUPTED));
    };
    report.print(&output)?;
    page.map_or(Ok(()), |page| page.write(&report))?;
    svg.map_or(Ok(()), |file| write(&file, &chart::svg(&report)))?;
    Ok(ExitCode::SUCCESS)
}

/// Where the servers are is the user's; everything else is as the figures are defined.
fn servers_of(configured: Settings) -> Settings {
    let mut settings = Settings::default();
    settings.database.url = configured.database.url;
    settings.redis.url = configured.redis.url;
    settings.redis.sentinel_password = configured.redis.sentinel_password;
    settings
}

/// `None` when it was interrupted.
///
/// On a runtime of its own: when that has ended, nobody works any more on tables that are about to be removed.
async fn measure(args: Args, servers: &Servers, interrupt: &Interrupt) -> anyhow::Result<Option<Report>> {
    let scale = Scale { events: args.events, rounds: args.rounds };
    let stage = Stage::new(servers, scale)?;
    let mut stopped = interrupt.stop();
    let task = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let measured = runtime.block_on(async {
            tokio::select! {
                report = run_all(&args, &stage) => report.map(Some),
                _ = stopped.wait_for(|stop| *stop) => Ok(None),
            }
        });
        runtime.shutdown_timeout(PATIENCE);
        measured
    });
    task.await?
}

async fn run_all(args: &Args, stage: &Stage) -> anyhow::Result<Report> {
    stage.migrate().await?;
    let machine = Machine::look(stage).await?;
    let mut all = Vec::new();
    for name in args.names() {
        let measured = run_one(name, args, stage).await;
        stage.clear_progress();
        all.push(measured.with_context(|| format!("{} failed", name_of(name)))?);
    }
    Ok(Report { machine, scale: stage.scale, measured: all })
}

async fn run_one(name: Name, args: &Args, stage: &Stage) -> anyhow::Result<Measured> {
    match name {
        Name::Drain => drain::measure(stage, &args.retentions()).await,
        Name::Held => held::measure(stage).await,
        Name::Latency => latency::measure(stage).await,
        Name::Sustained => sustained::measure(stage).await,
        Name::Publish => publish::measure(stage).await,
        Name::PublishAll => publish::measure_all(stage).await,
        Name::Streams => streams::measure(stage).await,
        Name::Observed => observed::measure(stage).await,
        Name::Idle => idle::measure(stage).await,
        Name::Scale => scale::measure(stage).await,
        Name::Cleanup => cleanup::measure(stage).await,
        Name::Console => console::measure(stage).await,
    }
}

fn name_of(name: Name) -> String {
    name.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
