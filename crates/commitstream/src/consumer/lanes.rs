//! What a consumer has in hand of one stream, aggregate by aggregate: what may be handled next, what waits, what is done. No I/O.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio::time::Instant;

use super::suspects::FEW;
use crate::event::EventEnvelope;
use crate::streams::EntryId;

/// Entries that may wait behind failed ones. Only their ids are kept.
pub(super) const MOST_WAITING: usize = 100_000;

/// One entry.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub id: EntryId,
    pub what: What,
    /// Failed deliveries, as a JSON array, and how many; empty when there is none.
    pub history: String,
    pub failures: u32,
    /// Deaths of consumers that had it at work, from 1.
    pub deliveries: u32,
    /// Its batch failed: it is handled alone.
    pub alone: bool,
    /// So many died that it may be the cause.
    pub suspect: bool,
    /// It was in hand when a consumer died: that it is at work is said before.
    pub careful: bool,
}

/// What is to be done with an entry.
#[derive(Debug, Clone)]
pub(super) enum What {
    /// Call a handler, by number.
    Handle(usize, Arc<EventEnvelope>),
    /// Acknowledge it.
    Pass,
    /// Nobody handles it, and that is a failure.
    Unknown(Arc<EventEnvelope>),
    /// Make it a dead letter.
    Bury(String),
    /// It waits, and is read again when its turn comes.
    Unread,
}

impl What {
    /// Id of the aggregate, where the entry was read.
    pub fn aggregate(&self) -> Option<&str> {
        match self {
            Self::Handle(_, envelope) | Self::Unknown(envelope) => Some(&envelope.aggregate_id),
            Self::Pass | Self::Bury(_) | Self::Unread => None,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Handle(_, envelope) | Self::Unknown(envelope) => envelope.payload.get().len(),
            Self::Pass | Self::Bury(_) | Self::Unread => 0,
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// In `ready`.
    #[default]
    Ready,
    /// Its first entries are being handled.
    Running,
    Waiting(Instant),
    /// In `unread`.
    Reading,
}

/// Entries to handle in one call, all of which are for the same handler or for none.
#[derive(Debug)]
pub(super) struct Work {
    /// Each aggregate once.
    pub parts: Vec<(Arc<str>, Vec<Item>)>,
}

impl Work {
    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.parts.iter().flat_map(|(_, items)| items)
    }
}

/// What became of the entries of one aggregate.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// To be acknowledged.
    pub done: Vec<EntryId>,
    /// Acknowledged already, as dead letters, or no longer ours.
    pub gone: Vec<EntryId>,
    /// To be handled again, in their order.
    pub back: Vec<Item>,
    /// When; `None` is at once.
    pub wait: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Lanes {
    queues: HashMap<Arc<str>, Queue>,
    ready: VecDeque<Arc<str>>,
    waiting: BTreeSet<(Instant, Arc<str>)>,
    unread: VecDeque<Arc<str>>,
    known: HashSet<EntryId>,
    /// Over, but an answer that is on its way may still have it.
    over: HashSet<EntryId>,
    /// Of these, those that need no acknowledgement: not reported yet, and reported.
    gone: Vec<EntryId>,
    gone_reported: Vec<EntryId>,
    /// Entries with their payload, queued or being handled.
    loaded: usize,
    bytes: usize,
    /// Bytes of a payload, as they were of late.
    typical: usize,
    /// To be told to Redis.
    done: Vec<EntryId>,
    idle: HashSet<Arc<str>>,
}

/// What a payload is taken to have until some were seen.
const LARGE: usize = 64 << 10;

impl Default for Lanes {
    fn default() -> Self {
        Self {
            queues: HashMap::new(),
            ready: VecDeque::new(),
            waiting: BTreeSet::new(),
            unread: VecDeque::new(),
            known: HashSet::new(),
            over: HashSet::new(),
            gone: Vec::new(),
            gone_reported: Vec::new(),
            loaded: 0,
            bytes: 0,
            typical: LARGE,
            done: Vec::new(),
            idle: HashSet::new(),
        }
    }
}

impl Lanes {
    /// Takes an entry in hand, behind the others of its aggregate. One that is known already is left as it is.
    pub fn offer(&mut self, aggregate: &str, mut item: Item) {
        if self.over.contains(&item.id) || !self.known.insert(item.id) {
            return;
        }
        let is_unread = matches!(item.what, What::Unread);
        if !self.queues.contains_key(aggregate) {
            let name: Arc<str> = aggregate.into();
            self.idle.remove(&name);
            let (list, state) = if is_unread { (&mut self.unread, State::Reading) } else { (&mut self.ready, State::Ready) };
            list.push_back(Arc::clone(&name));
            self.queues.insert(name, Queue { items: VecDeque::new(), state });
        }
        let Some(queue) = self.queues.get_mut(aggregate) else { return };
        // Behind an entry that waits, or one that is yet to be read, it would only take memory.
        let behind_unread = queue.items.back().is_some_and(|last| matches!(last.what, What::Unread));
        if is_unread || behind_unread || matches!(queue.state, State::Waiting(_)) {
            item.what = What::Unread;
        } else {
            self.loaded += 1;
            self.bytes += item.what.bytes();
            self.typical = (self.typical * 15 + item.what.bytes()) / 16;
        }
        queue.items.push_back(item);
    }

    /// What to handle next: one entry, or as many as are there up to `most(handler)`.
    pub fn take(&mut self, most: impl Fn(usize) -> usize) -> Option<Work> {
        let mut work = Work { parts: Vec::new() };
        let (mut handler, mut room, mut careful) = (None, 1, false);
        while room > 0 {
            let Some(name) = self.ready.front() else { break };
            let Some(queue) = self.queues.get_mut(name) else {
                self.ready.pop_front();
                continue;
            };
            let mut part = Vec::new();
            while let Some(item) = queue.items.front() {
                let of = if let What::Handle(handler, _) = &item.what { Some(*handler) } else { None };
                let first = work.parts.is_empty() && part.is_empty();
                if first {
                    handler = of;
                    room = of.filter(|_| !item.alone && !item.suspect).map_or(1, &most);
                    careful = item.careful;
                    room = if careful { room.min(FEW) } else { room };
                } else if of != handler || of.is_none() || item.alone || item.suspect || item.careful != careful || room == 0 {
                    break;
                }
                room -= 1;
                part.extend(queue.items.pop_front());
                if room == 0 {
                    break;
                }
            }
            if part.is_empty() {
                break;
            }
            queue.state = State::Running;
            work.parts.extend(self.ready.pop_front().map(|name| (name, part)));
        }
        (!work.parts.is_empty()).then_some(work)
    }

    /// The entries of one aggregate were handled.
    pub fn settle(&mut self, aggregate: &Arc<str>, taken: &[(EntryId, usize)], outcome: Outcome) {
        for (_, bytes) in taken {
            self.loaded = self.loaded.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(*bytes);
        }
        for id in outcome.done.iter().chain(&outcome.gone) {
            self.known.remove(id);
            self.over.insert(*id);
        }
        self.done.extend(outcome.done);
        self.gone.extend(outcome.gone);
        let Some(queue) = self.queues.get_mut(aggregate) else { return };
        for item in outcome.back.into_iter().rev() {
            self.loaded += 1;
            self.bytes += item.what.bytes();
            queue.items.push_front(item);
        }
        match outcome.wait {
            Some(at) => {
                for item in &mut queue.items {
                    if !matches!(item.what, What::Unread) {
                        self.loaded = self.loaded.saturating_sub(1);
                        self.bytes = self.bytes.saturating_sub(item.what.bytes());
                        item.what = What::Unread;
                    }
                }
                queue.state = State::Waiting(at);
                self.waiting.insert((at, Arc::clone(aggregate)));
            }
            None => self.go_on(aggregate),
        }
    }

    /// Puts an aggregate where it belongs by its first entry.
    fn go_on(&mut self, aggregate: &Arc<str>) {
        let Some(queue) = self.queues.get_mut(aggregate) else { return };
        match queue.items.front().map(|item| &item.what) {
            None => {
                self.queues.remove(aggregate);
                self.idle.insert(Arc::clone(aggregate));
            }
            Some(What::Unread) => {
                queue.state = State::Reading;
                self.unread.push_back(Arc::clone(aggregate));
            }
            Some(_) => {
                queue.state = State::Ready;
                self.ready.push_back(Arc::clone(aggregate));
            }
        }
    }

    /// Aggregates that have waited long enough go on.
    pub fn wake(&mut self, now: Instant) {
        while self.waiting.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, aggregate)) = self.waiting.pop_first() else { return };
            self.go_on(&aggregate);
        }
    }

    /// When the next one has.
    pub fn next_wake(&self) -> Option<Instant> {
        self.waiting.first().map(|(at, _)| *at)
    }

    /// Up to `count` entries whose turn has come and which are to be read again, all of one aggregate.
    pub fn next_unread(&mut self, count: usize) -> Option<(Arc<str>, Vec<EntryId>)> {
        let aggregate = self.unread.pop_front()?;
        let queue = self.queues.get(&aggregate)?;
        let unread = queue.items.iter().take_while(|item| matches!(item.what, What::Unread)).take(count);
        let ids = unread.map(|item| item.id).collect();
        Some((aggregate, ids))
    }

    /// They were read: the first entries of the aggregate, in order. Without any it is asked for again.
    pub fn read(&mut self, aggregate: &Arc<str>, whats: Vec<What>) {
        if let Some(queue) = self.queues.get_mut(aggregate) {
            for (item, what) in queue.items.iter_mut().zip(whats) {
                self.loaded += 1;
                self.bytes += what.bytes();
                item.what = what;
            }
        }
        self.go_on(aggregate);
    }

    /// How many more entries may be taken in hand: `batch` at a time, twice that in all, and what fits into `bytes` by the size of those
    /// that are here.
    pub fn room(&self, batch: usize, bytes: usize) -> usize {
        if self.is_full() {
            return 0;
        }
        let fits = bytes.saturating_sub(self.bytes) / self.typical.max(1);
        // One that is larger than all that is allowed is taken alone.
        let fits = if self.loaded == 0 { fits.max(1) } else { fits };
        batch.min((2 * batch).saturating_sub(self.loaded)).min(fits)
    }

    /// What is to be acknowledged, and which aggregates have nothing in hand any more. Up to `most` of each.
    pub fn report(&mut self, most: usize) -> (Vec<EntryId>, Vec<Arc<str>>) {
        let done: Vec<EntryId> = self.done.drain(..self.done.len().min(most)).collect();
        self.gone_reported.append(&mut self.gone);
        // What an aggregate has done is acknowledged before it is given back.
        let most = if self.done.is_empty() { most } else { 0 };
        let idle: Vec<Arc<str>> = self.idle.iter().take(most).cloned().collect();
        idle.iter().for_each(|name| drop(self.idle.take(name)));
        (done, idle)
    }

    /// Redis has answered to the report: no later answer has these entries.
    pub fn heard(&mut self, done: &[EntryId]) {
        for id in done.iter().copied().chain(std::mem::take(&mut self.gone_reported)) {
            self.over.remove(&id);
        }
    }

    /// Redis has not heard of it, or has not given the aggregates back.
    pub fn report_again(&mut self, done: Vec<EntryId>, idle: Vec<Arc<str>>) {
        self.done.extend(done);
        self.idle.extend(idle.into_iter().filter(|name| !self.queues.contains_key(name)));
    }

    /// The member owns these aggregates; those that it has nothing of are given back.
    pub fn own(&mut self, aggregates: Vec<String>) {
        let names = aggregates.into_iter().map(Arc::<str>::from);
        self.idle.extend(names.filter(|name| !self.queues.contains_key(name)));
    }

    /// No more may be taken in hand, not even what only waits.
    pub fn is_full(&self) -> bool {
        self.waiting_entries() >= MOST_WAITING
    }

    /// Entries whose turn has come are to be read.
    pub fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    pub fn has_report(&self) -> bool {
        !self.done.is_empty()
    }

    /// Whether it is in hand, or over and Redis may not know yet.
    pub fn knows(&self, id: EntryId) -> bool {
        self.known.contains(&id) || self.over.contains(&id)
    }

    /// Entries in hand, and how many of them wait.
    pub fn in_hand(&self) -> (usize, usize) {
        (self.known.len(), self.waiting_entries())
    }

    fn waiting_entries(&self) -> usize {
        self.known.len().saturating_sub(self.loaded)
    }
}

pub(super) fn sizes(items: &[Item]) -> Vec<(EntryId, usize)> {
    items.iter().map(|item| (item.id, item.what.bytes())).collect()
}
