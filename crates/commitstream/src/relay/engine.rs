//! The loop of an active relay: claim, append and settle of different batches overlap, and one task decides what starts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use sqlx::PgConnection;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::append::{self, Ended, Outcome, Trouble};
use super::chain::Chains;
use super::cleanup::after_publishing;
use super::exceptions::Exceptions;
use super::markers::{self, Markers};
use super::pipeline::{Limits, Pipeline, Size};
use super::probe::{Idle, next_probe, probe_idle};
use super::repair::{Prepared, Repair, Scope};
use super::retry::Retries;
use super::session::{SessionError, bounded};
use super::settling::{self, Settled};
use super::sleep::SleepLock;
use super::status::Reporter;
use super::turns::Turns;
use super::unready::Unready;
use crate::chain::chain;
use crate::config::{AfterFailure, Settings};
use crate::metrics;
use crate::outbox::{AfterPublishing, Batch, Claim, ClaimRequest, Lease, OutboxError, OutboxRepository, Partitions, Refusal};
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
/// Claims whose events may be between claim and settle: of one stream, and of all together, so that another has room while one is full.
const CLAIMS_OF_A_STREAM: i64 = 3;
const CLAIMS_IN_FLIGHT: i64 = 4;
/// The cursor that nothing but stuck streams is left out of.
const FIRST: usize = 0;
/// How long a relay with work to do goes on being notified, before it gives the sleep lock back.
const AWAKE_AFTER: Duration = Duration::from_millis(20);
/// The sweep takes one part in so many of the time at most, however long it is.
const SWEEP_SHARE: u32 = 20;
/// How often Redis is asked for the last batches while nothing is appended: a failover is noticed without waiting for an event.
const PULSE_EVERY: Duration = Duration::from_secs(1);

/// While many streams cannot get on, this is said no more often.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// What the engine works with.
pub(super) struct Parts {
    /// Nothing is claimed.
    pub is_paused: bool,
    pub repair: Repair,
    pub lease: Lease,
    pub prepared: Prepared,
    pub markers: Markers,
}

/// Sessions that outlive an engine.
pub(super) struct Connections {
    pub claims: PgConnection,
    pub settles: PgConnection,
    pub sleep: SleepLock,
    /// What the engine before knew of what was settled lately.
    pub known: Option<Known>,
}

pub(super) struct Known {
    pub partitions: Partitions,
    chains: Chains,
}

/// At most one of a kind under way.
type Slot<T> = Option<BoxFuture<'static, T>>;

pub(super) struct Engine {
    outbox: OutboxRepository,
    streams: Streams,
    settings: Arc<Settings>,
    reporter: Reporter,
    repair: Repair,
    lease: Lease,
    is_paused: bool,
    sleep: SleepLock,
    pipeline: Pipeline,
    turns: Turns,
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
    /// Which cursor the claim under way is of.
    claiming: usize,
    sweeping: bool,
    /// When an append was last carried out.
    last_append: Option<Instant>,
    reported: Instant,
    claims: Option<PgConnection>,
    settles: Option<PgConnection>,
    claim: Slot<Result<(PgConnection, Claim), OutboxError>>,
    appends: FuturesUnordered<BoxFuture<'static, Ended>>,
    settle: Slot<Result<(PgConnection, Settled), SessionError>>,
    exceptions: Exceptions,
    /// Batches that the settle under way tries again.
    retried: Vec<Uuid>,
    /// Partitions are stopped: this relay does not count as able to work.
    stopped: Option<String>,
    expire: Slot<()>,
    pulse: Slot<Result<(), StreamsError>>,
    unready: Unready,
    probe: Slot<Vec<String>>,
    repairing: Slot<Result<(PgConnection, Prepared), SessionError>>,
    /// Sessions that are being asked whether they are alive.
    session_probe: Slot<Result<Idle, OutboxError>>,
    next_session_probe: Instant,
    markers: Markers,
}

impl Engine {
    pub fn new(parts: Parts, connections: Connections) -> Self {
        let now = Instant::now();
        let Parts { is_paused, repair, lease, prepared, markers } = parts;
        let mut chains = connections.known.map_or_else(|| Chains::new(repair.window()), |known| known.chains);
        chains.found(prepared.predecessors, prepared.looked_up);
        let mut exceptions = Exceptions::default();
        exceptions.settled(&[], Settled { stuck: prepared.stuck, ..Settled::default() }, now);
        Self {
            pipeline: Pipeline::new(limits(&repair.settings)),
            turns: Turns::new(now),
            chains,
            dirty: true,
            not_before: now,
            busy_since: None,
            next_sweep: now,
            rested: now,
            retries: Retries::new(now),
            sweep_again: false,
            next_pulse: now + PULSE_EVERY,
            claim_started: now,
            claiming: 0,
            sweeping: false,
            last_append: None,
            reported: now,
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
            unready: Unready::new(prepared.unready, now),
            probe: None,
            repairing: None,
            session_probe: None,
            next_session_probe: next_probe(),
            markers,
            outbox: repair.outbox.clone(),
            streams: repair.streams.clone(),
            settings: repair.settings.clone(),
            reporter: repair.reporter.clone(),
            repair,
            lease,
            is_paused,
            sleep: connections.sleep,
        }
    }

    /// Runs until `stop` is done and everything in flight is settled, or until something fails. A failure leaves batches
    /// open; the next session finds out what became of them. So does whoever comes after a stop with what stuck streams keep.
    pub async fn run(mut self, wake: &Notify, stop: impl Future<Output = ()>) -> Result<Connections, SessionError> {
        if self.is_paused && self.sleep.is_held() {
            // Producers need not notify meanwhile.
            self.sleep.release();
        }
        self.report_exceptions();
        let mut stop = std::pin::pin!(stop.fuse());
        let mut stopping = false;
        self.report();
        loop {
            self.start(stopping);
            if stopping && self.is_done() {
                return self.end();
            }
            let (sweep_due, next_start) = (self.sweep_due(), self.next_start());
            tokio::select! {
                () = &mut stop, if !stopping => stopping = true,
                claimed = finish(&mut self.claim) => self.on_claimed(claimed?)?,
                Some(ended) = self.appends.next() => self.on_appended(ended)?,
                settled = finish(&mut self.settle) => self.on_settled(settled?),
                () = finish(&mut self.expire) => {}
                alive = finish(&mut self.pulse) => self.on_pulse(alive)?,
                reachable = finish(&mut self.probe) => self.unready.probed(reachable, Instant::now()),
                repaired = finish(&mut self.repairing) => self.on_repaired(repaired?),
                probed = finish(&mut self.session_probe) => self.on_probed(probed?),
                done = self.sleep.progress() => {
                    done?;
                    self.dirty = true;
                }
                () = wake.notified() => self.dirty = true,
                () = until(self.exceptions.due()), if self.settles.is_some() => {}
                // A claim under way may be the sweep that is due.
                () = tokio::time::sleep_until(sweep_due), if !self.dirty && self.claim.is_none() => self.dirty = true,
                () = until(next_start), if !stopping => {}
                () = tokio::time::sleep_until(self.next_pulse), if self.is_quiet() => self.start_pulse(),
                () = tokio::time::sleep_until(self.next_session_probe), if self.has_idle_session() => self.start_session_probe(),
            }
        }
    }

    fn is_done(&self) -> bool {
        self.pipeline.is_drained()
            && self.claim.is_none()
            && self.expire.is_none()
            && self.repairing.is_none()
            && self.settle.is_none()
            && self.session_probe.is_none()
    }

    fn end(self) -> Result<Connections, SessionError> {
        let (claims, settles) = self.claims.zip(self.settles).ok_or(SessionError::LeaseLost)?;
        let known = Known { partitions: self.lease.partitions, chains: self.chains };
        let known = self.unready.is_empty().then_some(known);
        Ok(Connections { claims, settles, sleep: self.sleep, known })
    }

    /// Starts whatever may be started.
    fn start(&mut self, stopping: bool) {
        if !stopping {
            self.start_repair();
            self.start_retries();
        }
        if !stopping && !self.is_paused && self.pipeline.may_claim() && self.claims.is_some() && self.is_for_a_look() {
            self.choose_claim();
        }
        while let Some(attempt) = self.pipeline.next_append() {
            self.start_append(attempt);
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
            // What could not be written down is no more told until it fails again.
            self.report_exceptions();
            self.turns.begin_anew();
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

    /// The first cursor has something to look for, or another one is ahead of it.
    fn is_for_a_look(&self) -> bool {
        let now = Instant::now();
        self.dirty && now >= self.not_before || self.turns.next_look().is_some_and(|next| next <= now)
    }

    fn choose_claim(&mut self) {
        let now = Instant::now();
        let mut left_out = self.pipeline.left_out();
        left_out.extend(self.unready.aggregate_types(&self.settings.redis.stream_prefix));
        let ready = self.dirty && now >= self.not_before;
        if let Some(chosen) = self.turns.choose(left_out, &self.pipeline.full(), ready, now)
            && let Some(connection) = self.claims.take()
        {
            self.start_claim(connection, chosen);
        }
    }

    fn start_append(&mut self, attempt: append::Attempt) {
        let behind = self.chains.behind(&attempt.batch.stream, Instant::now());
        let (streams, settings, reporter) = (self.streams.clone(), self.settings.clone(), self.reporter.clone());
        self.appends.push(append::append(streams, settings, reporter, attempt, behind).boxed());
    }

    /// Stuck streams are tried again; what they may not keep is put down.
    fn start_retries(&mut self) {
        let now = Instant::now();
        while let Some(attempt) = self.pipeline.next_retry(now) {
            self.start_append(attempt);
        }
        while let Some((stream, trouble)) = self.pipeline.put_down() {
            self.unready.insert(stream, trouble, now);
        }
    }

    /// Streams that could not be asked about are asked for again, and then repaired.
    fn start_repair(&mut self) {
        if self.probe.is_none() && self.repairing.is_none() && self.unready.is_due(Instant::now()) {
            let (streams, unready) = (self.streams.clone(), self.unready.streams());
            self.probe = Some(async move { streams.reachable(unready).await }.boxed());
        }
        if self.repairing.is_none()
            && self.unready.has_reachable()
            && let Some(mut connection) = self.claims.take()
        {
            let partitions = self.lease.partitions;
            let scope = Scope { partitions, unknown: partitions, streams: Some(self.unready.take_reachable()) };
            let repair = self.repair.clone();
            let repairing = async move { repair.prepare(&mut connection, &scope).await.map(|prepared| (connection, prepared)) };
            self.repairing = Some(repairing.boxed());
        }
    }

    fn on_repaired(&mut self, (connection, prepared): (PgConnection, Prepared)) {
        self.claims = Some(connection);
        self.chains.found(prepared.predecessors, prepared.looked_up);
        self.unready.repaired(prepared.unready, Instant::now());
        self.dirty = true;
        self.report();
    }

    fn start_claim(&mut self, mut connection: PgConnection, chosen: usize) {
        if let Some(seq) = self.pipeline.start_claim() {
            self.turns.rewind_to(seq);
        }
        self.claiming = chosen;
        self.claim_started = Instant::now();
        let is_first = chosen == FIRST;
        self.dirty &= !is_first;
        self.sweeping = is_first && self.claim_started >= self.sweep_due();
        self.sweep_again &= !self.sweeping;
        if self.sweeping {
            self.turns.rewind();
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
            max_bytes: parts(processor.max_in_flight_bytes, 4),
            batch_size: i64::from(processor.batch_size),
            max_payload_bytes: i64::try_from(self.settings.publishing.max_payload_bytes).unwrap_or(i64::MAX),
            stream_prefix: self.settings.redis.stream_prefix.clone(),
            left_out: Vec::new(),
            up_to: i64::MAX,
        };
        self.turns.aim(self.claiming, &mut request);
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
        if self.claiming == FIRST {
            self.decide_sleep(!claim.batches.is_empty() || claim.waiting > 0 || claim.cut_at.is_some(), now);
            let found: usize = claim.batches.iter().map(|batch| batch.events.len()).sum();
            if found >= STEADY && claim.cut_at.is_none() {
                let events = u32::try_from(found).unwrap_or(u32::MAX);
                self.not_before = self.claim_started + LINGER_PER_EVENT.saturating_mul(events).min(LONGEST_LINGER);
            }
        }
        self.turns.advance(self.claiming, &claim, now);
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
        let now = Instant::now();
        match ended {
            Ended::Known(batch, outcome) => {
                outcome.refusals.iter().for_each(|refusal| log_refusal(&batch, refusal));
                self.measure(&batch, &outcome);
                if outcome.appended > 0 {
                    self.chains.appended(&batch.stream, batch.id, now);
                    self.last_append = Some(now);
                }
                self.pipeline.appended(batch, outcome, now);
                self.report();
                Ok(())
            }
            Ended::Waits(attempt, trouble) => {
                self.pipeline.waits(attempt, trouble, now);
                self.report();
                Ok(())
            }
            Ended::Lost(error) => Err(SessionError::Streams(error)),
            Ended::TakenOver => Err(SessionError::LeaseLost),
        }
    }

    /// What cannot get on is said of this relay: it is unable only if a server is at fault and nothing was appended since.
    fn report(&mut self) {
        let (waiting, now) = (self.pipeline.waiting(), Instant::now());
        if waiting.are_many() && now < self.reported + REPORT_EVERY {
            return;
        }
        self.reported = now;
        let streams = waiting.len() + self.unready.len();
        let text = waiting.first().or_else(|| self.unready.first()).map(|first| told(streams, first));
        let since = waiting.without_server_since().into_iter().chain(self.unready.without_server_since()).min();
        match (since, &text) {
            _ if self.stopped.is_some() => self.reporter.unable_for(self.stopped.as_deref().unwrap_or_default()),
            (Some(since), Some(reason)) if self.last_append.is_none_or(|last| last < since) => self.reporter.unable_for(reason),
            _ => self.reporter.able(),
        }
        self.reporter.waiting(streams, text);
    }

    fn measure(&self, batch: &Batch, outcome: &Outcome) {
        let (metrics, appended) = (&self.reporter.metrics, outcome.appended);
        if appended > 0 {
            metrics.latency.record(batch.age + batch.claimed.elapsed());
            metrics.batch_events.record(appended as f64);
            metrics
                .events
                .count(batch.events.iter().take(appended).map(|event| event.event_type.as_str()), metrics::Outcome::Published);
        }
        if outcome.refusals.is_empty() {
            return;
        }
        let types: HashMap<Uuid, &str> = batch.events.iter().map(|event| (event.id, event.event_type.as_str())).collect();
        for refusal in &outcome.refusals {
            let outcome = if refusal.retry_after.is_some() { metrics::Outcome::Refused } else { metrics::Outcome::Failed };
            metrics.events.count(types.get(&refusal.event_id).copied().into_iter(), outcome);
        }
    }

    /// When the table is looked through from its low end: now and then, and when a refused event is due.
    fn sweep_due(&self) -> Instant {
        self.retries.next().map_or(self.next_sweep, |retry| self.next_sweep.min(retry.max(self.rested)))
    }

    /// When something may be started that waits for nothing but its time: a claim, another attempt of a stuck stream, a repair.
    fn next_start(&self) -> Option<Instant> {
        let may_claim = !self.is_paused && self.claims.is_some() && self.pipeline.may_claim();
        let first = (may_claim && self.dirty).then_some(self.not_before);
        let ahead = self.turns.next_look().filter(|_| may_claim);
        let repair = self.unready.next().filter(|_| self.probe.is_none() && self.repairing.is_none());
        let now = Instant::now();
        // What is due already waits for something else: a stream that is full.
        let claims = first.into_iter().chain(ahead).filter(|next| *next > now);
        claims.chain(self.pipeline.waiting().next()).chain(repair).min()
    }

    /// Nothing is being asked of Redis.
    fn is_quiet(&self) -> bool {
        self.pulse.is_none() && !self.pipeline.is_appending()
    }

    fn start_pulse(&mut self) {
        let now = Instant::now();
        self.next_pulse = now + PULSE_EVERY;
        let (streams, chains) = (self.streams.clone(), self.chains.all(now));
        self.pulse = Some(async move { streams.check(&chains).await }.boxed());
    }

    fn has_idle_session(&self) -> bool {
        self.session_probe.is_none() && (self.claims.is_some() || self.settles.is_some())
    }

    fn start_session_probe(&mut self) {
        self.session_probe = Some(probe_idle((self.claims.take(), self.settles.take())).boxed());
    }

    fn on_probed(&mut self, (claims, settles): Idle) {
        self.claims = self.claims.take().or(claims);
        self.settles = self.settles.take().or(settles);
        self.next_session_probe = next_probe();
    }

    fn on_pulse(&mut self, alive: Result<(), StreamsError>) -> Result<(), SessionError> {
        match alive {
            // Whether Redis takes what is being appended, that append will tell.
            Ok(()) => self.report(),
            Err(lost @ StreamsError::Lost { .. }) => return Err(SessionError::Streams(lost)),
            Err(error) => {
                metrics::redis_failed(&error);
                if error.is_of_server() {
                    self.reporter.unable(&error);
                }
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
            // What is not kept back any more stands behind cursors that have passed it over.
            self.turns.begin_anew();
            self.dirty = true;
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
        self.stopped = error.as_ref().filter(|_| is_stopped).map(|error| chain(error));
        self.report();
    }
}

/// Waits for what is in the slot and empties it. May be dropped at any await.
async fn finish<T>(slot: &mut Slot<T>) -> T {
    let Some(future) = slot else { return std::future::pending().await };
    let output = future.await;
    *slot = None;
    output
}

/// Waits until then, if there is such a time.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn told(streams: usize, (stream, trouble): (&str, &Trouble)) -> String {
    match streams {
        1 => format!("{stream} waits: {}", trouble.reason),
        _ => format!("{streams} streams wait, {stream} for longest: {}", trouble.reason),
    }
}

fn limits(settings: &Settings) -> Limits {
    let processor = &settings.outbox.processor;
    let events = |claims: i64| usize::try_from(per_claim(processor.batch_size) * claims).unwrap_or(usize::MAX);
    let bytes = processor.max_in_flight_bytes;
    // One claim more may be under way, of a quarter of the bytes: all in all they are not exceeded.
    Limits {
        all: Size { events: events(CLAIMS_IN_FLIGHT), bytes: parts(bytes, 2) },
        stream: Size { events: events(CLAIMS_OF_A_STREAM), bytes: parts(bytes, 8) },
        stuck: Size { events: events(CLAIMS_IN_FLIGHT), bytes: parts(bytes, 4) },
    }
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

fn parts(bytes: usize, parts: usize) -> i64 {
    i64::try_from(bytes / parts).unwrap_or(i64::MAX)
}
