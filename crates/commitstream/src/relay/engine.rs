//! The loop of an active relay: claim, append and settle of different batches overlap, and one task decides what starts.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use sqlx::PgConnection;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::append::{self, Ended};
use super::chain::Chains;
use super::cleanup::after_publishing;
use super::cursor::Cursor;
use super::exceptions::Exceptions;
use super::markers::{self, Markers};
use super::pipeline::{Limits, Pipeline};
use super::repair::Predecessors;
use super::retry::Retries;
use super::session::{SessionError, bounded};
use super::settling::{self, Settled};
use super::sleep::SleepLock;
use super::status::{Outage, Reporter};
use crate::config::{AfterFailure, Settings};
use crate::metrics::Outcome;
use crate::outbox::{
    AfterPublishing, Batch, Claim, ClaimRequest, Lease, OutboxError, OutboxRepository, Partitions, Refusal, StuckBatch,
};
use crate::streams::{Streams, StreamsError};

/// A claim takes this many batches at most, so that small batches do not mean a commit for each.
const BATCHES_PER_CLAIM: i64 = 10;
/// Most events of a claim of several batches.
const MAX_EVENTS_PER_CLAIM: i64 = 2_000;
/// A look that finds so many events, and no more, is one of a steady stream. The next one begins later, by this much for each of them,
/// and finds more at once: each look, its commit and its settle take from the producers' time. Up to about 3,000 events a second
/// nothing waits; beyond, at most for `LONGEST_LINGER`.
const STEADY: usize = 8;
const LINGER_PER_EVENT: Duration = Duration::from_micros(300);
const LONGEST_LINGER: Duration = Duration::from_millis(10);
/// Claims whose events may be between claim and settle.
const CLAIMS_IN_FLIGHT: i64 = 3;
/// How long a relay with work to do goes on being notified, before it gives the sleep lock back.
const AWAKE_AFTER: Duration = Duration::from_millis(20);
/// The sweep takes one part in so many of the time at most, however long it is.
const SWEEP_SHARE: u32 = 20;
/// How often Redis is asked for the last batches while nothing is appended: a failover is noticed without waiting for an event.
const PULSE_EVERY: Duration = Duration::from_secs(1);

/// What the engine works with.
pub(super) struct Parts {
    /// Nothing is claimed.
    pub is_paused: bool,
    pub outbox: OutboxRepository,
    pub streams: Streams,
    pub settings: Arc<Settings>,
    pub reporter: Reporter,
    pub lease: Lease,
    pub predecessors: Predecessors,
    /// What is in the streams and could not be settled so far.
    pub stuck: Vec<StuckBatch>,
    pub looked_up: Instant,
    pub markers: Markers,
    /// How long after it was appended a batch is looked for.
    pub window: Duration,
}

/// Sessions that outlive an engine.
pub(super) struct Connections {
    pub claims: PgConnection,
    pub settles: PgConnection,
    pub sleep: SleepLock,
}

/// At most one of a kind under way.
type Slot<T> = Option<BoxFuture<'static, T>>;

pub(super) struct Engine {
    outbox: OutboxRepository,
    streams: Streams,
    settings: Arc<Settings>,
    reporter: Reporter,
    lease: Lease,
    is_paused: bool,
    sleep: SleepLock,
    pipeline: Pipeline,
    cursor: Cursor,
    chains: Chains,
    /// Something may be waiting in the table.
    dirty: bool,
    /// The next claim does not begin before.
    not_before: Instant,
    busy_since: Option<Instant>,
    next_sweep: Instant,
    /// A sweep for retries does not begin before, so that sweeps have their share of the time and no more.
    rested: Instant,
    retries: Retries,
    sweep_again: bool,
    next_pulse: Instant,
    claim_started: Instant,
    sweeping: bool,
    claims: Option<PgConnection>,
    settles: Option<PgConnection>,
    claim: Slot<Result<(PgConnection, Claim), OutboxError>>,
    appends: FuturesUnordered<BoxFuture<'static, Ended>>,
    settle: Slot<Result<(PgConnection, Settled), SessionError>>,
    exceptions: Exceptions,
    /// Batches that the settle under way tries again.
    retried: Vec<Uuid>,
    /// Partitions are stopped: this relay does not count as able to work.
    stopped: Option<Outage>,
    expire: Slot<()>,
    pulse: Slot<Result<(), StreamsError>>,
    markers: Markers,
}

impl Engine {
    pub fn new(parts: Parts, connections: Connections) -> Self {
        let now = Instant::now();
        let processor = &parts.settings.outbox.processor;
        let limits = Limits {
            events: usize::try_from(per_claim(processor.batch_size) * CLAIMS_IN_FLIGHT).unwrap_or(usize::MAX),
            bytes: half(processor.max_in_flight_bytes),
        };
        let mut exceptions = Exceptions::default();
        exceptions.settled(&[], Settled { stuck: parts.stuck, ..Settled::default() }, now);
        Self {
            pipeline: Pipeline::new(limits),
            cursor: Cursor::default(),
            chains: Chains::new(parts.predecessors, parts.window, parts.looked_up),
            dirty: true,
            not_before: now,
            busy_since: None,
            next_sweep: now,
            rested: now,
            retries: Retries::new(now),
            sweep_again: false,
            next_pulse: now + PULSE_EVERY,
            claim_started: now,
            sweeping: false,
            claims: Some(connections.claims),
            settles: Some(connections.settles),
            claim: None,
            appends: FuturesUnordered::new(),
            settle: None,
            exceptions,
            retried: Vec::new(),
            stopped: None,
            expire: None,
            pulse: None,
            markers: parts.markers,
            outbox: parts.outbox,
            streams: parts.streams,
            settings: parts.settings,
            reporter: parts.reporter,
            lease: parts.lease,
            is_paused: parts.is_paused,
            sleep: connections.sleep,
        }
    }

    /// Runs until `stop` is done and everything in flight is settled, or until something fails. A failure leaves batches
    /// open; the next session finds out what became of them.
    pub async fn run(mut self, wake: &Notify, stop: impl Future<Output = ()>) -> Result<Connections, SessionError> {
        if self.is_paused && self.sleep.is_held() {
            // Producers need not notify meanwhile.
            self.sleep.release();
        }
        self.report_exceptions();
        let mut stop = std::pin::pin!(stop.fuse());
        let mut stopping = false;
        loop {
            self.start(stopping);
            if stopping && self.pipeline.is_empty() && self.expire.is_none() {
                let (claims, settles) = self.claims.zip(self.settles).ok_or(SessionError::LeaseLost)?;
                return Ok(Connections { claims, settles, sleep: self.sleep });
            }
            let sweep_due = self.sweep_due();
            tokio::select! {
                () = &mut stop, if !stopping => stopping = true,
                claimed = finish(&mut self.claim) => self.on_claimed(claimed?)?,
                Some(ended) = self.appends.next() => self.on_appended(ended)?,
                settled = finish(&mut self.settle) => self.on_settled(settled?),
                () = finish(&mut self.expire) => {}
                alive = finish(&mut self.pulse) => self.on_pulse(alive)?,
                done = self.sleep.progress() => {
                    done?;
                    self.dirty = true;
                }
                () = wake.notified() => self.dirty = true,
                () = sleep_until(self.exceptions.due()), if self.settles.is_some() => {}
                // A claim under way may be the sweep that is due.
                () = tokio::time::sleep_until(sweep_due), if !self.dirty && self.claim.is_none() => self.dirty = true,
                () = tokio::time::sleep_until(self.not_before), if !stopping && self.lingers() => {}
                () = tokio::time::sleep_until(self.next_pulse), if self.is_quiet() => self.start_pulse(),
            }
        }
    }

    /// Starts whatever may be started.
    fn start(&mut self, stopping: bool) {
        if !stopping
            && !self.is_paused
            && self.dirty
            && self.pipeline.may_claim()
            && Instant::now() >= self.not_before
            && let Some(connection) = self.claims.take()
        {
            self.start_claim(connection);
        }
        while let Some(batch) = self.pipeline.next_append() {
            let behind = self.chains.behind(&batch.stream, Instant::now());
            let (streams, settings, reporter) = (self.streams.clone(), self.settings.clone(), self.reporter.clone());
            self.appends.push(append::append(streams, settings, reporter, batch, behind).boxed());
        }
        if let Some(connection) = self.settles.take() {
            self.start_settle(connection);
        }
        if self.expire.is_none() {
            let (streams, markers) = (self.streams.clone(), self.markers.take_due());
            let life = self.settings.outbox.processor.settled_marker_life;
            self.expire = (!markers.is_empty()).then(|| async move { markers::shorten(&markers, &streams, life).await }.boxed());
        }
    }

    /// Settles all that has ended, and what is to be tried again.
    fn start_settle(&mut self, mut connection: PgConnection) {
        if let Some(retried) = self.exceptions.take_due(Instant::now()) {
            self.retried = retried;
            self.look_at_all_again();
        }
        let settlements = self.pipeline.take_settlements().unwrap_or_default();
        if settlements.is_empty() && self.retried.is_empty() {
            self.settles = Some(connection);
            return;
        }
        let (outbox, limit) = (self.outbox.clone(), self.settings.database.timeout);
        let (after, retried) = (after_publishing(&self.settings.outbox.cleanup), self.retried.clone());
        let metrics = self.reporter.metrics.clone();
        let settle = async move {
            crash_window!("before-settle");
            let began = Instant::now();
            let settled = settling::settle(&outbox, &mut connection, &settlements, &retried, after, limit).await?;
            metrics.settle.record(began.elapsed());
            crash_window!("after-settle");
            if settled.is_taken_over { Err(SessionError::LeaseLost) } else { Ok((connection, settled)) }
        };
        self.settle = Some(settle.boxed());
    }

    fn start_claim(&mut self, mut connection: PgConnection) {
        if let Some(seq) = self.pipeline.start_claim() {
            self.cursor.rewind_to(seq);
        }
        self.dirty = false;
        self.claim_started = Instant::now();
        self.sweeping = self.claim_started >= self.sweep_due();
        self.sweep_again &= !self.sweeping;
        if self.sweeping {
            self.cursor.rewind();
            self.retries.forget(self.claim_started);
        }
        let request = self.request();
        let (outbox, limit) = (self.outbox.clone(), self.settings.database.timeout);
        let claim = async move {
            crash_window!("before-claim");
            let found = bounded("claiming events", limit, outbox.claim(&mut connection, &request)).await?;
            if !found.batches.is_empty() {
                crash_window!("after-claim");
            }
            Ok((connection, found))
        };
        self.claim = Some(claim.boxed());
    }

    fn request(&self) -> ClaimRequest {
        let processor = &self.settings.outbox.processor;
        let mut request = ClaimRequest {
            lease: self.lease,
            after: 0,
            snapshot: None,
            skipped: Vec::new(),
            open: self.pipeline.open_batches(),
            stopped: Partitions::default(),
            kept_back: Vec::new(),
            looks_back: false,
            hold: processor.after_failure == AfterFailure::Hold,
            max_events: per_claim(processor.batch_size),
            max_bytes: half(processor.max_in_flight_bytes),
            batch_size: i64::from(processor.batch_size),
            max_payload_bytes: i64::try_from(self.settings.publishing.max_payload_bytes).unwrap_or(i64::MAX),
            stream_prefix: self.settings.redis.stream_prefix.clone(),
        };
        self.cursor.aim(&mut request);
        self.exceptions.aim(&mut request);
        request
    }

    fn on_claimed(&mut self, (connection, claim): (PgConnection, Claim)) -> Result<(), SessionError> {
        self.claims = Some(connection);
        self.reporter.metrics.claim.record(self.claim_started.elapsed());
        if !claim.held {
            return Err(SessionError::LeaseLost);
        }
        if !claim.batches.is_empty() {
            self.markers.on_disk(self.claim_started);
        }
        let now = Instant::now();
        if self.sweeping {
            self.rested = now + (now - self.claim_started) * SWEEP_SHARE;
            let next = self.rested.max(now + self.settings.outbox.processor.poll_interval);
            self.next_sweep = if self.sweep_again { now } else { next };
        }
        self.decide_sleep(!claim.batches.is_empty() || claim.waiting > 0, now);
        let found: usize = claim.batches.iter().map(|batch| batch.events.len()).sum();
        if found >= STEADY && claim.cut_at.is_none() {
            let events = u32::try_from(found).unwrap_or(u32::MAX);
            self.not_before = self.claim_started + LINGER_PER_EVENT.saturating_mul(events).min(LONGEST_LINGER);
        }
        self.cursor.advance(&claim);
        self.pipeline.claimed(claim.batches);
        Ok(())
    }

    /// Found something: look again at once. Found nothing: ask for the sleep lock, and look again when it is granted.
    fn decide_sleep(&mut self, found: bool, now: Instant) {
        if !found {
            self.busy_since = None;
            self.sleep.ask();
            return;
        }
        self.dirty = true;
        let since = *self.busy_since.get_or_insert(now);
        if now - since > AWAKE_AFTER && self.sleep.is_held() {
            self.sleep.release();
        }
    }

    fn on_appended(&mut self, ended: Ended) -> Result<(), SessionError> {
        match ended {
            Ended::Known { batch, appended, last_entry, refusals } => {
                refusals.iter().for_each(|refusal| log_refusal(&batch, refusal));
                self.measure(&batch, appended, &refusals);
                if appended > 0 {
                    self.chains.appended(&batch.stream, batch.id, Instant::now());
                }
                self.pipeline.appended(batch, appended, last_entry, refusals);
                Ok(())
            }
            Ended::Lost(error) => Err(SessionError::Streams(error)),
            Ended::TakenOver => Err(SessionError::LeaseLost),
        }
    }

    fn measure(&self, batch: &Batch, appended: usize, refusals: &[Refusal]) {
        let metrics = &self.reporter.metrics;
        if appended > 0 {
            metrics.latency.record(batch.age + batch.claimed.elapsed());
            metrics.batch_events.record(appended as f64);
            metrics.events.count(batch.events.iter().take(appended).map(|event| event.event_type.as_str()), Outcome::Published);
        }
        for refusal in refusals {
            let outcome = if refusal.retry_after.is_some() { Outcome::Refused } else { Outcome::Failed };
            let of_this = batch.events.iter().filter(|event| event.id == refusal.event_id);
            metrics.events.count(of_this.map(|event| event.event_type.as_str()), outcome);
        }
    }

    /// When the table is looked through from its low end: now and then, and when a refused event is due.
    fn sweep_due(&self) -> Instant {
        self.retries.next().map_or(self.next_sweep, |retry| self.next_sweep.min(retry.max(self.rested)))
    }

    /// A claim waits for nothing but its time.
    fn lingers(&self) -> bool {
        !self.is_paused && self.dirty && self.claims.is_some() && self.pipeline.may_claim()
    }

    /// Nothing is being asked of Redis.
    fn is_quiet(&self) -> bool {
        self.pulse.is_none() && self.appends.is_empty()
    }

    fn start_pulse(&mut self) {
        let now = Instant::now();
        self.next_pulse = now + PULSE_EVERY;
        let (streams, chains) = (self.streams.clone(), self.chains.all(now));
        self.pulse = Some(async move { streams.check(&chains).await }.boxed());
    }

    fn on_pulse(&mut self, alive: Result<(), StreamsError>) -> Result<(), SessionError> {
        match alive {
            // Whether Redis takes what is being appended, that append will tell.
            Ok(()) if self.appends.is_empty() => self.reporter.able(),
            Ok(()) => {}
            Err(lost @ StreamsError::Lost { .. }) => return Err(SessionError::Streams(lost)),
            Err(error) => {
                crate::metrics::redis_failed(&error);
                self.reporter.unable(&error);
            }
        }
        Ok(())
    }

    fn on_settled(&mut self, (connection, settled): (PgConnection, Settled)) {
        self.settles = Some(connection);
        let retried = std::mem::take(&mut self.retried);
        if after_publishing(&self.settings.outbox.cleanup) == AfterPublishing::Delete {
            self.exceptions.note_kept(settled.refused.as_deref());
        }
        if !(retried.is_empty() && settled.stuck.is_empty() && settled.unwritten.is_empty()) {
            self.exceptions.settled(&retried, settled, Instant::now());
            self.report_exceptions();
        }
        let done = self.pipeline.settled();
        self.reporter.count(done.published, done.refused, done.failed);
        let now = Instant::now();
        self.markers.settled(done.markers, now);
        self.retries.add(done.retries, now);
        self.dirty |= done.released || done.unblocked;
        if done.unblocked {
            self.look_at_all_again();
        }
    }

    /// What has waited is below the cursor. A sweep that is under way may have looked too early.
    fn look_at_all_again(&mut self) {
        self.dirty = true;
        self.sweep_again = true;
        self.next_sweep = Instant::now();
    }

    /// A relay with stopped partitions cannot work; one that keeps single aggregates back works, and says so.
    fn report_exceptions(&mut self) {
        let error = self.exceptions.error();
        let is_stopped = !self.exceptions.stopped().is_empty();
        self.reporter.unsettled(error.as_ref());
        match &error {
            Some(error) if is_stopped => {
                self.stopped.get_or_insert_with(|| self.reporter.outage());
                self.reporter.unable(error);
            }
            _ => {
                if self.stopped.take().is_some() {
                    self.reporter.able();
                }
            }
        }
    }
}

/// Never, without a time.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits for what is in the slot and empties it. May be dropped at any await.
async fn finish<T>(slot: &mut Slot<T>) -> T {
    let Some(future) = slot else { return std::future::pending().await };
    let output = future.await;
    *slot = None;
    output
}

fn log_refusal(batch: &Batch, refusal: &Refusal) {
    let Some(refused) = batch.events.iter().find(|event| event.id == refusal.event_id) else { return };
    let (stream, event, error) = (&batch.stream, refusal.event_id, &refusal.error);
    let (partition, aggregate) = (refused.partition, &refused.aggregate_id);
    match refusal.retry_after {
        Some(after) => {
            tracing::warn!(stream, batch = %batch.id, partition, aggregate, %event, error, retry_after = ?after, "event refused, to be tried again")
        }
        None => {
            tracing::error!(stream, batch = %batch.id, partition, aggregate, %event, error, "event FAILED: see `commitstream failed list`")
        }
    }
}

fn per_claim(batch_size: u32) -> i64 {
    let batch = i64::from(batch_size);
    (batch * BATCHES_PER_CLAIM).min(MAX_EVENTS_PER_CLAIM).max(batch)
}

/// Half of the bytes may be claimed at once while the other half is in flight.
fn half(max_in_flight_bytes: usize) -> i64 {
    i64::try_from(max_in_flight_bytes / 2).unwrap_or(i64::MAX)
}
