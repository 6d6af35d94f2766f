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

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use uuid::Uuid;

use crate::outbox::{Batch, OutboxEvent, Refusal, Settlement};

/// Bounds of what is in flight.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub events: usize,
    pub bytes: i64,
}

#[derive(Debug)]
pub struct Pipeline {
    limits: Limits,
    streams: BTreeMap<String, StreamState>,
    outcomes: Vec<Outcome>,
    settling: Vec<Outcome>,
    claiming: bool,
    events: usize,
    bytes: i64,
    /// Lowest `seq` that was released since the last rewind.
    rewind: Option<i64>,
}

#[derive(Debug, Default)]
struct StreamState {
    queue: VecDeque<Batch>,
    appending: bool,
    /// Something was released: release all that was claimed before that is settled.
    held: bool,
    /// Batches claimed and not settled.
    unsettled: BTreeSet<Uuid>,
}

/// An ended batch that waits to be settled.
#[derive(Debug)]
struct Outcome {
    stream: String,
    events: usize,
    bytes: i64,
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
            outcomes: Vec::new(),
            settling: Vec::new(),
            claiming: false,
            events: 0,
            bytes: 0,
            rewind: None,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.events == 0 && !self.claiming
    }

    /// The batches that are claimed and not settled.
    pub fn open_batches(&self) -> Vec<Uuid> {
        self.streams.values().flat_map(|s| s.unsettled.iter().copied()).collect()
    }

    /// True when another claim may start: none is under way, nothing waits to be released, and there is room.
    pub fn may_claim(&self) -> bool {
        !self.claiming
            && self.streams.values().all(|s| !s.held)
            && self.events < self.limits.events
            && self.bytes < self.limits.bytes
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
            self.events += batch.events.len();
            self.bytes += bytes_of(&batch.events);
            let state = self.streams.entry(batch.stream.clone()).or_default();
            state.unsettled.insert(batch.id);
            if state.held { self.release(batch) } else { state.queue.push_back(batch) }
        }
        self.lift_holds();
    }

    /// The next batch to append, of a stream that has none in flight.
    pub fn next_append(&mut self) -> Option<Batch> {
        let state = self.streams.values_mut().find(|s| !s.appending && !s.queue.is_empty())?;
        let batch = state.queue.pop_front()?;
        state.appending = true;
        Some(batch)
    }

    /// Ends the append of a batch. `last_entry` is the id of what was appended last, where that is known.
    pub fn appended(&mut self, batch: Batch, appended: usize, last_entry: Option<String>, refusals: Vec<Refusal>) {
        let short = appended < batch.events.len();
        // A refused event is not due before long; there is nothing to go back to for it.
        let is_refused = |e: &OutboxEvent| refusals.iter().any(|r| r.event_id == e.id);
        let released = batch.events.iter().skip(appended).find(|e| !is_refused(e)).map(|e| e.seq);
        let state = self.streams.entry(batch.stream.clone()).or_default();
        state.appending = false;
        if short {
            state.held = true;
            let queue = std::mem::take(&mut state.queue);
            released.into_iter().for_each(|seq| self.note_release(seq));
            queue.into_iter().for_each(|later| self.release(later));
        }
        self.end(batch, appended, last_entry, refusals);
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
        for outcome in std::mem::take(&mut self.settling) {
            self.events -= outcome.events;
            self.bytes -= outcome.bytes;
            if let Some(state) = self.streams.get_mut(&outcome.stream) {
                state.unsettled.remove(&outcome.settlement.batch_id);
            }
            let settlement = outcome.settlement;
            done.unblocked |= outcome.was_waiting;
            done.released |= usize::try_from(settlement.appended).is_ok_and(|appended| appended < outcome.events);
            done.published += u64::try_from(settlement.appended).unwrap_or(0);
            done.retries.extend(settlement.refusals.iter().filter_map(|r| r.retry_after));
            done.refused += settlement.refusals.len() as u64;
            done.failed += settlement.refusals.iter().filter(|r| r.retry_after.is_none()).count() as u64;
            if settlement.appended > 0 {
                done.markers.push((outcome.stream, settlement.batch_id));
            }
        }
        self.lift_holds();
        done
    }

    fn release(&mut self, batch: Batch) {
        if let Some(first) = batch.events.first() {
            self.note_release(first.seq);
        }
        self.end(batch, 0, None, Vec::new());
    }

    fn note_release(&mut self, seq: i64) {
        self.rewind = Some(self.rewind.map_or(seq, |lowest| lowest.min(seq)));
    }

    fn end(&mut self, batch: Batch, appended: usize, last_entry: Option<String>, refusals: Vec<Refusal>) {
        let appended = i32::try_from(appended).unwrap_or(i32::MAX);
        let settlement = Settlement { batch_id: batch.id, appended, last_entry, refusals };
        self.outcomes.push(Outcome {
            events: batch.events.len(),
            was_waiting: batch.events.iter().any(|e| e.was_waiting),
            bytes: bytes_of(&batch.events),
            stream: batch.stream,
            settlement,
        });
    }

    /// A hold ends when all that was claimed before it is settled. Idle streams are forgotten.
    fn lift_holds(&mut self) {
        let claiming = self.claiming;
        for state in self.streams.values_mut().filter(|s| s.unsettled.is_empty() && !claiming) {
            state.held = false;
        }
        self.streams.retain(|_, s| s.held || !s.unsettled.is_empty());
    }
}

fn bytes_of(events: &[OutboxEvent]) -> i64 {
    events.iter().filter(|e| e.payload.is_some()).map(|e| e.bytes).sum()
}

#[cfg(test)]
#[path = "pipeline_model.rs"]
mod model;
