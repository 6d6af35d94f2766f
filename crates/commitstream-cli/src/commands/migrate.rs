//! `commitstream migrate`

use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::json;

use crate::context::{self, Context};

/// Create or update the outbox tables
///
/// Applies migrations/V3__create_outbox_table.sql in one transaction: the table event_outbox, its journal and its trigger.
/// It may be run any number of times, also by several processes at once, and beside existing data. Tables that Flyway or psql
/// created from the same file are recognised.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  DATABASE_URL=postgres://app:secret@localhost/app commitstream migrate")]
pub struct Args {}

pub async fn run(_args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let mut connection = context::postgres(&settings, "migrate").await?;
    let migrated = context::repository(&settings).migrate(&mut connection).await.context("nothing was changed")?;
    if context.output.json {
        context.output.json(&json!({ "from": migrated.from, "to": migrated.to }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let schema = &settings.database.schema;
    let text = match migrated.from {
        None => format!("created the outbox tables in schema {schema}, version {}", migrated.to),
        Some(from) if from >= migrated.to => format!("nothing to do: version {from} is in force in schema {schema}"),
        Some(from) => format!("updated the outbox tables in schema {schema} from version {from} to version {}", migrated.to),
    };
    context.output.line(&text)?;
    Ok(ExitCode::SUCCESS)
}
