//! A model of table, relay and stream: claims, appends and settles end in any order, some batches end short, and still each
//! event is appended once and in order.

use std::collections::BTreeMap;

use chrono::Utc;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use super::*;

#[derive(Default)]
struct World {
    /// Unsent events by `seq`, as the table has them.
    table: BTreeMap<i64, Row>,
    /// What was appended, in order.
    stream: Vec<i64>,
    /// Forward claims start above this.
    high: i64,
}

struct Row {
    aggregate: i64,
    open: bool,
    /// `next_retry_at` is set.
    waiting: bool,
}

impl World {
    /// What the claim's statement does, without its bounds in bytes: from the cursor on, leaving out open batches; a fresh event
    /// behind a waiting one becomes a waiting one.
    fn claim(&mut self, limit: usize, sweep: bool) -> Vec<Batch> {
        let from = if sweep { 0 } else { self.high };
        let mut blocked: BTreeSet<i64> = BTreeSet::new();
        let mut fresh_blocked: BTreeSet<i64> = BTreeSet::new();
        let (mut picked, mut looked) = (Vec::new(), 0);
        for (seq, row) in &mut self.table {
            let in_range = *seq > from && !row.open && looked < limit;
            if row.waiting {
                let free = in_range && !blocked.contains(&row.aggregate);
                fresh_blocked.insert(row.aggregate);
                if free {
                    picked.push(*seq)
                } else {
                    blocked.insert(row.aggregate);
                }
                looked += usize::from(free);
            } else if in_range {
                looked += 1;
                if fresh_blocked.contains(&row.aggregate) { row.waiting = true } else { picked.push(*seq) }
            }
        }
        picked.iter().for_each(|seq| {
            if let Some(row) = self.table.get_mut(seq) {
                row.open = true
            }
        });
        self.high = self.high.max(picked.last().copied().unwrap_or(0));
        let batch = |chunk: &[i64]| Batch {
            id: Uuid::now_v7(),
            stream: "events:user".into(),
            aggregate_type: "user".into(),
            events: chunk.iter().map(|seq| event(*seq, self.table[seq].aggregate)).collect(),
            age: Default::default(),
            claimed: std::time::Instant::now(),
        };
        picked.chunks(3).map(batch).collect()
    }

    fn settle(&mut self, settlements: &[Settlement], batches: &BTreeMap<Uuid, Vec<i64>>) {
        for settlement in settlements {
            let seqs = &batches[&settlement.batch_id];
            let sent = usize::try_from(settlement.appended).unwrap();
            self.table.retain(|seq, _| !seqs[..sent].contains(seq));
            for (at, seq) in seqs.iter().enumerate().skip(sent) {
                let row = self.table.get_mut(seq).unwrap();
                row.open = false;
                row.waiting |= at == sent && !settlement.refusals.is_empty();
            }
        }
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

#[test]
fn each_event_is_appended_once_and_in_order_however_batches_end() {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    (0..500).for_each(|round| run(StdRng::seed_from_u64(seed.wrapping_add(round))));
}

fn run(mut rng: StdRng) {
    const EVENTS: i64 = 60;
    let aggregates = rng.random_range(1..8);
    let mut world = World::default();
    let mut pipeline = Pipeline::new(Limits { events: 30, bytes: 1_000 });
    let (mut batches, mut inserted) = (BTreeMap::new(), 0);
    let (mut claim, mut append, mut settle): (Option<Vec<Batch>>, Option<Batch>, Option<Vec<Settlement>>) = (None, None, None);
    while world.stream.len() < usize::try_from(EVENTS).unwrap() || !pipeline.is_empty() {
        match rng.random_range(0..5) {
            0 if inserted < EVENTS => {
                inserted += 1;
                world.table.insert(inserted, Row { aggregate: inserted % aggregates, open: false, waiting: false });
            }
            1 if pipeline.may_claim() => {
                if let Some(seq) = pipeline.start_claim() {
                    world.high = world.high.min(seq - 1);
                }
                let claimed = world.claim(9, rng.random_bool(0.3));
                batches.extend(claimed.iter().map(|b| (b.id, b.events.iter().map(|e| e.seq).collect())));
                claim = Some(claimed);
            }
            2 if claim.is_some() => pipeline.claimed(claim.take().unwrap()),
            3 => match append.take().or_else(|| pipeline.next_append()) {
                Some(batch) if rng.random_bool(0.5) => append = Some(batch),
                Some(batch) => {
                    let short = rng.random_bool(0.2).then(|| rng.random_range(0..batch.events.len()));
                    let sent = short.unwrap_or(batch.events.len());
                    world.stream.extend(batch.events[..sent].iter().map(|e| e.seq));
                    let refused = short.filter(|_| rng.random_bool(0.8)).map(|at| batch.events[at].id);
                    let refusals = refused.map(|event_id| Refusal { event_id, error: "no".into(), retry_after: None });
                    pipeline.appended(batch, sent, None, refusals.into_iter().collect());
                }
                None => {}
            },
            _ => match settle.take().or_else(|| pipeline.take_settlements()) {
                Some(settlements) if rng.random_bool(0.5) => settle = Some(settlements),
                Some(settlements) => {
                    world.settle(&settlements, &batches);
                    pipeline.settled();
                }
                None => {}
            },
        }
    }
    let mut last = BTreeMap::new();
    for seq in &world.stream {
        let before = last.insert(seq % aggregates, *seq);
        assert!(before.is_none_or(|before| before < *seq), "{seq} after {before:?}: {:?}", world.stream);
    }
    assert_eq!(world.stream.iter().collect::<BTreeSet<_>>().len(), usize::try_from(EVENTS).unwrap());
}
