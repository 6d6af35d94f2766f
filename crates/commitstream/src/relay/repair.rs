//! Finds out what became of what was done before: batches that were left open, and batches that Redis had acknowledged and may have lost.
//!
//! A failover of Redis loses the end of a stream, entries and markers together, when its replication is asynchronous. What was lost
//! is an end of every relay's own sequence of batches too, since each appends one batch of a stream at a time. So it is enough to look
//! each sequence's last batch up; only where that is gone, those before it are looked at, until one is found.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use sqlx::PgConnection;
use uuid::Uuid;

use super::cleanup::after_publishing;
use super::session::{Relay, SessionError, bounded};
use super::settling;
use crate::backoff::Backoff;
use crate::metrics::{OTHER, Outcome, redis_failed};
use crate::outbox::{AfterPublishing, JournalBatch, OpenBatch, Partitions, Requeued, Settlement, StuckBatch};
use crate::streams::{Marker, Presence, StreamsError};

/// Batches looked up at a time, on the way back to the first that is there.
const PAGE: i64 = 500;

/// Questions to Redis at a time: with many open batches or streams, one round trip after the other would take too long.
const AT_ONCE: usize = 32;

/// Stream key → batches that must be there before another is appended.
pub(super) type Predecessors = HashMap<String, Vec<Uuid>>;

impl Relay {
    /// Resolves every batch with events of these partitions that is not settled: it was left open by an earlier owner, or by an
    /// earlier session of this relay whose commit or append went unanswered. Its marker says what became of it; where there is none it
    /// is aborted, and can no longer be appended by anybody. Returns what is in the streams and cannot be settled.
    pub async fn recover(&self, connection: &mut PgConnection, partitions: Partitions) -> Result<Vec<StuckBatch>, SessionError> {
        loop {
            let read = self.outbox.open_batches(connection, partitions);
            let open = bounded("reading open batches", self.timeout(), read).await?;
            let (stuck, open): (Vec<OpenBatch>, Vec<OpenBatch>) = open.into_iter().partition(|batch| batch.is_stuck);
            let stuck: Vec<Uuid> = stuck.iter().map(|batch| batch.batch_id).collect();
            let after = after_publishing(&self.settings.outbox.cleanup);
            if open.is_empty() {
                let settled = settling::settle(&self.outbox, connection, &[], &stuck, after, self.timeout()).await?;
                return Ok(settled.stuck);
            }
            self.settle_open(connection, &open, after).await?;
            // Another owner may have settled some of them, and set aside what could not be.
        }
    }

    async fn settle_open(
        &self,
        connection: &mut PgConnection,
        open: &[OpenBatch],
        after: AfterPublishing,
    ) -> Result<(), SessionError> {
        tracing::info!(batches = open.len(), "resolving open batches");
        let mut settlements = Vec::with_capacity(open.len());
        for batches in open.chunks(AT_ONCE) {
            settlements.extend(join_all(batches.iter().map(|batch| self.resolve(batch))).await);
        }
        crash_window!("after-resolve");
        settling::settle(&self.outbox, connection, &settlements, &[], after, self.timeout()).await?;
        crash_window!("after-recovery");
        let appended: i32 = settlements.iter().map(|settlement| settlement.appended).sum();
        let appended = u64::try_from(appended).unwrap_or(0);
        self.reporter.count(appended, 0, 0);
        self.reporter.metrics.prevented.increment(appended);
        self.reporter.metrics.events.add(OTHER, appended, Outcome::Published);
        Ok(())
    }

    async fn resolve(&self, batch: &OpenBatch) -> Settlement {
        let life = self.settings.outbox.processor.marker_life;
        let mut backoff = Backoff::default();
        let marker: Marker = loop {
            match self.streams.resolve(&batch.stream, batch.batch_id, life).await {
                Ok(marker) => break marker,
                Err(error) => self.wait_out(&error, &mut backoff).await,
            }
        };
        let events = usize::try_from(batch.events).unwrap_or(0);
        let appended = i32::try_from(marker.count(events)).unwrap_or(i32::MAX);
        tracing::info!(batch = %batch.batch_id, stream = batch.stream, events, appended, "open batch resolved");
        Settlement { batch_id: batch.batch_id, appended, last_entry: None, refusals: Vec::new() }
    }

    /// Looks up what was settled lately of these partitions, and makes unsent again what Redis has lost, before anything newer is
    /// claimed. Returns what the next batch of each stream must find. After an outage it starts anew: what it had read may be too old.
    pub async fn look_up(&self, connection: &mut PgConnection, partitions: Partitions) -> Result<Predecessors, SessionError> {
        let mut backoff = Backoff::default();
        loop {
            match self.look_up_once(connection, partitions).await {
                Err(SessionError::Streams(error)) => self.wait_out(&error, &mut backoff).await,
                done => return done,
            }
        }
    }

    async fn look_up_once(&self, connection: &mut PgConnection, partitions: Partitions) -> Result<Predecessors, SessionError> {
        let read = self.outbox.last_batches(connection, partitions, self.window());
        let last = bounded("reading the last batches", self.timeout(), read).await?;
        let mut by_stream: BTreeMap<String, Vec<JournalBatch>> = BTreeMap::new();
        last.into_iter().for_each(|batch| by_stream.entry(batch.stream.clone()).or_default().push(batch));
        let by_stream: Vec<(String, Vec<JournalBatch>)> = by_stream.into_iter().collect();
        let mut predecessors = Predecessors::new();
        for streams in by_stream.chunks(AT_ONCE) {
            let found = try_join_all(streams.iter().map(|(stream, last)| self.streams.presence(stream, last))).await?;
            let batches = streams.iter().flat_map(|(_, last)| last);
            for (batch, presence) in batches.zip(found.into_iter().flatten()) {
                let there = predecessors.entry(batch.stream.clone()).or_default();
                match presence {
                    Presence::Marked => there.push(batch.batch_id),
                    Presence::Unmarked => warn_unmarked(batch),
                    Presence::Lost => there.extend(self.republish(connection, batch, partitions).await?),
                }
            }
        }
        Ok(predecessors)
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

    /// Redis is asked until it answers. Who is told to stop meanwhile drops this.
    async fn wait_out(&self, error: &StreamsError, backoff: &mut Backoff) {
        redis_failed(error);
        self.reporter.unable(error);
        tokio::time::sleep(backoff.next()).await;
    }

    /// How far back what was settled is looked up. Markers of settled batches live twice as long: the clocks of PostgreSQL and of the
    /// servers of Redis may differ by the rest.
    pub fn window(&self) -> Duration {
        self.settings.outbox.processor.settled_marker_life / 2
    }
}

fn warn_unmarked(batch: &JournalBatch) {
    tracing::warn!(
        batch = %batch.batch_id, stream = batch.stream,
        "the marker of a batch is gone, though its entries are there: does Redis evict (maxmemory-policy must be noeviction)?"
    );
}
