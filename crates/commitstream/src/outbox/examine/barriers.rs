use sqlx::{PgConnection, Row};

use super::{OutboxError, OutboxRepository};

/// Something that others set up on the tables, and that may keep statements of relays and producers from doing what they are meant to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Barrier {
    pub kind: BarrierKind,
    pub table: String,
    /// Of a trigger, rule or constraint; of a constraint with the table that it is on.
    pub name: String,
    /// Row-level security is in force for this user; a trigger may keep a row from changing.
    pub is_direct: bool,
}

/// What a [`Barrier`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarrierKind {
    RowSecurity,
    Trigger,
    Rule,
    /// A foreign key of another table that keeps rows from being deleted.
    Reference,
}

/// Triggers of partitions are those of the table. Type bits of a trigger: 1 is FOR EACH ROW, 2 is BEFORE.
const BARRIERS: &str = "
WITH ours AS (
    SELECT c.oid, c.relname::text AS relname, c.relrowsecurity FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relkind IN ('r', 'p')
      AND (c.relname IN ('event_outbox', 'outbox_batch', 'outbox_lease', 'outbox_relay', 'event_inbox', 'outbox_audit', 'outbox_migration',
                         'outbox_pause')
           OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass($2)))
)
SELECT 'row security' AS kind, relname, '' AS name, row_security_active(oid) AS is_direct FROM ours WHERE relrowsecurity
UNION ALL
SELECT 'trigger', relname, tgname, tgtype::int & 3 = 3 FROM ours JOIN pg_trigger ON tgrelid = ours.oid
WHERE NOT tgisinternal AND tgparentid = 0 AND tgenabled <> 'D' AND tgname <> 'event_outbox_wake_relay'
UNION ALL
SELECT 'rule', relname, rulename, true FROM ours JOIN pg_rewrite ON ev_class = ours.oid WHERE ev_enabled <> 'D'
UNION ALL
SELECT 'reference', relname, format('%s of %s', conname, conrelid::regclass), false FROM ours JOIN pg_constraint k ON confrelid = ours.oid
WHERE contype = 'f' AND confdeltype IN ('a', 'r') AND conparentid = 0
ORDER BY 1, 2, 3 LIMIT 100";

impl OutboxRepository {
    pub(super) async fn barriers(&self, connection: &mut PgConnection) -> Result<Vec<Barrier>, OutboxError> {
        let doing = "looking for row-level security and triggers";
        let mut tx = self.looking(doing, connection).await?;
        let table = format!("{}.event_outbox", self.quoted);
        let rows = self.query(BARRIERS).bind(&self.schema).bind(table).fetch_all(&mut *tx).await.map_err(self.error(doing))?;
        let barrier = |row: &sqlx::postgres::PgRow| {
            let kind = match row.try_get("kind")? {
                "row security" => BarrierKind::RowSecurity,
                "trigger" => BarrierKind::Trigger,
                "rule" => BarrierKind::Rule,
                _ => BarrierKind::Reference,
            };
            let (table, name) = (row.try_get("relname")?, row.try_get("name")?);
            Ok(Barrier { kind, table, name, is_direct: row.try_get("is_direct")? })
        };
        rows.iter().map(barrier).collect::<Result<_, sqlx::Error>>().map_err(self.error(doing))
    }
}
