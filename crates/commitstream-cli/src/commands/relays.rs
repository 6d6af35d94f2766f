//! `commitstream relays`

use std::process::ExitCode;
use std::time::Duration;

use commitstream::outbox::RelayRow;

use crate::context::{self, Context};
use crate::output::{Table, age, count, plural, printable};

/// List the relays: where they run, their share of the work, and what they do
///
/// Relays that died are listed for an hour. A relay that cannot work says why.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream relays
  commitstream relays --json")]
pub struct Args {}

pub async fn run(_: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let mut connection = context::migrated(&settings, "relays").await?;
    let relays = context::repository(&settings).relays(&mut connection).await?;
    if context.output.json {
        context.output.json(&relays)?;
        return Ok(ExitCode::SUCCESS);
    }
    if relays.is_empty() {
        context.output.line("no relay runs: start one with `commitstream relay`")?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table =
        Table::new(&["HOST", "PID", "VERSION", "STATE", "PARTITIONS", "EVENTS/S", "PUBLISHED", "FAILED", "HEARTBEAT", "STARTED"]);
    relays.iter().for_each(|relay| table.row(cells(relay)));
    context.output.write(&table.render(&context.output))?;
    relays.iter().flat_map(remarks).try_for_each(|remark| context.output.line(&remark))?;
    let owned: i64 = relays.iter().filter(|relay| relay.alive).map(|relay| relay.partitions).sum();
    let free = PARTITIONS.saturating_sub(owned.unsigned_abs());
    if free > 0 {
        context.output.line(&format!("{} of {PARTITIONS} partitions have no living relay: their events wait", free))?;
    }
    Ok(ExitCode::SUCCESS)
}

const PARTITIONS: u64 = commitstream::outbox::PARTITIONS as u64;

/// What the table has no room for.
fn remarks(relay: &RelayRow) -> impl Iterator<Item = String> {
    let who = format!("{} {}", printable(&relay.host), relay.pid);
    let reason = relay.reason.as_ref().filter(|_| relay.alive).map(|why| format!("{who} cannot work: {}", printable(why)));
    let events = plural(relay.republished.unsigned_abs(), "event");
    let republished = (relay.republished > 0).then(|| format!("{who} published {events} again that Redis had lost"));
    reason.into_iter().chain(republished)
}

fn cells(relay: &RelayRow) -> [String; 10] {
    let time = |millis: i64| age(Duration::from_millis(millis.unsigned_abs()));
    [
        relay.host.clone(),
        relay.pid.to_string(),
        relay.version.clone(),
        relay.state.clone(),
        relay.partitions.to_string(),
        count(relay.events_per_second.round() as u64),
        count(relay.published.unsigned_abs()),
        count(relay.failed.unsigned_abs()),
        format!("{} ago", time(relay.heartbeat_age_ms)),
        format!("{} ago", time(relay.age_ms)),
    ]
}
