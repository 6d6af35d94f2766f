use std::time::Duration;

use sqlx::PgConnection;

use super::connection::begin;
use super::{OutboxError, OutboxRepository};

/// Journal rows outlive their batch by this at least: after a failover of Redis the relay looks recent batches up.
const MIN_JOURNAL_LIFE: Duration = Duration::from_secs(3_600);

impl OutboxRepository {
    /// Deletes up to `limit` events published more than `retention` ago, oldest first, whatever partition they are in; returns how
    /// many. One short transaction that waits for nobody: rows that somebody else has locked are left for next time.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn delete_published(
        &self,
        connection: &mut PgConnection,
        retention: Duration,
        limit: u32,
    ) -> Result<u64, OutboxError> {
        self.delete_published_from(connection, "{s}.event_outbox", retention, limit).await
    }

    /// The same in one partition, named as SQL has it.
    pub(crate) async fn delete_published_from(
        &self,
        connection: &mut PgConnection,
        table: &str,
        retention: Duration,
        limit: u32,
    ) -> Result<u64, OutboxError> {
        let sql = format!(
            "DELETE FROM {table} WHERE id = ANY (ARRAY(
                 SELECT id FROM {table}
                 WHERE status = 'PUBLISHED' AND published_at < statement_timestamp() - $1 * interval '1 second'
                 ORDER BY published_at LIMIT $2 FOR UPDATE SKIP LOCKED))"
        );
        self.delete(connection, &sql, retention, limit, "deleting published events").await
    }

    /// Deletes up to `limit` settled batches older than `retention` (an hour at least); returns how many.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn delete_settled(
        &self,
        connection: &mut PgConnection,
        retention: Duration,
        limit: u32,
    ) -> Result<u64, OutboxError> {
        let sql = "DELETE FROM {s}.outbox_batch WHERE batch_id = ANY (ARRAY(
                       SELECT batch_id FROM {s}.outbox_batch
                       WHERE settled_at < statement_timestamp() - $1 * interval '1 second'
                       ORDER BY settled_at LIMIT $2 FOR UPDATE SKIP LOCKED))";
        self.delete(connection, sql, retention.max(MIN_JOURNAL_LIFE), limit, "deleting settled batches").await
    }

    pub(super) async fn delete(
        &self,
        connection: &mut PgConnection,
        sql: &str,
        retention: Duration,
        limit: u32,
        doing: &'static str,
    ) -> Result<u64, OutboxError> {
        let mut transaction = begin(connection).await?;
        let done = self
            .query(self.sql(sql))
            .bind(retention.as_secs_f64())
            .bind(i64::from(limit))
            .execute(&mut *transaction)
            .await
            .map_err(self.error(doing))?;
        transaction.commit().await.map_err(self.error(doing))?;
        Ok(done.rows_affected())
    }
}
