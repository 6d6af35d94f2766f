use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::text::readable;
use super::{OutboxError, OutboxRepository, Partitions, millis};

/// A batch that is not settled, as the journal has it.
#[derive(Debug, Clone)]
pub struct OpenBatch {
    pub batch_id: Uuid,
    pub stream: String,
    pub events: i64,
    /// Its events are in the stream, as the journal knows, and their rows could not become `PUBLISHED`.
    pub is_stuck: bool,
}

/// A batch that was settled as appended.
#[derive(Debug, Clone)]
pub struct JournalBatch {
    pub batch_id: Uuid,
    pub stream: String,
    /// Of the claim. Batches of one relay, epoch and stream were appended in the order of `batch_no`.
    pub relay_id: Uuid,
    pub epoch: i64,
    pub batch_no: i64,
    /// The event that was appended last, and the id of its entry where that is known.
    pub last_event: Uuid,
    pub last_entry: Option<String>,
}

/// What became of the events of lost batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requeued {
    /// Unsent again.
    pub unsent: i64,
    /// Their rows have been cleaned up: they cannot be published again. Of all partitions of the batches.
    pub gone: i64,
}

/// Batches of these partitions (`$1`) that were settled as appended within `$2` milliseconds, by the database's clock, and of which
/// these partitions' events were not published again since.
const RECENT: &str = "
    SELECT batch_id, stream, relay_id, epoch, batch_no, event_ids[appended] AS last_event, last_entry
    FROM {s}.outbox_batch
    WHERE settled_at > statement_timestamp() - $2::bigint * interval '1 millisecond' AND appended > 0
      AND partitions & $1::bigint & ~lost <> 0";

/// One statement, one transaction: the events of these partitions (`$2`) in the batches (`$1`) are unsent again, and the batches
/// say so. Of a batch, only those of partitions that it does not name as lost yet: the others were published again since. Rows that an
/// operator has changed meanwhile are left alone. `unstuck`: what was set aside, because its row could not be settled, is lost with its
/// batch, so it is to be sent again. `status || ''` keeps the planner on the key. An aggregate type that ends in `:dead`, of a time when
/// the table took it, may only wait (migration V8).
const REQUEUE: &str = "
WITH found AS MATERIALIZED (
    SELECT batch_id, partitions & $2 & ~lost AS partitions FROM {s}.outbox_batch
    WHERE batch_id = ANY ($1) AND partitions & $2 & ~lost <> 0 FOR UPDATE
), lost AS (
    UPDATE {s}.outbox_batch b SET lost = b.lost | found.partitions FROM found
    WHERE b.batch_id = found.batch_id
    RETURNING b.event_ids[1:b.appended] AS ids, found.partitions
), unstuck AS (
    UPDATE {s}.outbox_batch SET settled_at = clock_timestamp(), appended = 0
    WHERE settled_at IS NULL AND appended IS NOT NULL AND event_ids && ARRAY(SELECT unnest(ids) FROM lost)
), again AS (
    UPDATE {s}.event_outbox e SET status = 'PENDING', published_at = NULL,
        next_retry_at = CASE WHEN e.aggregate_type LIKE '%:dead' THEN statement_timestamp() ELSE e.next_retry_at END
    FROM (SELECT unnest(ids) AS id, partitions FROM lost) AS l
    WHERE e.id = l.id AND e.status || '' = 'PUBLISHED'
      AND (l.partitions >> e.partition_no::int) & 1 = 1
    RETURNING 1
)
SELECT (SELECT count(*) FROM again) AS unsent, (SELECT count(*) FROM lost) AS noted,
       (SELECT count(*) FROM {s}.outbox_batch WHERE batch_id = ANY ($1) AND partitions & $2 & ~lost <> 0) AS to_note,
       (SELECT count(*) FROM lost, unnest(ids) AS lost_id JOIN {s}.event_outbox e ON e.id = lost_id
        WHERE e.status || '' = 'PUBLISHED' AND (lost.partitions >> e.partition_no::int) & 1 = 1) AS published,
       (SELECT count(*) FROM lost, unnest(ids) AS lost_id
        WHERE NOT EXISTS (SELECT 1 FROM {s}.event_outbox e WHERE e.id = lost_id)) AS gone";

impl OutboxRepository {
    /// The batches with events of these partitions that nobody has settled, oldest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn open_batches(
        &self,
        connection: &mut PgConnection,
        partitions: Partitions,
    ) -> Result<Vec<OpenBatch>, OutboxError> {
        let sql = self.sql(
            "SELECT batch_id, stream, cardinality(event_ids)::bigint AS events, appended IS NOT NULL AS is_stuck FROM {s}.outbox_batch
             WHERE settled_at IS NULL AND partitions & $1 <> 0 ORDER BY batch_no",
        );
        let doing = "reading open batches";
        let rows = sqlx::query(sql).bind(partitions.bits()).fetch_all(connection).await.map_err(self.error(doing))?;
        let batch = |row: &PgRow| -> Result<OpenBatch, sqlx::Error> {
            Ok(OpenBatch {
                batch_id: row.try_get("batch_id")?,
                stream: readable(row, "stream")?,
                events: row.try_get("events")?,
                is_stuck: row.try_get("is_stuck")?,
            })
        };
        rows.iter().map(batch).collect::<Result<_, _>>().map_err(self.error(doing))
    }

    /// The last appended batch of each relay, epoch and stream within `window`, for these partitions.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn last_batches(
        &self,
        connection: &mut PgConnection,
        partitions: Partitions,
        window: Duration,
    ) -> Result<Vec<JournalBatch>, OutboxError> {
        let doing = "reading the last batches";
        let sql = format!(
            "SELECT DISTINCT ON (relay_id, epoch, stream) * FROM ({RECENT}) AS recent
             ORDER BY relay_id, epoch, stream, batch_no DESC"
        );
        let query = sqlx::query(self.sql(&sql)).bind(partitions.bits()).bind(millis(window));
        let rows = query.fetch_all(connection).await.map_err(self.error(doing))?;
        rows.iter().map(journal_batch).collect::<Result<_, _>>().map_err(self.error(doing))
    }

    /// Up to `limit` batches of the same relay, epoch and stream that were appended before `than`, within `window`, newest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn batches_before(
        &self,
        connection: &mut PgConnection,
        than: &JournalBatch,
        partitions: Partitions,
        window: Duration,
        limit: i64,
    ) -> Result<Vec<JournalBatch>, OutboxError> {
        let doing = "reading recent batches";
        let sql = format!(
            "SELECT * FROM ({RECENT}) AS recent WHERE relay_id = $3 AND epoch = $4 AND stream = $5 AND batch_no < $6
             ORDER BY batch_no DESC LIMIT $7"
        );
        let rows = sqlx::query(self.sql(&sql))
            .bind(partitions.bits())
            .bind(millis(window))
            .bind(than.relay_id)
            .bind(than.epoch)
            .bind(&than.stream)
            .bind(than.batch_no)
            .bind(limit)
            .fetch_all(connection)
            .await
            .map_err(self.error(doing))?;
        rows.iter().map(journal_batch).collect::<Result<_, _>>().map_err(self.error(doing))
    }

    /// Makes the events of these partitions in these batches unsent again, because Redis has lost them. Calling it again changes
    /// nothing.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; all or nothing was done.
    pub async fn requeue_lost(
        &self,
        connection: &mut PgConnection,
        batches: &[Uuid],
        partitions: Partitions,
    ) -> Result<Requeued, OutboxError> {
        let doing = "publishing lost batches again";
        let mut tx = connection.begin().await.map_err(self.error(doing))?;
        let query = sqlx::query(self.sql(REQUEUE)).bind(batches).bind(partitions.bits());
        let row = query.fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let number = |column| row.try_get::<i64, _>(column).map_err(self.error(doing));
        for (changed, meant) in [("noted", "to_note"), ("unsent", "published")] {
            let (changed, meant) = (number(changed)?, number(meant)?);
            // More may be meant by now: a row that was changed since the statement began is read as it was.
            if changed < meant {
                return Err(OutboxError::Unchanged { doing, changed, meant });
            }
        }
        tx.commit().await.map_err(self.error(doing))?;
        Ok(Requeued { unsent: number("unsent")?, gone: number("gone")? })
    }
}

fn journal_batch(row: &PgRow) -> Result<JournalBatch, sqlx::Error> {
    Ok(JournalBatch {
        batch_id: row.try_get("batch_id")?,
        stream: readable(row, "stream")?,
        relay_id: row.try_get("relay_id")?,
        epoch: row.try_get("epoch")?,
        batch_no: row.try_get("batch_no")?,
        last_event: row.try_get("last_event")?,
        last_entry: row.try_get("last_entry")?,
    })
}
