//! The streams that relays of this outbox have written to, and what is known of the end of each.

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::{OutboxError, OutboxRepository};
use crate::streams::Owner;

/// What is known of a stream, and what the journal says was appended since it was looked at last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownStream {
    pub stream: String,
    /// Id of its first entry at the last look, if there had been others before it; as it was before entries were lost.
    pub first_entry: Option<String>,
    /// Id of the newest entry that was appended by the last look.
    pub last_entry: Option<String>,
    /// How many entries Redis had counted by then.
    pub entries_added: Option<u64>,
    /// The first and the last entry that were appended since, as far as their ids are known.
    pub since: Option<(String, String)>,
    /// When entries were found to be gone, and how that showed. Until an audit finds nothing missing.
    pub lost: Option<(DateTime<Utc>, String)>,
}

/// What one look at a stream came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamLook {
    pub stream: String,
    pub first_entry: Option<String>,
    pub last_entry: Option<String>,
    pub entries_added: Option<u64>,
    pub lost: Option<String>,
}

/// Streams under the prefix `$1`. Of the journal, what was settled in the last minutes is read, by its index: a relay looks more often. Ids of
/// entries are padded, so that they sort as text.
const KNOWN: &str = "
WITH appended AS MATERIALIZED (
    SELECT b.stream, min(p.id) AS oldest, max(p.id) AS newest
    FROM {s}.outbox_batch b LEFT JOIN {s}.outbox_stream k ON k.stream = b.stream
    CROSS JOIN LATERAL (SELECT lpad(split_part(b.last_entry, '-', 1), 20, '0') || '-'
                            || lpad(split_part(b.last_entry, '-', 2), 20, '0') COLLATE \"C\" AS id) AS p
    WHERE b.settled_at > statement_timestamp() - interval '10 minutes' AND b.settled_at > COALESCE(k.looked_at, '-infinity')
      AND b.appended > 0 AND starts_with(b.stream, $1)
    GROUP BY b.stream
)
SELECT k.stream, k.first_entry, k.last_entry, k.entries_added, k.lost_at, k.lost, a.oldest, a.newest
FROM {s}.outbox_stream k LEFT JOIN appended a ON a.stream = k.stream WHERE starts_with(k.stream, $1)
UNION ALL
SELECT a.stream, NULL, NULL, NULL, NULL, NULL, a.oldest, a.newest
FROM appended a WHERE NOT EXISTS (SELECT 1 FROM {s}.outbox_stream k WHERE k.stream = a.stream)
ORDER BY 1";

const NOTE: &str = "
INSERT INTO {s}.outbox_stream AS k (stream, last_entry, entries_added, looked_at, lost_at, lost, first_entry)
SELECT l.stream, l.last_entry, l.entries_added, $5, CASE WHEN l.lost IS NOT NULL THEN $5 END, l.lost, l.first_entry
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $6::text[]) AS l(stream, last_entry, entries_added, lost, first_entry)
ON CONFLICT (stream) DO UPDATE
SET last_entry = EXCLUDED.last_entry, entries_added = EXCLUDED.entries_added, looked_at = EXCLUDED.looked_at,
    lost_at = COALESCE(k.lost_at, EXCLUDED.lost_at), lost = COALESCE(k.lost, EXCLUDED.lost),
    first_entry = CASE WHEN k.lost_at IS NULL THEN EXCLUDED.first_entry ELSE k.first_entry END";

impl OutboxRepository {
    /// Who this outbox is, for others that write to the same Redis: the same until the database is another one.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn owner(&self, connection: &mut PgConnection) -> Result<Owner, OutboxError> {
        let doing = "finding out which outbox this is";
        // Some providers let nobody ask. A refusal would end the transaction that this may be in.
        let may_ask = self.scalar("SELECT has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE')");
        let system: String = if may_ask.fetch_one(&mut *connection).await.map_err(self.error(doing))? {
            let system = self.scalar("SELECT system_identifier::text FROM pg_catalog.pg_control_system()");
            system.fetch_one(&mut *connection).await.map_err(self.error(doing))?
        } else {
            String::new()
        };
        let sql =
            "SELECT md5(concat_ws('/', $1::text, d.oid, $2::text)), d.datname::text, inet_server_addr()::text, inet_server_port()
                   FROM pg_catalog.pg_database d WHERE d.datname = current_database()";
        let (id, database, address, port): (String, String, Option<String>, Option<i32>) = sqlx::query_as(sql)
            .persistent(self.prepares)
            .bind(system)
            .bind(&self.schema)
            .fetch_one(connection)
            .await
            .map_err(self.error(doing))?;
        let place = address
            .zip(port)
            .map_or_else(String::new, |(address, port)| format!(" at {}:{port}", address.split('/').next().unwrap_or_default()));
        Ok(Owner { id, name: format!("schema {} of database {database}{place}", self.schema) })
    }

    /// The streams under this prefix that relays of this outbox have written to, and the time of the question.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn known_streams(
        &self,
        connection: &mut PgConnection,
        prefix: &str,
    ) -> Result<(DateTime<Utc>, Vec<KnownStream>), OutboxError> {
        let doing = "reading which streams there are";
        let now = self.scalar("SELECT clock_timestamp()").fetch_one(&mut *connection).await.map_err(self.error(doing))?;
        let rows = self.query(self.sql(KNOWN)).bind(prefix).fetch_all(connection).await.map_err(self.error(doing))?;
        let streams = rows.iter().map(known_stream).collect::<Result<_, _>>().map_err(self.error(doing))?;
        Ok((now, streams))
    }

    /// Writes down what looks at this time came to. A loss that is there already stays as it is.
    pub(crate) async fn note_looks(
        &self,
        connection: &mut PgConnection,
        at: DateTime<Utc>,
        looks: &[StreamLook],
    ) -> Result<(), OutboxError> {
        let count = |look: &StreamLook| look.entries_added.map(|entries| i64::try_from(entries).unwrap_or(i64::MAX));
        self.query(self.sql(NOTE))
            .bind(looks.iter().map(|look| look.stream.as_str()).collect::<Vec<_>>())
            .bind(looks.iter().map(|look| look.last_entry.as_deref()).collect::<Vec<_>>())
            .bind(looks.iter().map(count).collect::<Vec<_>>())
            .bind(looks.iter().map(|look| look.lost.as_deref()).collect::<Vec<_>>())
            .bind(at)
            .bind(looks.iter().map(|look| look.first_entry.as_deref()).collect::<Vec<_>>())
            .execute(connection)
            .await
            .map_err(self.error("writing down how streams stand"))
            .map(drop)
    }

    /// Forgets that entries of streams under this prefix were gone before `before`, because an audit that began then found that none is missing.
    pub(crate) async fn forget_losses(
        &self,
        connection: &mut PgConnection,
        prefix: &str,
        before: DateTime<Utc>,
    ) -> Result<(), OutboxError> {
        let sql = "UPDATE {s}.outbox_stream SET lost_at = NULL, lost = NULL WHERE lost_at < $2 AND starts_with(stream, $1)";
        self.query(self.sql(sql))
            .bind(prefix)
            .bind(before)
            .execute(connection)
            .await
            .map_err(self.error("writing down how streams stand"))
            .map(drop)
    }
}

fn known_stream(row: &PgRow) -> Result<KnownStream, sqlx::Error> {
    let (oldest, newest): (Option<String>, Option<String>) = (row.try_get("oldest")?, row.try_get("newest")?);
    let (lost_at, lost): (Option<DateTime<Utc>>, Option<String>) = (row.try_get("lost_at")?, row.try_get("lost")?);
    Ok(KnownStream {
        stream: row.try_get("stream")?,
        first_entry: row.try_get("first_entry")?,
        last_entry: row.try_get("last_entry")?,
        entries_added: row.try_get::<Option<i64>, _>("entries_added")?.and_then(|entries| entries.try_into().ok()),
        since: oldest.zip(newest),
        lost: lost_at.zip(lost),
    })
}
