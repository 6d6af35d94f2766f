use sqlx::{AssertSqlSafe, PgConnection};

use super::{OutboxError, OutboxRepository};

/// First key of the sleep lock, as in the trigger function `outbox_wake_relay`.
const SLEEP_LOCK: i32 = 1_129_139_027;

/// Of one request for the sleep lock.
const LONGEST_WAIT: &str = "5s";

/// What is sent on the channel when the list of relays or their shares changed. Producers send nothing but the notification.
pub(crate) const RELAYS_CHANGED: &str = "relays";

/// What the partitioning of the table sends on its old channel: nothing else will come on it.
pub(crate) const TABLE_REPLACED: &str = "replaced";

impl OutboxRepository {
    /// Number that stands for this outbox in lock keys and in the channel's name.
    async fn table_oid(&self, connection: &mut PgConnection) -> Result<i64, OutboxError> {
        sqlx::query_scalar("SELECT $1::text::regclass::oid::bigint")
            .bind(format!("{}.event_outbox", self.quoted))
            .fetch_one(connection)
            .await
            .map_err(self.error("looking for event_outbox"))
    }

    /// The channel that producers notify while a relay sleeps.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn wake_channel(&self, connection: &mut PgConnection) -> Result<String, OutboxError> {
        Ok(format!("event_outbox_{}", self.table_oid(connection).await?))
    }

    /// Waits for the sleep lock, for some seconds at most: a statement that waits keeps its snapshot, and that holds back vacuum.
    /// From the request on, every producer's commit notifies; when it is granted, no producer that did not notify is between insert and
    /// commit. False when it was not granted in time.
    ///
    /// # Errors
    /// The session was lost.
    pub async fn lock_sleep(&self, connection: &mut PgConnection) -> Result<bool, OutboxError> {
        let doing = "waiting for the sleep lock";
        let oid = self.table_oid(connection).await?;
        sqlx::query(AssertSqlSafe(format!("SET lock_timeout = '{LONGEST_WAIT}'")))
            .execute(&mut *connection)
            .await
            .map_err(self.error(doing))?;
        let lock = sqlx::query("SELECT pg_advisory_lock($1, $2)").bind(SLEEP_LOCK).bind(lock_key(oid)).execute(connection).await;
        match lock {
            Ok(_) => Ok(true),
            // lock_not_available
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03") => Ok(false),
            Err(error) => Err(self.error(doing)(error)),
        }
    }

    /// Gives the sleep lock back: producers stop notifying.
    ///
    /// # Errors
    /// The session was lost, and the lock with it.
    pub async fn unlock_sleep(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        sqlx::query("SELECT pg_advisory_unlock_all()")
            .execute(connection)
            .await
            .map_err(self.error("releasing the sleep lock"))?;
        Ok(())
    }

    /// Lets the other relays look who is there, after one came or left or gave partitions back.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn tell_relays(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        self.send(connection, RELAYS_CHANGED).await
    }

    /// Wakes a sleeping relay, for changes that the insert trigger does not see, such as a retry by hand.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn notify(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        self.send(connection, "").await
    }

    async fn send(&self, connection: &mut PgConnection, message: &str) -> Result<(), OutboxError> {
        let channel = self.wake_channel(connection).await?;
        sqlx::query("SELECT pg_notify($1, $2)")
            .bind(channel)
            .bind(message)
            .execute(connection)
            .await
            .map_err(self.error("waking the relay"))?;
        Ok(())
    }
}

/// The cast `oid::int` of the trigger function: the same 32 bits, signed.
fn lock_key(oid: i64) -> i32 {
    u32::try_from(oid).map_or(0, u32::cast_signed)
}
