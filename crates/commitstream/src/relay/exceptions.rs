//! What PostgreSQL does not let a relay settle, and what is not claimed meanwhile. Pure: the engine tells what came of a settle.
//!
//! An event whose row cannot become `PUBLISHED` is in its stream already, so it must not be claimed: its open batch keeps it out. Nothing
//! else of its aggregate is claimed either, since that would most likely come to the same. Where PostgreSQL changes nothing and raises no
//! error, as with row-level security, or where there are too many aggregates to name, the whole partition stops.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::settling::Settled;
use crate::backoff;
use crate::outbox::{ClaimRequest, OutboxError, Partitions, StuckBatch, StuckRow};

/// Aggregates that are kept back by name.
const MOST_KEPT_BACK: usize = 100;

/// How long until it is tried again: from the first, doubling, to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(15);

#[derive(Debug, Default)]
pub(super) struct Exceptions {
    stuck: Vec<StuckBatch>,
    /// Refused events whose rows do not say so. They are tried again like any other event.
    unwritten: Vec<StuckRow>,
    retry_at: Option<Instant>,
    attempts: u32,
    /// Why rows were kept that should have been deleted, as it was logged.
    told: Option<String>,
}

impl Exceptions {
    /// When to try again; `None` when nothing is in the way.
    pub fn due(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Starts another attempt if it is time, at these batches. What could not be written down is claimed again.
    pub fn take_due(&mut self, now: Instant) -> Option<Vec<Uuid>> {
        if self.retry_at.is_none_or(|at| at > now) {
            return None;
        }
        if self.stuck.is_empty() && self.unwritten.is_empty() {
            (self.retry_at, self.attempts) = (None, 0);
            return None;
        }
        self.unwritten.clear();
        self.schedule(now);
        Some(self.batches())
    }

    /// Takes in what came of a settle, in which the batches of `retried` were tried again.
    pub fn settled(&mut self, retried: &[Uuid], settled: Settled, now: Instant) {
        self.stuck.retain(|batch| !retried.contains(&batch.batch_id));
        self.stuck.extend(settled.stuck);
        self.unwritten.extend(settled.unwritten);
        if self.retry_at.is_none() && !(self.stuck.is_empty() && self.unwritten.is_empty()) {
            self.schedule(now);
        }
    }

    fn schedule(&mut self, now: Instant) {
        self.retry_at = Some(now + backoff::delay(self.attempts, FIRST_RETRY, LONGEST_RETRY));
        self.attempts = self.attempts.saturating_add(1);
    }

    fn batches(&self) -> Vec<Uuid> {
        self.stuck.iter().map(|batch| batch.batch_id).collect()
    }

    fn rows(&self) -> impl Iterator<Item = &StuckRow> {
        self.stuck.iter().flat_map(|batch| &batch.rows).chain(&self.unwritten)
    }

    /// Writes down what is not to be claimed.
    pub fn aim(&self, request: &mut ClaimRequest) {
        request.stopped = self.stopped();
        let named = self.rows().filter(|row| !request.stopped.contains(row.partition));
        let named: BTreeSet<_> = named.map(|row| (row.aggregate_type.clone(), row.aggregate_id.clone())).collect();
        request.kept_back = named.into_iter().collect();
        request.open.extend(self.batches());
        // They may stand behind the cursor of an engine that has claimed nothing yet.
        request.looks_back |= !self.stuck.is_empty();
    }

    /// Partitions in which nothing is claimed.
    pub fn stopped(&self) -> Partitions {
        let (mut stopped, mut named) = (Partitions::default(), BTreeSet::new());
        for row in self.rows() {
            let aggregate = (&row.aggregate_type, &row.aggregate_id);
            let is_named = named.contains(&aggregate) || (named.len() < MOST_KEPT_BACK && named.insert(aggregate));
            if row.error.is_none() || !is_named {
                stopped.insert(row.partition);
            }
        }
        stopped
    }

    /// Says once that rows could not be deleted as they were published.
    pub fn note_kept(&mut self, refused: Option<&str>) {
        let Some(refused) = refused.filter(|refused| self.told.as_deref() != Some(refused)) else { return };
        tracing::warn!(
            reason = refused,
            "published events could not be deleted at once (retentionDays = 0): they are PUBLISHED, for the clean-up to delete"
        );
        self.told = Some(refused.to_owned());
    }

    /// What stands in the way, by its first row.
    pub fn error(&self) -> Option<OutboxError> {
        let rows = self.rows().count();
        let stuck = self.stuck.first().and_then(|batch| batch.rows.first().map(|row| (batch, row)));
        if let Some((StuckBatch { batch_id, stream, .. }, row)) = stuck {
            let (batch_id, stream, reason) = (*batch_id, stream.clone(), row.reason().to_owned());
            return Some(OutboxError::Unsettled { event_id: row.event_id, batch_id, stream, reason, rows });
        }
        let row = self.unwritten.first()?;
        Some(OutboxError::Unwritten { event_id: row.event_id, reason: row.reason().to_owned(), rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(aggregate: usize, error: Option<&str>) -> StuckRow {
        StuckRow {
            event_id: Uuid::now_v7(),
            aggregate_type: "user".into(),
            aggregate_id: aggregate.to_string(),
            partition: aggregate % 64,
            error: error.map(str::to_owned),
        }
    }

    fn stuck(rows: Vec<StuckRow>) -> StuckBatch {
        StuckBatch { batch_id: Uuid::now_v7(), stream: "events:user".into(), rows }
    }

    #[test]
    fn an_error_keeps_its_aggregate_back_and_silence_stops_the_partition() {
        let now = Instant::now();
        let mut exceptions = Exceptions::default();
        assert_eq!((exceptions.due(), exceptions.stopped()), (None, Partitions::default()));
        let batch = stuck(vec![row(1, Some("no")), row(1, Some("no")), row(2, None)]);
        exceptions.settled(&[], Settled { stuck: vec![batch], ..Settled::default() }, now);
        assert_eq!(exceptions.stopped(), [2].into_iter().collect());
        assert!(exceptions.due().is_some_and(|at| at > now && at <= now + FIRST_RETRY));
    }

    #[test]
    fn more_aggregates_than_can_be_named_stop_their_partitions() {
        let rows = (0..MOST_KEPT_BACK + 3).map(|aggregate| row(aggregate, Some("no"))).collect();
        let mut exceptions = Exceptions::default();
        exceptions.settled(&[], Settled { stuck: vec![stuck(rows)], ..Settled::default() }, Instant::now());
        assert_eq!(exceptions.stopped(), (MOST_KEPT_BACK..MOST_KEPT_BACK + 3).map(|n| n % 64).collect());
    }

    #[test]
    fn what_is_settled_at_last_is_out_of_the_way() {
        let now = Instant::now();
        let mut exceptions = Exceptions::default();
        let (one, other) = (stuck(vec![row(1, Some("no"))]), stuck(vec![row(2, Some("no"))]));
        exceptions.settled(&[], Settled { stuck: vec![one.clone(), other.clone()], ..Settled::default() }, now);
        assert_eq!(exceptions.take_due(now), None, "not yet");
        let later = now + FIRST_RETRY;
        let retried = exceptions.take_due(later).unwrap();
        assert_eq!(retried, [one.batch_id, other.batch_id]);
        exceptions.settled(&retried, Settled { stuck: vec![other.clone()], ..Settled::default() }, later);
        assert_eq!(exceptions.batches(), [other.batch_id]);
        let retried = exceptions.take_due(later + LONGEST_RETRY).unwrap();
        exceptions.settled(&retried, Settled::default(), later + LONGEST_RETRY);
        assert!(exceptions.error().is_none());
        assert_eq!(exceptions.take_due(later + 3 * LONGEST_RETRY), None);
        assert_eq!(exceptions.due(), None);
    }
}
