//! Finds out what became of what was done before: batches that were left open, and batches that Redis had acknowledged and may have lost.
//!
//! A failover of Redis loses the end of a stream, entries and markers together, when its replication is asynchronous. What was lost
//! is an end of every relay's own sequence of batches too, since each appends one batch of a stream at a time. So it is enough to look
//! each sequence's last batch up; only where that is gone, those before it are looked at, until one is found.
//!
//! A batch is of one stream, so all of this is done stream by stream, at the same time. A stream of which Redis cannot be asked is left out of
//! claims and tried again later; the others go on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::stream::{self, StreamExt};
use sqlx::PgConnection;
use tokio::time::Instant;
use uuid::Uuid;

use super::append::Trouble;
use super::cleanup::after_publishing;
use super::session::{Relay, SessionError, bounded};
use super::settling;
use super::status::Reporter;
use crate::config::Settings;
use crate::metrics::{OTHER, Outcome, redis_failed};
use crate::outbox::{AfterPublishing, JournalBatch, OpenBatch, OutboxRepository, Partitions, Requeued, Settlement, StuckBatch};
use crate::streams::{Marker, Presence, Streams, StreamsError};

/// Batches looked up at a time, on the way back to the first that is there.
const PAGE: i64 = 500;

/// Questions about one stream at a time: with many open batches, one round trip after the other would take too long.
const AT_ONCE: usize = 32;

/// Streams at a time. As many as may wait for one server that does not answer should do so at once.
const STREAMS_AT_ONCE: usize = 1_000;

/// Stream key → batches that must be there before another is appended.
pub(super) type Predecessors = HashMap<String, Vec<Uuid>>;

/// What was found out.
#[derive(Debug)]
pub(super) struct Prepared {
    pub predecessors: Predecessors,
    pub looked_up: Instant,
    /// What is in the streams and could not be settled so far.
    pub stuck: Vec<StuckBatch>,
    /// Streams of which Redis could not be asked. Nothing of theirs may be claimed.
    pub unready: BTreeMap<String, Trouble>,
}

/// What is to be found out: of which partitions, and of which streams.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    /// Those of the relay.
    pub partitions: Partitions,
    /// Those of which it does not know what was settled lately.
    pub unknown: Partitions,
    /// Of these streams only, where some are named.
    pub streams: Option<BTreeSet<String>>,
}

impl Scope {
    fn has(&self, stream: &str) -> bool {
        self.streams.as_ref().is_none_or(|streams| streams.contains(stream))
    }
}

#[derive(Debug, Clone)]
pub(super) struct Repair {
    pub outbox: OutboxRepository,
    pub streams: Streams,
    pub settings: Arc<Settings>,
    pub reporter: Reporter,
}

impl Relay {
    pub fn repair(&self, streams: &Streams) -> Repair {
        let (outbox, settings, reporter) = (self.outbox.clone(), self.settings.clone(), self.reporter.clone());
        Repair { outbox, streams: streams.clone(), settings, reporter }
    }
}

impl Repair {
    /// Resolves what was left open, then looks up what was settled lately, and makes unsent again what Redis has lost, before anything
    /// newer is claimed.
    pub async fn prepare(&self, connection: &mut PgConnection, scope: &Scope) -> Result<Prepared, SessionError> {
        let (stuck, mut unready) = self.recover(connection, scope).await?;
        let looked_up = Instant::now();
        let predecessors = self.look_up(connection, scope, &mut unready).await?;
        Ok(Prepared { predecessors, looked_up, stuck, unready })
    }

    /// Resolves every batch with events of these partitions that is not settled: it was left open by an earlier owner, or by an
    /// earlier session of this relay whose commit or append went unanswered. Its marker says what became of it; where there is none it
    /// is aborted, and can no longer be appended by anybody. Returns what is in the streams and cannot be settled, and the streams of which
    /// Redis could not be asked.
    async fn recover(
        &self,
        connection: &mut PgConnection,
        scope: &Scope,
    ) -> Result<(Vec<StuckBatch>, BTreeMap<String, Trouble>), SessionError> {
        let mut unready = BTreeMap::new();
        loop {
            let read = self.outbox.open_batches(connection, scope.partitions);
            let open = bounded("reading open batches", self.timeout(), read).await?;
            let open = open.into_iter().filter(|batch| scope.has(&batch.stream) && !unready.contains_key(&batch.stream));
            let (stuck, open): (Vec<OpenBatch>, Vec<OpenBatch>) = open.partition(|batch| batch.is_stuck);
            let after = after_publishing(&self.settings.outbox.cleanup);
            if open.is_empty() {
                // A repair of some streams beside an engine leaves to it what it tries to settle again.
                let stuck: Vec<Uuid> = stuck.iter().filter(|_| scope.streams.is_none()).map(|batch| batch.batch_id).collect();
                let settled = settling::settle(&self.outbox, connection, &[], &stuck, after, self.timeout()).await?;
                return Ok((settled.stuck, unready));
            }
            self.settle_open(connection, open, after, &mut unready).await?;
            // Another owner may have settled some of them, and set aside what could not be.
        }
    }

    async fn settle_open(
        &self,
        connection: &mut PgConnection,
        open: Vec<OpenBatch>,
        after: AfterPublishing,
        unready: &mut BTreeMap<String, Trouble>,
    ) -> Result<(), SessionError> {
        let batches = open.len();
        let mut by_stream: BTreeMap<String, Vec<OpenBatch>> = BTreeMap::new();
        open.into_iter().for_each(|batch| by_stream.entry(batch.stream.clone()).or_default().push(batch));
        let streams = by_stream.len();
        let resolve = by_stream.into_iter().map(|(stream, batches)| self.resolve_all(stream, batches));
        let mut resolving = stream::iter(resolve).buffer_unordered(STREAMS_AT_ONCE);
        let mut settlements = Vec::new();
        while let Some((stream, resolved, error)) = resolving.next().await {
            settlements.extend(resolved);
            note_unready(unready, stream, error);
        }
        drop(resolving);
        crash_window!("after-resolve");
        settling::settle(&self.outbox, connection, &settlements, &[], after, self.timeout()).await?;
        crash_window!("after-recovery");
        let appended: i32 = settlements.iter().map(|settlement| settlement.appended).sum();
        let appended = u64::try_from(appended).unwrap_or(0);
        let resolved = settlements.len();
        tracing::info!(batches, streams, resolved, appended, unready = unready.len(), "resolved open batches");
        self.reporter.count(appended, 0, 0);
        self.reporter.metrics.prevented.increment(appended);
        self.reporter.metrics.events.add(OTHER, appended, Outcome::Published);
        Ok(())
    }

    /// What became of the open batches of one stream, up to the first that Redis does not answer for.
    async fn resolve_all(&self, stream: String, batches: Vec<OpenBatch>) -> (String, Vec<Settlement>, Option<StreamsError>) {
        let mut settlements = Vec::with_capacity(batches.len());
        // One first: if that is not answered, the others need not be asked for.
        let (first, others) = batches.split_at(1.min(batches.len()));
        for batches in std::iter::once(first).chain(others.chunks(AT_ONCE)) {
            match try_join_all(batches.iter().map(|batch| self.resolve(batch))).await {
                Ok(resolved) => settlements.extend(resolved),
                Err(error) => return (stream, settlements, Some(error)),
            }
        }
        (stream, settlements, None)
    }

    async fn resolve(&self, batch: &OpenBatch) -> Result<Settlement, StreamsError> {
        let life = self.settings.outbox.processor.marker_life;
        let marker = self.streams.resolve(&batch.stream, batch.batch_id, life).await?;
        let events = usize::try_from(batch.events).unwrap_or(0);
        let appended = i32::try_from(marker.count(events)).unwrap_or(i32::MAX);
        tracing::debug!(batch = %batch.batch_id, stream = batch.stream, events, appended, "open batch resolved");
        Ok(Settlement { batch_id: batch.batch_id, appended, last_entry: None, refusals: Vec::new() })
    }

    /// Looks up what was settled lately of the partitions of which this relay does not know it. Returns what the next batch of each stream
    /// must find.
    async fn look_up(
        &self,
        connection: &mut PgConnection,
        scope: &Scope,
        unready: &mut BTreeMap<String, Trouble>,
    ) -> Result<Predecessors, SessionError> {
        if scope.unknown.is_empty() {
            return Ok(Predecessors::new());
        }
        let read = self.outbox.last_batches(connection, scope.unknown, self.window());
        let last = bounded("reading the last batches", self.timeout(), read).await?;
        let mut by_stream: BTreeMap<String, Vec<JournalBatch>> = BTreeMap::new();
        last.into_iter().filter(|batch| scope.has(&batch.stream) && !unready.contains_key(&batch.stream)).for_each(|batch| {
            by_stream.entry(batch.stream.clone()).or_default().push(batch);
        });
        let look = by_stream.into_iter().map(async |(stream, last)| {
            let found = self.streams.presence(&stream, &last).await;
            (stream, last, found)
        });
        let mut looking = stream::iter(look).buffer_unordered(STREAMS_AT_ONCE);
        let mut predecessors = Predecessors::new();
        while let Some((stream, last, found)) = looking.next().await {
            let there = match found {
                Ok(found) => self.still_there(connection, last.iter().zip(found), scope.unknown).await,
                Err(error) => Err(error.into()),
            };
            match there {
                Ok(there) => drop(predecessors.insert(stream, there)),
                Err(SessionError::Streams(error)) => note_unready(unready, stream, Some(error)),
                Err(error) => return Err(error),
            }
        }
        Ok(predecessors)
    }

    async fn still_there(
        &self,
        connection: &mut PgConnection,
        found: impl Iterator<Item = (&JournalBatch, Presence)>,
        partitions: Partitions,
    ) -> Result<Vec<Uuid>, SessionError> {
        let mut there = Vec::new();
        for (batch, presence) in found {
            match presence {
                Presence::Marked => there.push(batch.batch_id),
                Presence::Unmarked => warn_unmarked(batch),
                Presence::Lost => there.extend(self.republish(connection, batch, partitions).await?),
            }
        }
        Ok(there)
    }

    /// Redis has lost this batch: it and those before it that are gone too are unsent again. Returns the one before them, which another
    /// failover may lose.
    async fn republish(
        &self,
        connection: &mut PgConnection,
        newest: &JournalBatch,
        partitions: Partitions,
    ) -> Result<Option<Uuid>, SessionError> {
        let mut lost = vec![newest.batch_id];
        let mut oldest = newest.clone();
        let still_there = loop {
            let read = self.outbox.batches_before(connection, &oldest, partitions, self.window(), PAGE);
            let page = bounded("reading recent batches", self.timeout(), read).await?;
            let found = self.streams.presence(&newest.stream, &page).await?;
            let gone = found.iter().take_while(|presence| **presence == Presence::Lost).count();
            lost.extend(page[..gone].iter().map(|batch| batch.batch_id));
            match page.last() {
                Some(last) if gone == page.len() => oldest = last.clone(),
                _ => break page.get(gone).filter(|_| found[gone] == Presence::Marked).map(|batch| batch.batch_id),
            }
        };
        tracing::error!(
            stream = newest.stream,
            batches = lost.len(),
            "Redis has lost batches that it had acknowledged (a failover, or deleted keys): their events are published again"
        );
        // The oldest first: whatever interrupts this, what remains is found again behind the newest.
        for batches in lost.rchunks(AT_ONCE) {
            self.requeue(connection, &newest.stream, batches, partitions).await?;
        }
        Ok(still_there)
    }

    /// Makes lost batches unsent. Each is aborted first: a call that was on its way to the former master may still come to the new one.
    async fn requeue(
        &self,
        connection: &mut PgConnection,
        stream: &str,
        batches: &[Uuid],
        partitions: Partitions,
    ) -> Result<(), SessionError> {
        let life = self.settings.outbox.processor.marker_life;
        let markers = try_join_all(batches.iter().map(|batch| self.streams.resolve(stream, *batch, life))).await?;
        let is_lost = |marker: &Marker| matches!(marker, Marker::Aborted);
        let lost: Vec<Uuid> =
            batches.iter().zip(&markers).filter(|(_, marker)| is_lost(marker)).map(|(batch, _)| *batch).collect();
        crash_window!("before-requeue");
        let requeue = self.outbox.requeue_lost(connection, &lost, partitions);
        let Requeued { unsent, gone } = bounded("publishing lost batches again", self.timeout(), requeue).await?;
        crash_window!("after-requeue");
        if gone > 0 {
            tracing::error!(stream, events = gone, "lost events whose rows were cleaned up cannot be published again");
        }
        self.reporter.republished(u64::try_from(unsent).unwrap_or(0));
        Ok(())
    }

    /// How far back what was settled is looked up. Markers of settled batches live twice as long: the clocks of PostgreSQL and of the
    /// servers of Redis may differ by the rest.
    pub fn window(&self) -> Duration {
        self.settings.outbox.processor.settled_marker_life / 2
    }

    fn timeout(&self) -> Duration {
        self.settings.database.timeout
    }
}

/// The stream waits if Redis could not be asked about it.
fn note_unready(unready: &mut BTreeMap<String, Trouble>, stream: String, error: Option<StreamsError>) {
    if let Some(error) = error {
        redis_failed(&error);
        unready.insert(stream, Trouble::from(&error));
    }
}

fn warn_unmarked(batch: &JournalBatch) {
    tracing::warn!(
        batch = %batch.batch_id, stream = batch.stream,
        "the marker of a batch is gone, though its entries are there: does Redis evict (maxmemory-policy must be noeviction)?"
    );
}
