//! Indexes of a table that has rows: built while producers and relays go on, outside of the migration's transaction.
//!
//! The files of `migrations/` build them in place, as Flyway and psql need it. `migrate` leaves these statements out on a table that
//! is there already, and then makes what differs from the definition that this build expects. So a run that was broken off is
//! completed by the next one.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::{Connection, Executor, PgConnection};

use super::attempts::{ATTEMPT, Attempts, MigrationProgress};
use super::{OutboxError, OutboxRepository};

/// Asked for without waiting: a statement that waits would hold up the index of the session that has it.
const BUILDER: &str = "SELECT pg_try_advisory_lock(1129139027, hashtext($1 || ' indexes'))";
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

/// The file without the statements that make or drop indexes.
pub(super) fn without_indexes(sql: &str) -> String {
    let mut is_of_index = false;
    let mut rest = String::new();
    for line in sql.split_inclusive('\n') {
        is_of_index |= line.starts_with("CREATE INDEX") || line.starts_with("DROP INDEX");
        if !is_of_index {
            rest += line;
        }
        is_of_index &= !line.trim_end().ends_with(';');
    }
    rest
}

impl OutboxRepository {
    /// Makes the indexes that are missing, invalid or others than this build expects. Nothing on a partitioned table, which takes none
    /// concurrently.
    pub(super) async fn make_indexes(
        &self,
        connection: &mut PgConnection,
        attempts: &Attempts,
        report: &mut (dyn FnMut(MigrationProgress) + Send),
    ) -> Result<(), OutboxError> {
        if self.indexes_to_make(connection).await?.is_empty() {
            return Ok(());
        }
        let doing = "waiting for another migration to build indexes";
        while !sqlx::query_scalar(BUILDER).bind(&self.schema).fetch_one(&mut *connection).await.map_err(self.error(doing))? {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        let made = self.make_all(connection, attempts, report).await;
        let doing = "ending the building of indexes";
        connection.execute("SELECT pg_advisory_unlock_all()").await.map_err(self.error(doing))?;
        made
    }

    async fn make_all(
        &self,
        connection: &mut PgConnection,
        attempts: &Attempts,
        report: &mut (dyn FnMut(MigrationProgress) + Send),
    ) -> Result<(), OutboxError> {
        for (name, definition) in self.indexes_to_make(connection).await? {
            report(MigrationProgress::Building { index: name.to_owned() });
            let doing = "building an index";
            // Of a run that was broken off.
            let drop = format!("DROP INDEX CONCURRENTLY IF EXISTS {{s}}.{name}_new");
            connection.execute(self.sql(&drop)).await.map_err(self.error(doing))?;
            let create = definition.replacen(
                &format!("CREATE INDEX {name} ON "),
                &format!("CREATE INDEX CONCURRENTLY {name}_new ON {{s}}."),
                1,
            );
            connection.execute(self.sql(&create)).await.map_err(self.error(doing))?;
            while let Err(error) = self.put_in_place(connection, name).await {
                attempts.again(self, connection, error, report).await?;
            }
        }
        Ok(())
    }

    async fn put_in_place(&self, connection: &mut PgConnection, name: &str) -> Result<(), OutboxError> {
        let doing = "putting an index in its place";
        let mut tx = connection.begin().await.map_err(self.error(doing))?;
        let swap = format!("{ATTEMPT}; DROP INDEX IF EXISTS {{s}}.{name}; ALTER INDEX {{s}}.{name}_new RENAME TO {name}");
        tx.execute(self.sql(&swap)).await.map_err(self.busy(doing))?;
        tx.commit().await.map_err(self.error(doing))
    }

    /// Name and definition.
    async fn indexes_to_make(&self, connection: &mut PgConnection) -> Result<Vec<(&'static str, &'static str)>, OutboxError> {
        let facts = self.schema_facts(connection).await?;
        if facts.is_partitioned {
            return Ok(Vec::new());
        }
        let differ: BTreeSet<&str> = facts.differences.iter().filter(|part| part.kind == "index").map(|part| part.name).collect();
        let is_invalid = |name: &str| facts.invalid.iter().any(|invalid| invalid.ends_with(&format!(".{name}")));
        let expected = super::examine::expected_indexes();
        Ok(expected.filter(|(name, _)| differ.contains(name) || is_invalid(name)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_on_indexes_are_left_out_and_all_others_kept() {
        let sql = "-- CREATE INDEX in words\nALTER TABLE t ADD c int;\n\nDROP INDEX i;\nCREATE INDEX i ON t (c)\n    WHERE c > 0;\nINSERT INTO m VALUES (1);\n";
        let rest = "-- CREATE INDEX in words\nALTER TABLE t ADD c int;\n\nINSERT INTO m VALUES (1);\n";
        assert_eq!(without_indexes(sql), rest);
    }
}
