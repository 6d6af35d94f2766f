use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::attempts::{ATTEMPT, Attempts, MigrationProgress};
use super::indexes::without_indexes;
use super::{OutboxError, OutboxRepository};

/// The version that this build works with.
pub const LATEST_VERSION: i32 = 9;

/// Longest that locks are waited for, unless something else is said.
const WAIT: Duration = Duration::from_secs(600);

/// Migration files, oldest first. Each records its own version in `outbox_migration`, whoever applies it.
const MIGRATIONS: [(i32, &str); 7] = [
    (3, include_str!("../../../../migrations/V3__create_outbox_table.sql")),
    (4, include_str!("../../../../migrations/V4__share_outbox_among_relays.sql")),
    (5, include_str!("../../../../migrations/V5__create_event_inbox.sql")),
    (6, include_str!("../../../../migrations/V6__keep_the_claim_on_its_indexes.sql")),
    (7, include_str!("../../../../migrations/V7__audit_operators_and_pause_relays.sql")),
    (8, include_str!("../../../../migrations/V8__refuse_types_that_name_dead_letters.sql")),
    (9, include_str!("../../../../migrations/V9__hold_under_faults.sql")),
];

/// What a call of [`OutboxRepository::migrate`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// Version found, or `None` where there was nothing.
    pub from: Option<i32>,
    /// Version in force now.
    pub to: i32,
}

impl OutboxRepository {
    /// Creates or updates the outbox tables. May be run any number of times and by several processes at once: an advisory lock makes
    /// them take turns, and versions that are there are not touched. It waits up to ten minutes for tables that are in use.
    ///
    /// # Errors
    /// [`OutboxError::ForeignTable`] when an `event_outbox` of another making is in the way; nothing is changed then.
    pub async fn migrate(&self, connection: &mut PgConnection) -> Result<Migrated, OutboxError> {
        let mut log = |progress| tracing::info!(?progress, "migrating the outbox tables");
        self.migrate_within(connection, WAIT, &mut log).await
    }

    /// The same, with a limit on the time for which locks are waited for. Each attempt waits for a moment, so that producers do not queue up
    /// behind it while somebody else reads the table for long. All changes are one transaction; then indexes are built on a table
    /// that was there before, while everybody goes on.
    ///
    /// # Errors
    /// The same; [`OutboxError::Busy`] when the tables could not be locked in time; [`OutboxError::IndexesMissing`] when only indexes are
    /// left to be built, which the next call does.
    pub async fn migrate_within(
        &self,
        connection: &mut PgConnection,
        limit: Duration,
        report: &mut (dyn FnMut(MigrationProgress) + Send),
    ) -> Result<Migrated, OutboxError> {
        let attempts = Attempts::within(limit);
        let migrated = loop {
            match self.try_to_migrate(connection).await {
                Err(error) => attempts.again(self, connection, error, report).await?,
                Ok(migrated) => break migrated,
            }
        };
        if migrated.from.is_some_and(|from| from <= LATEST_VERSION) {
            let made = self.make_indexes(connection, &attempts, report).await;
            made.map_err(|error| OutboxError::IndexesMissing(Box::new(error)))?;
        }
        Ok(migrated)
    }

    async fn try_to_migrate(&self, connection: &mut PgConnection) -> Result<Migrated, OutboxError> {
        let mut tx = connection.begin().await.map_err(self.error("starting the migration"))?;
        self.take_turns(&mut tx).await?;
        let from = self.version(&mut tx).await?;
        if from.is_none() && self.exists(&mut tx, "event_outbox").await? {
            return Err(OutboxError::ForeignTable { schema: self.schema.clone() });
        }
        if !self.schema_exists(&mut tx).await? {
            tx.execute(self.sql("CREATE SCHEMA {s}")).await.map_err(self.error("creating the schema"))?;
        }
        // Indexes on a table with rows are built afterwards; a partitioned one takes none concurrently.
        let in_place = from.is_none() || self.is_partitioned(&mut tx).await?;
        // pg_catalog is searched first in any case. LOCAL: the caller's session keeps its own path.
        tx.execute(self.sql("SET LOCAL search_path TO {s}")).await.map_err(self.error("choosing the schema"))?;
        tx.execute(ATTEMPT).await.map_err(self.error("limiting the wait for locks"))?;
        for (_, sql) in MIGRATIONS.iter().filter(|(version, _)| from.is_none_or(|from| *version > from)) {
            let sql = if in_place { (*sql).to_owned() } else { without_indexes(sql) };
            tx.execute(AssertSqlSafe(sql)).await.map_err(self.busy("applying the migration"))?;
        }
        tx.commit().await.map_err(self.error("committing the migration"))?;
        Ok(Migrated { from, to: LATEST_VERSION })
    }

    /// The encoding of the database, such as `UTF8`.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn encoding(&self, connection: &mut PgConnection) -> Result<String, OutboxError> {
        sqlx::query_scalar("SELECT current_setting('server_encoding')")
            .fetch_one(connection)
            .await
            .map_err(self.error("asking for the encoding of the database"))
    }

    /// Waits for other migrations of the schema to end, and keeps them waiting until the transaction ends.
    pub(super) async fn take_turns(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        sqlx::query("SELECT pg_advisory_xact_lock(1129139027, hashtext($1))")
            .bind(&self.schema)
            .execute(connection)
            .await
            .map_err(self.error("waiting for another migration"))?;
        Ok(())
    }

    /// The newest migration that the schema has, or `None`.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn version(&self, connection: &mut PgConnection) -> Result<Option<i32>, OutboxError> {
        if !self.exists(connection, "outbox_migration").await? {
            return Ok(None);
        }
        self.scalar(self.sql("SELECT max(version) FROM {s}.outbox_migration"))
            .fetch_one(connection)
            .await
            .map_err(self.error("reading the migration's version"))
    }

    /// # Errors
    /// [`OutboxError::NotMigrated`] or [`OutboxError::Outdated`] unless the tables are those of this build or newer.
    pub async fn check_migrated(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        match self.version(connection).await? {
            Some(version) if version >= LATEST_VERSION => Ok(()),
            Some(found) => Err(OutboxError::Outdated { schema: self.schema.clone(), found, needed: LATEST_VERSION }),
            None => Err(OutboxError::NotMigrated { schema: self.schema.clone(), source: None }),
        }
    }

    pub(super) async fn exists(&self, connection: &mut PgConnection, table: &str) -> Result<bool, OutboxError> {
        self.scalar("SELECT to_regclass($1) IS NOT NULL")
            .bind(format!("{}.{table}", self.quoted))
            .fetch_one(connection)
            .await
            .map_err(self.error("looking for the outbox tables"))
    }

    async fn schema_exists(&self, connection: &mut PgConnection) -> Result<bool, OutboxError> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)")
            .bind(&self.schema)
            .fetch_one(connection)
            .await
            .map_err(self.error("looking for the schema"))
    }
}
