//! The loop of an active relay: claim, append and settle of different batches overlap, and one task decides what starts.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use sqlx::PgConnection;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::append::{self, Ended};
use super::cursor::{self, Cursor};
use super::pipeline::{Batch, Limits, Pipeline, batches_of};
use super::session::{SessionError, bounded};
use super::sleep::SleepLock;
use super::status::Reporter;
use crate::config::Settings;
use crate::outbox::{Claim, ClaimRequest, OutboxError, OutboxRepository, Refusal, SeqRange};
use crate::streams::{Streams, StreamsError};

/// A claim takes this many batches at most, so that small batches do not mean a commit for each.
const BATCHES_PER_CLAIM: i64 = 10;
/// Most events of a claim of several batches.
const MAX_EVENTS_PER_CLAIM: i64 = 2_000;
/// Claims whose events may be between claim and settle.
const CLAIMS_IN_FLIGHT: i64 = 3;
/// How long a relay with work to do goes on being notified, before it gives the sleep lock back.
const AWAKE_AFTER: Duration = Duration::from_millis(20);
/// The sweep takes one part in so many of the time at most, however long it is.
const SWEEP_SHARE: u32 = 20;
/// How often open writers are asked for while there are holes.
const WRITERS_EVERY: Duration = Duration::from_millis(100);
/// Markers whose life waits to be shortened; more are left to expire by themselves.
const MAX_MARKERS: usize = 10_000;

/// What the engine works with.
pub(super) struct Parts {
    pub outbox: OutboxRepository,
    pub streams: Streams,
    pub settings: Arc<Settings>,
    pub reporter: Reporter,
    pub relay_id: Uuid,
    pub epoch: i64,
    pub claims: PgConnection,
    pub settles: PgConnection,
    pub sleep: SleepLock,
}

/// At most one of a kind under way.
type Slot<T> = Option<BoxFuture<'static, T>>;

/// The connection back, the open writers if they were asked for, and what was found.
type Claimed = (PgConnection, Option<HashSet<String>>, Claim);

pub(super) struct Engine {
    outbox: OutboxRepository,
    streams: Streams,
    settings: Arc<Settings>,
    reporter: Reporter,
    relay_id: Uuid,
    epoch: i64,
    sleep: SleepLock,
    pipeline: Pipeline,
    cursor: Cursor,
    /// Highest `seq` claimed in this session: below it, events may be in flight.
    highest: i64,
    /// Something may be waiting in the table.
    dirty: bool,
    busy_since: Option<Instant>,
    next_sweep: Instant,
    sweep_again: bool,
    next_writers: Instant,
    claim_started: Instant,
    sweeping: bool,
    claims: Option<PgConnection>,
    settles: Option<PgConnection>,
    claim: Slot<Result<Claimed, OutboxError>>,
    appends: FuturesUnordered<BoxFuture<'static, Ended>>,
    settle: Slot<Result<PgConnection, SessionError>>,
    expire: Slot<Result<(), StreamsError>>,
    markers: Vec<(String, Uuid)>,
}

impl Engine {
    pub fn new(parts: Parts) -> Self {
        let now = Instant::now();
        let processor = &parts.settings.outbox.processor;
        let limits = Limits {
            events: usize::try_from(per_claim(processor.batch_size) * CLAIMS_IN_FLIGHT).unwrap_or(usize::MAX),
            bytes: half(processor.max_in_flight_bytes),
        };
        Self {
            pipeline: Pipeline::new(limits),
            cursor: Cursor::default(),
            highest: 0,
            dirty: true,
            busy_since: None,
            next_sweep: now,
            sweep_again: false,
            next_writers: now,
            claim_started: now,
            sweeping: false,
            claims: Some(parts.claims),
            settles: Some(parts.settles),
            claim: None,
            appends: FuturesUnordered::new(),
            settle: None,
            expire: None,
            markers: Vec::new(),
            outbox: parts.outbox,
            streams: parts.streams,
            settings: parts.settings,
            reporter: parts.reporter,
            relay_id: parts.relay_id,
            epoch: parts.epoch,
            sleep: parts.sleep,
        }
    }

    /// Runs until `stop` is done and everything in flight is settled, or until something fails. A failure leaves batches
    /// open; the next session finds out what became of them.
    pub async fn run(&mut self, wake: &Notify, stop: impl Future<Output = ()>) -> Result<(), SessionError> {
        let mut stop = std::pin::pin!(stop.fuse());
        let mut stopping = false;
        loop {
            self.start(stopping);
            if stopping && self.pipeline.is_empty() && self.expire.is_none() {
                return Ok(());
            }
            tokio::select! {
                () = &mut stop, if !stopping => stopping = true,
                claimed = finish(&mut self.claim) => self.on_claimed(claimed?),
                Some(ended) = self.appends.next() => self.on_appended(ended)?,
                settled = finish(&mut self.settle) => self.on_settled(settled?),
                expired = finish(&mut self.expire) => self.on_expired(expired),
                done = self.sleep.progress() => {
                    done?;
                    self.dirty = true;
                }
                () = wake.notified() => self.dirty = true,
                () = tokio::time::sleep_until(self.next_sweep), if !self.dirty => self.dirty = true,
            }
        }
    }

    /// Starts whatever may be started.
    fn start(&mut self, stopping: bool) {
        if !stopping
            && self.dirty
            && self.pipeline.may_claim()
            && let Some(connection) = self.claims.take()
        {
            self.start_claim(connection);
        }
        while let Some(batch) = self.pipeline.next_append() {
            self.appends.push(append::append(self.streams.clone(), self.settings.clone(), self.reporter.clone(), batch).boxed());
        }
        if self.settles.is_some()
            && let Some(settlements) = self.pipeline.take_settlements()
            && let Some(mut connection) = self.settles.take()
        {
            let (outbox, limit) = (self.outbox.clone(), self.settings.database.timeout);
            let settle = async move {
                let settled = bounded("settling batches", limit, outbox.settle(&mut connection, &settlements)).await?;
                // Fewer means that another relay has resolved some of them.
                let all = usize::try_from(settled).is_ok_and(|settled| settled == settlements.len());
                if all { Ok(connection) } else { Err(SessionError::LeaseLost) }
            };
            self.settle = Some(settle.boxed());
        }
        if self.expire.is_none() && !self.markers.is_empty() {
            let (streams, markers) = (self.streams.clone(), std::mem::take(&mut self.markers));
            let life = self.settings.outbox.processor.settled_marker_life;
            self.expire = Some(async move { streams.expire_markers(&markers, life).await }.boxed());
        }
    }

    fn start_claim(&mut self, mut connection: PgConnection) {
        if let Some(seq) = self.pipeline.start_claim() {
            self.cursor.rewind_to(seq);
        }
        self.dirty = false;
        self.claim_started = Instant::now();
        self.sweeping = self.claim_started >= self.next_sweep;
        self.sweep_again &= !self.sweeping;
        let ask_writers = self.cursor.has_holes() && self.claim_started >= self.next_writers;
        if ask_writers {
            self.next_writers = self.claim_started + WRITERS_EVERY;
        }
        let request = self.request();
        let (outbox, limit) = (self.outbox.clone(), self.settings.database.timeout);
        let claim = async move {
            // Before the claim: what these transactions committed meanwhile, the claim sees.
            let writers = if ask_writers {
                Some(bounded("asking for open writers", limit, outbox.open_writers(&mut connection)).await?)
            } else {
                None
            };
            let found = bounded("claiming events", limit, outbox.claim(&mut connection, &request)).await?;
            Ok((connection, writers.map(|w| w.into_iter().collect()), found))
        };
        self.claim = Some(claim.boxed());
    }

    fn request(&self) -> ClaimRequest {
        let processor = &self.settings.outbox.processor;
        let everything = || vec![SeqRange { after: 0, to: i64::MAX }];
        let ranges = if self.sweeping { everything() } else { self.cursor.ranges() };
        let looks_back = ranges.first().is_some_and(|r| r.after < self.highest);
        ClaimRequest {
            relay_id: self.relay_id,
            epoch: self.epoch,
            open: if looks_back { self.pipeline.open_batches() } else { Vec::new() },
            ranges,
            max_events: per_claim(processor.batch_size),
            max_bytes: half(processor.max_in_flight_bytes),
            batch_size: i64::from(processor.batch_size),
            max_payload_bytes: i64::try_from(self.settings.publishing.max_payload_bytes).unwrap_or(i64::MAX),
            stream_prefix: self.settings.redis.stream_prefix.clone(),
        }
    }

    fn on_claimed(&mut self, (connection, writers, claim): Claimed) {
        self.claims = Some(connection);
        let now = Instant::now();
        let found = cursor::seen(&claim);
        if self.sweeping {
            let pause = self.settings.outbox.processor.poll_interval.max((now - self.claim_started) * SWEEP_SHARE);
            let found_something_old = found.first().is_some_and(|seq| self.cursor.has_passed(*seq));
            self.next_sweep = if found_something_old || self.sweep_again { now } else { now + pause };
        }
        self.cursor.observe(&found, writers.as_ref());
        self.highest = self.highest.max(found.last().copied().unwrap_or(0));
        self.decide_sleep(!claim.events.is_empty() || !claim.waiting.is_empty(), now);
        self.pipeline.claimed(batches_of(claim.events));
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
            Ended::Known { batch, appended, refusals } => {
                refusals.iter().for_each(|refusal| log_refusal(&batch, refusal));
                self.pipeline.appended(batch, appended, refusals);
                Ok(())
            }
            Ended::TakenOver => Err(SessionError::LeaseLost),
        }
    }

    fn on_settled(&mut self, connection: PgConnection) {
        self.settles = Some(connection);
        let done = self.pipeline.settled();
        self.reporter.count(done.published, done.refused, done.failed);
        let room = MAX_MARKERS.saturating_sub(self.markers.len());
        self.markers.extend(done.markers.into_iter().take(room));
        self.dirty |= done.released || done.unblocked;
        if done.unblocked {
            // What waited behind these is below the cursor. A sweep that is under way may have looked too early.
            self.sweep_again = true;
            self.next_sweep = Instant::now();
        }
    }

    fn on_expired(&mut self, expired: Result<(), StreamsError>) {
        if let Err(error) = expired {
            tracing::debug!(%error, "markers of settled batches keep their full life");
        }
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
    let (stream, event, error) = (&batch.stream, refusal.event_id, &refusal.error);
    match refusal.retry_after {
        Some(after) => {
            tracing::warn!(stream, batch = %batch.id, %event, error, retry_after = ?after, "event refused, to be tried again")
        }
        None => tracing::error!(stream, batch = %batch.id, %event, error, "event FAILED: see `commitstream failed list`"),
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
