//! One membership in the group of one stream: reads, hands out to workers, acknowledges, takes over from the dead.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ConsumerState;
use super::brake::Brake;
use super::effects::Effects;
use super::handler::AnyHandler;
use super::heartbeat::beat;
use super::lanes::{Item, Lanes, What};
use super::pulse::Pulse;
use super::recovery::Round;
use super::status::{Part, Reporter};
use super::suspects::{Started, is_suspect};
use crate::backoff::Backoff;
use crate::chain::chain;
use crate::config::{ConsumerSettings, StartFrom, UnknownEvents};
use crate::outbox::OutboxError;
use crate::streams::{Cycle, EntryId, Member, Received, Streams, StreamsError, TakenOver};

/// Acknowledgements, and aggregates given back, in one call.
const MOST_REPORTED: usize = 2_000;
/// Entries read again, or taken over, in one call.
const PAGE: usize = 200;
/// Aggregates whose entries are read again in one call.
const MOST_READ_AGAIN: usize = 100;
/// Longest wait for a new entry: so long, a connection that is dead is not noticed.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Errors in a row of calls that time out while Redis answers heartbeats: the threads of this process were busy, not Redis.
const BUSY: u32 = 3;
/// After `shutdownTimeout`: how long handlers that are broken off may take to end, and then, the last words to Redis.
const ABORT: Duration = Duration::from_millis(250);
const LAST_WORDS: Duration = Duration::from_millis(500);
/// All that a stop takes in the end, with some room.
pub(super) const AFTER_SHUTDOWN: Duration = Duration::from_secs(1);
/// While others have too much queued up, their work is not added to.
const CONGESTION: Duration = Duration::from_millis(20);

/// Which handler an event goes to, for one stream.
#[derive(Debug, Clone, Default)]
pub(super) struct Routes {
    pub by_type: HashMap<String, usize>,
    /// Takes what no other handler is for.
    pub raw: Option<usize>,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Stopped,
    /// Others have what was in hand, or may have. Begin anew, as somebody else.
    TakenOver,
}

pub(super) struct Session {
    pub settings: Arc<ConsumerSettings>,
    pub streams: Streams,
    /// A connection to wait on for new entries.
    pub waiting: Streams,
    pub member: Member,
    pub stream: Arc<str>,
    pub group: Arc<str>,
    pub routes: Routes,
    pub handlers: Arc<[Arc<dyn AnyHandler>]>,
    pub effects: Effects,
    pub brake: Arc<Brake>,
    pub reporter: Reporter,
    pub stop: watch::Receiver<bool>,
    pub lanes: Mutex<Lanes>,
    /// Whether this member lives.
    pub pulse: Arc<Pulse>,
    /// What may be the end of it.
    pub started: Started,
    /// Counts the calls, so that one that arrives late is told from the last one.
    pub turn: AtomicU64,
    /// There is something to handle.
    pub ready: Notify,
    /// Something was handled.
    pub settled: Notify,
}

impl Session {
    pub fn lanes(&self) -> MutexGuard<'_, Lanes> {
        // Lanes are consistent after each call, whoever panicked.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the tables are there that handlers need. A database that is away is no error here: each event waits for it.
    pub async fn find_tables(&self) -> Result<(), OutboxError> {
        let handlers: BTreeSet<usize> = self.routes.by_type.values().chain(&self.routes.raw).copied().collect();
        for handler in handlers.iter().filter_map(|handler| self.handlers.get(*handler)) {
            match handler.find_tables().await {
                Ok(()) => {}
                Err(error) if error.is_not_migrated() || error.is_denied() => return Err(error),
                Err(error) => {
                    tracing::debug!(stream = %self.stream, %error, "could not look for the tables of handlers");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Becomes a member of the group, which reads from `start` if it has to be made.
    pub async fn join(&self, start: StartFrom) -> Result<(), StreamsError> {
        let begun = std::time::Instant::now();
        if self.streams.join_group(&self.member, start).await? {
            tracing::info!(stream = %self.stream, group = %self.group, from = ?start, "consumer group made; it reads from there");
        }
        self.pulse.joined(begun);
        // A slow connection may have used the time up.
        if !self.pulse.is_alive() {
            self.pulse.beat(&self.streams).await;
        }
        Ok(())
    }

    /// Works until told to stop, or until others have taken over or may have.
    pub async fn run(self: &Arc<Self>) -> Result<End, StreamsError> {
        let mut workers = JoinSet::new();
        for number in 0..self.settings.concurrency as usize {
            workers.spawn(Arc::clone(self).work(number));
        }
        let end = tokio::select! {
            end = self.feed() => end,
            () = self.pulse.over() => Ok(End::TakenOver),
        };
        if matches!(end, Ok(End::Stopped)) {
            self.finish(&mut workers).await;
            return end;
        }
        // What handlers are doing ends here, also after a takeover.
        workers.shutdown().await;
        self.pulse.end();
        end
    }

    /// The loop that talks to Redis. An outage is waited for, and what is in hand is kept as long as others do not count this member dead.
    async fn feed(&self) -> Result<End, StreamsError> {
        // A new name has nothing in hand yet.
        let (mut backoff, mut round, mut busy) = (Backoff::default(), Round::new(), 0);
        let mut wait: Option<BoxFuture<'_, _>> = None;
        // The wait has failures of its own: an exchange that succeeds says nothing of it.
        let (mut wait_backoff, mut wait_from) = (Backoff::default(), Instant::now());
        loop {
            if *self.stop.borrow() {
                return Ok(End::Stopped);
            }
            let begun = std::time::Instant::now();
            let pause = match self.turn(&mut round).await {
                Ok(Ok(pause)) => {
                    (backoff, busy) = (Backoff::default(), 0);
                    self.pulse.heard(begun);
                    self.reporter.state(ConsumerState::Active);
                    self.reporter.works(Part::Group);
                    pause
                }
                Ok(Err(TakenOver)) => return Ok(End::TakenOver),
                Err(error) if is_no_group(&error) => return Err(error),
                Err(error) => {
                    busy += 1;
                    if self.pulse.is_heard_since(begun) && busy < BUSY {
                        tracing::debug!(stream = %self.stream, %error, "a call failed while Redis answered others");
                    } else {
                        self.reporter.trouble(Part::Group, &chain(&error));
                    }
                    round.lost();
                    Pause::For(backoff.next())
                }
            };
            self.reporter.in_hand(self.lanes().in_hand());
            let after = match pause {
                Pause::No => continue,
                Pause::For(duration) => {
                    self.asleep(Instant::now() + duration, false).await;
                    continue;
                }
                Pause::Full => None,
                Pause::UntilEntryAfter(id) => Some(id),
            };
            if let (Some(after), None) = (after, &wait)
                && Instant::now() >= wait_from
            {
                wait = Some(self.waiting.wait_for_entry(&self.stream, after, LONGEST_WAIT).boxed());
            }
            let until = self.lanes().next_wake().map_or(round.beat, |wake| wake.min(round.beat));
            let Some(entry) = wait.as_mut().filter(|_| after.is_some()) else {
                self.asleep(until, true).await;
                continue;
            };
            tokio::select! {
                waited = entry => {
                    wait = None;
                    match waited {
                        Ok(()) => {
                            wait_backoff = Backoff::default();
                            self.reporter.works(Part::Wait);
                        }
                        Err(error) => {
                            self.reporter.trouble(Part::Wait, &chain(&error));
                            wait_from = Instant::now() + wait_backoff.next();
                        }
                    }
                }
                () = self.asleep(until, true) => {}
            }
        }
    }

    /// Sleeps until then, until told to stop or, if wanted, until a handler has finished something.
    async fn asleep(&self, until: Instant, wake: bool) {
        let mut stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep_until(until) => {}
            () = self.settled.notified(), if wake => {}
            // An error means that nobody can say stop any more: the consumer was dropped.
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }

    /// One exchange with Redis.
    async fn turn(&self, round: &mut Round) -> Result<Result<Pause, TakenOver>, StreamsError> {
        if let Err(gone) = self.look_after_the_dead(round).await? {
            return Ok(Err(gone));
        }
        self.read_again().await?;
        if round.unsure.is_some() {
            // From here on, a call that was given up finds that it is too late. What it did before is found now.
            if let Err(gone) = self.cycle(&[], &[], 0).await? {
                return Ok(Err(gone));
            }
            if let Err(gone) = self.find_what_is_in_hand(round).await? {
                return Ok(Err(gone));
            }
        }
        let (done, mut idle) = self.lanes().report(MOST_REPORTED);
        let mut room = self.room();
        if round.unsure.is_some() {
            // Nothing new before what is still to be found, and nothing of it is given back.
            room = 0;
            self.lanes().report_again(Vec::new(), std::mem::take(&mut idle));
        }
        let cycle = match self.cycle(&done, &idle, room).await {
            Ok(Ok(cycle)) => cycle,
            Ok(Err(gone)) => return Ok(Err(gone)),
            Err(error) => {
                self.lanes().report_again(done, idle);
                return Err(error);
            }
        };
        self.lanes().heard(&done);
        if !cycle.released {
            self.lanes().report_again(Vec::new(), idle);
        }
        let (received, end) = (cycle.received.len(), cycle.end);
        self.offer(cycle.received);
        let lanes = self.lanes();
        Ok(Ok(if received > 0 || lanes.has_report() || (lanes.has_unread() && room > 0) {
            Pause::No
        } else if room == 0 {
            Pause::Full
        } else {
            end.map_or(Pause::For(CONGESTION), Pause::UntilEntryAfter)
        }))
    }

    /// Now and then: takes over from members that are dead, and forgets them.
    async fn look_after_the_dead(&self, round: &mut Round) -> Result<Result<(), TakenOver>, StreamsError> {
        if Instant::now() < round.beat {
            return Ok(Ok(()));
        }
        let takeover = match self.streams.take_over(&self.member, PAGE).await? {
            Ok(takeover) => takeover,
            Err(gone) => return Ok(Err(gone)),
        };
        if takeover.entries > 0 {
            tracing::info!(stream = %self.stream, group = %self.group, entries = takeover.entries, "took over what others had left");
        }
        if takeover.more {
            return Ok(Ok(()));
        }
        round.beat = Instant::now() + beat(self.member.life);
        // What an answer that was lost has given comes first: until then it is not known what is owned in vain.
        if round.unsure.is_some() { Ok(Ok(())) } else { self.sweep(round, takeover.forwarded).await }
    }

    async fn cycle(&self, done: &[EntryId], idle: &[Arc<str>], room: usize) -> Result<Result<Cycle, TakenOver>, StreamsError> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) + 1;
        self.streams.cycle(&self.member, turn, done, idle, room).await
    }

    /// Entries whose wait is over are read again, as only their ids were kept: those of many aggregates in one call, so that a batch stays
    /// one, and so many at a time that others are not kept waiting; as there is room.
    async fn read_again(&self) -> Result<(), StreamsError> {
        self.lanes().wake(Instant::now());
        let (mut aggregates, mut ids): (Vec<(Arc<str>, usize)>, Vec<EntryId>) = (Vec::new(), Vec::new());
        if self.room() > 0 {
            let mut lanes = self.lanes();
            while aggregates.len() < MOST_READ_AGAIN && ids.len() < PAGE {
                let Some((aggregate, some)) = lanes.next_unread(PAGE - ids.len()) else { break };
                aggregates.push((aggregate, some.len()));
                ids.extend(some);
            }
        }
        if aggregates.is_empty() {
            return Ok(());
        }
        let read = self.streams.entries(&self.stream, &ids).await;
        let mut whats = read.iter().flatten().map(|entry| self.judge(entry));
        let mut lanes = self.lanes();
        for (aggregate, count) in aggregates {
            // Without any, they are asked for again.
            lanes.read(&aggregate, whats.by_ref().take(count).collect());
        }
        drop(lanes);
        self.ready.notify_one();
        read.map(drop)
    }

    fn room(&self) -> usize {
        self.lanes().room(self.settings.batch_size as usize, self.settings.max_in_flight_bytes)
    }

    fn offer(&self, received: Vec<Received>) {
        if received.is_empty() {
            return;
        }
        let items = received.into_iter().map(|entry| {
            let aggregate = match &entry.event {
                Some(Ok(envelope)) => envelope.aggregate_id.clone(),
                _ => String::new(),
            };
            let what = self.judge(&entry);
            let failures = failures_in(&entry.history);
            let Received { id, history, deliveries, inherited, .. } = entry;
            let suspect = is_suspect(deliveries, failures);
            (aggregate, Item { id, what, history, failures, deliveries, alone: false, suspect, careful: inherited })
        });
        let items: Vec<_> = items.collect();
        let mut lanes = self.lanes();
        items.into_iter().for_each(|(aggregate, item)| lanes.offer(&aggregate, item));
        drop(lanes);
        self.ready.notify_one();
    }

    /// What is to be done with an entry.
    fn judge(&self, entry: &Received) -> What {
        if entry.only_for.as_deref().is_some_and(|group| *group != *self.group) {
            return What::Pass;
        }
        let envelope = match &entry.event {
            Some(Ok(envelope)) => envelope,
            Some(Err(reason)) => return What::Bury(reason.clone()),
            None => {
                tracing::warn!(stream = %self.stream, group = %self.group, entry = %entry.id,
                    "an entry was removed from the stream before it was handled");
                return What::Pass;
            }
        };
        let envelope = || Arc::new(envelope.clone());
        let by_type = |envelope: &crate::EventEnvelope| self.routes.by_type.get(&envelope.event_type).copied();
        let Some(Ok(event)) = &entry.event else { return What::Pass };
        match by_type(event).or(self.routes.raw) {
            Some(handler) => What::Handle(handler, envelope()),
            None => match self.settings.unknown_events {
                UnknownEvents::Skip => {
                    self.reporter.skipped();
                    What::Pass
                }
                UnknownEvents::Park => What::Bury(no_handler(&event.event_type)),
                UnknownEvents::Error => What::Unknown(envelope()),
            },
        }
    }

    /// Waits for the handlers that are at work, tells Redis what they have done, and leaves. A handler that holds its thread may go on for
    /// longer: then the member does not leave, and lives until that handler ends or the process does, so that nobody else handles the same.
    async fn finish(&self, workers: &mut JoinSet<()>) {
        let deadline = Instant::now() + self.settings.shutdown_timeout;
        while !workers.is_empty() {
            tokio::select! {
                // They end by themselves when told to stop; a panic was caught.
                _ = workers.join_next() => {}
                () = tokio::time::sleep_until(deadline) => break,
                () = tokio::time::sleep(beat(self.member.life)) => drop(self.flush().await),
            }
        }
        // Nobody may be at work here when others take over.
        workers.abort_all();
        let ended = async { while workers.join_next().await.is_some() {} };
        let are_ended = tokio::time::timeout(ABORT, ended).await.is_ok();
        let last_words = async {
            while self.flush().await {}
            if are_ended { self.streams.leave_group(&self.member, &[]).await } else { Ok(()) }
        };
        let (stream, group) = (&*self.stream, &*self.group);
        match tokio::time::timeout(LAST_WORDS.max(deadline - Instant::now()), last_words).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(stream, %error, "could not leave the group: others take over when claimIdle is over")
            }
            Err(_) => tracing::warn!(stream, "could not leave the group in time: others take over when claimIdle is over"),
        }
        if are_ended {
            self.pulse.end();
        }
        for (held, call) in self.pulse.holding() {
            tracing::warn!(stream, group, handler = call.handler, event_type = call.event.event_type, aggregate = call.event.aggregate_id,
                for_at_least = ?held, "a handler holds its thread and could not be ended: it keeps its event until it ends or the process does");
        }
    }

    /// Acknowledges what is done. Returns whether there is more. No aggregate is given back: where an answer was lost, entries of it may be
    /// in hand and not known of; whoever takes over has them all.
    async fn flush(&self) -> bool {
        let (done, _) = self.lanes().report(MOST_REPORTED);
        match self.cycle(&done, &[], 0).await {
            Ok(_) => self.lanes().has_report(),
            Err(error) => {
                tracing::warn!(stream = %self.stream, %error, "could not acknowledge; handled events may be delivered again");
                self.lanes().report_again(done, Vec::new());
                false
            }
        }
    }
}

pub(super) fn no_handler(event_type: &str) -> String {
    format!("no handler for events of type {event_type}")
}

/// Attempts in a JSON array of them.
pub(super) fn failures_in(history: &str) -> u32 {
    let attempts: Vec<serde::de::IgnoredAny> = serde_json::from_str(history).unwrap_or_default();
    u32::try_from(attempts.len()).unwrap_or(u32::MAX)
}

impl Drop for Session {
    fn drop(&mut self) {
        self.pulse.end();
    }
}

/// Until the next exchange.
enum Pause {
    No,
    For(Duration),
    /// Until a handler has finished something.
    Full,
    UntilEntryAfter(EntryId),
}

/// Somebody has removed the group, or Redis has lost it.
fn is_no_group(error: &StreamsError) -> bool {
    matches!(error, StreamsError::Refused { source, .. } if source.code() == Some("NOGROUP"))
}
