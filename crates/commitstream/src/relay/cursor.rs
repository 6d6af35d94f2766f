//! Where to look next. Pure: told what a claim found, it says which ranges of `seq` may still hold something.

use std::collections::HashSet;

use crate::outbox::{Claim, SeqRange};

/// Most holes that are told apart; beyond that, neighbours are looked at as one range, which is slower and as safe.
const MAX_HOLES: usize = 32;

/// The claim reads from the cursor on, not from the low end of the index, where dead entries pile up while any
/// long transaction holds back vacuum.
///
/// A `seq` that was missing below the cursor may belong to a transaction that has yet to commit. Such a *hole* is part
/// of every claim until nobody is left who could fill it. That keeps order, not only completeness: a transaction that waited for the
/// late one (a lock on the aggregate) draws a `seq` above the cursor, and both become visible to the same claim.
#[derive(Debug, Default)]
pub struct Cursor {
    /// Everything up to here was seen, or is in a hole.
    high: i64,
    /// Sorted, not overlapping, all below `high`.
    holes: Vec<Hole>,
}

#[derive(Debug)]
struct Hole {
    first: i64,
    last: i64,
    /// The transactions that may still fill it; `None` until they were asked for.
    writers: Option<HashSet<String>>,
}

impl Cursor {
    /// The ranges that a claim has to look at: the holes, then all that is new.
    pub fn ranges(&self) -> Vec<SeqRange> {
        let holes = self.holes.iter().map(|h| SeqRange { after: h.first - 1, to: h.last });
        holes.chain([SeqRange { after: self.high, to: i64::MAX }]).collect()
    }

    /// True when `seq` was passed already: to find it is the sweep's merit.
    pub fn has_passed(&self, seq: i64) -> bool {
        seq <= self.high
    }

    /// True when it would help to know the open writers.
    pub fn has_holes(&self) -> bool {
        !self.holes.is_empty()
    }

    /// Takes in what one claim found (ascending), and the writers that were open *before* it, if they were asked for.
    pub fn observe(&mut self, found: &[i64], writers: Option<&HashSet<String>>) {
        let seen_before = self.high;
        for &seq in found {
            if seq > self.high {
                if seq > self.high + 1 {
                    self.holes.push(Hole { first: self.high + 1, last: seq - 1, writers: None });
                }
                self.high = seq;
            } else {
                self.fill(seq);
            }
        }
        if let Some(writers) = writers {
            self.narrow(writers, seen_before, found.last().copied());
        }
        self.merge();
    }

    /// Events from `seq` on were released: look there again, before anything newer.
    pub fn rewind_to(&mut self, seq: i64) {
        self.high = self.high.min(seq - 1);
        self.holes.retain(|h| h.first <= self.high);
        if let Some(last) = self.holes.last_mut() {
            last.last = last.last.min(self.high);
        }
    }

    fn fill(&mut self, seq: i64) {
        let Some(at) = self.holes.iter().position(|h| h.first <= seq && seq <= h.last) else { return };
        let hole = self.holes.remove(at);
        let parts = [(hole.first, seq - 1), (seq + 1, hole.last)];
        let parts = parts.into_iter().filter(|(first, last)| first <= last);
        let parts = parts.map(|(first, last)| Hole { first, last, writers: hole.writers.clone() });
        self.holes.splice(at..at, parts);
    }

    /// A hole that an earlier claim saw can only be filled by those who were open at the first look after that, and still
    /// are. When none is left, the claim that just ran has seen the last of it. A claim that reached its bounds has looked no
    /// further than the last event it found.
    fn narrow(&mut self, open: &HashSet<String>, seen_before: i64, last_found: Option<i64>) {
        for hole in self.holes.iter_mut().filter(|h| h.last <= seen_before) {
            match &mut hole.writers {
                Some(writers) => writers.retain(|w| open.contains(w)),
                None => hole.writers = Some(open.clone()),
            }
        }
        let looked_at = |hole: &Hole| last_found.is_none_or(|last| hole.last < last);
        self.holes.retain(|h| !(looked_at(h) && h.writers.as_ref().is_some_and(HashSet::is_empty)));
    }

    /// Joins the two nearest neighbours until the list is short enough.
    fn merge(&mut self) {
        while self.holes.len() > MAX_HOLES {
            let gap = |at: usize| self.holes[at + 1].first - self.holes[at].last;
            let Some(at) = (0..self.holes.len() - 1).min_by_key(|at| gap(*at)) else { return };
            let right = self.holes.remove(at + 1);
            let left = &mut self.holes[at];
            left.last = right.last;
            left.writers = match (left.writers.take(), right.writers) {
                (Some(a), Some(b)) => Some(a.union(&b).cloned().collect()),
                _ => None,
            };
        }
    }
}

/// What a claim has seen, ascending: its events, and those that it made waiting ones, which from now on keep their order
/// by themselves. A claim that was cut off by bytes has looked no further than its last event.
pub fn seen(claim: &Claim) -> Vec<i64> {
    let last = claim.events.last().map_or(i64::MAX, |e| e.seq);
    let mut seen: Vec<i64> = claim.events.iter().map(|e| e.seq).collect();
    seen.extend(claim.waiting.iter().filter(|seq| **seq <= last));
    seen.sort_unstable();
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(cursor: &Cursor) -> Vec<(i64, i64)> {
        cursor.ranges().iter().map(|r| (r.after + 1, r.to)).collect()
    }

    fn writers(names: &[&str]) -> HashSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn a_hole_is_looked_at_until_its_writers_are_gone() {
        let mut cursor = Cursor::default();
        cursor.observe(&[1, 2, 5], Some(&writers(&["a"])));
        assert_eq!(ranges(&cursor), [(3, 4), (6, i64::MAX)], "the writers of that look say nothing about a hole it made");
        cursor.observe(&[], Some(&writers(&["a", "b"])));
        cursor.observe(&[6], Some(&writers(&["b", "c"])));
        assert_eq!(ranges(&cursor), [(3, 4), (7, i64::MAX)]);
        cursor.observe(&[3], Some(&writers(&["c"])));
        assert_eq!(ranges(&cursor), [(4, 4), (7, i64::MAX)], "the claim may have been cut short after 3");
        cursor.observe(&[], Some(&writers(&["c"])));
        assert_eq!(ranges(&cursor), [(7, i64::MAX)], "c came too late to have drawn 4");
    }

    #[test]
    fn a_rewind_looks_at_released_events_first() {
        let mut cursor = Cursor::default();
        cursor.observe(&[3, 4, 9, 12], None);
        cursor.rewind_to(7);
        assert_eq!(ranges(&cursor), [(1, 2), (5, 6), (7, i64::MAX)]);
    }

    /// Whatever is drawn, committed and looked at in whatever order: what commits is found, and never behind a
    /// later event of a transaction that waited for it.
    #[test]
    fn every_commit_is_found_in_order() {
        use rand::{Rng, SeedableRng};
        let seed: u64 = rand::rng().random();
        println!("seed {seed}");
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        for _ in 0..300 {
            let mut cursor = Cursor::default();
            let (mut next, mut open, mut visible) = (1_i64, Vec::new(), Vec::new());
            let mut found = HashSet::new();
            let mut committed = HashSet::new();
            for step in 0..400 {
                match rng.random_range(0..10) {
                    0..4 => {
                        open.push((next, format!("t{step}")));
                        next += 1;
                    }
                    4..7 if !open.is_empty() => {
                        let (seq, _) = open.swap_remove(rng.random_range(0..open.len()));
                        if rng.random_bool(0.8) {
                            visible.push(seq);
                            committed.insert(seq);
                        }
                    }
                    _ => {
                        let asked = rng.random_bool(0.5).then(|| open.iter().map(|(_, t)| t.clone()).collect::<HashSet<_>>());
                        look(&mut cursor, &mut visible, &mut found, asked.as_ref(), rng.random_range(1..20));
                    }
                }
            }
            while !visible.is_empty() {
                look(&mut cursor, &mut visible, &mut found, None, 10);
            }
            assert_eq!(found, committed, "seed {seed}");
        }
    }

    fn look(
        cursor: &mut Cursor,
        visible: &mut Vec<i64>,
        found: &mut HashSet<i64>,
        writers: Option<&HashSet<String>>,
        limit: usize,
    ) {
        visible.sort_unstable();
        let covered = |seq: i64, ranges: &[SeqRange]| ranges.iter().any(|r| r.after < seq && seq <= r.to);
        let ranges = cursor.ranges();
        assert!(visible.iter().all(|seq| covered(*seq, &ranges)), "{visible:?} is visible, but only {ranges:?} are looked at");
        let claimed: Vec<i64> = visible.drain(..limit.min(visible.len())).collect();
        cursor.observe(&claimed, writers);
        found.extend(claimed);
    }
}
