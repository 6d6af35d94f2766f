use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{OutboxError, OutboxRepository, PARTITIONS};

/// A range of `seq`: above `after`, up to and including `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqRange {
    pub after: i64,
    pub to: i64,
}

/// What to claim, and its bounds.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    pub relay_id: Uuid,
    /// Of the lease, as [`OutboxRepository::take_leases`] returned it.
    pub epoch: i64,
    /// Where to look, lowest first; must not overlap.
    pub ranges: Vec<SeqRange>,
    /// Leave out what these batches name while they are open. Needed when the ranges reach below what was claimed before.
    pub open: Vec<Uuid>,
    /// Most events of the claim, at least 1.
    pub max_events: i64,
    /// Most bytes of payload and headers of the claim; the first event is taken whatever its size.
    pub max_bytes: i64,
    /// Most events of one batch.
    pub batch_size: i64,
    /// An event with more bytes than this comes without payload: it is to be refused, not sent.
    pub max_payload_bytes: i64,
    /// Stream keys are this and the aggregate type.
    pub stream_prefix: String,
}

/// What a claim found.
#[derive(Debug, Clone, Default)]
pub struct Claim {
    /// In `seq` order, each in the batch that names it.
    pub events: Vec<OutboxEvent>,
    /// The `seq` of events that were made waiting ones behind an earlier one of their aggregate, ascending.
    pub waiting: Vec<i64>,
}

/// The outbox row as a model: one claimed event, in the batch that names it.
#[derive(Debug, Clone)]
pub struct OutboxEvent {
    pub batch_id: Uuid,
    pub stream: String,
    pub seq: i64,
    pub id: Uuid,
    pub event_type: String,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub occurred_at: DateTime<Utc>,
    /// JSON text, passed on as it came; `None` when it is over the limit.
    pub payload: Option<String>,
    /// JSON text; empty when there are none.
    pub headers: String,
    /// Bytes of payload and headers, also when the payload was left out.
    pub bytes: i64,
    pub retry_count: i32,
    /// It was refused before, or waited behind such an event: others of its aggregate may be waiting for it.
    pub was_waiting: bool,
}

/// A batch that is not settled, as the journal has it.
#[derive(Debug, Clone)]
pub struct OpenBatch {
    pub batch_id: Uuid,
    pub stream: String,
    pub events: i64,
}

/// One statement, so that the claim is one round trip and one commit:
///
/// * `lease` locks the relay's lease rows: a takeover either sees this claim or makes it find nothing. The epoch shuts out a claim
///   of an earlier session of the same relay that arrives late. `KEY SHARE` lets the lease's renewal pass.
/// * `candidates` are read per range, by index, lowest `seq` first, without their payloads. A waiting event (`next_retry_at` set)
///   counts when it is due and nothing of its aggregate before it is still undue or in flight: what is due before it is in this
///   very claim. Both sides of that compare with one instant: with a running clock, an event could become due between the two.
/// * A fresh event behind a waiting one is `blocked`: it is not claimed, but made a waiting one itself. Then it holds back in
///   turn what comes after it, whatever happens to the first, and order per aggregate needs no memory of the relay's. A row that
///   somebody else has locked is passed over; it stays a hole of the cursor until that transaction has ended.
/// * `open` goes by `batch_id`: the index of open batches is full of dead entries while a long transaction holds back vacuum.
/// * `sized` cuts the claim off by bytes, `chunks` cuts it into batches: one journal row per stream and `batch_size` events.
/// * The answer has the claimed events, and the `seq` of each that became a waiting one.
const CLAIM: &str = "
WITH lease AS MATERIALIZED (
    SELECT count(*) = $1 AS held
    FROM (SELECT 1 FROM {s}.outbox_lease WHERE relay_id = $2 AND epoch = $11 FOR KEY SHARE) AS l
), open AS MATERIALIZED (
    SELECT unnest(event_ids) AS id FROM {s}.outbox_batch
    WHERE cardinality($5::uuid[]) > 0 AND batch_id = ANY ($5) AND COALESCE(settled_at, 'infinity') = 'infinity'
), candidates AS MATERIALIZED (
    SELECT c.*
    FROM unnest($3::bigint[], $4::bigint[]) AS r(after, upto)
    CROSS JOIN LATERAL (
        SELECT e.seq, e.id, e.event_type, e.aggregate_type, e.aggregate_id, e.retry_count, e.payload, e.headers, e.payload_bytes,
               COALESCE(e.occurred_at, e.created_at) AS occurred_at, e.next_retry_at IS NOT NULL AS was_waiting,
               e.next_retry_at IS NULL AND EXISTS (
                   SELECT 1 FROM {s}.event_outbox b
                   WHERE b.aggregate_type = e.aggregate_type AND b.aggregate_id = e.aggregate_id AND b.seq < e.seq
                     AND b.status IN ('PENDING', 'PROCESSING') AND b.next_retry_at IS NOT NULL) AS blocked
        FROM {s}.event_outbox e
        WHERE e.status IN ('PENDING', 'PROCESSING') AND e.seq > r.after AND e.seq <= r.upto
          AND e.id NOT IN (SELECT id FROM open)
          AND (e.next_retry_at IS NULL OR (e.next_retry_at <= statement_timestamp() AND NOT EXISTS (
                   SELECT 1 FROM {s}.event_outbox b
                   WHERE b.aggregate_type = e.aggregate_type AND b.aggregate_id = e.aggregate_id AND b.seq < e.seq
                     AND b.status IN ('PENDING', 'PROCESSING') AND b.next_retry_at IS NOT NULL
                     AND (b.next_retry_at > statement_timestamp() OR b.seq <= r.after OR b.id IN (SELECT id FROM open)))))
        ORDER BY e.seq LIMIT $6
    ) AS c
    WHERE (SELECT held FROM lease)
    ORDER BY c.seq LIMIT $6
), sized AS (
    SELECT c.*, sum(LEAST(payload_bytes, $9::int)) OVER (ORDER BY seq) AS running,
           row_number() OVER (ORDER BY seq) AS n,
           (row_number() OVER (PARTITION BY aggregate_type ORDER BY seq) - 1) / $8 AS chunk
    FROM candidates c WHERE NOT blocked
), chunks AS MATERIALIZED (
    SELECT * FROM sized WHERE running <= $7 OR n = 1
), batches AS MATERIALIZED (
    SELECT gen_random_uuid() AS batch_id, aggregate_type, chunk, array_agg(id ORDER BY seq) AS event_ids
    FROM chunks GROUP BY aggregate_type, chunk
), journal AS (
    INSERT INTO {s}.outbox_batch (batch_id, relay_id, stream, event_ids)
    SELECT batch_id, $2, $10 || aggregate_type, event_ids FROM batches
), waiting AS (
    UPDATE {s}.event_outbox SET next_retry_at = statement_timestamp()
    WHERE id = ANY (ARRAY(
        SELECT id FROM {s}.event_outbox
        WHERE id = ANY (ARRAY(SELECT id FROM candidates WHERE blocked))
          AND status IN ('PENDING', 'PROCESSING') AND next_retry_at IS NULL
        FOR UPDATE SKIP LOCKED))
    RETURNING id
)
SELECT b.batch_id, c.seq, c.id, c.event_type, c.aggregate_type, c.aggregate_id, c.occurred_at, c.retry_count, c.payload_bytes, c.was_waiting,
       CASE WHEN c.payload_bytes <= $9 THEN c.payload::text END AS payload,
       CASE WHEN c.payload_bytes <= $9 AND c.headers <> '{}' THEN c.headers::text ELSE '' END AS headers
FROM chunks c JOIN batches b USING (aggregate_type, chunk)
UNION ALL
SELECT NULL, seq, id, event_type, aggregate_type, aggregate_id, occurred_at, retry_count, payload_bytes, true, NULL, ''
FROM candidates WHERE blocked AND id IN (SELECT id FROM waiting)
ORDER BY seq";

impl OutboxRepository {
    /// Step 1 of the protocol: journals up to `max_events` unsent events in open batches and returns them in `seq` order.
    /// Returns nothing when the relay no longer holds its lease.
    ///
    /// # Errors
    /// When the answer was lost the claim may have been committed: the caller then resolves the open batches.
    pub async fn claim(&self, connection: &mut PgConnection, request: &ClaimRequest) -> Result<Claim, OutboxError> {
        let rows = sqlx::query(self.sql(CLAIM))
            .bind(PARTITIONS)
            .bind(request.relay_id)
            .bind(request.ranges.iter().map(|r| r.after).collect::<Vec<_>>())
            .bind(request.ranges.iter().map(|r| r.to).collect::<Vec<_>>())
            .bind(&request.open)
            .bind(request.max_events)
            .bind(request.max_bytes)
            .bind(request.batch_size)
            .bind(request.max_payload_bytes)
            .bind(&request.stream_prefix)
            .bind(request.epoch)
            .fetch_all(connection)
            .await
            .map_err(self.error("claiming events"))?;
        claim_of(&rows, &request.stream_prefix).map_err(self.error("reading claimed events"))
    }

    /// The batches that nobody has settled, oldest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn open_batches(&self, connection: &mut PgConnection) -> Result<Vec<OpenBatch>, OutboxError> {
        let sql = self.sql(
            "SELECT batch_id, stream, cardinality(event_ids)::bigint AS events FROM {s}.outbox_batch
             WHERE settled_at IS NULL ORDER BY claimed_at, batch_id",
        );
        let rows = sqlx::query(sql).fetch_all(connection).await.map_err(self.error("reading open batches"))?;
        let batch = |row: &PgRow| -> Result<OpenBatch, sqlx::Error> {
            Ok(OpenBatch { batch_id: row.try_get("batch_id")?, stream: row.try_get("stream")?, events: row.try_get("events")? })
        };
        rows.iter().map(batch).collect::<Result<_, _>>().map_err(self.error("reading open batches"))
    }

    /// The transactions that have written to the outbox, or locked rows of it, and are still open, as virtual transaction ids.
    /// An INSERT locks the table before it draws its `seq`, so a missing `seq` can only still arrive from one of these.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn open_writers(&self, connection: &mut PgConnection) -> Result<Vec<String>, OutboxError> {
        sqlx::query_scalar(
            "SELECT DISTINCT virtualtransaction FROM pg_locks
             WHERE locktype = 'relation' AND mode IN ('RowExclusiveLock', 'RowShareLock') AND relation = $1::text::regclass
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        .bind(format!("{}.event_outbox", self.quoted))
        .fetch_all(connection)
        .await
        .map_err(self.error("looking for open transactions that wrote to the outbox"))
    }
}

fn claim_of(rows: &[PgRow], stream_prefix: &str) -> Result<Claim, sqlx::Error> {
    let mut claim = Claim::default();
    for row in rows {
        match row.try_get("batch_id")? {
            Some(batch_id) => claim.events.push(event_of(row, batch_id, stream_prefix)?),
            None => claim.waiting.push(row.try_get("seq")?),
        }
    }
    Ok(claim)
}

fn event_of(row: &PgRow, batch_id: Uuid, stream_prefix: &str) -> Result<OutboxEvent, sqlx::Error> {
    let aggregate_type: String = row.try_get("aggregate_type")?;
    Ok(OutboxEvent {
        batch_id,
        stream: format!("{stream_prefix}{aggregate_type}"),
        seq: row.try_get("seq")?,
        id: row.try_get("id")?,
        event_type: row.try_get("event_type")?,
        aggregate_type,
        aggregate_id: row.try_get("aggregate_id")?,
        occurred_at: row.try_get("occurred_at")?,
        payload: row.try_get("payload")?,
        headers: row.try_get("headers")?,
        bytes: i64::from(row.try_get::<i32, _>("payload_bytes")?),
        retry_count: row.try_get("retry_count")?,
        was_waiting: row.try_get("was_waiting")?,
    })
}
