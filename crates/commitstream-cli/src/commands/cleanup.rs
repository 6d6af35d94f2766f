//! `commitstream cleanup`

use std::process::ExitCode;
use std::time::Instant;

use commitstream::relay::cleanup::{self, Cleaned};
use serde_json::json;

use crate::context::{self, Context};
use crate::output::{Progress, age, plural};

/// Delete events that were published or handled long ago
///
/// The relay does this by itself every hour (app.outbox.cleanup). What the inbox remembers of handled events has a retention of
/// its own (app.consumer.inboxRetentionDays). Deletes in small transactions that wait for nobody; it may be
/// stopped at any time, and run beside relays.
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
    if context.output.json {
        context.output.json(&json!({ "events": cleaned.events, "batches": cleaned.batches, "inbox": cleaned.inbox }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let ago = match settings.outbox.cleanup.retention_days {
        0 => String::new(),
        days => format!(" more than {} ago", plural(u64::from(days), "day")),
    };
    context.output.line(&match cleaned {
        Cleaned { events: 0, batches: 0, inbox: 0 } => format!("nothing to delete: no event was published{ago}"),
        Cleaned { events, batches, inbox } => {
            let were = if events == 1 { "was" } else { "were" };
            let (events, batches, inbox) = (plural(events, "event"), plural(batches, "journal row"), plural(inbox, "inbox row"));
            format!("deleted {events} that {were} published{ago}, {batches} and {inbox}, in {}", age(started.elapsed()))
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
