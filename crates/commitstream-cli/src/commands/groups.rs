//! `commitstream groups`

use std::process::ExitCode;
use std::time::Duration;

use commitstream::streams::{GroupConsumer, GroupInfo};

use super::tail::key_of;
use crate::context::{self, Context};
use crate::output::{Table, age, count, printable};

/// List the consumer groups: who reads, what is pending, how far behind they are
///
/// PENDING entries were delivered and are not acknowledged yet: a handler works on them, or they wait for another attempt. OLDEST says
/// how long ago the oldest of them was written. BEHIND is what was not delivered yet. DEAD is what the group gave up
/// (`commitstream dead list`).
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream groups
  commitstream groups user --consumers
  commitstream groups --json | jq '.[] | select(.behind > 1000)'")]
pub struct Args {
    /// Stream, such as events:user, or aggregate type, such as user [default: all]
    #[arg(value_name = "STREAM")]
    streams: Vec<String>,
    /// List the consumers of each group, too
    #[arg(long)]
    consumers: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let streams = context::redis(&settings).await?;
    let prefix = &settings.redis.stream_prefix;
    let named: Vec<String> = args.streams.iter().map(|name| key_of(&streams, prefix, name)).collect();
    let mut groups = Vec::new();
    for stream in if named.is_empty() { streams.list().await? } else { named } {
        groups.extend(streams.groups(&stream).await?);
    }
    let output = &context.output;
    if output.json {
        output.json(&groups)?;
        return Ok(ExitCode::SUCCESS);
    }
    if groups.is_empty() {
        let place = if args.streams.is_empty() { format!("under {prefix}*") } else { args.streams.join(", ") };
        output.line(&format!("no consumer group {}: a consumer makes its group when it starts", printable(&place)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["STREAM", "GROUP", "CONSUMERS", "PENDING", "OLDEST", "BEHIND", "DEAD"]);
    groups.iter().for_each(|group| table.row(cells(group)));
    output.write(&table.render(output))?;
    if args.consumers {
        let mut table = Table::new(&["STREAM", "GROUP", "CONSUMER", "STATE", "PENDING", "OLDEST", "IDLE"]);
        for group in &groups {
            group.consumers.iter().for_each(|consumer| table.row(consumer_cells(group, consumer)));
        }
        output.write(&format!("\n{}", table.render(output)))?;
    }
    groups.iter().filter_map(remark).try_for_each(|remark| output.line(&remark))?;
    Ok(ExitCode::SUCCESS)
}

/// Nothing happens in a group all of whose consumers are gone.
fn remark(group: &GroupInfo) -> Option<String> {
    let waits = group.pending > 0 || group.behind != Some(0);
    let named = format!("{} of {}", printable(&group.group), printable(&group.stream));
    (waits && group.is_deserted()).then(|| format!("{named} has no living consumer: its events wait"))
}

fn cells(group: &GroupInfo) -> [String; 7] {
    let (all, alive) = (group.processes().count(), group.processes().filter(|consumer| consumer.alive == Some(true)).count());
    // Those of other libraries do not report.
    let nobody_reports = group.processes().all(|consumer| consumer.alive.is_none());
    let consumers = if nobody_reports || alive == all { all.to_string() } else { format!("{alive} of {all} alive") };
    let counted = |number: Option<u64>| number.map_or_else(|| format!("over {}", count(GroupInfo::COUNTED as u64)), count);
    [
        group.stream.clone(),
        group.group.clone(),
        consumers,
        count(group.pending),
        since(group.oldest_pending_age_ms),
        counted(group.behind),
        counted(group.dead),
    ]
}

fn consumer_cells(group: &GroupInfo, consumer: &GroupConsumer) -> [String; 7] {
    let state = match consumer.alive {
        Some(true) => "alive",
        Some(false) => "gone",
        None if consumer.is_returned() => "to be taken over",
        None => "unknown",
    };
    [
        group.stream.clone(),
        group.group.clone(),
        consumer.name.clone(),
        state.to_owned(),
        count(consumer.pending),
        since(consumer.oldest_pending_age_ms),
        age(Duration::from_millis(consumer.idle_ms)),
    ]
}

fn since(millis: Option<u64>) -> String {
    millis.map_or_else(|| "-".to_owned(), |millis| format!("{} ago", age(Duration::from_millis(millis))))
}
