use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::{Counted, OutboxError, OutboxRepository, PUBLISHED};

/// Unsent and failed events are counted up to so many.
const COUNTED: i64 = 10_000;

/// How the outbox stands, at a cost that does not grow with the table.
#[derive(Debug, Clone, Serialize)]
pub struct Glance {
    /// Pending and processing.
    pub unsent: Counted,
    pub failed: Counted,
    /// Age of the oldest unsent event, by the database's clock.
    pub oldest_unsent_ms: Option<i64>,
    pub open_batches: i64,
    /// From insert to the settle, of the events published last: at most 200 of the last minute. The median, and what 99 % do not exceed.
    pub latency_p50_ms: Option<f64>,
    pub latency_p99_ms: Option<f64>,
    /// When one was published last, of those whose rows are there.
    pub last_published_at: Option<DateTime<Utc>>,
    pub is_paused: bool,
}

const GLANCE: &str = "
WITH latest AS MATERIALIZED (
    SELECT created_at, published_at FROM {s}.event_outbox WHERE {published} ORDER BY published_at DESC LIMIT 200
), latency AS (
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM published_at - created_at) * 1000) AS p
    FROM latest WHERE published_at > statement_timestamp() - interval '1 minute'
)
SELECT (SELECT count(*) FROM (SELECT FROM {s}.event_outbox WHERE status IN ('PENDING', 'PROCESSING')
                              ORDER BY seq DESC LIMIT {counted}) AS u) AS unsent,
       (SELECT count(*) FROM (SELECT FROM {s}.event_outbox WHERE status = 'FAILED' ORDER BY created_at DESC LIMIT {counted}) AS f) AS failed,
       (SELECT GREATEST(0, extract(epoch FROM clock_timestamp() - created_at) * 1000)::bigint FROM {s}.event_outbox
        WHERE status IN ('PENDING', 'PROCESSING') ORDER BY seq LIMIT 1) AS oldest,
       (SELECT count(*) FROM {s}.outbox_batch WHERE settled_at IS NULL) AS open_batches,
       (SELECT p[1] FROM latency) AS p50, (SELECT p[2] FROM latency) AS p99,
       (SELECT max(published_at) FROM latest) AS last_published_at,
       EXISTS (SELECT FROM {s}.outbox_pause) AS is_paused";

impl OutboxRepository {
    /// The figures of an overview. Counts up to 10,000 events of a kind.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn glance(&self, connection: &mut PgConnection) -> Result<Glance, OutboxError> {
        let doing = "looking at the outbox";
        let sql = GLANCE.replace("{counted}", &COUNTED.to_string()).replace("{published}", PUBLISHED);
        let row = sqlx::query(self.sql(&sql)).fetch_one(connection).await.map_err(self.error(doing))?;
        glance(&row).map_err(self.error(doing))
    }
}

fn glance(row: &PgRow) -> Result<Glance, sqlx::Error> {
    let counted = |column: &str| {
        let events: i64 = row.try_get(column)?;
        Ok::<_, sqlx::Error>(Counted { events, at_least: events >= COUNTED })
    };
    Ok(Glance {
        unsent: counted("unsent")?,
        failed: counted("failed")?,
        oldest_unsent_ms: row.try_get("oldest")?,
        open_batches: row.try_get("open_batches")?,
        latency_p50_ms: row.try_get("p50")?,
        latency_p99_ms: row.try_get("p99")?,
        last_published_at: row.try_get("last_published_at")?,
        is_paused: row.try_get("is_paused")?,
    })
}
