//! `commitstream migrate`

use std::process::ExitCode;

use anyhow::Context as _;
use commitstream::outbox::OutboxRepository;
use commitstream::relay::days::{self, DaysChanged};
use serde_json::json;
use sqlx::PgConnection;

use crate::commands::days as of_days;
use crate::context::{self, Context};
use crate::output::plural;

/// Create or update the outbox tables
///
/// Applies the files of migrations/ that are missing, in one transaction: the table event_outbox, its journal, its trigger and
/// what came later. It may be run any number of times, also by several processes at once, and beside existing data. Tables that
/// Flyway or psql created from the same files are recognised.
///
/// With --partitioned, event_outbox has a partition for each day, and clean-up drops those that are old instead of deleting
/// rows: for many millions of events a day. A table that has rows is converted as it is. Producers wait until it has been read
/// once; relays go on by themselves. It stays partitioned whatever later runs say.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  DATABASE_URL=postgres://app:secret@localhost/app commitstream migrate
  commitstream migrate --partitioned")]
pub struct Args {
    /// Partition event_outbox by day
    #[arg(long)]
    partitioned: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let mut connection = context::postgres(&settings, "migrate").await?;
    let outbox = context::repository(&settings);
    let migrated = outbox.migrate(&mut connection).await.context("nothing was changed")?;
    let copied = if args.partitioned { partition(&outbox, &mut connection, context).await? } else { None };
    let days = days::make_ahead(&outbox, &mut connection).await?;
    if context.output.json {
        let mut result = json!({ "from": migrated.from, "to": migrated.to });
        if let Some(days) = &days {
            result["partitioned"] = copied.is_some().into();
            result["partitions"] = of_days::json(days);
        }
        context.output.json(&result)?;
        return Ok(exit_code(days.as_ref()));
    }
    let schema = &settings.database.schema;
    let text = match migrated.from {
        None => format!("created the outbox tables in schema {schema}, version {}", migrated.to),
        Some(from) if from >= migrated.to => format!("nothing to do: version {from} is in force in schema {schema}"),
        Some(from) => format!("updated the outbox tables in schema {schema} from version {from} to version {}", migrated.to),
    };
    context.output.line(&text)?;
    match copied {
        None => {}
        Some(0) => context.output.line("partitioned event_outbox by day (UTC)")?,
        Some(copied) => {
            let copied = plural(copied, "event");
            context.output.line(&format!(
                "partitioned event_outbox by day (UTC); {copied} with ids of other days or kinds went to event_outbox_rest"
            ))?;
        }
    }
    days.iter().try_for_each(|days| of_days::tell(&context.output, days))?;
    Ok(exit_code(days.as_ref()))
}

/// How many events were copied, or `None` when it was partitioned before.
async fn partition(outbox: &OutboxRepository, connection: &mut PgConnection, context: &Context) -> anyhow::Result<Option<u64>> {
    if outbox.missing_days(connection).await?.is_none() {
        context.output.remark("partitioning event_outbox; producers wait until it is done")?;
    }
    outbox.partition_by_day(connection).await.context("event_outbox was not partitioned")
}

fn exit_code(days: Option<&DaysChanged>) -> ExitCode {
    if days.is_some_and(|days| days.postponed) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
