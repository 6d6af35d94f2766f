//! A model of the table and its snapshots: whatever is drawn, committed and looked at in whatever order, every commit is found once, and
//! never behind a later event of a transaction that waited for it.

use std::collections::BTreeSet;

use chrono::Utc;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use super::*;
use crate::outbox::{Batch, Lease, OutboxEvent, Partitions};

#[derive(Clone)]
pub struct Row {
    pub seq: i64,
    pub xid: u64,
    pub kind: u8,
    pub mine: bool,
    pub pending: bool,
}

/// A PostgreSQL as far as it matters: `seq` is drawn before the transaction gets its id, and rows are visible by snapshot.
#[derive(Default)]
pub struct Table {
    pub rows: Vec<Row>,
    next_seq: i64,
    next_xid: u64,
    /// Transactions that have drawn a `seq` but no id yet, and what they will write.
    pub drawn: Vec<(i64, u8, bool)>,
    pub open: BTreeSet<u64>,
    pub rolled_back: BTreeSet<u64>,
}

#[derive(Clone)]
pub struct Snapshot {
    xmax: u64,
    open: BTreeSet<u64>,
}

impl Snapshot {
    fn text(&self) -> String {
        let open = self.open.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        format!("{}:{}:{open}", self.open.first().unwrap_or(&self.xmax), self.xmax)
    }

    fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, ':').skip(1);
        let xmax = parts.next().unwrap().parse().unwrap();
        Self { xmax, open: parts.next().unwrap().split(',').filter(|x| !x.is_empty()).map(|x| x.parse().unwrap()).collect() }
    }
}

impl Table {
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { xmax: self.next_xid, open: self.open.clone() }
    }

    pub fn sees(&self, snapshot: &Snapshot, xid: u64) -> bool {
        xid < snapshot.xmax && !snapshot.open.contains(&xid) && !self.rolled_back.contains(&xid)
    }

    pub fn draw(&mut self, kind: u8, mine: bool) {
        self.next_seq += 1;
        self.drawn.push((self.next_seq, kind, mine));
    }

    pub fn write(&mut self, at: usize) {
        let (seq, kind, mine) = self.drawn.swap_remove(at);
        self.open.insert(self.next_xid);
        self.rows.push(Row { seq, xid: self.next_xid, kind, mine, pending: true });
        self.next_xid += 1;
    }

    pub fn end(&mut self, xid: u64, commit: bool) {
        self.open.remove(&xid);
        if !commit {
            self.rolled_back.insert(xid);
        }
    }

    /// The claim's statement, as far as it finds rows.
    pub fn claim(&self, request: &ClaimRequest, in_flight: &BTreeSet<i64>) -> Claim {
        let now = self.snapshot();
        let before = request.snapshot.as_deref().map(Snapshot::parse);
        let late = |row: &Row| {
            before.as_ref().is_some_and(|before| before.open.contains(&row.xid) || row.xid >= before.xmax)
                && row.seq <= request.after
                && !in_flight.contains(&row.seq)
        };
        let next = |row: &Row| {
            row.seq > request.after && row.seq <= request.up_to && !(request.looks_back && in_flight.contains(&row.seq))
        };
        let visible = self.rows.iter().filter(|row| row.pending && row.mine && self.sees(&now, row.xid));
        let taken = visible.clone().filter(|row| !request.left_out.contains(&name(row.kind)));
        let mut found: Vec<(i64, u8)> = taken.filter(|row| late(row) || next(row)).map(|row| (row.seq, row.kind)).collect();
        found.sort_unstable();
        let limit = usize::try_from(request.max_events).unwrap();
        found.truncate(limit);
        let beyond = visible.map(|row| row.seq).filter(|seq| *seq > request.up_to).min().map(|seq| seq - 1);
        let cut_at = found.last().map(|(seq, _)| *seq).filter(|_| found.len() == limit).or(beyond);
        let mut batches: Vec<Batch> = Vec::new();
        for (seq, kind) in found {
            match batches.iter_mut().find(|batch| batch.aggregate_type == name(kind)) {
                Some(batch) => batch.events.push(event(seq)),
                None => batches.push(batch(kind, event(seq))),
            }
        }
        Claim { held: true, batches, snapshot: Some(now.text()), cut_at, ..Claim::default() }
    }
}

pub fn name(kind: u8) -> String {
    format!("type{kind}")
}

fn batch(kind: u8, first: OutboxEvent) -> Batch {
    Batch {
        id: Uuid::nil(),
        stream: name(kind),
        aggregate_type: name(kind),
        events: vec![first],
        age: Default::default(),
        claimed: std::time::Instant::now(),
    }
}

fn event(seq: i64) -> OutboxEvent {
    OutboxEvent {
        seq,
        id: Uuid::nil(),
        event_type: String::new(),
        partition: 0,
        aggregate_id: String::new(),
        occurred_at: Utc::now(),
        payload: None,
        headers: String::new(),
        bytes: 0,
        retry_count: 0,
        unreadable: Vec::new(),
        was_waiting: false,
    }
}

pub fn request(limit: i64) -> ClaimRequest {
    ClaimRequest {
        lease: Lease { relay_id: Uuid::nil(), epoch: 0, partitions: Partitions::ALL },
        after: 0,
        snapshot: None,
        skipped: Vec::new(),
        open: Vec::new(),
        stopped: Partitions::default(),
        kept_back: Vec::new(),
        looks_back: false,
        hold: false,
        max_events: limit,
        max_bytes: 0,
        batch_size: 0,
        max_payload_bytes: 0,
        stream_prefix: String::new(),
        left_out: Vec::new(),
        up_to: i64::MAX,
    }
}

#[test]
fn every_commit_is_found_once_and_in_order() {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    (0..400).for_each(|round| run(StdRng::seed_from_u64(seed.wrapping_add(round))));
}

fn run(mut rng: StdRng) {
    let mut table = Table::default();
    let mut cursor = Cursor::default();
    let (mut found, mut in_flight) = (BTreeSet::new(), BTreeSet::new());
    for step in 0..600 {
        match rng.random_range(0..12) {
            0..3 => table.draw(0, rng.random_bool(0.6)),
            3..5 if !table.drawn.is_empty() => table.write(rng.random_range(0..table.drawn.len())),
            5..7 if !table.open.is_empty() => {
                let xid = *table.open.iter().nth(rng.random_range(0..table.open.len())).unwrap();
                table.end(xid, rng.random_bool(0.8));
            }
            // Another relay publishes what is its own, or this one settles.
            7 => table.rows.iter_mut().filter(|row| !row.mine).for_each(|row| row.pending = false),
            8 => settle(&mut table, &mut in_flight, &mut rng),
            9 if step % 7 == 0 => cursor.rewind(),
            10 => release(&mut cursor, &mut in_flight, &mut found, &mut rng),
            _ => look(&table, &mut cursor, &mut found, &mut in_flight, rng.random_range(1..9)),
        }
    }
    while !table.drawn.is_empty() {
        table.write(0);
    }
    for xid in table.open.clone() {
        table.end(xid, true);
    }
    for _ in 0..1_000 {
        look(&table, &mut cursor, &mut found, &mut in_flight, 5);
    }
    let committed: BTreeSet<i64> =
        table.rows.iter().filter(|row| row.mine && !table.rolled_back.contains(&row.xid)).map(|row| row.seq).collect();
    assert_eq!(found, committed);
}

pub fn settle(table: &mut Table, in_flight: &mut BTreeSet<i64>, rng: &mut StdRng) {
    in_flight.retain(|seq| {
        let settled = rng.random_bool(0.5);
        table.rows.iter_mut().filter(|row| settled && row.seq == *seq).for_each(|row| row.pending = false);
        !settled
    });
}

/// A batch ends short: from some event on, all that is on its way goes back, and the cursor too.
fn release(cursor: &mut Cursor, in_flight: &mut BTreeSet<i64>, found: &mut BTreeSet<i64>, rng: &mut StdRng) {
    let Some(&from) = in_flight.iter().nth(rng.random_range(0..in_flight.len().max(1))) else { return };
    for seq in in_flight.split_off(&from) {
        found.remove(&seq);
    }
    cursor.rewind_to(from);
}

fn look(table: &Table, cursor: &mut Cursor, found: &mut BTreeSet<i64>, in_flight: &mut BTreeSet<i64>, limit: i64) {
    let mut request = request(limit);
    cursor.aim(&mut request);
    let claim = table.claim(&request, in_flight);
    let now = table.snapshot();
    let visible = table.rows.iter().filter(|row| row.pending && row.mine && table.sees(&now, row.xid));
    let unclaimed: BTreeSet<i64> = visible.map(|row| row.seq).filter(|seq| !in_flight.contains(seq)).collect();
    let claimed: Vec<i64> = claim.batches.iter().flat_map(|b| &b.events).map(|e| e.seq).collect();
    // Whatever could be claimed and stands before something that is, is claimed too.
    let first: Vec<i64> = unclaimed.iter().copied().take(claimed.len()).collect();
    assert_eq!(claimed, first, "of {unclaimed:?}, looking from {request:?}");
    if claim.cut_at.is_none() {
        assert_eq!(claimed.len(), unclaimed.len(), "{unclaimed:?}");
    }
    for seq in claimed {
        assert!(found.insert(seq), "{seq} is claimed twice");
        in_flight.insert(seq);
    }
    cursor.advance(&claim);
}
