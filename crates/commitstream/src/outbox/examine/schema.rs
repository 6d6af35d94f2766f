use std::collections::BTreeMap;

use sqlx::PgConnection;

use super::{OutboxError, OutboxRepository};
use crate::outbox::LATEST_VERSION;

/// What the migrations make, line by line: kind, name and definition, parted by tabs. A test holds it to the migrations.
const EXPECTED: &str = include_str!("definition.tsv");

/// The same of what there is. Names are not qualified, since the schema is the only one in the search path.
const DEFINITION: &str = r"
WITH ours AS (
    SELECT c.oid, c.relname, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relkind IN ('r', 'p')
      AND c.relname IN ('event_outbox', 'outbox_batch', 'outbox_lease', 'outbox_relay', 'event_inbox', 'outbox_audit', 'outbox_migration',
                        'outbox_pause', 'outbox_stream')
)
SELECT 'column', relname || '.' || attname,
       format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
       || CASE WHEN attidentity <> '' THEN ' IDENTITY' ELSE '' END
       || COALESCE(CASE WHEN attgenerated = '' THEN ' DEFAULT ' ELSE ' GENERATED ' END || pg_get_expr(adbin, adrelid), '')
FROM ours JOIN pg_attribute a ON attrelid = ours.oid AND attnum > 0 AND NOT attisdropped
LEFT JOIN pg_attrdef ON adrelid = ours.oid AND adnum = attnum
UNION ALL
SELECT 'constraint', relname || '.' || conname, pg_get_constraintdef(k.oid)
FROM ours JOIN pg_constraint k ON conrelid = ours.oid AND contype IN ('p', 'u', 'c')
UNION ALL
SELECT 'index', i.relname,
       replace(replace(pg_get_indexdef(indexrelid), ' ON ONLY ', ' ON '), format(' ON %I.', nspname), ' ON ')
FROM ours JOIN pg_index ON indrelid = ours.oid JOIN pg_class i ON i.oid = indexrelid
WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND conrelid = ours.oid)
UNION ALL
SELECT 'trigger', tgname, 'type ' || tgtype || CASE WHEN tgenabled IN ('O', 'A') THEN '' ELSE ' DISABLED' END
       || ' EXECUTE ' || tgfoid::regproc
FROM ours JOIN pg_trigger ON tgrelid = ours.oid AND NOT tgisinternal
UNION ALL
SELECT 'function', proname, md5(prosrc) FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
WHERE nspname = $1 AND proname IN ('outbox_uuid_v7', 'outbox_wake_relay')";

/// Of the tables and their partitions.
const INVALID: &str = "
SELECT format('%I.%I', n.nspname, i.relname) FROM pg_index x
JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_namespace n ON n.oid = i.relnamespace
WHERE NOT (x.indisvalid AND x.indisready)
  AND (x.indrelid = ANY (ARRAY[to_regclass($1), to_regclass($2), to_regclass($3)])
       OR x.indrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass($1)))
ORDER BY 1 LIMIT 20";

/// What a relay needs, and what an operator needs besides. It is asked of the catalogs alone, which every user may read.
const PRIVILEGES: &str = "
SELECT true, 'schema: USAGE' FROM pg_namespace WHERE nspname = $1 AND NOT has_schema_privilege(oid, 'USAGE')
UNION ALL (
SELECT of_relay, t.name || ': ' || string_agg(privilege, ', ' ORDER BY place)
FROM (VALUES (true, 'event_outbox', ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
             (true, 'outbox_batch', ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
             (true, 'outbox_relay', ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
             (true, 'outbox_lease', ARRAY['SELECT', 'UPDATE']), (true, 'event_inbox', ARRAY['SELECT', 'DELETE']),
             (true, 'outbox_stream', ARRAY['SELECT', 'INSERT', 'UPDATE']), (true, 'outbox_pause', ARRAY['SELECT']), (true, 'outbox_migration', ARRAY['SELECT']),
             (false, 'outbox_pause', ARRAY['INSERT', 'DELETE']), (false, 'outbox_audit', ARRAY['SELECT', 'INSERT', 'UPDATE'])
     ) AS needed (of_relay, name, privileges)
CROSS JOIN LATERAL unnest(privileges) WITH ORDINALITY AS p (privilege, place)
JOIN (SELECT relname::text AS name, c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = $1) AS t USING (name)
WHERE NOT has_table_privilege(t.oid, privilege) GROUP BY of_relay, t.name ORDER BY t.name)";

/// Which migration is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    Version(i32),
    Nothing,
    /// An `event_outbox` that no migration of ours made.
    Foreign,
}

impl Recorded {
    /// The tables of this build are there.
    #[must_use]
    pub fn is_current_or_newer(self) -> bool {
        matches!(self, Self::Version(version) if version >= LATEST_VERSION)
    }
}

/// What is not as the migrations made it.
#[derive(Debug, Clone)]
pub struct SchemaFacts {
    pub differences: Vec<Difference>,
    /// Indexes, with their schema.
    pub invalid: Vec<String>,
    /// Rows of `outbox_lease`.
    pub leases: i64,
    pub is_partitioned: bool,
}

/// What this user may not do with the tables that there are.
#[derive(Debug, Clone)]
pub struct Rights {
    pub user: String,
    /// What a relay needs, each as `table: SELECT, UPDATE` or `schema: USAGE`.
    pub denied: Vec<String>,
    /// The same of what an operator needs besides, in the console or with commands.
    pub denied_to_operators: Vec<String>,
}

/// A part of the outbox that is missing or another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `column`, `constraint`, `index`, `trigger` or `function`.
    pub kind: &'static str,
    /// With the table before it and a point, for columns and constraints.
    pub name: &'static str,
    pub expected: &'static str,
    /// `None` when there is none.
    pub found: Option<String>,
}

impl OutboxRepository {
    pub(super) async fn recorded(&self, connection: &mut PgConnection) -> Result<Recorded, OutboxError> {
        Ok(match self.version(connection).await? {
            Some(version) => Recorded::Version(version),
            None if self.exists(connection, "event_outbox").await? => Recorded::Foreign,
            None => Recorded::Nothing,
        })
    }

    pub(super) async fn rights(&self, connection: &mut PgConnection) -> Result<Rights, OutboxError> {
        let doing = "looking at the rights of this user";
        let mut tx = self.looking(doing, connection).await?;
        let user = self.scalar("SELECT current_user::text").fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let denied: Vec<(bool, String)> = sqlx::query_as(PRIVILEGES)
            .persistent(self.prepares)
            .bind(&self.schema)
            .fetch_all(&mut *tx)
            .await
            .map_err(self.error(doing))?;
        let (relay, operators): (Vec<_>, Vec<_>) = denied.into_iter().partition(|(of_relay, _)| *of_relay);
        let names = |denied: Vec<(bool, String)>| denied.into_iter().map(|(_, name)| name).collect();
        Ok(Rights { user, denied: names(relay), denied_to_operators: names(operators) })
    }

    pub(in crate::outbox) async fn schema_facts(&self, connection: &mut PgConnection) -> Result<SchemaFacts, OutboxError> {
        let doing = "comparing the outbox tables with the migrations";
        let mut tx = self.looking(doing, connection).await?;
        let found = sqlx::query_as(DEFINITION)
            .persistent(self.prepares)
            .bind(&self.schema)
            .fetch_all(&mut *tx)
            .await
            .map_err(self.error(doing))?;
        let tables = ["event_outbox", "outbox_batch", "event_inbox"].map(|name| format!("{}.{name}", self.quoted));
        let [outbox, batch, inbox] = &tables;
        let invalid = self.scalar(INVALID).bind(outbox).bind(batch).bind(inbox).fetch_all(&mut *tx).await;
        let leases = self.scalar(self.sql("SELECT count(*) FROM {s}.outbox_lease")).fetch_one(&mut *tx).await;
        Ok(SchemaFacts {
            differences: differences(found),
            invalid: invalid.map_err(self.error(doing))?,
            leases: leases.map_err(self.error(doing))?,
            is_partitioned: self.is_partitioned(&mut tx).await?,
        })
    }

    /// What there is of the outbox, in the form of `definition.tsv`, sorted.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn definition(&self, connection: &mut PgConnection) -> Result<String, OutboxError> {
        let doing = "reading the definition of the outbox";
        let mut tx = self.looking(doing, connection).await?;
        let query = sqlx::query_as::<_, (String, String, String)>(DEFINITION).bind(&self.schema);
        let parts = query.fetch_all(&mut *tx).await.map_err(self.error(doing))?;
        let mut lines: Vec<_> = parts.iter().map(|(kind, name, definition)| format!("{kind}\t{name}\t{definition}\n")).collect();
        lines.sort();
        Ok(lines.concat())
    }
}

/// Name and definition of each index that the migrations make beside those of keys.
pub(in crate::outbox) fn expected_indexes() -> impl Iterator<Item = (&'static str, &'static str)> {
    EXPECTED.lines().filter_map(|line| line.strip_prefix("index\t")?.split_once('\t'))
}

/// What somebody added is no difference.
fn differences(found: Vec<(String, String, String)>) -> Vec<Difference> {
    let found: BTreeMap<_, _> = found.into_iter().map(|(kind, name, definition)| ((kind, name), definition)).collect();
    let parts = EXPECTED.lines().filter_map(|line| {
        let mut parts = line.splitn(3, '\t');
        Some((parts.next()?, parts.next()?, parts.next()?))
    });
    let differs = |(kind, name, expected): (&'static str, &'static str, &'static str)| {
        let found = found.get(&(kind.to_owned(), name.to_owned())).cloned();
        // A constraint that somebody has validated since is none the worse for it.
        let is_same = found.is_some() && [Some(expected), expected.strip_suffix(" NOT VALID")].contains(&found.as_deref());
        (!is_same).then_some(Difference { kind, name, expected, found })
    };
    parts.filter_map(differs).collect()
}
