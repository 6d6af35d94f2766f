//! What operators have done, and the switch by which they stop publishing.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Deed, OutboxError, OutboxRepository};

/// One row of the audit.
#[derive(Debug, Clone, Serialize)]
pub struct AuditRow {
    pub audit_id: i64,
    pub done_at: DateTime<Utc>,
    pub who: String,
    pub action: String,
    pub about: String,
    pub events: i64,
    pub event_ids: Vec<Uuid>,
}

/// Since when publishing is paused, and by whom.
#[derive(Debug, Clone, Serialize)]
pub struct Pause {
    pub since: DateTime<Utc>,
    pub who: String,
}

impl OutboxRepository {
    /// Up to `limit` deeds before the row of this number, newest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn deeds(
        &self,
        connection: &mut PgConnection,
        before: Option<i64>,
        limit: i64,
    ) -> Result<Vec<AuditRow>, OutboxError> {
        let doing = "reading what operators did";
        let sql = self.sql("SELECT * FROM {s}.outbox_audit WHERE audit_id < $1 ORDER BY audit_id DESC LIMIT $2");
        let query = self.query(sql).bind(before.unwrap_or(i64::MAX)).bind(limit);
        let rows = query.fetch_all(connection).await.map_err(self.error(doing))?;
        rows.iter().map(audit_row).collect::<Result<_, _>>().map_err(self.error(doing))
    }

    /// Writes down what is about to be done to these events outside this database, and returns the number of the row. Its outcome is unknown
    /// until [`note_outcome`](Self::note_outcome).
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; then it should not be done.
    pub async fn note(
        &self,
        connection: &mut PgConnection,
        deed: Deed<'_>,
        action: &str,
        event_ids: &[Uuid],
    ) -> Result<i64, OutboxError> {
        let sql = self.sql(
            "INSERT INTO {s}.outbox_audit (who, action, about, event_ids) VALUES ($1, $2, $3 || ': outcome unknown', $4)
             RETURNING audit_id",
        );
        self.scalar(sql)
            .bind(deed.who)
            .bind(action)
            .bind(deed.about)
            .bind(event_ids)
            .fetch_one(connection)
            .await
            .map_err(self.error("writing down what is about to be done"))
    }

    /// Writes down what became of it: in words, and to which and how many events it was done.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; then the row says that the outcome is unknown.
    pub async fn note_outcome(
        &self,
        connection: &mut PgConnection,
        audit_id: i64,
        about: &str,
        event_ids: &[Uuid],
        events: i64,
    ) -> Result<(), OutboxError> {
        let sql = self.sql("UPDATE {s}.outbox_audit SET about = $2, event_ids = $3, events = $4 WHERE audit_id = $1");
        self.query(sql)
            .bind(audit_id)
            .bind(about)
            .bind(event_ids)
            .bind(events)
            .execute(connection)
            .await
            .map_err(self.error("writing down what was done"))?;
        Ok(())
    }

    /// Lets all relays settle what is on its way and then claim nothing, until [`resume`](Self::resume). False if it is so already.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn pause(&self, connection: &mut PgConnection, who: &str) -> Result<bool, OutboxError> {
        let switch = "INSERT INTO {s}.outbox_pause (who) VALUES ($1) ON CONFLICT DO NOTHING RETURNING 1";
        self.switch(connection, who, "pause", switch).await
    }

    /// Lets relays go on. False if they were not paused.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn resume(&self, connection: &mut PgConnection, who: &str) -> Result<bool, OutboxError> {
        self.switch(connection, who, "resume", "DELETE FROM {s}.outbox_pause RETURNING 1").await
    }

    /// Since when publishing is paused; `None` if it is not.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn paused(&self, connection: &mut PgConnection) -> Result<Option<Pause>, OutboxError> {
        let doing = "asking whether relays are paused";
        let row = self
            .query(self.sql("SELECT since, who FROM {s}.outbox_pause"))
            .fetch_optional(connection)
            .await
            .map_err(self.error(doing))?;
        let read = |row: PgRow| Ok(Pause { since: row.try_get("since")?, who: row.try_get("who")? });
        row.map(read).transpose().map_err(self.error(doing))
    }

    async fn switch(&self, connection: &mut PgConnection, who: &str, action: &str, switch: &str) -> Result<bool, OutboxError> {
        let sql = format!(
            "WITH switched AS ({switch}), noted AS (
                 INSERT INTO {{s}}.outbox_audit (who, action, about) SELECT $1, $2, 'all relays' FROM switched)
             SELECT EXISTS (SELECT FROM switched)"
        );
        let switched = self
            .scalar(self.sql(&sql))
            .bind(who)
            .bind(action)
            .fetch_one(&mut *connection)
            .await
            .map_err(self.error("switching the relays"))?;
        self.tell_relays(connection).await?;
        Ok(switched)
    }
}

fn audit_row(row: &PgRow) -> Result<AuditRow, sqlx::Error> {
    Ok(AuditRow {
        audit_id: row.try_get("audit_id")?,
        done_at: row.try_get("done_at")?,
        who: row.try_get("who")?,
        action: row.try_get("action")?,
        about: row.try_get("about")?,
        events: row.try_get("events")?,
        event_ids: row.try_get("event_ids")?,
    })
}
