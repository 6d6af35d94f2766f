//! `commitstream tail`

mod follow;
mod history;
mod show;

use std::process::ExitCode;

use commitstream::streams::Streams;

use crate::context::{self, Context};
use history::History;
use show::Printer;

/// Show events as they arrive in their streams
///
/// Shows the newest events of all streams under the prefix (or of those named), then follows; streams that appear later are picked
/// up. One line for each event: time (UTC), stream, type, aggregate id, payload; with --json one JSON object with all fields.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream tail
  commitstream tail user order --last 50
  commitstream tail --from-start --no-follow --json > events.jsonl
  commitstream tail user --last 0 --limit 1     wait for one event")]
pub struct Args {
    /// Stream, such as events:user, or aggregate type, such as user [default: all]
    #[arg(value_name = "STREAM")]
    streams: Vec<String>,
    /// Begin with the oldest event
    #[arg(long, conflicts_with = "last")]
    from_start: bool,
    /// Begin with the newest N events
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    last: u32,
    /// Stop after N events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Stop after the events that are there
    #[arg(long)]
    no_follow: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let streams = context::redis(&settings).await?;
    let prefix = &settings.redis.stream_prefix;
    let named: Vec<String> = args.streams.iter().map(|name| key_of(&streams, prefix, name)).collect();
    let known = if named.is_empty() { streams.list().await? } else { named.clone() };
    let mut printer = Printer::new(context.output, args.limit);
    let mut history = if args.from_start {
        History::from_start(&streams, known)
    } else {
        History::newest(&streams, known, usize::try_from(args.last)?).await?
    };
    loop {
        let entries = history.next().await?;
        if entries.is_empty() {
            break;
        }
        if printer.print(&entries)?.is_full() {
            return Ok(ExitCode::SUCCESS);
        }
    }
    if args.no_follow {
        if printer.has_printed_nothing() && args.last > 0 {
            context.output.remark(&nothing(&args, prefix, "there is no event"))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if printer.has_printed_nothing() && args.last > 0 {
        let text = nothing(&args, prefix, "no event yet");
        context
            .output
            .remark(&format!("{text}; waiting (Ctrl-C stops). Is a relay running, and is STREAM_PREFIX the same there?"))?;
    }
    follow::run(streams, history.into_positions(), named.is_empty(), &mut printer, &context.output).await
}

/// A key as it is, or the key of an aggregate type.
pub fn key_of(streams: &Streams, prefix: &str, name: &str) -> String {
    if name.starts_with(prefix) { name.to_owned() } else { streams.stream_of(name) }
}

fn nothing(args: &Args, prefix: &str, what: &str) -> String {
    match args.streams.as_slice() {
        [] => format!("{what} in any stream under {prefix}*"),
        names => format!("{what} in {}", names.join(", ")),
    }
}
