//! Whose turn it is: which events the next claim looks for, so that no stream keeps the others waiting. Pure.
//!
//! Claims go through the table in `seq` order with one cursor, and as long as no stream is *full* (has so much in flight as one stream may)
//! there is nothing else to do. When one is, the next events may all be its own: a transaction of millions stands before those of the others.
//! Then a second cursor starts from where the first one stands and leaves the full streams out; the first goes on as soon as they have room.
//! Where the second meets another full stream, a third leaves that out too, and so on.
//!
//! Each cursor is complete for all that it does not leave out, whatever the others took before it: what is on its way or published is
//! not found again. So a claim takes, of each stream, the first of what nobody took yet, and order holds. When a cursor has
//! seen everything, those behind it, which leave out more, are of no use any more.
//!
//! *Stuck* streams are left out by all cursors. When one is not stuck any more, all begin anew: what was left out may stand anywhere.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::cursor::Cursor;
use crate::outbox::{Claim, ClaimRequest};

/// Cursors at a time. Streams that are full beyond these wait for a cursor that comes to them.
const MOST: usize = 8;
/// A claim that leaves streams out looks at so many `seq` at a time, so that it does not take long however much it leaves out.
const REACH: i64 = 50_000;
/// A cursor ahead that has found nothing looks again after this: nobody wakes it, since the relay is at work.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// A cursor ahead looks at everything again for one part in so many of the time: something may have fallen due behind it.
const PASS_SHARE: u32 = 20;

#[derive(Debug)]
pub struct Turns {
    /// Each leaves out what the one before it does, and more. The first leaves out stuck streams only.
    levels: Vec<Level>,
    /// As of the last claim.
    stuck: BTreeSet<String>,
    /// The level that has the next turn, if it may.
    next: usize,
    /// Something that cursors have passed over may be claimed again.
    anew: bool,
}

#[derive(Debug)]
struct Level {
    cursor: Cursor,
    skips: BTreeSet<String>,
    not_before: Instant,
    /// It looks at everything since then; or it has, and does so again from `rested` on.
    pass_began: Option<Instant>,
    rested: Instant,
}

impl Turns {
    pub fn new(now: Instant) -> Self {
        Self { levels: vec![Level::new(Cursor::default(), BTreeSet::new(), now)], stuck: BTreeSet::new(), next: 0, anew: false }
    }

    /// The cursor that is to look next, if one may: the first only if it is `ready`.
    pub fn choose(&mut self, stuck: BTreeSet<String>, full: &BTreeSet<String>, ready: bool, now: Instant) -> Option<usize> {
        if std::mem::take(&mut self.anew) || !self.stuck.is_subset(&stuck) {
            self.levels.truncate(1);
            self.rewind();
        }
        self.stuck = stuck;
        let last = self.levels.len() - 1;
        if self.levels.len() < MOST && self.levels[last].meets(full) && (last > 0 || ready) {
            let Level { cursor, skips, .. } = &self.levels[last];
            self.levels.push(Level::new(cursor.clone(), skips.union(full).cloned().collect(), now));
        }
        let count = self.levels.len();
        let may = |at: &usize| {
            let level = &self.levels[*at];
            !level.meets(full) && if *at == 0 { ready } else { now >= level.not_before }
        };
        let chosen = (0..count).map(|step| (self.next + step) % count).find(may)?;
        self.next = (chosen + 1) % count;
        Some(chosen)
    }

    /// All cursors begin anew with the next claim: what they have passed over may be claimed again.
    pub fn begin_anew(&mut self) {
        self.anew = true;
    }

    /// When a cursor ahead of the first is to look again, if there is one.
    pub fn next_look(&self) -> Option<Instant> {
        self.levels[1..].iter().map(|level| level.not_before).min()
    }

    /// Writes down where the chosen cursor has to look.
    pub fn aim(&self, chosen: usize, request: &mut ClaimRequest) {
        let Some(level) = self.levels.get(chosen) else { return };
        level.cursor.aim(request);
        request.left_out = self.stuck.union(&level.skips).cloned().collect();
        request.up_to = if request.left_out.is_empty() { i64::MAX } else { request.after.saturating_add(REACH) };
    }

    /// Takes in what the claim of the chosen cursor found.
    pub fn advance(&mut self, chosen: usize, claim: &Claim, now: Instant) {
        let claimed = claim.last_seq().unwrap_or(0);
        self.levels.iter_mut().for_each(|level| level.cursor.note_claimed(claimed));
        let Some(level) = self.levels.get_mut(chosen) else { return };
        level.cursor.advance(claim);
        level.not_before = now;
        if claim.cut_at.is_some() {
            return;
        }
        if claim.batches.is_empty() {
            level.not_before = now + LOOK_AGAIN;
        }
        if let Some(began) = level.pass_began.take() {
            level.rested = now + (now - began) * PASS_SHARE;
        } else if chosen > 0 && now >= level.rested {
            level.cursor.rewind();
            level.pass_began = Some(now);
        }
        self.levels.truncate(chosen + 1);
    }

    /// Events from `seq` on were released: look there again, before anything newer.
    pub fn rewind_to(&mut self, seq: i64) {
        self.levels.iter_mut().for_each(|level| level.cursor.rewind_to(seq));
    }

    /// The first cursor looks at everything again: the sweep.
    pub fn rewind(&mut self) {
        self.levels[0].cursor.rewind();
    }
}

impl Level {
    fn new(cursor: Cursor, skips: BTreeSet<String>, now: Instant) -> Self {
        Self { cursor, skips, not_before: now, pass_began: Some(now), rested: now }
    }

    /// It would find events of a stream that has no room.
    fn meets(&self, full: &BTreeSet<String>) -> bool {
        !full.is_subset(&self.skips)
    }
}

#[cfg(test)]
#[path = "turns_model.rs"]
mod model;
