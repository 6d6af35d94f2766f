use chrono::{DateTime, Utc};
use sqlx::{PgConnection, Row};

use super::{COUNTED, OutboxError, OutboxRepository};
use crate::outbox::PUBLISHED;
use crate::outbox::relays::ALIVE;

/// The first unsent events in the order of `seq`, at most [`COUNTED`] and one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backlog {
    pub events: i64,
    /// Age of the oldest that does not wait for a retry.
    pub oldest_ms: Option<i64>,
    /// Those that were refused and wait for another attempt, and those behind one.
    pub waiting: i64,
    /// Aggregates that these are of.
    pub blocked: i64,
}

/// The newest failed events, at most [`COUNTED`] and one.
#[derive(Debug, Clone, Default)]
pub struct FailedFacts {
    pub events: i64,
    pub aggregates: i64,
    /// Why the newest of them failed.
    pub newest_error: Option<String>,
}

/// When something happened, by the database's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct History {
    pub now: DateTime<Utc>,
    /// Whether any event was ever written; `None` if this user may not know.
    pub ever_written: Option<bool>,
    /// Of what is still there.
    pub last_write: Option<DateTime<Utc>>,
    /// The oldest published event that was not cleaned up.
    pub oldest_published: Option<DateTime<Utc>>,
}

/// Open batches whose relay is dead, of the first [`COUNTED`] open ones.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenFacts {
    pub orphaned: i64,
    pub oldest_ms: Option<i64>,
}

/// Aggregates are counted apart: `count(DISTINCT ...)` would sort them as records, which takes ten times as long as to hash them.
const BACKLOG: &str = "
WITH backlog AS MATERIALIZED (
    SELECT created_at, next_retry_at, aggregate_type, aggregate_id FROM {s}.event_outbox
    WHERE status IN ('PENDING', 'PROCESSING') ORDER BY seq LIMIT $1
)
SELECT count(*) AS events, count(next_retry_at) AS waiting,
       (extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE next_retry_at IS NULL)) * 1000)::bigint AS oldest_ms,
       (SELECT count(*) FROM (SELECT DISTINCT aggregate_type, aggregate_id FROM backlog WHERE next_retry_at IS NOT NULL) AS b) AS blocked
FROM backlog";

const FAILED: &str = "
WITH newest_failed AS MATERIALIZED (
    SELECT aggregate_type, aggregate_id, created_at, left(last_error, 300) AS last_error FROM {s}.event_outbox
    WHERE status = 'FAILED' ORDER BY created_at DESC LIMIT $1
)
SELECT count(*) AS events, (SELECT count(*) FROM (SELECT DISTINCT aggregate_type, aggregate_id FROM newest_failed) AS a) AS aggregates,
       (SELECT last_error FROM newest_failed ORDER BY created_at DESC LIMIT 1) AS newest_error
FROM newest_failed";

/// Ids are UUIDv7 mostly, so the highest one is the newest event.
const HISTORY: &str = "
SELECT clock_timestamp() AS now,
       (SELECT CASE WHEN has_sequence_privilege(q.seq::regclass, 'USAGE, SELECT') THEN pg_sequence_last_value(q.seq::regclass) IS NOT NULL END
        FROM pg_get_serial_sequence($1, 'seq') AS q (seq)) AS ever_written,
       GREATEST((SELECT created_at FROM {s}.event_outbox ORDER BY id DESC LIMIT 1),
                (SELECT published_at FROM {s}.event_outbox WHERE {published} ORDER BY published_at DESC LIMIT 1),
                (SELECT settled_at FROM {s}.outbox_batch WHERE settled_at IS NOT NULL ORDER BY settled_at DESC LIMIT 1)) AS last_write,
       (SELECT published_at FROM {s}.event_outbox WHERE {published} ORDER BY published_at LIMIT 1) AS oldest_published";

impl OutboxRepository {
    pub(super) async fn examine_backlog(&self, connection: &mut PgConnection) -> Result<Backlog, OutboxError> {
        let doing = "looking at unsent events";
        let mut tx = self.looking(doing, connection).await?;
        let row = self.query(self.sql(BACKLOG)).bind(COUNTED + 1).fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let read = || {
            Ok(Backlog {
                events: row.try_get("events")?,
                oldest_ms: row.try_get("oldest_ms")?,
                waiting: row.try_get("waiting")?,
                blocked: row.try_get("blocked")?,
            })
        };
        read().map_err(self.error(doing))
    }

    pub(super) async fn failed_facts(&self, connection: &mut PgConnection) -> Result<FailedFacts, OutboxError> {
        let doing = "looking at failed events";
        let mut tx = self.looking(doing, connection).await?;
        let row = self.query(self.sql(FAILED)).bind(COUNTED + 1).fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let read = || {
            Ok(FailedFacts {
                events: row.try_get("events")?,
                aggregates: row.try_get("aggregates")?,
                newest_error: row.try_get("newest_error")?,
            })
        };
        read().map_err(self.error(doing))
    }

    pub(super) async fn history(&self, connection: &mut PgConnection) -> Result<History, OutboxError> {
        let doing = "looking for the newest and the oldest event";
        let mut tx = self.looking(doing, connection).await?;
        let query =
            self.query(self.sql(&HISTORY.replace("{published}", PUBLISHED))).bind(format!("{}.event_outbox", self.quoted));
        let row = query.fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let read = || {
            Ok(History {
                now: row.try_get("now")?,
                ever_written: row.try_get("ever_written")?,
                last_write: row.try_get("last_write")?,
                oldest_published: row.try_get("oldest_published")?,
            })
        };
        read().map_err(self.error(doing))
    }

    pub(super) async fn open_facts(&self, connection: &mut PgConnection) -> Result<OpenFacts, OutboxError> {
        let doing = "looking at open batches";
        let sql = format!(
            "SELECT count(*) AS orphaned, (extract(epoch FROM clock_timestamp() - min(claimed_at)) * 1000)::bigint AS oldest_ms
             FROM (SELECT relay_id, claimed_at FROM {{s}}.outbox_batch WHERE settled_at IS NULL ORDER BY claimed_at LIMIT $1) AS open
             WHERE NOT EXISTS (SELECT FROM {{s}}.outbox_relay r WHERE r.relay_id = open.relay_id AND {ALIVE})"
        );
        let mut tx = self.looking(doing, connection).await?;
        let row = self.query(self.sql(&sql)).bind(COUNTED).fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let read = || Ok(OpenFacts { orphaned: row.try_get("orphaned")?, oldest_ms: row.try_get("oldest_ms")? });
        read().map_err(self.error(doing))
    }
}
