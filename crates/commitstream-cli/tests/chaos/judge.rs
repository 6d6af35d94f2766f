//! The verdict: what stands in the streams, against what is in the outbox and what the producers know.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use commitstream::config::Settings;
use commitstream::outbox::OutboxRepository;
use commitstream::streams::Streams;
use commitstream::verify;
use serde::Deserialize;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::history::Ledger;
use crate::world::{PREFIX, World};

/// Rows or entries of one page.
const PAGE: usize = 5_000;
/// Events that `verify` names of each kind of fault.
const NAMED: u32 = 5;

/// An event as the outbox has it.
#[derive(Debug)]
struct Event {
    published: bool,
    seen: bool,
}

/// Events that something is wrong with.
#[derive(Debug, Default)]
pub struct Faulty {
    pub lost: Vec<Uuid>,
    pub duplicated: Vec<Uuid>,
    pub out_of_order: Vec<Uuid>,
    /// In a stream, though rolled back or unknown.
    pub invented: Vec<Uuid>,
    /// In the outbox, and not published.
    pub unpublished: Vec<Uuid>,
    /// An attempt was counted, or an error was written down, though none of the faults is an event's.
    pub blamed: Vec<Uuid>,
    /// Not in the outbox, though its commit was confirmed, or another event of its transaction is.
    pub uncommitted: Vec<Uuid>,
}

impl Faulty {
    pub fn kinds(&self) -> [(&'static str, &[Uuid]); 7] {
        [
            ("lost", &self.lost),
            ("duplicated", &self.duplicated),
            ("out of order", &self.out_of_order),
            ("invented", &self.invented),
            ("unpublished", &self.unpublished),
            ("blamed for an outage", &self.blamed),
            ("missing in the outbox", &self.uncommitted),
        ]
    }
}

#[derive(Debug, Default)]
pub struct Judgement {
    pub events: u64,
    pub entries: u64,
    /// Commits without an answer that had been carried out.
    pub in_doubt_committed: u64,
    /// Events that relays found lost by Redis and published again.
    pub republished: u64,
    pub faulty: Faulty,
    /// Everything else that is wrong, one sentence each.
    pub findings: Vec<String>,
}

impl Judgement {
    pub fn is_clean(&self) -> bool {
        self.events > 0 && self.findings.is_empty() && self.faulty.kinds().iter().all(|(_, events)| events.is_empty())
    }
}

pub async fn judge(world: &World, ledger: &Ledger) -> Result<Judgement> {
    let mut connection = world.connect().await?;
    let mut judge = Judge::default();
    read_outbox(&mut connection, &mut judge).await?;
    judge.ledger(ledger);
    let streams = world.streams()?;
    for stream in streams.list().await? {
        let mut after = "0".to_owned();
        loop {
            let page = streams.range(&stream, &after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.id);
            for entry in &page {
                let field = |name| entry.field(name).unwrap_or_default();
                let id = field("id").parse().unwrap_or_default();
                judge.entry(&stream, id, (field("aggregate_type"), field("aggregate_id")), number(field("payload")));
            }
        }
    }
    let mut judgement = judge.finish();
    judgement.findings.extend(world.findings.all());
    judgement.findings.extend(miscounted(&mut connection).await?);
    judgement.findings.extend(verified(&mut connection, &streams, judgement.entries).await?);
    judgement.republished = republished(&mut connection).await?;
    Ok(judgement)
}

/// What `commitstream verify` finds, which knows nothing of the producers.
async fn verified(connection: &mut PgConnection, streams: &Streams, entries: u64) -> Result<Vec<String>> {
    let outbox = OutboxRepository::new(&Settings::default().database.schema);
    let report = verify::run(&outbox, connection, streams, NAMED, |_| {}).await?;
    let faults = report.faults();
    let faults = faults.into_iter().filter(|(_, findings)| findings.count > 0);
    let mut found: Vec<String> = faults.map(|(kind, findings)| format!("verify: {kind}: {findings:?}")).collect();
    let (open, unknown) = (report.open_batches, report.unknown);
    if report.entries != entries || open > 0 || unknown > 0 {
        found.push(format!(
            "verify: {open} open batches, {unknown} unknown of {} entries, of which {entries} were read",
            report.entries
        ));
    }
    Ok(found)
}

async fn republished(connection: &mut PgConnection) -> Result<u64> {
    let sql = "SELECT count(*) FROM outbox_batch b, unnest(event_ids[1:appended]) AS lost_id
               JOIN event_outbox e ON e.id = lost_id WHERE lost & (1::bigint << e.partition_no::int) <> 0";
    Ok(sqlx::query_scalar::<_, i64>(sql).fetch_one(connection).await?.unsigned_abs())
}

async fn read_outbox(connection: &mut PgConnection, judge: &mut Judge) -> Result<()> {
    let sql = "SELECT seq, id, status = 'PUBLISHED' AS published,
                      retry_count > 0 OR last_error IS NOT NULL OR status = 'FAILED' AS blamed
               FROM event_outbox WHERE seq > $1 ORDER BY seq LIMIT $2";
    let mut after = 0_i64;
    loop {
        let rows = sqlx::query(sql).bind(after).bind(PAGE as i64).fetch_all(&mut *connection).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = last.try_get("seq")?;
        for row in &rows {
            judge.event(row.try_get("id")?, row.try_get("published")?, row.try_get("blamed")?);
        }
    }
}

/// The producers' own table was written in the same transactions: both agree, and numbers have no gap.
async fn miscounted(connection: &mut PgConnection) -> Result<Option<String>> {
    let sql = "SELECT count(*) FROM aggregate a
               LEFT JOIN (SELECT aggregate_type, aggregate_id, count(*) AS events, max((payload->>'number')::bigint) AS last
                          FROM event_outbox GROUP BY 1, 2) e ON e.aggregate_type = a.type AND e.aggregate_id = a.id
               WHERE (a.events, a.events) IS DISTINCT FROM (COALESCE(e.events, 0), COALESCE(e.last, 0))";
    let miscounted: i64 = sqlx::query_scalar(sql).fetch_one(connection).await?;
    Ok((miscounted > 0).then(|| format!("{miscounted} aggregates have other events in the outbox than their producers counted")))
}

/// The number of an event within its aggregate.
pub fn number(payload: &str) -> i64 {
    #[derive(Deserialize)]
    struct Payload {
        number: i64,
    }
    serde_json::from_str(payload).map_or(0, |payload: Payload| payload.number)
}

/// Takes the outbox first, then the entries in the order of their streams.
#[derive(Default)]
struct Judge {
    outbox: HashMap<Uuid, Event>,
    /// Last number of each aggregate.
    last: HashMap<String, i64>,
    judgement: Judgement,
}

impl Judge {
    fn event(&mut self, id: Uuid, published: bool, blamed: bool) {
        self.judgement.events += 1;
        self.outbox.insert(id, Event { published, seen: false });
        if !published {
            self.judgement.faulty.unpublished.push(id);
        }
        if blamed {
            self.judgement.faulty.blamed.push(id);
        }
    }

    fn ledger(&mut self, ledger: &Ledger) {
        let Judgement { faulty, in_doubt_committed, findings, .. } = &mut self.judgement;
        let missing = |id: &&Uuid| !self.outbox.contains_key(*id);
        for events in &ledger.committed {
            faulty.uncommitted.extend(events.iter().filter(missing));
        }
        for events in &ledger.in_doubt {
            let absent: Vec<Uuid> = events.iter().filter(missing).copied().collect();
            if absent.len() < events.len() {
                *in_doubt_committed += 1;
                faulty.uncommitted.extend(absent);
            }
        }
        let rolled_back: HashSet<_> = ledger.rolled_back.iter().flatten().collect();
        let there = rolled_back.iter().filter(|id| self.outbox.contains_key(**id)).count();
        if there > 0 {
            findings.push(format!("{there} events that were rolled back are in the outbox"));
        }
    }

    fn entry(&mut self, stream: &str, id: Uuid, aggregate: (&str, &str), number: i64) {
        let Judgement { entries, faulty, .. } = &mut self.judgement;
        *entries += 1;
        let (aggregate_type, aggregate_id) = aggregate;
        let in_its_stream = stream.strip_prefix(PREFIX) == Some(aggregate_type);
        let Some(event) = self.outbox.get_mut(&id).filter(|_| in_its_stream) else { return faulty.invented.push(id) };
        if std::mem::replace(&mut event.seen, true) {
            return faulty.duplicated.push(id);
        }
        let last = self.last.entry(format!("{aggregate_type}/{aggregate_id}")).or_default();
        if number <= *last {
            faulty.out_of_order.push(id);
        }
        *last = number.max(*last);
    }

    fn finish(mut self) -> Judgement {
        let lost = self.outbox.iter().filter(|(_, event)| event.published && !event.seen);
        self.judgement.faulty.lost.extend(lost.map(|(id, _)| id));
        self.judgement
    }
}

#[test]
fn each_kind_of_fault_is_found() {
    let [a, b, c, d, e] = [1, 2, 3, 4, 5].map(Uuid::from_u128);
    let ledger = Ledger { committed: vec![vec![a, b]], in_doubt: vec![vec![c, e]], rolled_back: vec![vec![d]] };
    let mut judge = Judge::default();
    for event in [a, b, c] {
        judge.event(event, event != c, event == c);
    }
    judge.ledger(&ledger);
    for (id, number) in [(c, 3), (a, 1), (a, 1), (d, 4)] {
        judge.entry("events:user", id, ("user", "7"), number);
    }
    let found = judge.finish();
    let expected: [&[Uuid]; 7] = [&[b], &[a], &[a], &[d], &[c], &[c], &[e]];
    assert_eq!(found.faulty.kinds().map(|(_, events)| events), expected);
    assert_eq!((found.entries, found.events, found.in_doubt_committed), (4, 3, 1));
}

#[test]
fn a_good_history_is_clean() {
    let mut judge = Judge::default();
    (1..=3).for_each(|n| judge.event(Uuid::from_u128(n), true, false));
    for (id, aggregate, number) in [(1, "7", 1), (3, "8", 1), (2, "7", 2)] {
        judge.entry("events:user", Uuid::from_u128(id), ("user", aggregate), number);
    }
    assert!(judge.finish().is_clean());
    assert!(!Judge::default().finish().is_clean(), "nothing at all proves nothing");
}
