use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::{OutboxError, OutboxRepository};

impl OutboxRepository {
    /// Writes down that `consumer` (1 to 255 bytes) handles an event, in the transaction of the handler's own effects. `false` if it
    /// has handled it before: then there is nothing left to do. Of two transactions that try at once, the second waits for the
    /// end of the first; if that rolls back, the event is the second one's.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked, or a trigger or row-level security keeps the row out; the transaction is to be rolled back.
    pub async fn remember(&self, connection: &mut PgConnection, consumer: &str, event_id: Uuid) -> Result<bool, OutboxError> {
        let doing = "writing to the inbox";
        let sql = "INSERT INTO {s}.event_inbox (consumer, event_id) VALUES ($1, $2) ON CONFLICT (consumer, event_id) DO NOTHING";
        let done =
            self.query(self.sql(sql)).bind(consumer).bind(event_id).execute(&mut *connection).await.map_err(self.error(doing))?;
        if done.rows_affected() == 1 {
            return Ok(true);
        }
        // A trigger that returns NULL inserts nothing either, and nothing was handled then.
        let known = "SELECT EXISTS (SELECT FROM {s}.event_inbox WHERE consumer = $1 AND event_id = $2)";
        let known = sqlx::query_scalar(self.sql(known)).bind(consumer).bind(event_id).fetch_one(connection).await;
        let known: bool = known.map_err(self.error(doing))?;
        if known { Ok(false) } else { Err(OutboxError::Unchanged { doing, changed: 0, meant: 1 }) }
    }

    /// Whether the inbox is there and this role may write to it. Nothing is written.
    ///
    /// # Errors
    /// [`OutboxError::NotMigrated`], a denial, or PostgreSQL cannot be asked.
    pub(crate) async fn find_inbox(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        let sql =
            "EXPLAIN INSERT INTO {s}.event_inbox (consumer, event_id) VALUES ('nobody', '00000000-0000-7000-8000-000000000000')
                   ON CONFLICT (consumer, event_id) DO NOTHING";
        sqlx::query(self.sql(sql)).execute(connection).await.map_err(self.error("looking for the inbox"))?;
        Ok(())
    }

    /// Deletes up to `limit` rows of the inbox older than `retention`, oldest first; returns how many. One short transaction that
    /// waits for nobody. An event that is delivered again after that is handled again.
    ///
    /// Rows never change, so they keep the place that the index led to.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn forget(&self, connection: &mut PgConnection, retention: Duration, limit: u32) -> Result<u64, OutboxError> {
        let sql = "DELETE FROM {s}.event_inbox WHERE ctid = ANY (ARRAY(
                       SELECT ctid FROM {s}.event_inbox
                       WHERE handled_at < statement_timestamp() - $1 * interval '1 second'
                       ORDER BY handled_at LIMIT $2 FOR UPDATE SKIP LOCKED))";
        self.delete(connection, sql, retention, limit, "deleting old rows of the inbox").await
    }
}
