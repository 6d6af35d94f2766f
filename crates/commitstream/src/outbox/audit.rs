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
DROP TABLE IF EXISTS pg_temp.audit_entry, pg_temp.audit_stream, pg_temp.audit_absent, pg_temp.audit_finding, pg_temp.audit_missing;
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

/// The keys under the prefix `$1` that events may be in, whatever Redis says of them.
const STREAMS: &str = "
SELECT DISTINCT stream FROM {s}.outbox_batch WHERE appended > 0 AND starts_with(stream, $1)
UNION SELECT stream FROM {s}.outbox_stream WHERE starts_with(stream, $1)
UNION SELECT DISTINCT $1 || aggregate_type FROM {s}.event_outbox WHERE status = 'PUBLISHED'";

const NOTE_STREAMS: &str = "
INSERT INTO pg_temp.audit_stream (stream, key, trimmed, survivor)
SELECT s.stream, s.key, s.trimmed, e.position
FROM unnest($1::int[], $2::text[], $3::boolean[], $4::text[]) AS s(stream, key, trimmed, first)
LEFT JOIN pg_temp.audit_entry e ON e.stream = s.stream AND e.entry_id = s.first";

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
///
/// What a relay has seen of the stream decides before that: what was trimmed by its last look (`first_entry`) is not missing though the
/// stream is gone now, and what was there when the stream was lost is missing though the new one was trimmed.
const MISSING: &str = r#"
INSERT INTO pg_temp.audit_finding (kind, event_id, stream, ordinal, aggregate_type, aggregate_id)
WITH named AS MATERIALIZED (
    SELECT b.batch_id, b.stream, b.claimed_at, u.id, u.place,
           lpad(split_part(b.last_entry, '-', 1), 20, '0') || '-' || lpad(split_part(b.last_entry, '-', 2), 20, '0') COLLATE "C" AS last
    FROM {s}.outbox_batch b CROSS JOIN LATERAL unnest(b.event_ids[1:b.appended]) WITH ORDINALITY AS u(id, place)
    WHERE b.settled_at IS NOT NULL AND b.stream IN (
        SELECT key FROM pg_temp.audit_stream WHERE trimmed
        UNION ALL SELECT stream FROM {s}.outbox_stream WHERE first_entry IS NOT NULL OR lost_at IS NOT NULL)
), looked_at AS (
    SELECT stream AS key, lost_at,
           lpad(split_part(first_entry, '-', 1), 20, '0') || '-' || lpad(split_part(first_entry, '-', 2), 20, '0') COLLATE "C" AS first
    FROM {s}.outbox_stream
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
    SELECT a.event_id, min(n.claimed_at) AS claimed_at, bool_or(n.place > r.place) AS follows, max(n.last) AS last
    FROM pg_temp.audit_absent a JOIN named n ON n.id = a.event_id LEFT JOIN reached r USING (batch_id) GROUP BY a.event_id
)
SELECT CASE WHEN a.later THEN 'later'
            WHEN d.last < k.first THEN 'trimmed'
            WHEN COALESCE(d.claimed_at, a.since) < k.lost_at THEN 'missing'
            WHEN NOT COALESCE(s.trimmed, false) OR d.follows OR COALESCE(d.claimed_at, a.since) > h.published_at THEN 'missing'
            ELSE 'trimmed' END,
       a.event_id, a.stream, a.seq, a.aggregate_type, a.aggregate_id
FROM pg_temp.audit_absent a
LEFT JOIN pg_temp.audit_stream s ON s.key = a.stream
LEFT JOIN horizon h ON h.key = a.stream
LEFT JOIN looked_at k ON k.key = a.stream
LEFT JOIN dated d ON d.event_id = a.event_id"#;

/// The rows of what is missing, for [`OutboxRepository::republish`]: as they were when they were compared.
const REPUBLISHABLE: &str = "
CREATE TEMP TABLE audit_missing ON COMMIT PRESERVE ROWS AS
SELECT o.id, o.seq, o.partition_no, o.published_at FROM pg_temp.audit_finding f JOIN {s}.event_outbox o ON o.id = f.event_id
WHERE f.kind = 'missing' AND o.status = 'PUBLISHED';
CREATE INDEX ON pg_temp.audit_missing (seq);
ANALYZE pg_temp.audit_missing";

/// Where the journal says that something missing is in the stream of another prefix, this is the wrong one to look under.
const ELSEWHERE: &str = "
SELECT b.stream FROM {s}.outbox_batch b
WHERE b.settled_at IS NOT NULL AND b.appended > 0 AND NOT starts_with(b.stream, $1)
  AND EXISTS (SELECT FROM unnest(b.event_ids[1:b.appended]) AS u(id) JOIN pg_temp.audit_missing m ON m.id = u.id)
LIMIT 1";

/// Relays look the batches of the last minutes up. Where one is missing whole, of a partition, they are told that it is published again: else
/// they would do it once more if its marker were gone, too.
const MARK_LOST: &str = "
WITH recent AS (
    SELECT b.batch_id, e.partition_no, bool_and(m.id IS NOT NULL) AS whole
    FROM {s}.outbox_batch b CROSS JOIN LATERAL unnest(b.event_ids[1:b.appended]) AS u(id)
    JOIN {s}.event_outbox e ON e.id = u.id LEFT JOIN pg_temp.audit_missing m ON m.id = u.id
    WHERE b.settled_at > statement_timestamp() - interval '1 day' GROUP BY b.batch_id, e.partition_no
), lost AS (
    SELECT batch_id, bit_or(1::bigint << partition_no::int) AS partitions FROM recent WHERE whole GROUP BY batch_id
)
UPDATE {s}.outbox_batch b SET lost = b.lost | l.partitions FROM lost l WHERE b.batch_id = l.batch_id";

/// One step, in `seq` order: a relay that is quicker than the next step still finds older events first. A row that somebody has changed since is
/// left alone. An aggregate type that ends in `:dead`, of a time when the table took it, may only wait (migration V8).
const REPUBLISH: &str = "
WITH step AS MATERIALIZED (
    SELECT id, seq, published_at FROM pg_temp.audit_missing WHERE seq > $1 ORDER BY seq LIMIT $2
), again AS (
    UPDATE {s}.event_outbox e SET status = 'PENDING', published_at = NULL, retry_count = 0, last_error = NULL,
        next_retry_at = CASE WHEN e.aggregate_type LIKE '%:dead' THEN statement_timestamp() END
    FROM step WHERE e.id = step.id AND e.status || '' = 'PUBLISHED' AND e.published_at IS NOT DISTINCT FROM step.published_at
    RETURNING e.id
), noted AS (
    INSERT INTO {s}.outbox_audit (who, action, about, events, event_ids)
    SELECT $3, 'republish', 'missing from the streams', count(*), array_agg(id) FROM again HAVING count(*) > 0
)
SELECT (SELECT count(*) FROM again), (SELECT max(seq) FROM step)";

/// Events of one step.
const STEP: i64 = 1_000;

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
    /// published before it was appended before it. With it come the streams that events were published to, as far as is known here.
    pub(crate) async fn begin_audit(
        &self,
        connection: &mut PgConnection,
        prefix: &str,
    ) -> Result<(DateTime<Utc>, Vec<String>), OutboxError> {
        let error = self.error("creating temporary tables for the audit");
        let begin = async {
            let mut transaction = connection.begin().await?;
            sqlx::raw_sql(TABLES).execute(&mut *transaction).await?;
            sqlx::raw_sql(PLANNER).execute(&mut *transaction).await?;
            let now = sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&mut *transaction).await?;
            let streams = sqlx::query_scalar(self.sql(STREAMS)).bind(prefix).fetch_all(&mut *transaction).await?;
            transaction.commit().await?;
            Ok((now, streams))
        };
        begin.await.map_err(error)
    }

    /// Notes entries, as [`EntryLines`] has them.
    pub(crate) async fn note_entries(&self, connection: &mut PgConnection, entries: &mut EntryLines) -> Result<(), OutboxError> {
        let copy = async {
            let mut copy = connection.copy_in_raw("COPY pg_temp.audit_entry FROM STDIN").await?;
            copy.send(entries.0.as_bytes()).await?;
            copy.finish().await
        };
        copy.await.map_err(self.error("noting entries for the audit"))?;
        entries.0.clear();
        Ok(())
    }

    /// Compares what was noted with the tables, all in one snapshot, and names the first `named` of each fault. What is missing is kept for
    /// [`republish`](Self::republish).
    pub(crate) async fn compare(
        &self,
        connection: &mut PgConnection,
        began: DateTime<Utc>,
        prefix: &str,
        streams: &[ReadStream],
        named: u32,
    ) -> Result<Compared, OutboxError> {
        let error = self.error("comparing the outbox with the streams");
        let compare = async {
            let mut transaction = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
            sqlx::raw_sql(PLANNER).execute(&mut *transaction).await?;
            sqlx::raw_sql("ANALYZE pg_temp.audit_entry").execute(&mut *transaction).await?;
            sqlx::query(NOTE_STREAMS)
                .bind(streams.iter().map(|stream| stream.number).collect::<Vec<_>>())
                .bind(streams.iter().map(|stream| stream.key.as_str()).collect::<Vec<_>>())
                .bind(streams.iter().map(|stream| stream.trimmed).collect::<Vec<_>>())
                .bind(streams.iter().map(|stream| stream.first.as_deref()).collect::<Vec<_>>())
                .execute(&mut *transaction)
                .await?;
            sqlx::raw_sql("ANALYZE pg_temp.audit_stream").execute(&mut *transaction).await?;
            sqlx::query(self.sql(ENTRIES)).bind(prefix).execute(&mut *transaction).await?;
            sqlx::query(self.sql(ABSENT)).bind(prefix).bind(began).execute(&mut *transaction).await?;
            sqlx::raw_sql("ANALYZE pg_temp.audit_absent").execute(&mut *transaction).await?;
            sqlx::query(self.sql(MISSING)).execute(&mut *transaction).await?;
            audit_settle::find(self, &mut transaction, prefix).await?;
            let found = sqlx::query(FOUND).bind(i64::from(named)).fetch_all(&mut *transaction).await?;
            let counts = sqlx::query(self.sql(COUNTS)).fetch_one(&mut *transaction).await?;
            sqlx::raw_sql(self.sql(REPUBLISHABLE)).execute(&mut *transaction).await?;
            sqlx::raw_sql("DROP TABLE pg_temp.audit_entry, pg_temp.audit_stream, pg_temp.audit_absent, pg_temp.audit_finding")
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
            compared(&found, &counts, named)
        };
        compare.await.map_err(error)
    }

    /// How many events of the last comparison are missing and can be published again, since they have their rows; and a stream with another
    /// prefix that the journal says some of them are in.
    pub(crate) async fn republishable(
        &self,
        connection: &mut PgConnection,
        prefix: &str,
    ) -> Result<(u64, Option<String>), OutboxError> {
        let doing = "looking at what is missing";
        let look = async {
            let mut transaction = connection.begin().await?;
            sqlx::raw_sql(PLANNER).execute(&mut *transaction).await?;
            let sql = "SELECT count(*) FROM pg_temp.audit_missing";
            let events: i64 = sqlx::query_scalar(sql).fetch_one(&mut *transaction).await?;
            let elsewhere = sqlx::query_scalar(self.sql(ELSEWHERE)).bind(prefix).fetch_optional(&mut *transaction).await?;
            transaction.commit().await?;
            Ok((events.unsigned_abs(), elsewhere))
        };
        look.await.map_err(self.error(doing))
    }

    /// Makes what the last comparison found missing unsent again, in steps, as the act of `who`; returns how many events that were.
    pub(crate) async fn republish(&self, connection: &mut PgConnection, who: &str) -> Result<u64, OutboxError> {
        let doing = "publishing missing events again";
        let mark = async {
            let mut transaction = connection.begin().await?;
            sqlx::raw_sql(PLANNER).execute(&mut *transaction).await?;
            sqlx::query(self.sql(MARK_LOST)).execute(&mut *transaction).await?;
            transaction.commit().await
        };
        mark.await.map_err(self.error(doing))?;
        let (mut events, mut after) = (0, Some(i64::MIN));
        while let Some(seq) = after {
            let step: (i64, Option<i64>) = sqlx::query_as(self.sql(REPUBLISH))
                .bind(seq)
                .bind(STEP)
                .bind(who)
                .fetch_one(&mut *connection)
                .await
                .map_err(self.error(doing))?;
            events += step.0.unsigned_abs();
            after = step.1;
        }
        Ok(events)
    }
}

/// Entries of streams, on their way into a temporary table.
#[derive(Debug, Default)]
pub(crate) struct EntryLines(String);

impl EntryLines {
    /// The entry at this position of a stream, from 1: the id of the event, if the entry has one, and Redis's id.
    pub fn push(&mut self, stream: i32, position: u64, event: Option<Uuid>, entry: &str) {
        let event = event.map_or_else(|| "\\N".to_owned(), |id| id.to_string());
        self.0 += &format!("{stream}\t{position}\t{event}\t{entry}\n");
    }

    pub fn bytes(&self) -> usize {
        self.0.len()
    }
}

/// A stream that was read.
#[derive(Debug)]
pub(crate) struct ReadStream {
    pub number: i32,
    pub key: String,
    pub trimmed: bool,
    /// Redis's id of its first entry after the reading.
    pub first: Option<String>,
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
