use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::{OutboxError, OutboxRepository, millis};

/// How one batch ended.
#[derive(Debug, Clone)]
pub struct Settlement {
    pub batch_id: Uuid,
    /// How many of its events, from the first, are in the stream. The others are released.
    pub appended: i32,
    /// Id of its last entry, where it is known.
    pub last_entry: Option<String>,
    /// Those of the released that were refused.
    pub refusals: Vec<Refusal>,
}

/// One event that Redis, or the relay on its behalf, refused.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub event_id: Uuid,
    pub error: String,
    /// Wait before the next attempt, or `None` when the event is to be `FAILED`.
    pub retry_after: Option<Duration>,
}

/// What becomes of the row of a published event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterPublishing {
    /// It becomes `PUBLISHED`, for the clean-up to delete one day.
    Keep,
    /// It is deleted at once. What a failover of Redis loses later cannot be published again.
    Delete,
}

/// One statement, one transaction. A batch that is settled already is left alone. Every row that the batches mean must change, or nothing
/// does: a trigger that returns NULL and row-level security leave a row as it is without an error, and what stays unsent would be sent
/// again. The cast at the end fails then; it has the text that PostgreSQL's log shows.
///
/// Rows are named by arrays and not by joins, so that their keys are the only way to find them: to a planner whose statistics are
/// of an empty table, reading all of it looks as good, and the session keeps the plan while the table grows. The least and the
/// greatest id spare a table that is partitioned by day the days in which there is nothing to find. `COALESCE` keeps the planner from
/// the index of open batches, where dead entries pile up while a long transaction holds back vacuum. `status || ''` does the same for
/// the index of unsent events, which looks empty after an idle time.
const SETTLE: &str = "
WITH settled AS (
    UPDATE {s}.outbox_batch SET settled_at = clock_timestamp(),
        appended = ($2::int[])[array_position($1::uuid[], batch_id)],
        last_entry = ($7::text[])[array_position($1::uuid[], batch_id)]
    WHERE batch_id = ANY ($1) AND COALESCE(settled_at, 'infinity') = 'infinity'
    RETURNING batch_id, event_ids[1:appended] AS event_ids
), sent AS (
    SELECT unnest(event_ids) AS id FROM settled
), published AS (
    {publish}
    WHERE id = ANY (ARRAY(SELECT id FROM sent))
      AND id >= (SELECT id FROM sent ORDER BY id LIMIT 1) AND id <= (SELECT id FROM sent ORDER BY id DESC LIMIT 1)
      AND status || '' IN ('PENDING', 'PROCESSING')
    RETURNING 1
), refused AS (
    UPDATE {s}.event_outbox e
    SET status = CASE WHEN r.retry_ms IS NULL THEN 'FAILED' ELSE 'PENDING' END,
        retry_count = e.retry_count + CASE WHEN r.retry_ms IS NULL THEN 0 ELSE 1 END,
        next_retry_at = clock_timestamp() + r.retry_ms * interval '1 millisecond',
        last_error = r.error
    FROM unnest($3::uuid[], $4::uuid[], $5::text[], $6::bigint[]) AS r(batch_id, id, error, retry_ms)
    WHERE e.id = ANY (ARRAY(SELECT unnest($4))) AND e.id = r.id AND e.status || '' IN ('PENDING', 'PROCESSING')
      AND r.batch_id IN (SELECT batch_id FROM settled)
    RETURNING 1
), rows AS (
    SELECT (SELECT count(*) FROM published) + (SELECT count(*) FROM refused) AS changed,
           (SELECT count(*) FROM sent) + (SELECT count(*) FROM unnest($3) AS batch_id WHERE batch_id IN (SELECT batch_id FROM settled)) AS meant
)
SELECT CASE WHEN changed = meant THEN (SELECT count(*) FROM settled)
            ELSE ('commitstream: ' || changed || ' of ' || meant || ' rows changed')::bigint END
FROM rows";

pub(super) const KEEP: &str =
    "UPDATE {s}.event_outbox SET status = 'PUBLISHED', published_at = clock_timestamp(), next_retry_at = NULL";
const DELETE: &str = "DELETE FROM {s}.event_outbox";

impl OutboxRepository {
    /// Step 3 of the protocol: marks what was appended `PUBLISHED` or deletes it, writes down refusals, and settles the batches.
    /// Returns how many batches this call settled; settling again changes nothing.
    ///
    /// # Errors
    /// [`OutboxError::is_about_rows`] when nothing was done, because a row was refused, was not changed, or is not as it was claimed:
    /// [`settle_rows`](Self::settle_rows) finds out. When the answer was lost it may have been committed: the caller then resolves the
    /// open batches.
    pub async fn settle(
        &self,
        connection: &mut PgConnection,
        settlements: &[Settlement],
        after: AfterPublishing,
    ) -> Result<i64, OutboxError> {
        let publish = match after {
            AfterPublishing::Keep => KEEP,
            AfterPublishing::Delete => DELETE,
        };
        let refusals = || settlements.iter().flat_map(|s| s.refusals.iter().map(|r| (s.batch_id, r)));
        sqlx::query_scalar(self.sql(&SETTLE.replace("{publish}", publish)))
            .bind(settlements.iter().map(|s| s.batch_id).collect::<Vec<_>>())
            .bind(settlements.iter().map(|s| s.appended).collect::<Vec<_>>())
            .bind(refusals().map(|(batch_id, _)| batch_id).collect::<Vec<_>>())
            .bind(refusals().map(|(_, r)| r.event_id).collect::<Vec<_>>())
            .bind(refusals().map(|(_, r)| storable(&r.error)).collect::<Vec<_>>())
            .bind(refusals().map(|(_, r)| r.retry_after.map(millis)).collect::<Vec<_>>())
            .bind(settlements.iter().map(|s| s.last_entry.as_deref()).collect::<Vec<_>>())
            .fetch_one(connection)
            .await
            .map_err(self.error("settling batches"))
    }
}

/// A text that every encoding of a database can hold.
pub(super) fn storable(text: &str) -> String {
    text.replace(['\0', '\u{fffd}'], "?")
}
