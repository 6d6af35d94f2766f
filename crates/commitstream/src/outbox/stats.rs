use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, Row};

use super::{FailedEvent, OutboxError, OutboxRepository, Selection};

/// How the outbox stands.
#[derive(Debug, Clone, Serialize)]
pub struct OutboxStats {
    /// Waiting to be claimed, or for a retry.
    pub pending: i64,
    /// Named by an open batch: on the way to Redis.
    pub processing: i64,
    pub published: i64,
    pub failed: i64,
    /// Age of the oldest event that is not published, pending or processing, by the database's clock.
    pub oldest_pending_age_ms: Option<i64>,
    /// The newest failed events, at most ten.
    pub recent_failures: Vec<FailedEvent>,
}

/// How many failed events the statistics name.
const RECENT_FAILURES: i64 = 10;

impl OutboxRepository {
    /// Counts by status, the age of the oldest unsent event and the newest failures. Counts published rows one by one, so it
    /// takes time in proportion to the table.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn stats(&self, connection: &mut PgConnection) -> Result<OutboxStats, OutboxError> {
        let sql = self.sql(
            "WITH open AS MATERIALIZED (
                 SELECT unnest(event_ids) AS id FROM {s}.outbox_batch WHERE settled_at IS NULL
             ), unsent AS (
                 SELECT count(*) AS events, min(created_at) AS oldest,
                        count(*) FILTER (WHERE status = 'PROCESSING' OR id IN (SELECT id FROM open)) AS processing
                 FROM {s}.event_outbox WHERE status IN ('PENDING', 'PROCESSING')
             )
             SELECT events - processing AS pending, processing, oldest, clock_timestamp() AS now,
                    (SELECT count(*) FROM {s}.event_outbox WHERE status = 'PUBLISHED') AS published,
                    (SELECT count(*) FROM {s}.event_outbox WHERE status = 'FAILED') AS failed
             FROM unsent",
        );
        let row = self.query(sql).fetch_one(&mut *connection).await.map_err(self.error("counting events"))?;
        let read = || -> Result<OutboxStats, sqlx::Error> {
            let oldest: Option<DateTime<Utc>> = row.try_get("oldest")?;
            let now: DateTime<Utc> = row.try_get("now")?;
            Ok(OutboxStats {
                pending: row.try_get("pending")?,
                processing: row.try_get("processing")?,
                published: row.try_get("published")?,
                failed: row.try_get("failed")?,
                oldest_pending_age_ms: oldest.map(|oldest| (now - oldest).num_milliseconds().max(0)),
                recent_failures: Vec::new(),
            })
        };
        let mut stats = read().map_err(self.error("counting events"))?;
        stats.recent_failures = self.failed(connection, &Selection::All { event_type: None }, RECENT_FAILURES).await?;
        Ok(stats)
    }

    /// Whether any event is not published yet, pending or processing. Reads up to the first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn has_unsent(&self, connection: &mut PgConnection) -> Result<bool, OutboxError> {
        self.scalar(self.sql("SELECT EXISTS (SELECT 1 FROM {s}.event_outbox WHERE status IN ('PENDING', 'PROCESSING'))"))
            .fetch_one(connection)
            .await
            .map_err(self.error("looking for unsent events"))
    }
}
