//! A model of table, relay and streams: claims, appends and settles end in any order, some batches end short, streams get stuck, and still each
//! event is appended once and in order.

use std::collections::BTreeMap;

use chrono::Utc;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use super::*;
use crate::outbox::{Claim, ClaimRequest, Lease, Partitions, Refusal};
use crate::relay::turns::Turns;

const EVENTS: i64 = 60;
const STREAMS: i64 = 3;

#[derive(Default)]
struct Table {
    /// Unsent events by `seq`.
    rows: BTreeMap<i64, Row>,
    /// What was appended, in order.
    sent: Vec<i64>,
}

struct Row {
    stream: i64,
    aggregate: i64,
    open: bool,
    /// `next_retry_at` is set.
    waiting: bool,
}

fn name(stream: i64) -> String {
    format!("type{stream}")
}

impl Table {
    /// What the claim's statement does, without its bounds in bytes: from the cursor on, leaving out open batches and what it is told to; a
    /// fresh event behind a waiting one becomes a waiting one.
    fn claim(&mut self, request: &ClaimRequest) -> Claim {
        let mut blocked: BTreeSet<i64> = BTreeSet::new();
        let mut fresh_blocked: BTreeSet<i64> = BTreeSet::new();
        let (mut picked, mut looked, mut last) = (Vec::new(), 0, 0);
        for (seq, row) in &mut self.rows {
            let in_range = *seq > request.after && *seq <= request.up_to && !row.open && looked < request.max_events;
            let in_range = in_range && !request.left_out.contains(&name(row.stream));
            if row.waiting {
                let free = in_range && !blocked.contains(&row.aggregate);
                fresh_blocked.insert(row.aggregate);
                if free {
                    picked.push(*seq)
                } else {
                    blocked.insert(row.aggregate);
                }
                looked += i64::from(free);
            } else if in_range {
                looked += 1;
                if fresh_blocked.contains(&row.aggregate) { row.waiting = true } else { picked.push(*seq) }
            }
            last = if in_range { *seq } else { last };
        }
        picked.iter().for_each(|seq| {
            if let Some(row) = self.rows.get_mut(seq) {
                row.open = true
            }
        });
        let beyond = self.rows.keys().find(|seq| **seq > request.up_to).map(|seq| seq - 1);
        let cut_at = (looked == request.max_events).then_some(last).or(beyond);
        let mut batches = Vec::new();
        for stream in 0..STREAMS {
            let of: Vec<i64> = picked.iter().copied().filter(|seq| self.rows[seq].stream == stream).collect();
            batches
                .extend(of.chunks(3).map(|chunk| batch(stream, chunk.iter().map(|seq| event(*seq, self.rows[seq].aggregate)))));
        }
        Claim { held: true, batches, cut_at, ..Claim::default() }
    }

    fn settle(&mut self, settlements: &[Settlement], batches: &BTreeMap<Uuid, Vec<i64>>) {
        for settlement in settlements {
            let seqs = &batches[&settlement.batch_id];
            let sent = usize::try_from(settlement.appended).unwrap();
            self.rows.retain(|seq, _| !seqs[..sent].contains(seq));
            for (at, seq) in seqs.iter().enumerate().skip(sent) {
                let row = self.rows.get_mut(seq).unwrap();
                row.open = false;
                row.waiting |= at == sent && !settlement.refusals.is_empty();
            }
        }
    }
}

fn batch(stream: i64, events: impl Iterator<Item = OutboxEvent>) -> Batch {
    Batch {
        id: Uuid::now_v7(),
        stream: name(stream),
        aggregate_type: name(stream),
        events: events.collect(),
        age: Default::default(),
        claimed: std::time::Instant::now(),
    }
}

fn event(seq: i64, aggregate: i64) -> OutboxEvent {
    OutboxEvent {
        seq,
        id: Uuid::from_u128(seq.unsigned_abs().into()),
        event_type: "E".into(),
        partition: 0,
        aggregate_id: aggregate.to_string(),
        occurred_at: Utc::now(),
        payload: Some("{}".into()),
        headers: String::new(),
        bytes: 2,
        retry_count: 0,
        unreadable: Vec::new(),
        was_waiting: false,
    }
}

fn request() -> ClaimRequest {
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
        max_events: 9,
        max_bytes: 0,
        batch_size: 3,
        max_payload_bytes: 0,
        stream_prefix: String::new(),
        left_out: Vec::new(),
        up_to: i64::MAX,
    }
}

#[test]
fn each_event_is_appended_once_and_in_order_however_batches_end() {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    (0..500).for_each(|round| World::new(seed.wrapping_add(round)).run());
}

struct World {
    seed: u64,
    rng: StdRng,
    aggregates: i64,
    table: Table,
    pipeline: Pipeline,
    turns: Turns,
    now: Instant,
    batches: BTreeMap<Uuid, Vec<i64>>,
    /// Streams whose batch was put down, and the batch.
    unready: BTreeMap<String, Uuid>,
    inserted: i64,
    claim: Option<(usize, Claim)>,
    append: Option<Attempt>,
    settle: Option<Vec<Settlement>>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Instant::now();
        let size = |events| Size { events, bytes: 1_000 };
        // Now and then a stuck stream may keep nothing.
        let stuck = size(rng.random_range(0..12));
        Self {
            seed,
            aggregates: STREAMS * rng.random_range(1..4),
            rng,
            table: Table::default(),
            pipeline: Pipeline::new(Limits { all: size(30), stream: size(12), stuck }),
            turns: Turns::new(now),
            now,
            batches: BTreeMap::new(),
            unready: BTreeMap::new(),
            inserted: 0,
            claim: None,
            append: None,
            settle: None,
        }
    }

    fn run(mut self) {
        let mut steps = 0;
        while self.table.sent.len() < usize::try_from(EVENTS).unwrap()
            || !self.pipeline.is_drained()
            || self.pipeline.kept.events > 0
        {
            self.now += Duration::from_millis(self.rng.random_range(0..200));
            self.step();
            steps += 1;
            assert!(steps < 100_000, "it does not come to an end (seed {}): {:?}", self.seed, self.table.sent);
        }
        let mut last = BTreeMap::new();
        for seq in &self.table.sent {
            let before = last.insert(seq % self.aggregates, *seq);
            assert!(
                before.is_none_or(|before| before < *seq),
                "{seq} after {before:?}: {:?} (seed {})",
                self.table.sent,
                self.seed
            );
        }
        assert_eq!(self.table.sent.iter().collect::<BTreeSet<_>>().len(), usize::try_from(EVENTS).unwrap(), "seed {}", self.seed);
    }

    fn step(&mut self) {
        match self.rng.random_range(0..7) {
            0 if self.inserted < EVENTS => {
                self.inserted += 1;
                let aggregate = self.inserted % self.aggregates;
                let row = Row { stream: aggregate % STREAMS, aggregate, open: false, waiting: false };
                self.table.rows.insert(self.inserted, row);
            }
            1 if self.pipeline.may_claim() => self.start_claim(),
            2 => {
                if let Some((chosen, claim)) = self.claim.take() {
                    self.turns.advance(chosen, &claim, self.now);
                    self.pipeline.claimed(claim.batches);
                }
            }
            3 => self.append(),
            4 => {
                while let Some((stream, _)) = self.pipeline.put_down() {
                    let open =
                        self.table.rows.iter().filter(|(_, row)| row.open && name(row.stream) == stream).map(|(seq, _)| *seq);
                    let open: Vec<i64> = open.collect();
                    let batch = self.batches.iter().find(|(_, seqs)| **seqs == open).map(|(id, _)| *id);
                    self.unready.insert(stream, batch.expect("its only open batch"));
                }
            }
            5 if self.rng.random_bool(0.2) => self.repair(),
            _ => match self.settle.take().or_else(|| self.pipeline.take_settlements()) {
                Some(settlements) if self.rng.random_bool(0.5) => self.settle = Some(settlements),
                Some(settlements) => {
                    self.table.settle(&settlements, &self.batches);
                    self.pipeline.settled();
                }
                None => {}
            },
        }
    }

    fn start_claim(&mut self) {
        let mut out = self.pipeline.left_out();
        out.extend(self.unready.keys().cloned());
        let Some(chosen) = self.turns.choose(out, &self.pipeline.full(), true, self.now) else { return };
        if let Some(seq) = self.pipeline.start_claim() {
            self.turns.rewind_to(seq);
        }
        if self.rng.random_bool(0.3) {
            self.turns.rewind();
        }
        let mut request = request();
        self.turns.aim(chosen, &mut request);
        if !request.left_out.is_empty() {
            request.up_to = request.after.saturating_add(self.rng.random_range(1..20));
        }
        let claim = self.table.claim(&request);
        self.batches.extend(claim.batches.iter().map(|b| (b.id, b.events.iter().map(|e| e.seq).collect())));
        self.claim = Some((chosen, claim));
    }

    fn append(&mut self) {
        let next = self.append.take().or_else(|| self.pipeline.next_append()).or_else(|| self.pipeline.next_retry(self.now));
        let Some(attempt) = next else { return };
        let trouble = Trouble { reason: "no".into(), of_server: false };
        if self.rng.random_bool(0.4) {
            self.append = Some(attempt);
            return;
        }
        if self.rng.random_bool(0.3) {
            self.pipeline.waits(attempt, trouble, self.now);
            return;
        }
        let batch = attempt.batch;
        let short = self.rng.random_bool(0.2).then(|| self.rng.random_range(0..batch.events.len()));
        let sent = short.unwrap_or(batch.events.len());
        self.table.sent.extend(batch.events[..sent].iter().map(|e| e.seq));
        let refused = short.filter(|_| self.rng.random_bool(0.6)).map(|at| batch.events[at].id);
        let refusals: Vec<Refusal> =
            refused.map(|event_id| Refusal { event_id, error: "no".into(), retry_after: None }).into_iter().collect();
        let trouble = short.filter(|_| refusals.is_empty() && self.rng.random_bool(0.6)).map(|_| trouble);
        self.pipeline.appended(batch, Outcome { appended: sent, last_entry: None, refusals, trouble }, self.now);
    }

    /// Redis answers again: nothing was appended of a batch that was put down, and it is settled so.
    fn repair(&mut self) {
        // The repair needs the session of the claims.
        if self.claim.is_some() {
            return;
        }
        if let Some((_, batch_id)) = self.unready.pop_first() {
            let settlement = Settlement { batch_id, appended: 0, last_entry: None, refusals: Vec::new() };
            self.table.settle(&[settlement], &self.batches);
        }
    }
}
