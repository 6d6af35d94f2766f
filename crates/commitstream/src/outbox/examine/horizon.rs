use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::{OutboxError, OutboxRepository};

/// Something that makes vacuum keep rows that nobody else can see any more.
#[derive(Debug, Clone)]
pub struct Holder {
    pub kind: HolderKind,
    /// Process id, name of the prepared transaction, of the slot or of the standby.
    pub name: String,
    pub user: Option<String>,
    pub application: Option<String>,
    pub state: Option<String>,
    /// The beginning of its last query, up to the first literal. What this user may not see is not there.
    pub query: Option<String>,
    /// Since the transaction began, where that is known.
    pub age_ms: Option<i64>,
    /// Transactions that have begun since.
    pub transactions: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HolderKind {
    Session,
    Prepared,
    Slot,
    /// It reports what its own queries need, without a slot.
    Standby,
}

/// Sessions of this database, but vacuum itself, which does not hold back others. A literal may be a secret, or hide another's end: so a
/// query is shown up to the first one only.
const HOLDERS: &str = r"
SELECT 'session' AS kind, pid::text AS name, usename::text AS role, application_name AS application, state,
       left(regexp_replace(left(NULLIF(query, '<insufficient privilege>'), 400), '(''|\$\w*\$).*', '...'), 120) AS query,
       (extract(epoch FROM clock_timestamp() - xact_start) * 1000)::bigint AS age_ms,
       GREATEST(age(backend_xmin), age(backend_xid))::bigint AS transactions
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
  AND backend_type IS DISTINCT FROM 'autovacuum worker' AND query !~* '^\s*vacuum'
UNION ALL
SELECT 'prepared', gid, owner::text, NULL, NULL, NULL,
       (extract(epoch FROM clock_timestamp() - prepared) * 1000)::bigint, age(transaction)
FROM pg_prepared_xacts WHERE database = current_database()
UNION ALL
SELECT 'slot', slot_name::text, NULL, NULL, CASE WHEN active THEN 'active' ELSE 'inactive' END, NULL, NULL, age(xmin)
FROM pg_replication_slots WHERE xmin IS NOT NULL
UNION ALL
SELECT 'standby', application_name, usename::text, NULL, state, NULL, NULL, age(backend_xmin)
FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
ORDER BY transactions DESC, age_ms DESC NULLS LAST LIMIT 50";

impl OutboxRepository {
    /// What holds vacuum back, the oldest first, at most 50.
    pub(super) async fn horizon(&self, connection: &mut PgConnection) -> Result<Vec<Holder>, OutboxError> {
        let doing = "looking for old transactions";
        let mut tx = self.looking(doing, connection).await?;
        let rows = self.query(HOLDERS).fetch_all(&mut *tx).await.map_err(self.error(doing))?;
        rows.iter().map(holder).collect::<Result<_, _>>().map_err(self.error(doing))
    }
}

fn holder(row: &PgRow) -> Result<Holder, sqlx::Error> {
    let kind = match row.try_get("kind")? {
        "prepared" => HolderKind::Prepared,
        "slot" => HolderKind::Slot,
        "standby" => HolderKind::Standby,
        _ => HolderKind::Session,
    };
    Ok(Holder {
        kind,
        name: row.try_get("name")?,
        user: row.try_get("role")?,
        application: row.try_get("application")?,
        state: row.try_get("state")?,
        query: row.try_get("query")?,
        age_ms: row.try_get("age_ms")?,
        transactions: row.try_get("transactions")?,
    })
}
