use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::text::readable_or_null;
use super::{OutboxError, OutboxRepository, audit_settle};

/// One event that is not where it should be, or not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub event_id: Uuid,
    /// The stream of the entry, or the one that should have it.
    pub stream: String,
    /// Redis's id of the entry; `None` where there is no entry.
    pub entry_id: Option<String>,
    /// `None` when the outbox has no row of this event (any more).
    pub aggregate_type: Option<String>,
    pub aggregate_id: Option<String>,
}

/// The events of one kind of fault.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    pub count: u64,
    /// The first of them, by stream and position, as many as were asked for.
    pub first: Vec<Finding>,
}

/// What the comparison of the tables with the entries that were read came to.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub missing: Findings,
    pub duplicated: Findings,
    pub out_of_order: Findings,
    pub unsettled: Findings,
    pub misplaced: Findings,
    pub rowless: Findings,
    pub trimmed: u64,
    pub later: u64,
    pub unknown: u64,
    pub published: u64,
    pub pending: u64,
    pub failed: u64,
    pub open_batches: u64,
}

/// Temporary tables of the session. `position` counts the entries of a stream; `survivor` is the position of the stream's first
/// entry when its reading had ended: what came before may have been trimmed while it was read.
const TABLES: &str = "
SET LOCAL client_min_messages = warning;
DROP TABLE IF EXISTS pg_temp.audit_entry, pg_temp.audit_stream, pg_temp.audit_absent, pg_temp.audit_finding;
CREATE TEMP TABLE audit_entry (stream int NOT NULL, position bigint NOT NULL, event_id uuid, entry_id text NOT NULL);
CREATE TEMP TABLE audit_stream (stream int NOT NULL, key text NOT NULL, trimmed boolean NOT NULL, survivor bigint);
CREATE TEMP TABLE audit_absent (event_id uuid NOT NULL, stream text NOT NULL, aggregate_type text, aggregate_id text, seq bigint,
    since timestamptz NOT NULL, later boolean NOT NULL);
CREATE TEMP TABLE audit_finding (kind text NOT NULL, event_id uuid NOT NULL, stream text NOT NULL, ordinal bigint, entry_id text,
    aggregate_type text, aggregate_id text);";

/// The sessions of [`connect`](super::connect) keep to nested loops by index, which is right for a claim and would take hours here.
const PLANNER: &str = "
SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; SET LOCAL enable_mergejoin = on; SET LOCAL enable_hashjoin = on;
SET LOCAL work_mem = '64MB'";

/// Faults of entries. A second entry of an event is `duplicated` and nothing else; the order of an aggregate is judged by its
/// first entries, those in its own stream before others. The highest `seq` so far is what counts, so that one early event does not put all later ones in the wrong.
const ENTRIES: &str = r#"
INSERT INTO pg_temp.audit_finding (kind, event_id, stream, ordinal, entry_id, aggregate_type, aggregate_id)
WITH known AS MATERIALIZED (
    SELECT e.stream, e.position, e.event_id, e.entry_id, o.seq, o.status, o.aggregate_type, o.aggregate_id,
           s.key <> $1 || o.aggregate_type AS elsewhere,
           row_number() OVER (PARTITION BY e.event_id ORDER BY s.key <> $1 || o.aggregate_type, e.stream, e.position) AS copy
    FROM pg_temp.audit_entry e JOIN pg_temp.audit_stream s USING (stream) LEFT JOIN {s}.event_outbox o ON o.id = e.event_id
    WHERE e.event_id IS NOT NULL
), ordered AS (
    SELECT *, max(seq) OVER (PARTITION BY stream, aggregate_type COLLATE "C", aggregate_id COLLATE "C" ORDER BY position) AS highest
    FROM known WHERE copy = 1 AND seq IS NOT NULL
), found AS (
    SELECT 'duplicated' AS kind, event_id, stream, position, entry_id, aggregate_type, aggregate_id FROM known WHERE copy > 1
    UNION ALL
    SELECT 'out_of_order', event_id, stream, position, entry_id, aggregate_type, aggregate_id FROM ordered WHERE seq < highest
    UNION ALL
    SELECT 'unsettled', event_id, stream, position, entry_id, aggregate_type, aggregate_id FROM known
    WHERE copy = 1 AND status <> 'PUBLISHED'
      AND event_id NOT IN (SELECT unnest(event_ids) FROM {s}.outbox_batch WHERE settled_at IS NULL)
    UNION ALL
    SELECT 'misplaced', event_id, stream, position, entry_id, aggregate_type, aggregate_id FROM known WHERE copy = 1 AND elsewhere
)
SELECT f.kind, f.event_id, s.key, f.position, f.entry_id, f.aggregate_type, f.aggregate_id
FROM found f JOIN pg_temp.audit_stream s USING (stream)"#;

/// What the tables say is in a stream, and is not: published rows, and what settled batches name whose rows were removed
/// since. `later` was published after the audit began, so its entry may be one that was not read.
const ABSENT: &str = "
INSERT INTO pg_temp.audit_absent (event_id, stream, aggregate_type, aggregate_id, seq, since, later)
SELECT o.id, $1 || o.aggregate_type, o.aggregate_type, o.aggregate_id, o.seq, o.created_at,
       COALESCE(NULLIF(o.published_at, 'infinity'), o.created_at) >= $2
FROM {s}.event_outbox o
WHERE o.status = 'PUBLISHED' AND NOT EXISTS (SELECT 1 FROM pg_temp.audit_entry e WHERE e.event_id = o.id)
UNION ALL
SELECT u.id, min(b.stream), NULL, NULL, NULL, min(b.claimed_at), bool_or(b.settled_at >= $2)
FROM {s}.outbox_batch b CROSS JOIN LATERAL unnest(b.event_ids[1:b.appended]) AS u(id)
WHERE b.settled_at IS NOT NULL AND starts_with(b.stream, $1)
  AND NOT EXISTS (SELECT 1 FROM pg_temp.audit_entry e WHERE e.event_id = u.id)
  AND NOT EXISTS (SELECT 1 FROM {s}.event_outbox o WHERE o.id = u.id)
GROUP BY u.id";

/// Which absent events are missing. Where a stream has lost its beginning, only those are that came after an entry that is still
/// there: a batch is appended in its order, and what was claimed after an entry was settled was appended after it. All
/// times are the database's; `since` is the creation of a row that no batch names.
const MISSING: &str = "
INSERT INTO pg_temp.audit_finding (kind, event_id, stream, ordinal, aggregate_type, aggregate_id)
WITH named AS MATERIALIZED (
    SELECT b.batch_id, b.stream, b.claimed_at, u.id, u.place
    FROM {s}.outbox_batch b CROSS JOIN LATERAL unnest(b.event_ids[1:b.appended]) WITH ORDINALITY AS u(id, place)
    WHERE b.settled_at IS NOT NULL AND b.stream IN (SELECT key FROM pg_temp.audit_stream WHERE trimmed)
), surviving AS (
    SELECT s.key, s.stream, e.position, e.event_id
    FROM pg_temp.audit_stream s JOIN pg_temp.audit_entry e ON e.stream = s.stream AND e.position >= s.survivor WHERE s.trimmed
), horizon AS (
    SELECT DISTINCT ON (v.stream) v.key, NULLIF(o.published_at, '-infinity') AS published_at
    FROM surviving v JOIN {s}.event_outbox o ON o.id = v.event_id AND o.status = 'PUBLISHED' ORDER BY v.stream, v.position
), reached AS (
    SELECT n.batch_id, min(n.place) AS place
    FROM named n JOIN surviving v ON v.event_id = n.id AND v.key = n.stream GROUP BY n.batch_id
), dated AS (
    SELECT a.event_id, min(n.claimed_at) AS claimed_at, bool_or(n.place > r.place) AS follows
    FROM pg_temp.audit_absent a JOIN named n ON n.id = a.event_id LEFT JOIN reached r USING (batch_id) GROUP BY a.event_id
)
SELECT CASE WHEN a.later THEN 'later'
            WHEN NOT COALESCE(s.trimmed, false) OR d.follows OR COALESCE(d.claimed_at, a.since) > h.published_at THEN 'missing'
            ELSE 'trimmed' END,
       a.event_id, a.stream, a.seq, a.aggregate_type, a.aggregate_id
FROM pg_temp.audit_absent a
LEFT JOIN pg_temp.audit_stream s ON s.key = a.stream
LEFT JOIN horizon h ON h.key = a.stream
LEFT JOIN dated d ON d.event_id = a.event_id";

const FOUND: &str = "
SELECT * FROM (
    SELECT f.*, count(*) OVER (PARTITION BY kind) AS total, row_number() OVER (PARTITION BY kind ORDER BY stream, ordinal) AS n
    FROM pg_temp.audit_finding f) AS numbered
WHERE n <= GREATEST($1, 1) ORDER BY kind, n";

const COUNTS: &str = "
SELECT count(*) FILTER (WHERE status = 'PUBLISHED') AS published,
       count(*) FILTER (WHERE status IN ('PENDING', 'PROCESSING')) AS pending,
       count(*) FILTER (WHERE status = 'FAILED') AS failed,
       (SELECT count(*) FROM {s}.outbox_batch WHERE settled_at IS NULL) AS open_batches,
       (SELECT count(*) FROM pg_temp.audit_entry e
        WHERE NOT EXISTS (SELECT 1 FROM {s}.event_outbox o WHERE o.id = e.event_id)) AS unknown
FROM {s}.event_outbox";

impl Findings {
    /// There are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl OutboxRepository {
    /// Makes room for the entries of the streams in temporary tables of the session, and returns the database's time: what is
    /// published before it was appended before it.
    pub(crate) async fn begin_audit(&self, connection: &mut PgConnection) -> Result<DateTime<Utc>, OutboxError> {
        let error = self.error("creating temporary tables for the audit");
        let begin = async {
            let mut transaction = connection.begin().await?;
            sqlx::raw_sql(TABLES).execute(&mut *transaction).await?;
            let now = sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(now)
        };
        begin.await.map_err(error)
    }

    /// Notes entries of a stream, of which `before` were noted already: the id of the event, if the entry has one, and Redis's id.
    pub(crate) async fn note_entries(
        &self,
        connection: &mut PgConnection,
        stream: i32,
        before: u64,
        entries: impl Iterator<Item = (Option<Uuid>, &str)>,
    ) -> Result<(), OutboxError> {
        let mut text = String::new();
        for (position, (event, entry)) in (before + 1..).zip(entries) {
            let event = event.map_or_else(|| "\\N".to_owned(), |id| id.to_string());
            text += &format!("{stream}\t{position}\t{event}\t{entry}\n");
        }
        let copy = async {
            let mut copy = connection.copy_in_raw("COPY pg_temp.audit_entry FROM STDIN").await?;
            copy.send(text.as_bytes()).await?;
            copy.finish().await
        };
        copy.await.map_err(self.error("noting entries for the audit")).map(drop)
    }

    /// Notes a stream that was read; `first` is Redis's id of its first entry after that.
    pub(crate) async fn note_stream(
        &self,
        connection: &mut PgConnection,
        stream: i32,
        key: &str,
        trimmed: bool,
        first: Option<&str>,
    ) -> Result<(), OutboxError> {
        let sql = "INSERT INTO pg_temp.audit_stream (stream, key, trimmed, survivor)
                   SELECT $1, $2, $3, (SELECT position FROM pg_temp.audit_entry WHERE stream = $1 AND entry_id = $4)";
        sqlx::query(sql)
            .bind(stream)
            .bind(key)
            .bind(trimmed)
            .bind(first)
            .execute(connection)
            .await
            .map_err(self.error("noting a stream for the audit"))
            .map(drop)
    }

    /// Compares what was noted with the tables, all in one snapshot, and names the first `named` of each fault.
    pub(crate) async fn compare(
        &self,
        connection: &mut PgConnection,
        began: DateTime<Utc>,
        prefix: &str,
        named: u32,
    ) -> Result<Compared, OutboxError> {
        let error = self.error("comparing the outbox with the streams");
        let compare = async {
            let mut transaction = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
            sqlx::raw_sql(PLANNER).execute(&mut *transaction).await?;
            sqlx::raw_sql("ANALYZE pg_temp.audit_entry, pg_temp.audit_stream").execute(&mut *transaction).await?;
            sqlx::query(self.sql(ENTRIES)).bind(prefix).execute(&mut *transaction).await?;
            sqlx::query(self.sql(ABSENT)).bind(prefix).bind(began).execute(&mut *transaction).await?;
            sqlx::raw_sql("ANALYZE pg_temp.audit_absent").execute(&mut *transaction).await?;
            sqlx::query(self.sql(MISSING)).execute(&mut *transaction).await?;
            audit_settle::find(self, &mut transaction, prefix).await?;
            let found = sqlx::query(FOUND).bind(i64::from(named)).fetch_all(&mut *transaction).await?;
            let counts = sqlx::query(self.sql(COUNTS)).fetch_one(&mut *transaction).await?;
            sqlx::raw_sql("DROP TABLE pg_temp.audit_entry, pg_temp.audit_stream, pg_temp.audit_absent, pg_temp.audit_finding")
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
            compared(&found, &counts, named)
        };
        compare.await.map_err(error)
    }
}

fn compared(found: &[PgRow], counts: &PgRow, named: u32) -> Result<Compared, sqlx::Error> {
    let count = |row: &PgRow, column: &str| Ok::<_, sqlx::Error>(row.try_get::<i64, _>(column)?.unsigned_abs());
    let mut compared = Compared {
        unknown: count(counts, "unknown")?,
        published: count(counts, "published")?,
        pending: count(counts, "pending")?,
        failed: count(counts, "failed")?,
        open_batches: count(counts, "open_batches")?,
        ..Compared::default()
    };
    for row in found {
        let total = count(row, "total")?;
        let findings = match row.try_get("kind")? {
            "missing" => &mut compared.missing,
            "duplicated" => &mut compared.duplicated,
            "out_of_order" => &mut compared.out_of_order,
            "unsettled" => &mut compared.unsettled,
            "misplaced" => &mut compared.misplaced,
            "rowless" => &mut compared.rowless,
            other => {
                *(if other == "later" { &mut compared.later } else { &mut compared.trimmed }) = total;
                continue;
            }
        };
        findings.count = total;
        if findings.first.len() < named as usize {
            findings.first.push(Finding {
                event_id: row.try_get("event_id")?,
                stream: row.try_get("stream")?,
                entry_id: row.try_get("entry_id")?,
                aggregate_type: readable_or_null(row, "aggregate_type")?,
                aggregate_id: readable_or_null(row, "aggregate_id")?,
            });
        }
    }
    Ok(compared)
}
