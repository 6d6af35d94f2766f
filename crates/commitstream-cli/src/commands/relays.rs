//! `commitstream relays [pause|resume]`

use std::process::ExitCode;
use std::time::Duration;

use commitstream::outbox::{self, Pause, RelayRow};
use serde::Serialize;
use serde_json::json;

use crate::context::{self, Context};
use crate::output::{Output, Table, age, count, plural, printable};

/// List the relays: where they run, their share of the work, and what they do; pause and resume them
///
/// Relays that died are listed for an hour. A relay that cannot work says why. While they are paused it says by whom and since when.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream relays
  commitstream relays pause
  commitstream relays --json")]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Let all relays settle what is on its way and publish nothing more, until somebody resumes them
    ///
    /// Events wait in the outbox meanwhile, and none is lost. Relays that start later wait, too. The streams lane goes on.
    #[command(after_help = "Example:\n  commitstream relays pause")]
    Pause,
    /// Let the relays go on, at once
    #[command(after_help = "Example:\n  commitstream relays resume")]
    Resume,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    match args.action {
        None => list(context).await?,
        Some(action) => switch(context, &action).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A relay, and the pause that it keeps, for programs.
#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    relay: &'a RelayRow,
    pause: Option<&'a Pause>,
}

async fn list(context: &Context) -> anyhow::Result<()> {
    let settings = context.settings()?;
    let mut connection = context::migrated(&settings, "relays").await?;
    let outbox = context::repository(&settings);
    let mut transaction = outbox::begin_reading(&mut connection).await?;
    let (relays, pause) = (outbox.relays(&mut transaction).await?, outbox.paused(&mut transaction).await?);
    transaction.commit().await?;
    let output = &context.output;
    if output.json {
        return output.json(&relays.iter().map(|relay| Listed { relay, pause: pause.as_ref() }).collect::<Vec<_>>());
    }
    if relays.is_empty() {
        output.line("no relay runs: start one with `commitstream relay`")?;
    } else {
        output.write(&table(&relays, output))?;
        relays.iter().flat_map(remarks).try_for_each(|remark| output.line(&remark))?;
        let owned: i64 = relays.iter().filter(|relay| relay.alive).map(|relay| relay.partitions).sum();
        let free = PARTITIONS.saturating_sub(owned.unsigned_abs());
        if free > 0 {
            output.line(&format!("{free} of {PARTITIONS} partitions have no living relay: their events wait"))?;
        }
    }
    if let Some(pause) = &pause {
        output.line(&format!("paused {}: relays publish nothing until `commitstream relays resume`", by(pause)))?;
    }
    Ok(())
}

/// Done twice it changes nothing more.
async fn switch(context: &Context, action: &Action) -> anyhow::Result<()> {
    let settings = context.settings()?;
    let mut connection = context::migrated(&settings, "relays").await?;
    let outbox = context::repository(&settings);
    let who = context::operator();
    let mut transaction = outbox::begin(&mut connection).await?;
    let changed = match action {
        Action::Pause => outbox.pause(&mut transaction, &who).await?,
        Action::Resume => outbox.resume(&mut transaction, &who).await?,
    };
    let pause = outbox.paused(&mut transaction).await?;
    transaction.commit().await?;
    if context.output.json {
        return context.output.json(&json!({ "changed": changed, "pause": pause }));
    }
    let text = match (action, changed) {
        (Action::Pause, true) => {
            "paused: relays settle what is on its way, then events wait in the outbox until `commitstream relays resume`"
                .to_owned()
        }
        (Action::Pause, false) => {
            format!("nothing to do: already paused {}", pause.as_ref().map(by).unwrap_or_default())
        }
        (Action::Resume, true) => "resumed: relays publish what has waited".to_owned(),
        (Action::Resume, false) => "nothing to do: relays are not paused".to_owned(),
    };
    Ok(context.output.line(&text)?)
}

fn by(pause: &Pause) -> String {
    format!("by {} since {}", printable(&pause.who), pause.since.format("%Y-%m-%d %H:%M:%S UTC"))
}

fn table(relays: &[RelayRow], output: &Output) -> String {
    let mut table =
        Table::new(&["HOST", "PID", "VERSION", "STATE", "PARTITIONS", "EVENTS/S", "PUBLISHED", "FAILED", "HEARTBEAT", "STARTED"]);
    relays.iter().for_each(|relay| table.row(cells(relay)));
    table.render(output)
}

const PARTITIONS: u64 = commitstream::outbox::PARTITIONS as u64;

/// What the table has no room for.
fn remarks(relay: &RelayRow) -> impl Iterator<Item = String> {
    let who = format!("{} {}", printable(&relay.host), relay.pid);
    let says = match relay.state.as_str() {
        "unable" => "cannot work",
        "gone" => "said at last",
        _ => "says",
    };
    let reason = relay.reason.as_ref().map(|why| format!("{who} {says}: {}", printable(why)));
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
