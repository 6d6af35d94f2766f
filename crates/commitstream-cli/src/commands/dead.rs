//! `commitstream dead list|retry|discard`

mod select;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use chrono::Utc;
use clap::ArgGroup;
use commitstream::config::Settings;
use commitstream::outbox::OutboxRepository;
use commitstream::streams::{DeadLetter, Streams};
use serde_json::json;
use sqlx::PgConnection;

use super::failed::agrees;
use crate::context::{self, Context};
use crate::dead_letters::{Audit, Change, carry_out, position};
use crate::failure::WrongUse;
use crate::output::{Table, age, plural};

use select::{Filter, Id, visit, visit_all};

/// List, retry or discard what consumers gave up
///
/// An event is a dead letter when a consumer group failed to handle it as often as maxDeliveries allows. Other groups are not
/// concerned. It keeps the event and the history of its failures until somebody decides what becomes of it. Where DATABASE_URL is set, the
/// audit says who that was. Exit code 1 when it could not be done for every dead letter that was meant.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream dead list
  commitstream dead retry --all --group mail
  commitstream dead discard user/1769860800000-0")]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List dead letters, oldest first
    #[command(after_help = "\
Examples:
  commitstream dead list --group mail --type UserCreated
  commitstream dead list --json | jq '.[] | {reason, history}'")]
    List {
        #[command(flatten)]
        filter: Filter,
        /// Most dead letters to list
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        limit: u32,
    },
    /// Deliver dead letters to their group again, and to no other, with all their attempts
    #[command(after_help = "\
Examples:
  commitstream dead retry user/1769860800000-0
  commitstream dead retry 0190b8a4-5c1e-7c3a-9c53-0d8f6a1f2b3c --group mail
  commitstream dead retry --all --group mail")]
    Retry(Which),
    /// Delete dead letters for good
    #[command(after_help = "\
Examples:
  commitstream dead discard user/1769860800000-0
  commitstream dead discard --all --group mail --type MetricUpdated --yes")]
    Discard(Which),
}

#[derive(clap::Args)]
#[command(group(ArgGroup::new("which").required(true).args(["ids", "all"])))]
struct Which {
    /// Ids as `dead list` shows them, such as user/1769860800000-0, or ids of events
    #[arg(value_name = "ID")]
    ids: Vec<Id>,
    /// All dead letters
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    /// With --all: do not ask
    #[arg(long, short)]
    yes: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    match args.action {
        Action::List { filter, limit } => list(context, &filter, usize::try_from(limit)?).await,
        Action::Retry(which) => change(context, &which, Change::Retry).await,
        Action::Discard(which) => change(context, &which, Change::Discard).await,
    }
}

async fn list(context: &Context, filter: &Filter, limit: usize) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let streams = context::redis(&settings).await?;
    let mut letters = Vec::new();
    for stream in streams.dead_streams().await? {
        // One more than asked for tells whether there are more.
        let most = letters.len() + limit + 1;
        let take = async |letter| {
            letters.push(letter);
            Ok(letters.len() < most)
        };
        visit(&streams, &stream, filter, take).await?;
    }
    letters.sort_by_key(|letter| position(&letter.dead_id));
    let has_more = letters.len() > limit;
    letters.truncate(limit);
    let output = &context.output;
    if output.json {
        output.json(&letters)?;
    } else if letters.is_empty() {
        let which = if filter.is_empty() { "no consumer has given up an event" } else { "none matches" };
        output.line(&format!("no dead letters: {which}"))?;
    } else {
        let mut table = Table::new(&["ID", "GROUP", "TYPE", "AGGREGATE", "ATTEMPTS", "AGE", "REASON"]);
        letters.iter().for_each(|letter| table.row(cells(letter, &settings.redis.stream_prefix)));
        output.write(&table.render(output))?;
        if has_more {
            output.line("and more, which --limit shows")?;
        }
        output.line("\nWhen the cause is mended: `commitstream dead retry --all`.")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How a dead letter is named: its aggregate type and its own id.
fn name_of(letter: &DeadLetter, prefix: &str) -> String {
    format!("{}/{}", letter.stream.strip_prefix(prefix).unwrap_or(&letter.stream), letter.dead_id)
}

fn cells(letter: &DeadLetter, prefix: &str) -> [String; 7] {
    let text = |field: &Option<String>| field.clone().unwrap_or_else(|| "?".to_owned());
    let since = letter.dead_at.and_then(|time| (Utc::now() - time).to_std().ok());
    [
        name_of(letter, prefix),
        letter.group.clone(),
        text(&letter.event_type),
        format!("{} {}", text(&letter.aggregate_type), text(&letter.aggregate_id)),
        letter.attempts.to_string(),
        age(since.unwrap_or(Duration::ZERO)),
        letter.reason.clone(),
    ]
}

async fn change(context: &Context, which: &Which, change: Change) -> anyhow::Result<ExitCode> {
    if change == Change::Discard && which.all && !which.yes && !io::stdin().is_terminal() {
        let message = "discard --all deletes dead letters for good, and there is no terminal to ask on";
        let hint = "give --yes if that is what you mean; `commitstream dead list` shows what would go";
        return Err(WrongUse::with_hint(message, hint).into());
    }
    let settings = context.settings()?;
    let streams = context::redis(&settings).await?;
    let prefix = &settings.redis.stream_prefix;
    if which.all && !which.yes && io::stdin().is_terminal() && !confirmed(&streams, &which.filter, change).await? {
        context.output.remark("nothing was changed")?;
        return Ok(ExitCode::FAILURE);
    }
    let mut work = Work { change, context, streams: &streams, prefix, audit: audit(&settings).await?, changed: 0, left: 0 };
    if which.all {
        let mut letters = Vec::new();
        let collect = async |letter| {
            letters.push(letter);
            if letters.len() == AT_ONCE {
                work.act(&letters).await?;
                letters.clear();
            }
            Ok(true)
        };
        visit_all(&streams, &which.filter, collect).await?;
        work.act(&letters).await?;
    } else {
        let (letters, missing) = select::named(&streams, prefix, &which.ids, &which.filter).await?;
        for letters in letters.chunks(AT_ONCE) {
            work.act(letters).await?;
        }
        for id in missing {
            context.output.remark(&format!("{id}: there is no dead letter with this id"))?;
            work.left += 1;
        }
    }
    let Work { changed, left, audit, .. } = work;
    if changed > 0 && audit.is_none() {
        context.output.remark("this is not written down: the audit is in PostgreSQL, and no DATABASE_URL is set")?;
    }
    if context.output.json {
        context.output.json(&json!({ "changed": changed }))?;
    } else if changed > 0 || left == 0 {
        context.output.line(&outcome(change, changed))?;
    }
    Ok(if left > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The audit is in PostgreSQL, which consumers and this command can do without.
async fn audit(settings: &Settings) -> anyhow::Result<Option<(OutboxRepository, PgConnection)>> {
    if settings.database.url.is_none() {
        return Ok(None);
    }
    Ok(Some((context::repository(settings), context::migrated(settings, "dead").await?)))
}

/// Dead letters that have one row of the audit together.
const AT_ONCE: usize = 500;

struct Work<'a> {
    change: Change,
    context: &'a Context,
    streams: &'a Streams,
    prefix: &'a str,
    audit: Option<(OutboxRepository, PgConnection)>,
    changed: u64,
    /// Meant, but not there or left as they are.
    left: u64,
}

impl Work<'_> {
    async fn act(&mut self, letters: &[DeadLetter]) -> anyhow::Result<()> {
        let who = context::operator();
        let audit = self.audit.as_mut().map(|(outbox, connection)| Audit { outbox, connection, who: &who });
        let left = carry_out(self.streams, audit, self.change, letters).await?;
        self.changed += u64::try_from(letters.len() - left.len())?;
        self.left += u64::try_from(left.len())?;
        for (letter, why) in left {
            self.context.output.remark(&format!("{}: {why}", name_of(letter, self.prefix)))?;
        }
        Ok(())
    }
}

fn outcome(change: Change, changed: u64) -> String {
    let letters = plural(changed, "dead letter");
    match (change, changed) {
        (_, 0) => "nothing to do: no dead letter matches".to_owned(),
        (Change::Retry, _) => {
            format!("{letters} delivered again, to the same group only: a running consumer takes over within about a second")
        }
        (Change::Discard, _) => format!("{letters} deleted"),
    }
}

/// How many dead letters are counted one by one before the question says "more than".
const COUNTED: u64 = 10_000;

/// Shows the count and asks.
async fn confirmed(streams: &Streams, filter: &Filter, change: Change) -> anyhow::Result<bool> {
    let mut found = 0;
    let count = async |_| {
        found += 1;
        Ok(found <= COUNTED)
    };
    visit_all(streams, filter, count).await?;
    let found = match found {
        0 => return Ok(true),
        more if more > COUNTED => format!("more than {}", plural(COUNTED, "dead letter")),
        found => plural(found, "dead letter"),
    };
    agrees(match change {
        Change::Retry => format!("Retry {found}? [y/N] "),
        Change::Discard => format!("Delete {found} for good? [y/N] "),
    })
    .await
}
