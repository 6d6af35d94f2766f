//! One event: its row, and the batch that carried it.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::search::EventStatus;
use super::text::{readable, readable_or_null};
use super::{OutboxError, OutboxRepository, dated, parked};

/// An event with all that its row says.
#[derive(Debug, Clone, Serialize)]
pub struct EventDetail {
    pub id: Uuid,
    pub seq: i64,
    pub event_type: String,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub partition: i16,
    pub status: EventStatus,
    pub retry_count: i32,
    pub next_retry_at: Option<DateTime<Utc>>,
    /// Somebody has set `next_retry_at` to `infinity`: it is not tried, and holds its aggregate back.
    pub is_parked: bool,
    pub last_error: Option<String>,
    pub created_at: DateTime<Utc>,
    /// `None` also where it is no date.
    pub published_at: Option<DateTime<Utc>>,
    pub occurred_at: Option<DateTime<Utc>>,
    /// JSON text; the first [`SHOWN`](Self::SHOWN) characters, and one more where there are more.
    pub payload: String,
    pub headers: String,
    /// Of payload and headers.
    pub bytes: i32,
    /// The header `traceparent`, if it is there.
    pub traceparent: Option<String>,
    /// The batch that carries it, or has carried it. The journal keeps a batch for an hour at least.
    pub batch: Option<EventBatch>,
}

impl EventDetail {
    /// Characters of a payload, and of headers, that are for people.
    pub const SHOWN: usize = 100_000;
}

/// A batch of the journal, and the place of an event in it.
#[derive(Debug, Clone, Serialize)]
pub struct EventBatch {
    pub batch_id: Uuid,
    pub relay_id: Uuid,
    pub stream: String,
    pub events: i32,
    /// From 1.
    pub place: i32,
    pub claimed_at: DateTime<Utc>,
    /// `None` while it is open.
    pub settled_at: Option<DateTime<Utc>>,
    pub appended: Option<i32>,
    /// Id of the batch's last entry, where it is known.
    pub last_entry: Option<String>,
}

/// The journal has no index by event. A published row and its batch are written by one statement, so their times are close together; an
/// open batch is one of few. `COALESCE` would hide the index here: this one may wait.
const BATCH: &str = "
SELECT batch_id, relay_id, stream, cardinality(event_ids) AS events, array_position(event_ids, $1) AS place,
       claimed_at, settled_at, appended, last_entry
FROM (SELECT * FROM {s}.outbox_batch WHERE settled_at IS NULL
      UNION ALL
      (SELECT * FROM {s}.outbox_batch
       WHERE settled_at > $2::timestamptz - interval '5 seconds' AND settled_at <= $2::timestamptz + interval '1 second'
       ORDER BY settled_at DESC LIMIT 10000)) AS b
WHERE (partitions >> $3::smallint::int) & 1 = 1 AND $1 = ANY (event_ids)
LIMIT 1";

impl OutboxRepository {
    /// The event of this id, if its row is there.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn event(&self, connection: &mut PgConnection, id: Uuid) -> Result<Option<EventDetail>, OutboxError> {
        let doing = "reading an event";
        let sql = format!(
            "SELECT id, seq, event_type, aggregate_type, aggregate_id, partition_no, status, retry_count, last_error, created_at,
                    {} AS next_retry_at, {} AS is_parked, {} AS published_at, occurred_at, payload_bytes,
                    left(jsonb_pretty(payload), {}) AS payload_text, left(jsonb_pretty(headers), {}) AS headers_text,
                    headers->>'traceparent' AS traceparent
             FROM {{s}}.event_outbox WHERE id = $1",
            dated("next_retry_at"),
            parked("next_retry_at"),
            dated("published_at"),
            EventDetail::SHOWN + 1,
            EventDetail::SHOWN + 1,
        );
        let row = sqlx::query(self.sql(&sql)).bind(id).fetch_optional(&mut *connection).await.map_err(self.error(doing))?;
        let Some(row) = row else { return Ok(None) };
        let mut event = detail(&row).map_err(self.error(doing))?;
        let batch = sqlx::query(self.sql(BATCH))
            .bind(id)
            .bind(event.published_at)
            .bind(event.partition)
            .fetch_optional(connection)
            .await
            .map_err(self.error(doing))?;
        event.batch = batch.as_ref().map(batch_of).transpose().map_err(self.error(doing))?;
        let is_open = event.batch.as_ref().is_some_and(|batch| batch.settled_at.is_none());
        event.status = EventStatus::of(event.status.name(), is_open);
        Ok(Some(event))
    }
}

fn detail(row: &PgRow) -> Result<EventDetail, sqlx::Error> {
    Ok(EventDetail {
        id: row.try_get("id")?,
        seq: row.try_get("seq")?,
        event_type: readable(row, "event_type")?,
        aggregate_type: readable(row, "aggregate_type")?,
        aggregate_id: readable(row, "aggregate_id")?,
        partition: row.try_get("partition_no")?,
        status: EventStatus::of(row.try_get("status")?, false),
        retry_count: row.try_get("retry_count")?,
        next_retry_at: row.try_get("next_retry_at")?,
        is_parked: row.try_get("is_parked")?,
        last_error: readable_or_null(row, "last_error")?,
        created_at: row.try_get("created_at")?,
        published_at: row.try_get("published_at")?,
        occurred_at: row.try_get("occurred_at")?,
        payload: readable(row, "payload_text")?,
        headers: readable(row, "headers_text")?,
        bytes: row.try_get("payload_bytes")?,
        traceparent: row.try_get("traceparent")?,
        batch: None,
    })
}

fn batch_of(row: &PgRow) -> Result<EventBatch, sqlx::Error> {
    Ok(EventBatch {
        batch_id: row.try_get("batch_id")?,
        relay_id: row.try_get("relay_id")?,
        stream: row.try_get("stream")?,
        events: row.try_get("events")?,
        place: row.try_get("place")?,
        claimed_at: row.try_get("claimed_at")?,
        settled_at: row.try_get("settled_at")?,
        appended: row.try_get("appended")?,
        last_entry: row.try_get("last_entry")?,
    })
}
