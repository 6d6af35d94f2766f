use sqlx::PgConnection;

use super::{OutboxError, OutboxRepository};

/// Tables with their partitions, the largest first, and their indexes: sizes and rows as of the last vacuum or analyze.
#[derive(Debug, Clone, Default)]
pub struct SizeFacts {
    pub tables: Vec<TableFacts>,
    /// Name, bytes, entries.
    pub indexes: Vec<(String, i64, i64)>,
}

#[derive(Debug, Clone)]
pub struct TableFacts {
    pub name: String,
    /// Without indexes and what is stored out of line.
    pub bytes: i64,
    pub live: i64,
    /// Rows that vacuum could remove, or could if nothing held it back.
    pub dead: i64,
    /// Switched off for this table alone.
    pub autovacuum_off: bool,
    pub vacuumed_ms_ago: Option<i64>,
}

const OURS: &str = "
WITH ours AS (
    SELECT unnest(ARRAY[to_regclass($1), to_regclass($2), to_regclass($3)])::oid AS oid
    UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass($1)
)";

const TABLES: &str = "
SELECT c.relname::text, c.relpages::bigint * current_setting('block_size')::bigint, pg_stat_get_live_tuples(c.oid),
       pg_stat_get_dead_tuples(c.oid),
       EXISTS (SELECT FROM pg_options_to_table(c.reloptions)
               WHERE option_name = 'autovacuum_enabled' AND NOT option_value::bool),
       (extract(epoch FROM clock_timestamp()
                - GREATEST(pg_stat_get_last_vacuum_time(c.oid), pg_stat_get_last_autovacuum_time(c.oid))) * 1000)::bigint
FROM ours JOIN pg_class c USING (oid) WHERE c.relkind = 'r'
ORDER BY pg_stat_get_dead_tuples(c.oid) DESC, c.relpages DESC, 1 LIMIT 1000";

const INDEXES: &str = "
SELECT i.relname::text, i.relpages::bigint * current_setting('block_size')::bigint, GREATEST(i.reltuples, 0)::bigint
FROM ours JOIN pg_index x ON x.indrelid = ours.oid JOIN pg_class i ON i.oid = x.indexrelid
WHERE i.relkind = 'i' ORDER BY i.relpages DESC, 1 LIMIT 100";

impl OutboxRepository {
    pub(super) async fn size_facts(&self, connection: &mut PgConnection) -> Result<SizeFacts, OutboxError> {
        let doing = "looking at the sizes of the tables";
        let mut tx = self.looking(doing, connection).await?;
        let [outbox, batch, inbox] =
            ["event_outbox", "outbox_batch", "event_inbox"].map(|name| format!("{}.{name}", self.quoted));
        let (tables, indexes) = (self.sql(&[OURS, TABLES].concat()), self.sql(&[OURS, INDEXES].concat()));
        let query = sqlx::query_as(tables).persistent(self.prepares).bind(&outbox).bind(&batch).bind(&inbox);
        let rows: Vec<(String, i64, i64, i64, bool, Option<i64>)> = query.fetch_all(&mut *tx).await.map_err(self.error(doing))?;
        let query = sqlx::query_as(indexes).persistent(self.prepares).bind(&outbox).bind(&batch).bind(&inbox);
        let indexes = query.fetch_all(&mut *tx).await.map_err(self.error(doing))?;
        let table = |(name, bytes, live, dead, autovacuum_off, vacuumed_ms_ago)| TableFacts {
            name,
            bytes,
            live,
            dead,
            autovacuum_off,
            vacuumed_ms_ago,
        };
        Ok(SizeFacts { tables: rows.into_iter().map(table).collect(), indexes })
    }
}
