//! `commitstream cleanup`

use std::process::ExitCode;
use std::time::{Duration, Instant};

use commitstream::config::Settings;
use commitstream::relay::cleanup::{self, Cleaned};
use commitstream::streams::{Streams, Trimmed};
use serde_json::json;
use sqlx::PgConnection;

use crate::commands::days;
use crate::context::{self, Context};
use crate::failure::on_one_line;
use crate::output::{Progress, age, plural, printable};

/// Delete what was published or handled long ago, and trim the streams
///
/// The relay does this by itself every hour (app.outbox.cleanup). Deletes in small transactions that wait for nobody; it may be
/// stopped at any time, and run beside relays. Where event_outbox is partitioned by day, old days are dropped as a whole, and those
/// to come are made; that needs the role that owns the table. What the inbox remembers has a retention of its own (app.consumer), and so
/// has what every consumer group has acknowledged (app.streams); with no REDIS_URL, streams are left alone.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream cleanup
  commitstream cleanup --retention-days 30")]
pub struct Args {
    /// Keep what was published within this many days [environment: OUTBOX_RETENTION_DAYS]
    #[arg(long, value_name = "DAYS", allow_hyphen_values = true)]
    retention_days: Option<String>,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.load(&[("app.outbox.cleanup.retentionDays", args.retention_days.as_ref())])?.settings;
    let mut connection = context::migrated(&settings, "cleanup").await?;
    let started = Instant::now();
    let mut progress = Progress::start();
    let outbox = context::repository(&settings);
    let cleaned = cleanup::run_once(&outbox, &mut connection, &settings, |cleaned| {
        progress.tell(|| format!("deleted {} so far", plural(cleaned.events, "event")));
    })
    .await;
    progress.clear();
    let cleaned = cleaned?;
    // What was deleted is told even if Redis is down.
    let trimmed = trim(&settings, &mut connection, context).await;
    let removed = trimmed.as_ref().ok().and_then(|trimmed| trimmed.as_ref()).map(|streams| streams.trimmed);
    if context.output.json {
        let streams = removed.map(|Trimmed { acknowledged, unread }| json!({ "acknowledged": acknowledged, "unread": unread }));
        let Cleaned { events, batches, inbox, days } = &cleaned;
        let mut result = json!({ "events": events, "batches": batches, "inbox": inbox, "streams": streams });
        if let Some(days) = days {
            result["partitions"] = days::json(days);
        }
        context.output.json(&result)?;
    } else {
        context.output.line(&describe(&cleaned, settings.outbox.cleanup.retention_days, started.elapsed()))?;
        cleaned.days.iter().try_for_each(|days| days::tell(&context.output, days))?;
        removed.map(describe_trimmed).map_or(Ok(()), |line| context.output.line(&line))?;
    }
    let has_failed = trimmed?.is_some_and(|streams| streams.has_failed) || cleaned.days.is_some_and(|days| days.postponed);
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What came of all streams together.
#[derive(Default)]
struct TrimmedStreams {
    trimmed: Trimmed,
    has_failed: bool,
}

/// `None` where no Redis is set.
async fn trim(settings: &Settings, connection: &mut PgConnection, context: &Context) -> anyhow::Result<Option<TrimmedStreams>> {
    let Some(url) = &settings.redis.url else { return Ok(None) };
    let streams = Streams::new(url, &settings.redis)?;
    let mut all = TrimmedStreams::default();
    let mut failures = Vec::new();
    let outbox = context::repository(settings);
    cleanup::trim(&outbox, connection, &streams, &settings.streams, |stream, trimmed| match trimmed {
        Ok(Trimmed { acknowledged, unread }) => {
            all.trimmed.acknowledged += acknowledged;
            all.trimmed.unread += unread;
        }
        Err(error) => failures.push(format!("cannot trim {}: {}", printable(stream), on_one_line(&error.into()))),
    })
    .await?;
    all.has_failed = !failures.is_empty();
    failures.iter().try_for_each(|failure| context.output.remark(failure))?;
    Ok(Some(all))
}

fn describe(cleaned: &Cleaned, retention_days: u32, took: Duration) -> String {
    let ago = match retention_days {
        0 => String::new(),
        days => format!(" more than {} ago", plural(u64::from(days), "day")),
    };
    match *cleaned {
        Cleaned { events: 0, batches: 0, inbox: 0, days: None } => format!("nothing to delete: no event was published{ago}"),
        Cleaned { events: 0, batches: 0, inbox: 0, days: Some(_) } => {
            format!("nothing to delete but partitions: no event of event_outbox_rest was published{ago}")
        }
        Cleaned { events, batches, inbox, .. } => {
            let were = if events == 1 { "was" } else { "were" };
            let (events, batches, inbox) = (plural(events, "event"), plural(batches, "journal row"), plural(inbox, "inbox row"));
            format!("deleted {events} that {were} published{ago}, {batches} and {inbox}, in {}", age(took))
        }
    }
}

fn describe_trimmed(trimmed: Trimmed) -> String {
    match trimmed {
        Trimmed { acknowledged: 0, unread: 0 } => "nothing to trim in the streams".into(),
        Trimmed { acknowledged, unread: 0 } => {
            format!("trimmed {} that every consumer group had acknowledged", plural(acknowledged, "stream entry"))
        }
        Trimmed { acknowledged, unread } => {
            let (acknowledged, unread) = (plural(acknowledged, "stream entry"), plural(unread, "entry"));
            format!("trimmed {acknowledged} that every consumer group had acknowledged, and {unread} that not every group had")
        }
    }
}
