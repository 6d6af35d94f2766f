//! `commitstream failed list|retry|discard`

use std::collections::HashSet;
use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use clap::ArgGroup;
use commitstream::outbox::{self, Counted, Deed, FailureFilter, FailurePlace, OutboxRepository, Remedy, Selection, Snapshot};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::stats::failures;
use crate::context::{self, Context};
use crate::failure::WrongUse;
use crate::output::plural;

/// List, retry or discard events that failed
///
/// An event is FAILED when Redis refused it more often than maxRetries allows. It stays in the table, with the last error,
/// until somebody decides what becomes of it. Exit code 1 when it could not be done for every event that was named.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream failed list
  commitstream failed retry --all
  commitstream failed discard 0190b8a4-5c1e-7c3a-9c53-0d8f6a1f2b3c")]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List failed events, newest first
    #[command(after_help = "\
Examples:
  commitstream failed list --type UserCreated --limit 100
  commitstream failed list --json | jq -r '.[].id'")]
    List {
        /// Only events of this type
        #[arg(long = "type", value_name = "EVENT_TYPE", visible_alias = "event-type")]
        event_type: Option<String>,
        /// Most events to list
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        limit: u32,
    },
    /// Make failed events PENDING again, with all their attempts
    #[command(after_help = "\
Examples:
  commitstream failed retry 0190b8a4-5c1e-7c3a-9c53-0d8f6a1f2b3c
  commitstream failed retry --all --type UserCreated")]
    Retry(Which),
    /// Delete failed events for good
    #[command(after_help = "\
Examples:
  commitstream failed discard 0190b8a4-5c1e-7c3a-9c53-0d8f6a1f2b3c
  commitstream failed discard --all --type MetricUpdated --yes")]
    Discard(Which),
}

#[derive(clap::Args)]
#[command(group(ArgGroup::new("which").required(true).args(["ids", "all"])))]
struct Which {
    /// Ids of the events
    #[arg(value_name = "ID", value_parser = event_id)]
    ids: Vec<Uuid>,
    /// All failed events
    #[arg(long)]
    all: bool,
    /// With --all: only events of this type
    #[arg(long = "type", value_name = "EVENT_TYPE", visible_alias = "event-type", requires = "all")]
    event_type: Option<String>,
    /// With --all: do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Which {
    fn filter(&self) -> FailureFilter {
        FailureFilter { event_type: self.event_type.clone(), cause: None }
    }
}

fn event_id(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|_| "an id is a UUID, as `commitstream failed list` shows it".to_owned())
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    match args.action {
        Action::List { event_type, limit } => list(context, Selection::All { event_type }, limit).await,
        Action::Retry(which) => change(context, &which, Remedy::Retry).await,
        Action::Discard(which) => change(context, &which, Remedy::Discard).await,
    }
}

async fn list(context: &Context, selection: Selection, limit: u32) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let mut connection = context::migrated(&settings, "failed").await?;
    // One more than asked for tells whether there are more.
    let mut transaction = outbox::begin_reading(&mut connection).await?;
    let mut events = context::repository(&settings).failed(&mut transaction, &selection, i64::from(limit) + 1).await?;
    transaction.commit().await?;
    let has_more = events.len() > usize::try_from(limit)?;
    events.truncate(usize::try_from(limit)?);
    let output = &context.output;
    if output.json {
        output.json(&events)?;
    } else if events.is_empty() {
        output.line("no failed events")?;
    } else {
        output.write(&failures(&events, output))?;
        if has_more {
            output.line("and more, which --limit shows")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn change(context: &Context, which: &Which, remedy: Remedy) -> anyhow::Result<ExitCode> {
    if remedy == Remedy::Discard && which.all && !which.yes && !io::stdin().is_terminal() {
        let message = "discard --all deletes events for good, and there is no terminal to ask on";
        return Err(WrongUse::with_hint(
            message,
            "give --yes if that is what you mean; `commitstream failed list` shows what would go",
        )
        .into());
    }
    let settings = context.settings()?;
    let outbox = context::repository(&settings);
    let mut connection = context::migrated(&settings, "failed").await?;
    let mut shown = None;
    if which.all && !which.yes && io::stdin().is_terminal() {
        let mut transaction = outbox::begin_reading(&mut connection).await?;
        let found = outbox.count_all_failed(&mut transaction, &which.filter()).await?;
        transaction.commit().await?;
        if !confirmed(found.events, remedy).await? {
            context.output.remark("nothing was changed")?;
            return Ok(ExitCode::FAILURE);
        }
        // What fails while the question stands is not meant.
        shown = Some(found.snapshot);
    }
    let missing = missing(&outbox, &mut connection, &which.ids).await?;
    let changed = apply(&outbox, &mut connection, which, remedy, shown.as_ref()).await?;
    for id in &missing {
        context.output.remark(&format!("{id}: there is no failed event with this id"))?;
    }
    if context.output.json {
        context.output.json(&json!({ "changed": changed }))?;
    } else {
        context.output.line(&outcome(remedy, changed))?;
    }
    // An id may be given twice.
    let named: HashSet<&Uuid> = which.ids.iter().collect();
    Ok(if changed < u64::try_from(named.len())? { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What is named at once, all that match in steps; each step is one transaction with its row in the audit. Returns how many were changed.
async fn apply(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    which: &Which,
    remedy: Remedy,
    shown: Option<&Snapshot>,
) -> anyhow::Result<u64> {
    let who = context::operator();
    if !which.all {
        let about = match which.ids.len() {
            1 => "one event".to_owned(),
            many => plural(u64::try_from(many)?, "event"),
        };
        let mut transaction = outbox::begin(connection).await?;
        let step = outbox.remedy_events(&mut transaction, Deed { who: &who, about: &about }, remedy, &which.ids).await?;
        transaction.commit().await?;
        return Ok(u64::try_from(step.changed)?);
    }
    let filter = which.filter();
    let about = filter.to_string();
    let (mut changed, mut place) = (0, Some(FailurePlace::default()));
    while let Some(from) = place {
        let deed = Deed { who: &who, about: &about };
        let mut transaction = outbox::begin(connection).await?;
        let step = outbox.remedy_step(&mut transaction, deed, remedy, &filter, &from, shown).await?;
        transaction.commit().await?;
        changed += u64::try_from(step.changed)?;
        place = step.next;
    }
    Ok(changed)
}

fn outcome(remedy: Remedy, changed: u64) -> String {
    let events = plural(changed, "event");
    match (remedy, changed) {
        (_, 0) => "nothing to do: no failed event matches".to_owned(),
        (Remedy::Retry, _) => format!("{events} made PENDING again: the relay publishes what can be published"),
        (Remedy::Discard, _) => format!("{events} deleted"),
    }
}

/// Those of the ids that no failed event has.
async fn missing(outbox: &OutboxRepository, connection: &mut PgConnection, ids: &[Uuid]) -> anyhow::Result<Vec<Uuid>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut transaction = outbox::begin_reading(connection).await?;
    let found = outbox.failed(&mut transaction, &Selection::Ids(ids.to_vec()), i64::try_from(ids.len())?).await?;
    transaction.commit().await?;
    let found: HashSet<Uuid> = found.into_iter().map(|event| event.id).collect();
    Ok(ids.iter().filter(|id| !found.contains(*id)).copied().collect())
}

/// Beyond so many events the question says "more than".
const COUNTED: u64 = 10_000;

/// Shows the count and asks.
async fn confirmed(found: Counted, remedy: Remedy) -> anyhow::Result<bool> {
    let found = match (u64::try_from(found.events)?, found.at_least) {
        (0, false) => return Ok(true),
        (more, _) if more > COUNTED => format!("more than {}", plural(COUNTED, "event")),
        (found, true) => format!("at least {}", plural(found, "event")),
        (found, false) => plural(found, "event"),
    };
    agrees(match remedy {
        Remedy::Retry => format!("Retry {found}? [y/N] "),
        Remedy::Discard => format!("Delete {found} for good? [y/N] "),
    })
    .await
}

/// Asks on the terminal.
pub async fn agrees(question: String) -> anyhow::Result<bool> {
    let answer = tokio::task::spawn_blocking(move || -> io::Result<String> {
        let mut stderr = io::stderr();
        stderr.write_all(question.as_bytes())?;
        stderr.flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok(answer)
    });
    Ok(matches!(answer.await??.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
