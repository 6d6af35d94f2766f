//! The table of the cursor's model with several streams, some of them full or stuck: every commit is found once, and of each stream in order.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::cursor::model::{Table, name, request, settle};
use super::*;

const KINDS: u8 = 4;

#[test]
fn every_commit_is_found_once_and_of_each_stream_in_order() {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    (0..150).for_each(|round| World::new(seed.wrapping_add(round)).run());
}

struct World {
    seed: u64,
    rng: StdRng,
    table: Table,
    turns: Turns,
    now: Instant,
    found: BTreeSet<i64>,
    in_flight: BTreeSet<i64>,
    stuck: BTreeSet<String>,
    full: BTreeSet<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            table: Table::default(),
            turns: Turns::new(now),
            now,
            found: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            stuck: BTreeSet::new(),
            full: BTreeSet::new(),
        }
    }

    fn run(mut self) {
        for _ in 0..800 {
            let (drawn, open) = (self.table.drawn.len(), self.table.open.len());
            match self.rng.random_range(0..14) {
                0..3 => {
                    // One stream has most of the events.
                    let kind = if self.rng.random_bool(0.6) { 0 } else { self.rng.random_range(0..KINDS) };
                    self.table.draw(kind, true);
                }
                3..5 if drawn > 0 => self.table.write(self.rng.random_range(0..drawn)),
                5..7 if open > 0 => {
                    let at = self.rng.random_range(0..open);
                    let xid = self.table.open.iter().nth(at).copied();
                    xid.into_iter().for_each(|xid| self.table.end(xid, self.rng.random_bool(0.8)));
                }
                7 => settle(&mut self.table, &mut self.in_flight, &mut self.rng),
                8 => self.release(),
                9 => self.full = self.some(0.3),
                10 => self.stuck = self.some(0.2),
                11 if self.rng.random_bool(0.3) => self.turns.rewind(),
                _ => self.look(),
            }
        }
        self.finish();
    }

    fn some(&mut self, share: f64) -> BTreeSet<String> {
        (0..KINDS).filter(|_| self.rng.random_bool(share)).map(name).collect()
    }

    /// A batch ends short: what is on its way of one stream goes back, from some event on.
    fn release(&mut self) {
        let Some(&from) = self.in_flight.iter().nth(self.rng.random_range(0..self.in_flight.len().max(1))) else { return };
        let kind_of = |seq: i64| self.table.rows.iter().find(|row| row.seq == seq).map(|row| row.kind);
        let back: Vec<i64> = self.in_flight.range(from..).copied().filter(|seq| kind_of(*seq) == kind_of(from)).collect();
        for seq in back {
            self.in_flight.remove(&seq);
            self.found.remove(&seq);
        }
        self.turns.rewind_to(from);
    }

    fn look(&mut self) {
        self.now += Duration::from_millis(self.rng.random_range(0..20));
        let ready = self.rng.random_bool(0.8);
        let Some(chosen) = self.turns.choose(self.stuck.clone(), &self.full, ready, self.now) else { return };
        let mut request = request(self.rng.random_range(1..6));
        self.turns.aim(chosen, &mut request);
        if !request.left_out.is_empty() {
            request.up_to = request.after.saturating_add(self.rng.random_range(1..9));
        }
        let claim = self.table.claim(&request, &self.in_flight);
        let snapshot = self.table.snapshot();
        for kind in 0..KINDS {
            let claimed: Vec<i64> =
                claim.batches.iter().filter(|b| b.aggregate_type == name(kind)).flat_map(|b| &b.events).map(|e| e.seq).collect();
            let rows = self.table.rows.iter().filter(|row| row.kind == kind && row.pending);
            let visible = rows.filter(|row| self.table.sees(&snapshot, row.xid) && !self.in_flight.contains(&row.seq));
            let unclaimed: BTreeSet<i64> = visible.map(|row| row.seq).collect();
            let first: Vec<i64> = unclaimed.iter().copied().take(claimed.len()).collect();
            assert_eq!(claimed, first, "of {unclaimed:?}, looking from {request:?} (seed {})", self.seed);
            let is_out = self.stuck.contains(&name(kind)) || chosen == 0 && self.full.contains(&name(kind));
            assert!(claimed.is_empty() || !is_out, "{kind} was to be left out (seed {})", self.seed);
        }
        for event in claim.batches.iter().flat_map(|batch| &batch.events) {
            assert!(self.found.insert(event.seq), "{} is claimed twice (seed {})", event.seq, self.seed);
            self.in_flight.insert(event.seq);
        }
        self.turns.advance(chosen, &claim, self.now);
    }

    /// Everything commits, and every stream moves.
    fn finish(mut self) {
        while !self.table.drawn.is_empty() {
            self.table.write(0);
        }
        for xid in self.table.open.clone() {
            self.table.end(xid, true);
        }
        (self.stuck, self.full) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..500 {
            self.look();
        }
        let committed = self.table.rows.iter().filter(|row| !self.table.rolled_back.contains(&row.xid)).map(|row| row.seq);
        assert_eq!(self.found, committed.collect::<BTreeSet<_>>(), "seed {}", self.seed);
    }
}
