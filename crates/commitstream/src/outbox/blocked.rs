use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::text::{readable, readable_or_null};
use super::{OutboxError, OutboxRepository, dated, parked};

/// Waiting events that one page looks at, at most.
const LOOKED_AT: i64 = 10_000;

/// An aggregate with waiting events: a refused one, which is tried again, and those behind it; or those behind one that is `FAILED`.
#[derive(Debug, Clone, Serialize)]
pub struct BlockedAggregate {
    pub aggregate_type: String,
    pub aggregate_id: String,
    /// Waiting events, the first included. Later ones that no relay has looked at yet are not among them.
    pub waiting: i64,
    /// `waiting` is the least that it can be.
    pub at_least: bool,
    /// The first of them.
    pub first: Uuid,
    pub event_type: String,
    pub created_at: DateTime<Utc>,
    pub retry_count: i32,
    pub next_retry_at: Option<DateTime<Utc>>,
    /// Somebody has set `next_retry_at` to `infinity`: it is not tried.
    pub is_parked: bool,
    pub last_error: Option<String>,
    /// The earliest event of the aggregate that is `FAILED`. With `afterFailure = hold` the others wait for what an operator decides of it.
    pub failed: Option<Uuid>,
}

/// Walks the index of waiting events, aggregate by aggregate.
const BLOCKED: &str = "
WITH looked AS MATERIALIZED (
    SELECT id, aggregate_type, aggregate_id, seq FROM {s}.event_outbox
    WHERE next_retry_at IS NOT NULL AND status || '' IN ('PENDING', 'PROCESSING') AND (aggregate_type, aggregate_id) > ($1, $2)
    ORDER BY aggregate_type, aggregate_id, seq LIMIT {looked_at}
), grouped AS MATERIALIZED (
    SELECT aggregate_type, aggregate_id, count(*) AS waiting, (array_agg(id ORDER BY seq))[1] AS first,
           (SELECT count(*) FROM looked) >= {looked_at}
             AND (aggregate_type, aggregate_id) >= (SELECT aggregate_type, aggregate_id FROM looked
                                                    ORDER BY aggregate_type DESC, aggregate_id DESC LIMIT 1) AS at_least
    FROM looked GROUP BY aggregate_type, aggregate_id ORDER BY aggregate_type, aggregate_id LIMIT $3
)
SELECT g.*, e.event_type, e.created_at, e.retry_count, {next_retry_at} AS next_retry_at, {is_parked} AS is_parked,
       left(e.last_error, 1000) AS last_error, f.id AS failed
FROM grouped g JOIN {s}.event_outbox e ON e.id = g.first
LEFT JOIN LATERAL (
    SELECT id FROM {s}.event_outbox b
    WHERE b.aggregate_type = g.aggregate_type AND b.aggregate_id = g.aggregate_id AND b.seq < e.seq AND b.status || '' = 'FAILED'
    ORDER BY b.seq LIMIT 1) AS f ON true
ORDER BY g.aggregate_type, g.aggregate_id";

impl OutboxRepository {
    /// Up to `limit` aggregates with waiting events, in their order after the named one. Looks at 10,000 events at most.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn blocked(
        &self,
        connection: &mut PgConnection,
        (aggregate_type, aggregate_id): (&str, &str),
        limit: i64,
    ) -> Result<Vec<BlockedAggregate>, OutboxError> {
        let doing = "listing blocked aggregates";
        let sql = BLOCKED.replace("{looked_at}", &LOOKED_AT.to_string());
        let sql = sql.replace("{next_retry_at}", &dated("e.next_retry_at")).replace("{is_parked}", &parked("e.next_retry_at"));
        let rows = sqlx::query(self.sql(&sql))
            .bind(aggregate_type)
            .bind(aggregate_id)
            .bind(limit)
            .fetch_all(connection)
            .await
            .map_err(self.error(doing))?;
        rows.iter().map(blocked).collect::<Result<_, _>>().map_err(self.error(doing))
    }
}

fn blocked(row: &PgRow) -> Result<BlockedAggregate, sqlx::Error> {
    Ok(BlockedAggregate {
        aggregate_type: readable(row, "aggregate_type")?,
        aggregate_id: readable(row, "aggregate_id")?,
        waiting: row.try_get("waiting")?,
        at_least: row.try_get("at_least")?,
        first: row.try_get("first")?,
        event_type: readable(row, "event_type")?,
        created_at: row.try_get("created_at")?,
        retry_count: row.try_get("retry_count")?,
        next_retry_at: row.try_get("next_retry_at")?,
        is_parked: row.try_get("is_parked")?,
        last_error: readable_or_null(row, "last_error")?,
        failed: row.try_get("failed")?,
    })
}
