//! `commitstream migrate`

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use commitstream::outbox::{MigrationProgress, OutboxError};
use commitstream::relay::days::{self, DaysChanged};
use serde_json::json;

use crate::commands::days as of_days;
use crate::context::{self, Context};
use crate::output::plural;

/// Create or update the outbox tables
///
/// Applies the files of migrations/ that are missing, in one transaction: the table event_outbox, its journal, its trigger and
/// what came later. It may be run any number of times, also by several processes at once, and beside existing data. Tables that
/// Flyway or psql created from the same files are recognised.
///
/// Where somebody reads the tables for long (a backup, a report), it tries for a moment each second, so that producers do not wait behind
/// it, up to --wait. Indexes of a table that is there already are built afterwards, while producers go on.
///
/// With --partitioned, event_outbox has a partition for each day, and clean-up drops those that are old instead of deleting
/// rows: for many millions of events a day. A table that has rows is converted as it is. Producers wait until it has been read
/// once; relays go on by themselves. It stays partitioned whatever later runs say.
///
/// With --two-phase, the table takes events of transactions that are committed in two phases (XA, JTA, PREPARE TRANSACTION): its
/// trigger no longer wakes relays, so events wait for their next look (pollInterval). --one-phase undoes that.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  DATABASE_URL=postgres://app:secret@localhost/app commitstream migrate
  commitstream migrate --wait 3600                       a backup may run for up to an hour
  commitstream migrate --partitioned
  commitstream migrate --two-phase")]
pub struct Args {
    /// Partition event_outbox by day
    #[arg(long)]
    partitioned: bool,

    /// Let producers commit in two phases; the trigger no longer wakes relays
    #[arg(long, conflicts_with = "one_phase")]
    two_phase: bool,

    /// Undo --two-phase: the trigger wakes relays
    #[arg(long)]
    one_phase: bool,

    /// Longest to wait for tables that are in use, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=604_800))]
    wait: u64,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let mut connection = context::own_session(&settings, "migrate").await?;
    let outbox = context::repository(&settings);
    let wait = Duration::from_secs(args.wait);
    let (output, mut last) = (&context.output, None);
    let mut report = |progress: MigrationProgress| {
        if last.as_ref() != Some(&progress) {
            // Nobody may be there to read it.
            output.remark(&describe(&progress)).ok();
        }
        last = Some(progress);
    };
    let migrated = match outbox.migrate_within(&mut connection, wait, &mut report).await {
        Err(error @ OutboxError::IndexesMissing(_)) => return Err(error.into()),
        migrated => migrated.context("nothing was changed")?,
    };
    let copied = if args.partitioned {
        if outbox.missing_days(&mut connection).await?.is_none() {
            output.remark("partitioning event_outbox; producers wait until it is done")?;
        }
        let partitioned = outbox.partition_by_day_within(&mut connection, wait, &mut report).await;
        partitioned.context("event_outbox was not partitioned")?
    } else {
        None
    };
    let phases = (args.two_phase || args.one_phase).then_some(args.two_phase);
    if let Some(two_phase) = phases {
        let set = outbox.set_two_phase(&mut connection, two_phase, wait, &mut report).await;
        set.context("the insert trigger was left as it was")?;
    }
    let days = days::make_ahead(&outbox, &mut connection).await?;
    if context.output.json {
        let mut result = json!({ "from": migrated.from, "to": migrated.to });
        if let Some(days) = &days {
            result["partitioned"] = copied.is_some().into();
            result["partitions"] = of_days::json(days);
        }
        if let Some(two_phase) = phases {
            result["two_phase"] = two_phase.into();
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
    match phases {
        None => {}
        Some(true) => {
            context.output.line("producers may commit in two phases; events wait for the next look of a relay (pollInterval)")?
        }
        Some(false) => {
            context.output.line("the insert trigger wakes relays; no transaction that wrote an event can be prepared")?
        }
    }
    days.iter().try_for_each(|days| of_days::tell(&context.output, days))?;
    Ok(exit_code(days.as_ref()))
}

fn describe(progress: &MigrationProgress) -> String {
    match progress {
        MigrationProgress::Waiting { holder: Some(holder) } => {
            format!("event_outbox is in use by {holder}; trying again until it is free, while producers go on")
        }
        MigrationProgress::Building { index } => format!("building the index {index}, while producers go on"),
        _ => "the outbox tables are in use; trying again until they are free, while producers go on".to_owned(),
    }
}

fn exit_code(days: Option<&DaysChanged>) -> ExitCode {
    if days.is_some_and(|days| days.postponed) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
