//! A table for producers that commit in two phases (XA, JTA).
//!
//! PostgreSQL prepares no transaction that has notified. So the insert trigger of such a table neither notifies nor takes the wake-up lock,
//! which a prepared transaction would hold until it is committed; relays find its events when they look by themselves.

use std::time::Duration;

use sqlx::{Connection, Executor, PgConnection};

use super::attempts::{ATTEMPT, Attempts, MigrationProgress};
use super::{OutboxError, OutboxRepository};

const TRIGGER: &str = "CREATE OR REPLACE TRIGGER event_outbox_wake_relay AFTER INSERT ON {s}.event_outbox
                       FOR EACH STATEMENT EXECUTE FUNCTION {s}.outbox_wake_relay({argument})";

const IS_TWO_PHASE: &str =
    "SELECT tgnargs > 0 FROM pg_trigger WHERE tgrelid = to_regclass($1) AND tgname = 'event_outbox_wake_relay'";

impl OutboxRepository {
    /// Whether the table is one for producers that commit in two phases.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn is_two_phase(&self, connection: &mut PgConnection) -> Result<bool, OutboxError> {
        let query = sqlx::query_scalar(IS_TWO_PHASE).bind(format!("{}.event_outbox", self.quoted));
        let two_phase: Option<bool> =
            query.fetch_optional(connection).await.map_err(self.error("looking at the insert trigger"))?;
        Ok(two_phase.unwrap_or(false))
    }

    /// Makes the table one for producers that commit in two phases, or not. False if it is that already. Locks are waited for up to `limit`,
    /// in short attempts.
    ///
    /// # Errors
    /// [`OutboxError::Busy`] when the table could not be locked in time; or the table belongs to another role.
    pub async fn set_two_phase(
        &self,
        connection: &mut PgConnection,
        two_phase: bool,
        limit: Duration,
        report: &mut (dyn FnMut(MigrationProgress) + Send),
    ) -> Result<bool, OutboxError> {
        let attempts = Attempts::within(limit);
        while self.is_two_phase(connection).await? != two_phase {
            match self.replace_trigger(connection, two_phase).await {
                Ok(()) => return Ok(true),
                Err(error) => attempts.again(self, connection, error, report).await?,
            }
        }
        Ok(false)
    }

    async fn replace_trigger(&self, connection: &mut PgConnection, two_phase: bool) -> Result<(), OutboxError> {
        let doing = "replacing the insert trigger";
        let mut tx = connection.begin().await.map_err(self.error(doing))?;
        tx.execute(ATTEMPT).await.map_err(self.error(doing))?;
        let sql = TRIGGER.replace("{argument}", if two_phase { "'two-phase'" } else { "" });
        tx.execute(self.sql(&sql)).await.map_err(self.busy(doing))?;
        tx.commit().await.map_err(self.error(doing))
    }
}
