use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::text::{readable, readable_or_null};
use super::{OutboxError, OutboxRepository};

/// An event that is `FAILED`.
#[derive(Debug, Clone, Serialize)]
pub struct FailedEvent {
    pub id: Uuid,
    pub event_type: String,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub retry_count: i32,
    pub last_error: Option<String>,
    pub created_at: DateTime<Utc>,
}

/// Which failed events an operator means.
#[derive(Debug, Clone)]
pub enum Selection {
    Ids(Vec<Uuid>),
    All { event_type: Option<String> },
}

impl Selection {
    fn parts(&self) -> (Option<&[Uuid]>, Option<&str>) {
        match self {
            Self::Ids(ids) => (Some(ids), None),
            Self::All { event_type } => (None, event_type.as_deref()),
        }
    }
}

/// The selection as SQL, on `$1` (ids or NULL) and `$2` (event type or NULL).
const SELECTED: &str = "status = 'FAILED' AND ($1::uuid[] IS NULL OR id = ANY ($1)) AND ($2::text IS NULL OR event_type = $2)";

impl OutboxRepository {
    /// The failed events of the selection, newest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn failed(
        &self,
        connection: &mut PgConnection,
        selection: &Selection,
        limit: i64,
    ) -> Result<Vec<FailedEvent>, OutboxError> {
        let (ids, event_type) = selection.parts();
        let sql = format!(
            "SELECT id, event_type, aggregate_type, aggregate_id, retry_count, last_error, created_at
             FROM {{s}}.event_outbox WHERE {SELECTED} ORDER BY created_at DESC LIMIT $3"
        );
        let doing = "listing failed events";
        let rows = self
            .query(self.sql(&sql))
            .bind(ids)
            .bind(event_type)
            .bind(limit)
            .fetch_all(connection)
            .await
            .map_err(self.error(doing))?;
        rows.iter().map(failed_event).collect::<Result<_, _>>().map_err(self.error(doing))
    }
}

fn failed_event(row: &PgRow) -> Result<FailedEvent, sqlx::Error> {
    Ok(FailedEvent {
        id: row.try_get("id")?,
        event_type: readable(row, "event_type")?,
        aggregate_type: readable(row, "aggregate_type")?,
        aggregate_id: readable(row, "aggregate_id")?,
        retry_count: row.try_get("retry_count")?,
        last_error: readable_or_null(row, "last_error")?,
        created_at: row.try_get("created_at")?,
    })
}
