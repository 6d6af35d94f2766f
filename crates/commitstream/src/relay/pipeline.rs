//! What is between claim and settle. Pure: the engine asks what may start and tells what has ended.
//!
//! ```text
//!             ┌── stream A: queue ─► one append in flight ──┐
//!  claim ─────┤                                             ├──► outcomes ─► one settle in flight
//!             └── stream B: queue ─► one append in flight ──┘
//! ```
//!
//! *Release.* When a batch ends short, the events that were not appended go back to the table. What was claimed after them for
//! the same stream may hold later events of the same aggregates, so all of that is released too, unsent, including the
//! batches of a claim that is still under way. Nothing new is claimed until those releases are settled; then the cursor
//! goes back to the first released event.
//!
//! *A stream that is stuck* keeps the batch that could not be appended, and tries the same one again. The rest of its queue is released, and
//! the stream is left out of claims, so that it uses up nothing of the others' budget. It is claimed again when it moves and all
//! that was released before is settled; the cursors then look at everything again (`turns.rs`).

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::append::{Attempt, Outcome, Trouble};
use super::waiting::Waiting;
use crate::outbox::{Batch, OutboxEvent, Settlement};

/// Bounds of what is in flight: of all streams together, of one stream, and of what stuck streams keep.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub all: Size,
    pub stream: Size,
    pub stuck: Size,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub events: usize,
    pub bytes: i64,
}

impl Size {
    fn of(batch: &Batch) -> Self {
        let sent = batch.events.iter().filter(|e| e.payload.is_some());
        Self { events: batch.events.len(), bytes: sent.map(|e| e.bytes).sum() }
    }

    fn reaches(self, limit: Self) -> bool {
        self.events >= limit.events || self.bytes >= limit.bytes
    }

    fn add(&mut self, other: Self) {
        self.events += other.events;
        self.bytes += other.bytes;
    }

    fn subtract(&mut self, other: Self) {
        self.events -= other.events;
        self.bytes -= other.bytes;
    }
}

pub struct Pipeline {
    limits: Limits,
    streams: BTreeMap<String, StreamState>,
    /// Streams with a queue and no append in flight.
    ready: BTreeSet<String>,
    /// Streams of which something was released that others must not overtake.
    held: BTreeSet<String>,
    /// Streams that cannot get on.
    waiting: Waiting,
    outcomes: Vec<Ending>,
    settling: Vec<Ending>,
    claiming: bool,
    appending: usize,
    /// Of streams that move.
    moving: Size,
    /// Of the batches that stuck streams keep.
    kept: Size,
    /// Lowest `seq` that was released since the last rewind.
    rewind: Option<i64>,
}

#[derive(Default)]
struct StreamState {
    aggregate_type: String,
    queue: VecDeque<Batch>,
    appending: bool,
    /// Left out of claims: stuck, or some of what was released when it was is not settled yet.
    left_out: bool,
    /// The batch of a stuck stream, between two attempts; and its size, also during them.
    parked: Option<Attempt>,
    kept: Size,
    /// Claimed and not settled.
    unsettled: BTreeSet<Uuid>,
    size: Size,
}

/// An ended batch that waits to be settled.
struct Ending {
    stream: String,
    size: Size,
    was_waiting: bool,
    settlement: Settlement,
}

/// What a finished settle leaves to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Streams and ids of the settled batches that have a marker in Redis.
    pub markers: Vec<(String, Uuid)>,
    /// Events went back to the table.
    pub released: bool,
    /// Events that others may have been waiting for are done.
    pub unblocked: bool,
    /// How long the events that were refused are to wait.
    pub retries: Vec<Duration>,
    pub published: u64,
    pub refused: u64,
    pub failed: u64,
}

impl Pipeline {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            streams: BTreeMap::new(),
            ready: BTreeSet::new(),
            held: BTreeSet::new(),
            waiting: Waiting::default(),
            outcomes: Vec::new(),
            settling: Vec::new(),
            claiming: false,
            appending: 0,
            moving: Size::default(),
            kept: Size::default(),
            rewind: None,
        }
    }

    /// All that can be settled is: what stuck streams keep stays open, for whoever recovers it.
    pub fn is_drained(&self) -> bool {
        !self.claiming && self.appending == 0 && self.moving.events == 0
    }

    pub fn is_appending(&self) -> bool {
        self.appending > 0
    }

    /// The streams that cannot get on.
    pub fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// The batches that are claimed and not settled.
    pub fn open_batches(&self) -> Vec<Uuid> {
        self.streams.values().flat_map(|s| s.unsettled.iter().copied()).collect()
    }

    /// True when another claim may start: none is under way, nothing waits to be released, and there is room.
    pub fn may_claim(&self) -> bool {
        !self.claiming && self.held.is_empty() && !self.moving.reaches(self.limits.all) && !self.keeps_too_much()
    }

    /// Aggregate types that no claim may take.
    pub fn left_out(&self) -> BTreeSet<String> {
        self.streams.values().filter(|s| s.left_out).map(|s| s.aggregate_type.clone()).collect()
    }

    /// Aggregate types of which so much is in flight that the others have a turn first.
    pub fn full(&self) -> BTreeSet<String> {
        let is_full = |s: &&StreamState| !s.left_out && s.size.reaches(self.limits.stream);
        self.streams.values().filter(is_full).map(|s| s.aggregate_type.clone()).collect()
    }

    /// Starts a claim; says from which `seq` to look again, if something was released.
    pub fn start_claim(&mut self) -> Option<i64> {
        self.claiming = true;
        self.rewind.take()
    }

    /// Ends a claim with what it found.
    pub fn claimed(&mut self, batches: Vec<Batch>) {
        self.claiming = false;
        for batch in batches {
            let size = Size::of(&batch);
            self.moving.add(size);
            let state = self.streams.entry(batch.stream.clone()).or_default();
            state.aggregate_type.clone_from(&batch.aggregate_type);
            state.unsettled.insert(batch.id);
            state.size.add(size);
            if state.left_out || self.held.contains(&batch.stream) {
                self.release(batch);
                continue;
            }
            if !state.appending {
                self.ready.insert(batch.stream.clone());
            }
            state.queue.push_back(batch);
        }
        self.lift_holds();
    }

    /// The next batch to append, of a stream that has none in flight.
    pub fn next_append(&mut self) -> Option<Attempt> {
        let stream = self.ready.pop_first()?;
        let state = self.streams.get_mut(&stream)?;
        let batch = state.queue.pop_front()?;
        state.appending = true;
        self.appending += 1;
        Some(Attempt::first(batch))
    }

    /// The next batch to try again, of a stuck stream whose time has come.
    pub fn next_retry(&mut self, now: Instant) -> Option<Attempt> {
        while let Some(stream) = self.waiting.pop_due(now) {
            let Some(state) = self.streams.get_mut(&stream) else { continue };
            if let Some(attempt) = state.parked.take() {
                state.appending = true;
                self.appending += 1;
                return Some(attempt);
            }
            // It keeps no batch: the next claim finds out.
            self.waiting.tries(&stream);
            self.lift_holds();
        }
        None
    }

    /// An attempt was in vain, and its stream is stuck: the same batch is tried again later.
    pub fn waits(&mut self, attempt: Attempt, trouble: Trouble, now: Instant) {
        let (stream, size) = (attempt.batch.stream.clone(), Size::of(&attempt.batch));
        self.appending -= 1;
        let state = self.streams.entry(stream.clone()).or_default();
        state.appending = false;
        state.parked = Some(attempt);
        if state.kept == Size::default() {
            state.kept = size;
            self.kept.add(size);
            self.moving.subtract(size);
        }
        self.leave_out(&stream);
        self.waiting.waits(&stream, trouble, now);
    }

    /// Ends the append of a batch.
    pub fn appended(&mut self, batch: Batch, outcome: Outcome, now: Instant) {
        let Outcome { appended, last_entry, refusals, trouble } = outcome;
        self.appending -= 1;
        let stream = batch.stream.clone();
        let state = self.streams.entry(stream.clone()).or_default();
        state.appending = false;
        let kept = std::mem::take(&mut state.kept);
        self.kept.subtract(kept);
        self.moving.add(kept);
        if appended < batch.events.len() {
            self.held.insert(stream.clone());
            // A refused event is not due before long; there is nothing to go back to for it.
            let refused: HashSet<Uuid> = refusals.iter().map(|r| r.event_id).collect();
            let released = batch.events.iter().skip(appended).find(|e| !refused.contains(&e.id)).map(|e| e.seq);
            released.into_iter().for_each(|seq| self.note_release(seq));
            self.release_queue(&stream);
        } else if self.streams.get(&stream).is_some_and(|s| !s.queue.is_empty()) {
            self.ready.insert(stream.clone());
        }
        match trouble {
            Some(trouble) => {
                self.leave_out(&stream);
                self.waiting.waits(&stream, trouble, now);
            }
            None => self.waiting.moves(&stream),
        }
        let settlement = settlement(&batch, appended, last_entry, refusals);
        self.outcomes.push(ending(&batch, settlement));
    }

    /// A stuck stream that keeps more than stuck streams may: its batch is left open and forgotten, and whoever recovers the stream finds
    /// out what became of it. Returns its key and what is the matter with it.
    pub fn put_down(&mut self) -> Option<(String, Trouble)> {
        // What a claim under way finds of it must be released, and that is done here.
        if !self.keeps_too_much() || self.claiming {
            return None;
        }
        // What else was released of it must be settled first: a batch is settled by one only.
        let found = self.streams.iter().find(|(_, s)| s.parked.is_some() && s.unsettled.len() == 1);
        let stream = found.map(|(stream, _)| stream.clone())?;
        let state = self.streams.remove(&stream)?;
        self.kept.subtract(state.kept);
        // Its events go back to the table, too, though not by this pipeline.
        let first = state.parked.as_ref().and_then(|attempt| attempt.batch.events.first()).map(|event| event.seq);
        first.into_iter().for_each(|seq| self.note_release(seq));
        let trouble = self.waiting.forget(&stream)?;
        Some((stream, trouble))
    }

    /// What to settle next: all that has ended, in one transaction.
    pub fn take_settlements(&mut self) -> Option<Vec<Settlement>> {
        if !self.settling.is_empty() || self.outcomes.is_empty() {
            return None;
        }
        self.settling = std::mem::take(&mut self.outcomes);
        Some(self.settling.iter().map(|o| o.settlement.clone()).collect())
    }

    /// Ends a settle that was committed.
    pub fn settled(&mut self) -> Settled {
        let mut done = Settled::default();
        for Ending { stream, size, was_waiting, settlement } in std::mem::take(&mut self.settling) {
            self.moving.subtract(size);
            if let Some(state) = self.streams.get_mut(&stream) {
                state.unsettled.remove(&settlement.batch_id);
                state.size.subtract(size);
            }
            done.unblocked |= was_waiting;
            done.released |= usize::try_from(settlement.appended).is_ok_and(|appended| appended < size.events);
            done.published += u64::try_from(settlement.appended).unwrap_or(0);
            done.retries.extend(settlement.refusals.iter().filter_map(|r| r.retry_after));
            done.refused += settlement.refusals.len() as u64;
            done.failed += settlement.refusals.iter().filter(|r| r.retry_after.is_none()).count() as u64;
            if settlement.appended > 0 {
                done.markers.push((stream, settlement.batch_id));
            }
        }
        self.lift_holds();
        done
    }

    fn keeps_too_much(&self) -> bool {
        self.kept.events > self.limits.stuck.events || self.kept.bytes > self.limits.stuck.bytes
    }

    fn leave_out(&mut self, stream: &str) {
        if let Some(state) = self.streams.get_mut(stream) {
            state.left_out = true;
        }
        self.release_queue(stream);
    }

    fn release_queue(&mut self, stream: &str) {
        self.ready.remove(stream);
        let queue = self.streams.get_mut(stream).map(|state| std::mem::take(&mut state.queue));
        queue.into_iter().flatten().for_each(|later| self.release(later));
    }

    fn release(&mut self, batch: Batch) {
        if let Some(first) = batch.events.first() {
            self.note_release(first.seq);
        }
        let settlement = settlement(&batch, 0, None, Vec::new());
        self.outcomes.push(ending(&batch, settlement));
    }

    fn note_release(&mut self, seq: i64) {
        self.rewind = Some(self.rewind.map_or(seq, |lowest| lowest.min(seq)));
    }

    /// A hold ends when all that was claimed before it is settled, and so does leaving out, once the stream moves. Idle streams are forgotten.
    fn lift_holds(&mut self) {
        if self.claiming {
            return;
        }
        let (held, waiting) = (&mut self.held, &self.waiting);
        self.streams.retain(|stream, state| {
            let settled = state.unsettled.is_empty();
            if settled {
                held.remove(stream);
                state.left_out &= waiting.is_stuck(stream);
            }
            state.left_out || !settled
        });
    }
}

fn settlement(batch: &Batch, appended: usize, last_entry: Option<String>, refusals: Vec<crate::outbox::Refusal>) -> Settlement {
    Settlement { batch_id: batch.id, appended: i32::try_from(appended).unwrap_or(i32::MAX), last_entry, refusals }
}

fn ending(batch: &Batch, settlement: Settlement) -> Ending {
    let was_waiting = |e: &OutboxEvent| e.was_waiting;
    Ending { stream: batch.stream.clone(), size: Size::of(batch), was_waiting: batch.events.iter().any(was_waiting), settlement }
}

#[cfg(test)]
#[path = "pipeline_model.rs"]
mod model;
