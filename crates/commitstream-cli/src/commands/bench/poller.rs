//! The baseline of the drains: the textbook loop in bare SQL. It takes the oldest rows with SKIP LOCKED, marks or deletes them and reads
//! them, a batch in a transaction, and sends them nowhere.

use std::time::{Duration, Instant};

use anyhow::ensure;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use uuid::Uuid;

use super::drain::BATCH_SIZE;
use super::stage::Stage;
use crate::output::count;

const COLUMNS: &str = "id, event_type, aggregate_type, aggregate_id, COALESCE(occurred_at, created_at) AS occurred_at,
    payload::text AS payload, headers::text AS headers";

/// The relay holds the planner to its indexes in the same way.
const PLANNER: &str =
    "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_bitmapscan = off";

/// What is read of each row, and so what a sender would need.
struct Event {
    id: Uuid,
    event_type: String,
    aggregate_type: String,
    aggregate_id: String,
    occurred_at: DateTime<Utc>,
    payload: String,
    headers: String,
}

/// Takes all that waits, and returns how long that took. With `retention` 0, rows are deleted.
pub async fn drain(
    stage: &Stage,
    connection: &mut PgConnection,
    events: u64,
    retention: u32,
    what: &str,
) -> anyhow::Result<Duration> {
    let take = match retention {
        0 => "DELETE FROM event_outbox",
        _ => "UPDATE event_outbox SET status = 'PUBLISHED', published_at = clock_timestamp()",
    };
    // The oldest rows, by the partial index.
    let sql = format!(
        "{take} WHERE id IN (SELECT id FROM event_outbox WHERE status = 'PENDING' ORDER BY seq LIMIT {BATCH_SIZE} FOR UPDATE SKIP LOCKED)
         RETURNING {COLUMNS}"
    );
    sqlx::raw_sql(PLANNER).execute(&mut *connection).await?;
    check_plan(connection, &sql).await?;
    let (started, mut taken) = (Instant::now(), 0);
    loop {
        let batch = batch(connection, &sql).await?;
        if batch.is_empty() {
            break;
        }
        taken += batch.len() as u64;
        stage.tell(|| format!("{what}, baseline: {} of {} marked", count(taken), count(events)));
    }
    let took = started.elapsed();
    ensure!(taken == events, "the baseline found {taken} of {events} events");
    Ok(took)
}

async fn batch(connection: &mut PgConnection, sql: &str) -> anyhow::Result<Vec<Event>> {
    let mut transaction = connection.begin().await?;
    let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *transaction).await?;
    let batch = rows.iter().map(Event::decode).collect::<Result<Vec<_>, _>>()?;
    transaction.commit().await?;
    // A sender would look at every field.
    std::hint::black_box(batch.iter().map(Event::bytes).sum::<usize>());
    Ok(batch)
}

/// A baseline that scans the table would prove nothing.
async fn check_plan(connection: &mut PgConnection, sql: &str) -> anyhow::Result<()> {
    let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN {sql}"))).fetch_all(connection).await?;
    let plan = plan.join("\n");
    let by_index = plan.contains("idx_outbox_pending_for_processing") && !plan.contains("Seq Scan on event_outbox");
    ensure!(by_index, "the baseline does not use the partial index:\n{plan}");
    Ok(())
}

impl Event {
    fn decode(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            event_type: row.try_get("event_type")?,
            aggregate_type: row.try_get("aggregate_type")?,
            aggregate_id: row.try_get("aggregate_id")?,
            occurred_at: row.try_get("occurred_at")?,
            payload: row.try_get("payload")?,
            headers: row.try_get("headers")?,
        })
    }

    fn bytes(&self) -> usize {
        let texts = [&self.event_type, &self.aggregate_type, &self.aggregate_id, &self.payload, &self.headers];
        size_of_val(&self.id) + size_of_val(&self.occurred_at) + texts.iter().map(|text| text.len()).sum::<usize>()
    }
}
