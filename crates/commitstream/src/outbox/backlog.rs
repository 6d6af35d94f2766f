use std::time::Duration;

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{OutboxError, OutboxRepository};

/// What is still to be done, counted up to a bound.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Backlog {
    /// Unpublished events, at most [`OutboxRepository::BACKLOG_BOUND`].
    pub events: u32,
    /// Age of the oldest of them, by the database's clock.
    pub oldest: Option<Duration>,
    /// Age of the oldest that waits for nothing and is of a partition of the relay that asked.
    pub oldest_due: Option<Duration>,
    /// `FAILED` events, at most 10,000.
    pub failed: u32,
    /// Batches without a settlement, at most 10,000.
    pub open_batches: u32,
}

/// Each part reads its own index up to a bound, whatever the size of the table.
const BACKLOG: &str = "
WITH unsent AS MATERIALIZED (
    SELECT created_at, next_retry_at, partition_no FROM {s}.event_outbox
    WHERE status IN ('PENDING', 'PROCESSING') ORDER BY seq LIMIT $1
), own AS MATERIALIZED (
    SELECT partition_no FROM {s}.outbox_lease WHERE relay_id = $2
)
SELECT count(*) AS events,
       extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest,
       extract(epoch FROM clock_timestamp() - min(created_at) FILTER (
           WHERE next_retry_at IS NULL AND partition_no IN (SELECT partition_no FROM own)))::float8 AS oldest_due,
       (SELECT count(*) FROM (SELECT FROM {s}.event_outbox WHERE status = 'FAILED' ORDER BY created_at LIMIT 10000) AS f) AS failed,
       (SELECT count(*) FROM (SELECT FROM {s}.outbox_batch WHERE settled_at IS NULL ORDER BY claimed_at LIMIT 10000) AS o) AS open
FROM unsent";

impl OutboxRepository {
    /// Most unpublished events that [`backlog`](Self::backlog) counts.
    pub const BACKLOG_BOUND: i64 = 100_000;

    /// What is still to be done, of all relays; `relay_id` is the one whose due events matter.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn backlog(&self, connection: &mut PgConnection, relay_id: Uuid) -> Result<Backlog, OutboxError> {
        let doing = "reading the backlog";
        let query = sqlx::query(self.sql(BACKLOG)).bind(Self::BACKLOG_BOUND).bind(relay_id);
        let row = query.fetch_one(connection).await.map_err(self.error(doing))?;
        let count = |name: &str| Ok::<_, sqlx::Error>(u32::try_from(row.try_get::<i64, _>(name)?).unwrap_or(u32::MAX));
        let age = |name: &str| Ok::<_, sqlx::Error>(row.try_get::<Option<f64>, _>(name)?.and_then(positive));
        let read = || {
            Ok(Backlog {
                events: count("events")?,
                oldest: age("oldest")?,
                oldest_due: age("oldest_due")?,
                failed: count("failed")?,
                open_batches: count("open")?,
            })
        };
        read().map_err(self.error(doing))
    }
}

/// `created_at` may be set by whoever inserts, and be in the future.
fn positive(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds.max(0.0)).ok()
}
