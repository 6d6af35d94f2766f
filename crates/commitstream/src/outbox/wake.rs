use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection};

use super::{OutboxError, OutboxRepository};

/// First key of the sleep lock, as in the trigger function `outbox_wake_relay`.
const SLEEP_LOCK: i32 = 1_129_139_027;

/// What is sent on the channel when the list of relays or their shares changed. Producers send nothing but the notification.
pub(crate) const RELAYS_CHANGED: &str = "relays";

/// What the partitioning of the table sends on its old channel: nothing else will come on it.
pub(crate) const TABLE_REPLACED: &str = "replaced";

impl OutboxRepository {
    /// Number that stands for this outbox in lock keys and in the channel's name.
    pub(crate) async fn table_oid(&self, connection: &mut PgConnection) -> Result<i64, OutboxError> {
        self.scalar("SELECT $1::text::regclass::oid::bigint")
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
        Ok(channel_of(self.table_oid(connection).await?))
    }

    /// Waits for the wake-up lock, up to `limit`: a statement that waits keeps its snapshot, and that holds back vacuum.
    /// From the request on, every producer's commit notifies; when it is granted, no producer that did not notify is between insert and
    /// commit. False when it was not granted in time.
    ///
    /// The block catches the time-out, so that PostgreSQL does not log an error for each request: a prepared transaction that somebody
    /// left open refuses them all. A lock that this session has is granted to it again, so the second statement says what came of it.
    ///
    /// # Errors
    /// The session was lost.
    pub async fn lock_sleep(&self, connection: &mut PgConnection, limit: Duration) -> Result<bool, OutboxError> {
        let doing = "waiting for the wake-up lock";
        let key = lock_key(self.table_oid(connection).await?);
        let wait = format!(
            "DO $wait$ BEGIN
                 PERFORM set_config('lock_timeout', '{}ms', true);
                 PERFORM pg_advisory_lock({SLEEP_LOCK}, {key});
             EXCEPTION WHEN lock_not_available THEN NULL;
             END $wait$",
            limit.as_millis()
        );
        sqlx::raw_sql(AssertSqlSafe(wait)).execute(&mut *connection).await.map_err(self.error(doing))?;
        let held = self.scalar("SELECT pg_try_advisory_lock($1, $2)").bind(SLEEP_LOCK).bind(key);
        held.fetch_one(connection).await.map_err(self.error(doing))
    }

    /// Gives the sleep lock back: producers stop notifying.
    ///
    /// # Errors
    /// The session was lost, and the lock with it.
    pub async fn unlock_sleep(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        self.query("SELECT pg_advisory_unlock_all()")
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
        self.query("SELECT pg_notify($1, $2)")
            .bind(channel)
            .bind(message)
            .execute(connection)
            .await
            .map_err(self.error("waking the relay"))?;
        Ok(())
    }
}

/// The channel of the table with this number, as in the trigger function `outbox_wake_relay`.
pub(crate) fn channel_of(table: i64) -> String {
    format!("event_outbox_{table}")
}

/// The cast `oid::int` of the trigger function: the same 32 bits, signed.
fn lock_key(oid: i64) -> i32 {
    u32::try_from(oid).map_or(0, u32::cast_signed)
}
