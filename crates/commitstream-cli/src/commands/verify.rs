//! `commitstream verify`

use std::cell::Cell;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use commitstream::outbox::OutboxRepository;
use commitstream::streams::Streams;
use commitstream::verify::{self, Report, VerifyError};
use serde::Serialize;
use sqlx::PgConnection;

use crate::context::{self, Context};
use crate::output::{Output, Progress, Style, Table, age, count, plural};

/// How often the state of the work is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Check that every published event is in its stream, once and in order
///
/// Reads all streams that this outbox has written to, and compares them with the outbox and its journal. It may run beside producers and
/// relays, and changes nothing; it works in temporary tables of PostgreSQL, so millions of events need little memory but some minutes. Exit
/// code 1 when anything is at fault.
///
/// With --republish --yes, the relay publishes again what is missing, and nothing else: where a stream was deleted, say. Those events come
/// behind newer ones of their aggregates that are in the stream; among themselves they keep their order. What has no row in the
/// outbox any more (retentionDays) cannot be published again.
///
/// With --settle, what is unsettled in its own stream is marked as published: after PostgreSQL was restored from a backup, a relay would
/// send it again. Relays must be paused or stopped. See docs/restore.md.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream verify
  commitstream verify --limit 100                          name more of each fault
  commitstream verify --json | jq -r '.missing.first[].event_id'
  commitstream verify --settle                             after a restore, while relays are paused
  commitstream verify --republish                          show what would be published again
  commitstream verify --republish --yes                    publish it again

What it tells apart:
  missing       published, and in no stream
  duplicated    a second entry of an event
  out of order  behind an event of its aggregate that was written to the outbox later; an event that
                had failed and was retried comes late too, and so do those of producers that race
                on one aggregate without a lock
  unsettled     in a stream, while its row says that it is still to be sent, or failed
  misplaced     in the stream of another aggregate type")]
pub struct Args {
    /// Most events of each fault to name
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    limit: u32,
    /// Mark as published what is in its stream and unsettled; relays must be paused or stopped
    #[arg(long, conflicts_with = "republish")]
    settle: bool,
    /// Publish again what is missing; without --yes, only say how much that is
    #[arg(long)]
    republish: bool,
    /// With --republish: do it
    #[arg(long, short, requires = "republish")]
    yes: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    // Wrong settings of either server are told before work begins.
    context::database_url(&settings)?;
    let streams = context::redis(&settings).await?;
    let mut connection = context::own_migrated(&settings, "verify").await?;
    let outbox = context::repository(&settings);
    if args.settle {
        verify::may_settle(&outbox, &mut connection).await?;
    }

    let (started, now) = (Instant::now(), Cell::new(None));
    let audit = verify::run(&outbox, &mut connection, &streams, args.limit, |progress| now.set(Some(progress)));
    let report = shown(audit, &now).await.context("the audit did not come to its end")?;
    let took = started.elapsed();
    let settled = if args.settle { Some(verify::settle(&outbox, &mut connection, &context::operator()).await?) } else { None };
    let others = report.faults().iter().any(|(name, findings)| *name != "unsettled" && findings.count > 0);
    let is_settled = settled == Some(report.unsettled.count) && !others;
    let republished = if args.republish {
        let yes = args.yes;
        Some(Republished { yes, events: republish(&outbox, &mut connection, &streams, yes).await })
    } else {
        None
    };
    let is_mended = republished.as_ref().is_some_and(|republished| republished.mends(&report));
    if context.output.json {
        context.output.json(&Answer {
            ok: report.is_clean(),
            report: &report,
            settled,
            republished: republished.as_ref().and_then(done),
        })?;
    } else {
        let prefix = settings.redis.stream_prefix.as_str();
        context.output.write(&describe(&report, prefix, took, &context.output))?;
        if let Some(settled) = settled {
            context
                .output
                .line(&format!("\nmarked as published, because they are in their streams: {}", plural(settled, "event")))?;
        }
        if let Some(line) = republished.as_ref().and_then(|republished| republished.describe(&report)) {
            context.output.line(&format!("\n{line}"))?;
        }
    }
    // What was found is told even if nothing could be done about it.
    republished.map_or(Ok(0), |republished| republished.events)?;
    Ok(if report.is_clean() || is_settled || is_mended { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn republish(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    streams: &Streams,
    yes: bool,
) -> Result<u64, VerifyError> {
    if yes {
        verify::republish(outbox, connection, streams, &context::operator()).await
    } else {
        verify::republishable(outbox, connection, streams).await
    }
}

/// What `--republish` came to: how many events were made unsent again, or would be.
struct Republished {
    yes: bool,
    events: Result<u64, VerifyError>,
}

impl Republished {
    /// All that was at fault is on its way.
    fn mends(&self, report: &Report) -> bool {
        let is_all = self.events.as_ref().is_ok_and(|events| *events == report.missing.count);
        self.yes && is_all && report.faults().iter().all(|(name, findings)| *name == "missing" || findings.count == 0)
    }

    fn describe(&self, report: &Report) -> Option<String> {
        let events = *self.events.as_ref().ok()?;
        let missing = report.missing.count;
        if missing == 0 {
            return Some("nothing is missing, so nothing has to be published again".to_owned());
        }
        let mut text = if self.yes {
            format!("{} unsent again: a running relay publishes what is missing", plural(events, "event"))
        } else {
            format!(
                "{} would be published again, behind newer ones of their aggregates: `commitstream verify --republish --yes`",
                plural(events, "event")
            )
        };
        if missing > events {
            let left = plural(missing - events, "event");
            text += &format!(
                "\n{left} cannot be published again: the outbox has no row of them any more, or they were changed meanwhile"
            );
        }
        Some(text)
    }
}

fn done(republished: &Republished) -> Option<u64> {
    republished.events.as_ref().ok().copied().filter(|_| republished.yes)
}

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    ok: bool,
    #[serde(flatten)]
    report: &'a Report,
    /// Events that were marked as published.
    #[serde(skip_serializing_if = "Option::is_none")]
    settled: Option<u64>,
    /// Events that were made unsent again.
    #[serde(skip_serializing_if = "Option::is_none")]
    republished: Option<u64>,
}

/// Waits for the audit and tells how far it has come, also during a long statement of PostgreSQL.
async fn shown<T>(audit: impl Future<Output = T>, now: &Cell<Option<verify::Progress>>) -> T {
    let mut progress = Progress::start();
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut compares_since = None;
    tokio::pin!(audit);
    loop {
        tokio::select! {
            ended = &mut audit => {
                progress.clear();
                return ended;
            }
            _ = look.tick() => match now.get() {
                None => (),
                Some(verify::Progress::Reading { entries, total }) => {
                    progress.tell(|| format!("read {} of {}", count(entries), plural(total, "entry")));
                }
                Some(verify::Progress::Comparing { entries }) => {
                    let since = *compares_since.get_or_insert_with(Instant::now);
                    let entries = plural(entries, "entry");
                    progress.tell(|| format!("PostgreSQL compares {entries} with the outbox, for {}", age(since.elapsed())));
                }
            },
        }
    }
}

fn describe(report: &Report, prefix: &str, took: Duration, output: &Output) -> String {
    if report.entries + report.published + report.pending + report.failed == 0 && report.is_clean() {
        return format!("There is nothing to verify: the outbox is empty, and so are the streams {prefix}*.\n");
    }
    let looked_at = format!("{} in {}", plural(report.entries, "entry"), plural(report.streams, "stream"));
    let mut text = format!(
        "{looked_at} and {} compared in {}\n\n",
        plural(report.published + report.pending + report.failed, "row"),
        age(took)
    );
    let faults = report.faults().map(|(name, findings)| (name, findings.count, count(findings.count)));
    let width = faults.iter().map(|(_, _, figure)| figure.len()).max().unwrap_or(0);
    for (name, number, figure) in &faults {
        let figure = format!("{figure:>width$}");
        let figure = if *number > 0 { output.paint(Style::Error, &figure) } else { figure };
        text += &format!("{name:<12}  {figure}\n");
    }
    text += &remarks(report);
    let (style, verdict) = verdict(report, prefix);
    text += &format!("\n{}\n", output.paint(style, &verdict));
    text + &named(report, output)
}

/// What is no fault, but good to know.
fn remarks(report: &Report) -> String {
    let remarks = [
        (report.pending, "row", "still to be published"),
        (report.failed, "row", "failed: `commitstream failed list`"),
        (report.later, "row", "published too recently to be checked"),
        (report.trimmed, "event", "not checked: their streams no longer go back so far, because they were trimmed"),
        (report.unknown, "entry", "without a row: the event was high-frequency, or its row was cleaned up"),
        (
            report.rowless.count,
            "entry",
            "of these not explained by the clean-up: high-frequency, deleted by hand, or lost by PostgreSQL (docs/restore.md)",
        ),
    ];
    let lines = remarks.iter().filter(|(number, ..)| *number > 0);
    let text: String = lines.map(|(number, noun, what)| format!("{} {what}\n", plural(*number, noun))).collect();
    if text.is_empty() { text } else { format!("\n{text}") }
}

fn verdict(report: &Report, prefix: &str) -> (Style, String) {
    if report.is_clean() {
        return (Style::Good, "Nothing is missing, duplicated, out of order, unsettled or misplaced.".to_owned());
    }
    let found = report.faults().into_iter().filter(|(_, findings)| findings.count > 0);
    let found: Vec<_> = found.map(|(name, findings)| format!("{} {name}", count(findings.count))).collect();
    let mut verdict = format!("The streams are not what the outbox says: {}.", found.join(", "));
    if report.streams == 0 {
        verdict += &format!("\nThere is no stream {prefix}* at all: are REDIS_URL and STREAM_PREFIX those of the relay?");
    }
    (Style::Error, verdict)
}

/// The first events of each fault.
fn named(report: &Report, output: &Output) -> String {
    let mut table = Table::new(&["FAULT", "EVENT", "STREAM", "ENTRY", "AGGREGATE"]);
    let (mut rows, mut faults) = (0, 0);
    for (name, findings) in report.faults().into_iter().chain([("no row", &report.rowless)]) {
        faults += findings.count;
        for finding in &findings.first {
            rows += 1;
            let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            table.row([
                name.to_owned(),
                finding.event_id.to_string(),
                finding.stream.clone(),
                or_dash(&finding.entry_id),
                or_dash(&finding.aggregate_id),
            ]);
        }
    }
    match rows {
        0 => String::new(),
        _ if faults > rows => format!("\n{}and more: see --limit\n", table.render(output)),
        _ => format!("\n{}", table.render(output)),
    }
}
