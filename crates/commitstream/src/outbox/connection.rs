use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Executor, Postgres, Transaction};

use super::{OutboxError, OutboxRepository};

/// Opens one session for the relay or an operator command.
///
/// The planner settings keep the claim and the settle on their indexes even while statistics are stale, as they are
/// after a bulk insert; to plan a claim anew for its values takes as long as a small claim, and changes nothing. `work_mem`
/// keeps a claim of many payloads off the disk. Commits are durable whatever the role or the database says of its own, since a batch must
/// be in the journal for good before it is sent. Time-outs that a role or database may have are for other sessions: those of the
/// relay wait and idle for long, and each of its calls has a limit of its own. A database that takes any bytes (SQL_ASCII) gives them as they
/// are: it would otherwise refuse a claim for one text that is not UTF-8. All belong to this session alone.
///
/// # Errors
/// The URL cannot be read, or the server cannot be reached within `timeout`.
pub async fn connect(url: &str, application_name: &str, timeout: Duration) -> Result<PgConnection, OutboxError> {
    let doing = CONNECTING;
    let mut connection = open(url, application_name, timeout).await?;
    let timed_out = |_| OutboxError::Timeout { doing, limit: timeout };
    let settings = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_mergejoin = off; SET enable_hashjoin = off; \
                    SET plan_cache_mode = force_generic_plan; SET work_mem = '32MB'; SET jit = off; \
                    SET idle_in_transaction_session_timeout = '60s'; SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0; \
                    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'; \
                    SELECT set_config('client_encoding', 'SQL_ASCII', false) WHERE current_setting('server_encoding') = 'SQL_ASCII'";
    tokio::time::timeout(timeout, connection.execute(settings)).await.map_err(timed_out)?.map_err(unreachable_or_refused)?;
    // A session that waits for a lock would otherwise not notice that its process is gone, and stay. Servers on some systems cannot check.
    let check = connection.execute("SET client_connection_check_interval = '1s'");
    match tokio::time::timeout(timeout, check).await.map_err(timed_out)? {
        Err(sqlx::Error::Database(error)) => tracing::debug!(%error, "the server cannot check whether its clients are there"),
        Err(error) => return Err(unreachable_or_refused(error)),
        Ok(_) => {}
    }
    Ok(connection)
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

/// The same session with nothing set, as those of other programs are.
pub(super) async fn open(url: &str, application_name: &str, timeout: Duration) -> Result<PgConnection, OutboxError> {
    let options = PgConnectOptions::from_str(url).map_err(OutboxError::Url)?.application_name(application_name);
    let timed_out = |_| OutboxError::Timeout { doing: CONNECTING, limit: timeout };
    tokio::time::timeout(timeout, options.connect()).await.map_err(timed_out)?.map_err(unreachable_or_refused)
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

const CONNECTING: &str = "connecting";

fn unreachable_or_refused(source: sqlx::Error) -> OutboxError {
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
