use sqlx::{PgConnection, Row};

use super::{OutboxError, OutboxRepository};

/// The server, and what this session may do there.
#[derive(Debug, Clone)]
pub struct ServerFacts {
    /// As `server_version_num`, such as 150018.
    pub version: i32,
    pub in_recovery: bool,
    /// New transactions are read-only by default; where that is set, as `pg_settings` says it.
    pub read_only: bool,
    pub read_only_source: String,
    pub fsync: bool,
    pub full_page_writes: bool,
    /// Of a new session of this user.
    pub synchronous_commit: String,
    pub synchronous_commit_source: String,
    pub autovacuum: bool,
    pub track_counts: bool,
    /// Sessions that there are, and may be of ordinary users.
    pub connections: i64,
    pub max_connections: i64,
    /// Transactions that may be prepared at a time; 0 where two-phase commit is off.
    pub max_prepared: i32,
    /// Transactions since the oldest one that the database must remember; writes end near 2,100,000,000.
    pub frozen_age: i32,
    /// This user sees what sessions of others do.
    pub sees_sessions: bool,
    pub user: String,
    pub database: String,
    /// Of the database, such as `UTF8`.
    pub encoding: String,
}

impl OutboxRepository {
    pub(super) async fn server_facts(&self, connection: &mut PgConnection) -> Result<ServerFacts, OutboxError> {
        let doing = "looking at the server's settings";
        let mut tx = self.looking(doing, connection).await?;
        let row = self
            .query(
                "SELECT current_setting('server_version_num')::int AS version, pg_is_in_recovery() AS in_recovery,
                    current_setting('default_transaction_read_only')::bool AS read_only,
                    current_setting('fsync')::bool AS fsync, current_setting('full_page_writes')::bool AS full_page_writes,
                    current_setting('synchronous_commit') AS synchronous_commit,
                    current_setting('autovacuum')::bool AS autovacuum, current_setting('track_counts')::bool AS track_counts,
                    (SELECT sum(numbackends) FROM pg_stat_database)::bigint AS connections,
                    current_setting('max_connections')::bigint
                        - current_setting('superuser_reserved_connections')::bigint AS max_connections,
                    current_setting('max_prepared_transactions')::int AS max_prepared,
                    (SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()) AS frozen_age,
                    pg_has_role('pg_read_all_stats', 'USAGE') AS sees_sessions, current_user::text AS user,
                    current_database()::text AS database, current_setting('server_encoding') AS encoding,
                    (SELECT source FROM pg_settings WHERE name = 'default_transaction_read_only') AS read_only_source,
                    (SELECT source FROM pg_settings WHERE name = 'synchronous_commit') AS synchronous_commit_source",
            )
            .fetch_one(&mut *tx)
            .await
            .map_err(self.error(doing))?;
        let read = || {
            Ok(ServerFacts {
                version: row.try_get("version")?,
                in_recovery: row.try_get("in_recovery")?,
                read_only: row.try_get("read_only")?,
                read_only_source: row.try_get("read_only_source")?,
                fsync: row.try_get("fsync")?,
                full_page_writes: row.try_get("full_page_writes")?,
                synchronous_commit: row.try_get("synchronous_commit")?,
                synchronous_commit_source: row.try_get("synchronous_commit_source")?,
                autovacuum: row.try_get("autovacuum")?,
                track_counts: row.try_get("track_counts")?,
                connections: row.try_get("connections")?,
                max_connections: row.try_get("max_connections")?,
                max_prepared: row.try_get("max_prepared")?,
                frozen_age: row.try_get("frozen_age")?,
                sees_sessions: row.try_get("sees_sessions")?,
                user: row.try_get("user")?,
                database: row.try_get("database")?,
                encoding: row.try_get("encoding")?,
            })
        };
        read().map_err(self.error(doing))
    }
}
