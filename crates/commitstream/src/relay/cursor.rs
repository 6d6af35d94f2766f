//! Where to look next. Pure: told what a claim saw, it says where the next one has to look.
//!
//! The claim reads from the cursor on, not from the low end of the index, where dead entries pile up while any long transaction holds
//! back vacuum. But `seq` is drawn at the insert and becomes visible at the commit, so what commits late stands below the cursor. The
//! cursor is therefore a pair, a `seq` and a snapshot, with one invariant:
//!
//! > Of what the snapshot sees, everything up to `after` has been looked at.
//!
//! What the snapshot does not see was written by transactions that were open then or began since. The next claim looks their events
//! up by transaction, at whatever `seq`, and takes them together with what stands behind the cursor, in `seq` order. That keeps
//! order, not only completeness: a transaction that waited for a late one (a lock on the aggregate) draws a higher `seq`, and both are
//! visible to the same claim.

use crate::outbox::{Claim, ClaimRequest};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursor {
    after: i64,
    snapshot: Option<String>,
    /// Passed over by the last claim, because somebody else had locked them.
    skipped: Vec<i64>,
    /// Highest `seq` that was claimed: below it, events may be on their way.
    highest: i64,
}

impl Cursor {
    /// Another cursor claimed events up to this `seq`: they may be on their way.
    pub fn note_claimed(&mut self, seq: i64) {
        self.highest = self.highest.max(seq);
    }

    /// Writes down where to look.
    pub fn aim(&self, request: &mut ClaimRequest) {
        request.after = self.after;
        request.snapshot.clone_from(&self.snapshot);
        request.skipped.clone_from(&self.skipped);
        request.looks_back = self.after < self.highest;
    }

    /// Takes in what a claim found there. A claim that came to its end has seen all that its snapshot sees, so any place will do:
    /// behind what it found, where the next events stand in order; or, where it found nothing, at the end, so that only new transactions
    /// are looked at and not what other relays have published meanwhile.
    pub fn advance(&mut self, claim: &Claim) {
        self.highest = self.highest.max(claim.last_seq().unwrap_or(0));
        self.after = match claim.cut_at {
            Some(seq) => seq,
            None if claim.batches.is_empty() => i64::MAX,
            None => self.highest,
        };
        self.snapshot.clone_from(&claim.snapshot);
        self.skipped.clone_from(&claim.skipped);
    }

    /// Events from `seq` on were released: look there again, before anything newer.
    pub fn rewind_to(&mut self, seq: i64) {
        self.after = self.after.min(seq - 1);
    }

    /// Look at everything again: the sweep.
    pub fn rewind(&mut self) {
        self.rewind_to(1);
    }
}

#[cfg(test)]
#[path = "cursor_model.rs"]
pub(super) mod model;
