use std::time::Duration;

use sqlx::postgres::{PgConnection, PgListener, PgPoolOptions};
use sqlx::{Connection, Executor, Postgres, Transaction};
use tokio::time::timeout;

use super::{Address, OutboxError, OutboxRepository};

/// Opens one session that is the relay's own, on the server itself: what [`set_up`] sets would stay with a pooler for whoever comes next.
///
/// # Errors
/// The URL cannot be read, or the server cannot be reached within `timeout`.
pub async fn connect(url: &str, application_name: &str, timeout: Duration) -> Result<PgConnection, OutboxError> {
    connect_to(&Address::parse(url)?, application_name, timeout).await
}

/// The same at an address.
pub(crate) async fn connect_to(address: &Address, application_name: &str, limit: Duration) -> Result<PgConnection, OutboxError> {
    let (mut connection, _) = address.reach(application_name, limit).await?;
    set_up(&mut connection, limit).await?;
    Ok(connection)
}

/// The same where nobody has looked yet whether a pooler is in between. The server may have no second session left to look with; then
/// the session is taken for its own.
///
/// # Errors
/// Also [`OutboxError::SharedSession`].
pub async fn connect_own(url: &str, application_name: &str, limit: Duration) -> Result<PgConnection, OutboxError> {
    let (mut connection, address) = Address::parse(url)?.reach(application_name, limit).await?;
    check_own(&mut connection, &address, application_name, limit).await?;
    set_up(&mut connection, limit).await?;
    Ok(connection)
}

/// # Errors
/// [`OutboxError::SharedSession`] if a pooler gives the session to others between transactions.
pub(crate) async fn check_own(
    connection: &mut PgConnection,
    address: &Address,
    application_name: &str,
    limit: Duration,
) -> Result<(), OutboxError> {
    let Ok((mut second, _)) = address.reach(application_name, limit).await else { return Ok(()) };
    let timed_out = |_| OutboxError::Timeout { doing: CONNECTING, limit };
    let pooled = timeout(limit, is_pooled(connection, &mut second)).await.map_err(timed_out)?;
    timeout(limit, second.close()).await.ok();
    if pooled.map_err(unreachable_or_refused)? { Err(OutboxError::SharedSession) } else { Ok(()) }
}

/// Opens a session for a command, with nothing set and no prepared statements: it may lead through a pooler in transaction mode. All is
/// done in transactions of [`begin`] and [`begin_reading`].
///
/// # Errors
/// As [`connect`].
pub async fn connect_plain(url: &str, application_name: &str, limit: Duration) -> Result<PgConnection, OutboxError> {
    let address = Address::parse(url)?.without_prepared_statements();
    Ok(address.reach(application_name, limit).await?.0)
}

/// What a transaction of a command needs whatever the role or the database says, and what is gone when it ends.
macro_rules! local_settings {
    ($begin:literal) => {
        concat!(
            $begin,
            "; SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_mergejoin = off;
            SET LOCAL enable_hashjoin = off; SET LOCAL enable_indexscan = on; SET LOCAL enable_nestloop = on;
            SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL work_mem = '32MB'; SET LOCAL jit = off;
            SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0;
            SELECT set_config('client_encoding', 'SQL_ASCII', true) WHERE current_setting('server_encoding') = 'SQL_ASCII';
            SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout' AND setting <> '0'"
        )
    };
}

/// Begins a transaction of a command.
///
/// # Errors
/// PostgreSQL cannot be asked.
pub async fn begin(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, OutboxError> {
    let begin = local_settings!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE");
    connection.begin_with(begin).await.map_err(unreachable_or_refused)
}

/// Begins a transaction that only reads, on a standby as well.
///
/// # Errors
/// PostgreSQL cannot be asked.
pub async fn begin_reading(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, OutboxError> {
    let begin = local_settings!("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY");
    connection.begin_with(begin).await.map_err(unreachable_or_refused)
}

/// What a session of the relay needs whatever the role or the database says.
///
/// The planner settings keep the claim and the settle on their indexes even while statistics are stale, as they are
/// after a bulk insert; to plan a claim anew for its values takes as long as a small claim, and changes nothing. `work_mem`
/// keeps a claim of many payloads off the disk. Commits are durable, since a batch must be in the journal for good before it is sent. Under
/// SERIALIZABLE, relays that share the table would refuse each other's statements. Time-outs are for other sessions: those of the
/// relay wait and idle for long, and each of its calls has a limit of its own. The server looks after its end of the connection, too: what a
/// session that died in silence holds, others wait for. A database that takes any bytes (SQL_ASCII) gives them as they are: it would
/// otherwise refuse a claim for one text that is not UTF-8.
const SETTINGS: &str = "
SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_mergejoin = off; SET enable_hashjoin = off;
SET enable_indexscan = on; SET enable_nestloop = on; SET plan_cache_mode = force_generic_plan; SET work_mem = '32MB'; SET jit = off;
SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; SET default_transaction_deferrable = off;
SET idle_in_transaction_session_timeout = '60s'; SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0;
SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3; SET tcp_user_timeout = '11s';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
SELECT set_config('client_encoding', 'SQL_ASCII', false) WHERE current_setting('server_encoding') = 'SQL_ASCII';
SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout' AND setting <> '0'";

/// Sets up a session that is the relay's own.
///
/// # Errors
/// PostgreSQL cannot be asked within `limit`.
pub(crate) async fn set_up(connection: &mut PgConnection, limit: Duration) -> Result<(), OutboxError> {
    let timed_out = |_| OutboxError::Timeout { doing: CONNECTING, limit };
    timeout(limit, connection.execute(SETTINGS)).await.map_err(timed_out)?.map_err(unreachable_or_refused)?;
    // A session that waits for a lock would otherwise not notice that its process is gone, and stay. Servers on some systems cannot check.
    let check = connection.execute("SET client_connection_check_interval = '1s'");
    match timeout(limit, check).await.map_err(timed_out)? {
        Err(sqlx::Error::Database(error)) => tracing::debug!(%error, "the server cannot check whether its clients are there"),
        Err(error) => return Err(unreachable_or_refused(error)),
        Ok(_) => {}
    }
    Ok(())
}

/// Listens on a channel, on a session of its own.
pub(crate) async fn listen_at(address: &Address, channel: &str, limit: Duration) -> Result<PgListener, OutboxError> {
    let doing = "listening for new events";
    let options = address.first().cloned().unwrap_or_default().application_name("commitstream relay: listener");
    let listen = async {
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(limit).idle_timeout(None).max_lifetime(None);
        let pool = pool.test_before_acquire(false).connect_with(options).await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.execute(SETTINGS).await?;
        listener.listen(channel).await?;
        Ok(listener)
    };
    let timed_out = |_| OutboxError::Timeout { doing, limit };
    timeout(limit, listen).await.map_err(timed_out)?.map_err(|source| OutboxError::Unreachable { doing, source })
}

/// Sets up a session of [`connect`] for what people look up: a statement may take as long as `limit`, and a page sorts the rows that it reads, not
/// all that wait or have failed. Without that, statistics of an idle time make both look alike.
///
/// # Errors
/// PostgreSQL cannot be asked.
pub async fn for_people(connection: &mut PgConnection, limit: Duration) -> Result<(), OutboxError> {
    let settings = format!("SET enable_sort = off; SET statement_timeout = {}", limit.as_millis());
    connection.execute(sqlx::AssertSqlSafe(settings)).await.map_err(unreachable_or_refused)?;
    Ok(())
}

/// A session with nothing set, as those of other programs are.
pub(super) async fn open(url: &str, application_name: &str, limit: Duration) -> Result<PgConnection, OutboxError> {
    Ok(Address::parse(url)?.reach(application_name, limit).await?.0)
}

/// True if two sessions that are open at the same time share a backend, or one of them changes it: what only a pooler does. One that gives each
/// session a backend of its own until it ends is not found, and does no harm.
///
/// A pooler mostly hands out the backend that came back last, so the second session gets that of the first one, and keeps it while the
/// first one asks again. One that takes them in turn or at random gives the first session several.
pub(crate) async fn is_pooled(first: &mut PgConnection, second: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let own = backend(first).await?;
    for _ in 0..4 {
        if backend(first).await? != own {
            return Ok(true);
        }
    }
    second.execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL statement_timeout = 0").await?;
    // Where they share the only one that there is, the first would wait for the second.
    let is_shared = backend(second).await? == own || backend(first).await? != own;
    second.execute("ROLLBACK").await?;
    Ok(is_shared)
}

/// Without a prepared statement, which poolers mix up.
async fn backend(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    let row = sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(connection).await?;
    sqlx::Row::try_get(&row, 0)
}

/// Commits, unless a statement has failed before: PostgreSQL answers COMMIT in an aborted transaction with ROLLBACK, which the driver takes for
/// success. Costs a round trip more.
///
/// # Errors
/// The transaction is aborted ([`IN_FAILED_TRANSACTION`]); or the commit failed, and if the connection was lost, it may have been carried out.
pub(crate) async fn commit_unless_aborted(mut transaction: Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
    sqlx::raw_sql("SELECT 1").execute(&mut *transaction).await?;
    transaction.commit().await
}

/// `in_failed_sql_transaction`, <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
pub(crate) const IN_FAILED_TRANSACTION: &str = "25P02";

pub(super) const CONNECTING: &str = "connecting";

pub(super) fn unreachable_or_refused(source: sqlx::Error) -> OutboxError {
    let doing = CONNECTING;
    match source {
        // A wrong password or a missing database is an answer, not an outage.
        sqlx::Error::Database(_) => OutboxError::Database { doing, source },
        source => OutboxError::Unreachable { doing, source },
    }
}

impl OutboxRepository {
    /// Lets commits of this session return before they are on disk. A crash of the server may undo the last of them, up to the moment
    /// when any other session's commit is on disk.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub(crate) async fn commit_without_waiting(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        connection.execute("SET synchronous_commit = off").await.map_err(self.error("connecting"))?;
        Ok(())
    }
}
