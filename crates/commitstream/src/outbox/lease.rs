use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::{OutboxError, OutboxRepository, PARTITIONS};

/// Takes every partition that is free, expired, or whose owner's backend is gone. All by the database's clock. The rows
/// are locked in order, so that two relays which try at once take turns instead of deadlocking.
const TAKE: &str = "
WITH free AS (
    SELECT partition_no FROM {s}.outbox_lease l
    WHERE relay_id IS NULL OR relay_id = $1 OR expires_at < clock_timestamp()
       OR NOT EXISTS (SELECT 1 FROM pg_stat_activity a WHERE a.pid = l.session_pid)
    ORDER BY partition_no FOR UPDATE
)
UPDATE {s}.outbox_lease l
SET relay_id = $1, epoch = (SELECT max(epoch) + 1 FROM {s}.outbox_lease), session_pid = pg_backend_pid(), expires_at = clock_timestamp() + $2
FROM free WHERE l.partition_no = free.partition_no
RETURNING l.epoch";

impl OutboxRepository {
    /// Tries to take all leases for `relay_id`, with this connection as the sign of life. Returns their new epoch when it has
    /// them all.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn take_leases(
        &self,
        connection: &mut PgConnection,
        relay_id: Uuid,
        life: Duration,
    ) -> Result<Option<i64>, OutboxError> {
        let epochs: Vec<i64> = sqlx::query_scalar(self.sql(TAKE))
            .bind(relay_id)
            .bind(interval(life))
            .fetch_all(connection)
            .await
            .map_err(self.error("taking the lease"))?;
        let all = i64::try_from(epochs.len()).is_ok_and(|taken| taken == PARTITIONS);
        Ok(epochs.into_iter().max().filter(|_| all))
    }

    /// Prolongs the leases of `relay_id`. False when another relay has taken them.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn renew_leases(&self, connection: &mut PgConnection, relay_id: Uuid, life: Duration) -> Result<bool, OutboxError> {
        let renewed =
            sqlx::query(self.sql("UPDATE {s}.outbox_lease SET expires_at = clock_timestamp() + $2 WHERE relay_id = $1"))
                .bind(relay_id)
                .bind(interval(life))
                .execute(connection)
                .await
                .map_err(self.error("renewing the lease"))?;
        Ok(renewed.rows_affected().cast_signed() == PARTITIONS)
    }

    /// Gives the leases of `relay_id` back, so that another relay can go on at once.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; the leases then expire.
    pub async fn release_leases(&self, connection: &mut PgConnection, relay_id: Uuid) -> Result<(), OutboxError> {
        sqlx::query(
            self.sql("UPDATE {s}.outbox_lease SET relay_id = NULL, session_pid = NULL, expires_at = NULL WHERE relay_id = $1"),
        )
        .bind(relay_id)
        .execute(connection)
        .await
        .map_err(self.error("releasing the lease"))?;
        Ok(())
    }
}

fn interval(life: Duration) -> sqlx::postgres::types::PgInterval {
    sqlx::postgres::types::PgInterval { months: 0, days: 0, microseconds: i64::try_from(life.as_micros()).unwrap_or(i64::MAX) }
}
