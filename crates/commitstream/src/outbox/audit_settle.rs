//! After PostgreSQL went back in time: events that stand in their streams though their rows say that they are unsent, and entries whose
//! rows are gone.

use sqlx::{Connection, PgConnection};

use super::relays::ALIVE;
use super::{OutboxError, OutboxRepository};

/// Entries without a row that the clean-up does not explain. It deletes what was published first, so what came a while after the oldest
/// published row that is there would have its row. Only streams count to which the outbox writes: in others are events of the direct lane.
const ROWLESS: &str = "
INSERT INTO pg_temp.audit_finding (kind, event_id, stream, ordinal, entry_id)
SELECT 'rowless', e.event_id, s.key, e.position, e.entry_id
FROM pg_temp.audit_entry e JOIN pg_temp.audit_stream s USING (stream)
WHERE e.event_id IS NOT NULL
  AND split_part(e.entry_id, '-', 1)::numeric > (
      SELECT (extract(epoch FROM min(published_at)) + 60) * 1000 FROM {s}.event_outbox
      WHERE status = 'PUBLISHED' AND published_at > '-infinity' AND published_at < 'infinity')
  AND s.key IN (SELECT $1 || aggregate_type FROM {s}.event_outbox UNION SELECT stream FROM {s}.outbox_batch)
  AND NOT EXISTS (SELECT 1 FROM {s}.event_outbox o WHERE o.id = e.event_id)
  AND NOT EXISTS (SELECT 1 FROM (SELECT unnest(event_ids) AS id FROM {s}.outbox_batch) AS b WHERE b.id = e.event_id)";

/// What the audit found unsettled, in the stream where it belongs; it stays until the session ends.
const STREAMED: &str = "
SET LOCAL client_min_messages = warning;
DROP TABLE IF EXISTS pg_temp.audit_streamed;
CREATE TEMP TABLE audit_streamed (event_id uuid NOT NULL PRIMARY KEY, entry_id text NOT NULL)";

const KEEP_STREAMED: &str = "
INSERT INTO pg_temp.audit_streamed (event_id, entry_id)
SELECT event_id, entry_id FROM pg_temp.audit_finding WHERE kind = 'unsettled' AND stream = $1 || aggregate_type";

/// Claims wait for it, and those under way are waited for: what they took is in the journal then.
const LOCK_LEASES: &str = "SELECT 1 FROM {s}.outbox_lease ORDER BY partition_no FOR UPDATE";

/// A step, with its row in the action log. The time of an entry is when its event was published.
const SETTLE: &str = "
WITH step AS (
    DELETE FROM pg_temp.audit_streamed
    WHERE event_id = ANY (ARRAY(SELECT event_id FROM pg_temp.audit_streamed ORDER BY event_id LIMIT 5000))
    RETURNING event_id, split_part(entry_id, '-', 1)::numeric AS ms
), settled AS (
    UPDATE {s}.event_outbox o
    SET status = 'PUBLISHED', next_retry_at = NULL,
        published_at = GREATEST(o.created_at, CASE WHEN step.ms < extract(epoch FROM statement_timestamp()) * 1000
                                                   THEN to_timestamp(step.ms / 1000) ELSE statement_timestamp() END)
    FROM step
    WHERE o.id = step.event_id AND o.status || '' <> 'PUBLISHED'
      AND NOT EXISTS (SELECT 1 FROM {s}.outbox_batch b WHERE b.settled_at IS NULL AND o.id = ANY (b.event_ids))
    RETURNING o.id
), noted AS (
    INSERT INTO {s}.outbox_audit (who, action, about, events, event_ids)
    SELECT $1, 'settle', 'events that stand in their streams', count(*), array_agg(id) FROM settled HAVING count(*) > 0
)
SELECT (SELECT count(*) FROM step), (SELECT count(*) FROM settled)";

/// For the comparison, in its transaction.
pub(super) async fn find(outbox: &OutboxRepository, transaction: &mut PgConnection, prefix: &str) -> Result<(), sqlx::Error> {
    sqlx::query(outbox.sql(ROWLESS)).bind(prefix).execute(&mut *transaction).await?;
    sqlx::raw_sql(STREAMED).execute(&mut *transaction).await?;
    sqlx::query(KEEP_STREAMED).bind(prefix).execute(transaction).await.map(drop)
}

impl OutboxRepository {
    /// Nobody claims events: relays are paused, or there is none.
    ///
    /// # Errors
    /// [`OutboxError::NotPaused`] otherwise; or PostgreSQL cannot be asked.
    pub(crate) async fn check_paused(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        let sql = format!(
            "SELECT EXISTS (SELECT FROM {{s}}.outbox_pause)
                 OR NOT EXISTS (SELECT FROM {{s}}.outbox_relay r WHERE shares AND {ALIVE})"
        );
        let query = sqlx::query_scalar::<_, bool>(self.sql(&sql));
        let is_quiet = query.fetch_one(connection).await.map_err(self.error("asking whether relays are paused"))?;
        if is_quiet { Ok(()) } else { Err(OutboxError::NotPaused) }
    }

    /// Marks as published what the audit before found in its stream and unsettled, unless a batch has taken it since. Returns how many.
    pub(crate) async fn settle_streamed(&self, connection: &mut PgConnection, who: &str) -> Result<u64, OutboxError> {
        let doing = "marking as published what is in the streams";
        let mut all = 0;
        loop {
            let mut tx = connection.begin().await.map_err(self.error(doing))?;
            sqlx::query(self.sql(LOCK_LEASES)).execute(&mut *tx).await.map_err(self.error(doing))?;
            self.check_paused(&mut tx).await?;
            let query = sqlx::query_as(self.sql(SETTLE)).bind(who);
            let (step, settled): (i64, i64) = query.fetch_one(&mut *tx).await.map_err(self.error(doing))?;
            tx.commit().await.map_err(self.error(doing))?;
            all += settled.unsigned_abs();
            if step == 0 {
                return Ok(all);
            }
        }
    }
}
