//! What is known about events that something is wrong with.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader};

use anyhow::Result;
use uuid::Uuid;

use crate::RELAYS;
use crate::judge::Judgement;
use crate::relay::Role;
use crate::world::World;

/// Events of each kind of fault that are looked into.
const NAMED: usize = 5;
const LOG_LINES: usize = 40;
const PAGE: usize = 5_000;

/// The row, the entries and the journal of the first few events of each kind.
pub async fn collect(world: &World, judgement: &Judgement) -> Result<String> {
    let named = judgement.faulty.kinds().map(|(kind, events)| (kind, events.len(), &events[..events.len().min(NAMED)]));
    let mut places: HashMap<Uuid, Vec<String>> =
        named.iter().flat_map(|(_, _, events)| events.iter().map(|id| (*id, Vec::new()))).collect();
    find(world, &mut places).await?;
    let mut text = String::new();
    for (kind, count, events) in named.into_iter().filter(|(_, count, _)| *count > 0) {
        writeln!(text, "{count} {kind}:")?;
        for id in events {
            writeln!(text, "  {id}")?;
            for line in rows(world, *id).await?.iter().chain(places.get(id).into_iter().flatten()) {
                writeln!(text, "    {line}")?;
            }
        }
    }
    Ok(text)
}

/// The event's row, and the journal rows that name it, with its place in the batch.
async fn rows(world: &World, id: Uuid) -> Result<Vec<String>> {
    let sql = "SELECT format('outbox %s', to_jsonb(e)) FROM event_outbox e WHERE id = $1
               UNION ALL
               SELECT format('batch %s, event %s of %s', to_jsonb(b) - 'event_ids', array_position(event_ids, $1), cardinality(event_ids))
               FROM (SELECT * FROM outbox_batch WHERE $1 = ANY (event_ids) ORDER BY claimed_at) b";
    Ok(sqlx::query_scalar(sql).bind(id).fetch_all(&mut world.connect().await?).await?)
}

/// Where these events stand: stream, entry id, position from the beginning, and what of the aggregate stands before.
async fn find(world: &World, places: &mut HashMap<Uuid, Vec<String>>) -> Result<()> {
    let streams = world.streams()?;
    for stream in streams.list().await? {
        let (mut after, mut position) = ("0".to_owned(), 0_u64);
        let mut before: BTreeMap<String, String> = BTreeMap::new();
        loop {
            let page = streams.range(&stream, &after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.id);
            for entry in page {
                position += 1;
                let field = |name| entry.field(name).unwrap_or_default();
                let payload = field("payload").to_owned();
                let previous = before.insert(field("aggregate_id").to_owned(), format!("{payload} at {}", entry.id));
                if let Some(found) = field("id").parse().ok().and_then(|id| places.get_mut(&id)) {
                    let previous = previous.unwrap_or_else(|| "nothing".to_owned());
                    found.push(format!("entry {stream} {} (number {position}) {payload} after {previous}", entry.id));
                }
            }
        }
    }
    Ok(())
}

/// The end of each log of a relay or consumer.
pub fn tails_of_logs(world: &World) -> Result<String> {
    let mut text = String::new();
    for number in 0..world.links.len() {
        let name = if number < RELAYS { Role::Relay.name() } else { Role::Consumer.name() };
        // One that was never started has none.
        let Ok(log) = File::open(world.directory.join(format!("{name}-{number}/log"))) else { continue };
        let mut tail = VecDeque::new();
        for line in BufReader::new(log).lines() {
            tail.push_back(line?);
            if tail.len() > LOG_LINES {
                tail.pop_front();
            }
        }
        writeln!(text, "{name} {number}, last lines:")?;
        for line in tail {
            writeln!(text, "  {line}")?;
        }
    }
    Ok(text)
}
