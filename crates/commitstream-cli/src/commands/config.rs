//! `commitstream config`

use std::process::ExitCode;

use commitstream::config::Source;
use serde_json::{Map, Value, json};

use crate::context::Context;
use crate::output::Table;

/// Show the settings in force, and where each comes from
///
/// Later sources win: the default, the settings file, the environment, the command line. Passwords are not shown.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream config
  commitstream config --config /etc/commitstream/application.conf
  commitstream config --json | jq '.\"app.outbox.processor.batchSize\"'")]
pub struct Args {}

pub async fn run(_args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let entries = context.load(&[])?.entries();
    if context.output.json {
        let entry = |value: Option<String>, source: &Source| json!({ "value": value, "source": kind_of(source) });
        let all: Map<String, Value> = entries.into_iter().map(|e| (e.key, entry(e.value, &e.source))).collect();
        context.output.json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["SETTING", "VALUE", "FROM", "ENVIRONMENT VARIABLE"]);
    for entry in entries {
        let from = match &entry.source {
            Source::Default => "default".to_owned(),
            Source::File { .. } => entry.source.to_string(),
            Source::Environment(_) => "environment".to_owned(),
            Source::Flag => "command line".to_owned(),
        };
        let value = entry.value.unwrap_or_else(|| "(not set)".to_owned());
        table.row([entry.key, value, from, entry.env.unwrap_or("").to_owned()]);
    }
    context.output.write(&table.render(&context.output))?;
    Ok(ExitCode::SUCCESS)
}

/// Where a value came from, in one word for programs.
fn kind_of(source: &Source) -> &'static str {
    match source {
        Source::Default => "default",
        Source::File { .. } => "file",
        Source::Environment(_) => "environment",
        Source::Flag => "flag",
    }
}
