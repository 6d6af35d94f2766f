//! Settles one batch row by row, after PostgreSQL refused to settle several, or did not change what it was told to.

use sqlx::postgres::PgRow;
use sqlx::{Connection, Executor, PgConnection, Row};
use uuid::Uuid;

use super::settle::{KEEP, storable};
use super::text::readable;
use super::{OutboxError, OutboxRepository, Partitions, Refusal, Settlement, millis};

/// Rows of one batch that are tried one by one when PostgreSQL raises errors; what is left of such a batch counts as they do.
const MOST_RAISED: usize = 100;

const DOING: &str = "settling a batch row by row";

/// What settling one batch row by row came to.
#[derive(Debug, Clone, Default)]
pub struct SettledRows {
    /// False when somebody else had settled it, or its row of the journal is gone.
    pub settled: bool,
    /// What is in the stream and stays unsent in the table.
    pub stuck: Option<StuckBatch>,
    /// Refused events whose rows stay as they were.
    pub unwritten: Vec<StuckRow>,
}

/// Events that are in their stream, and whose rows do not become `PUBLISHED`. They have an open batch of their own, which says that they
/// were appended: so no relay claims them, nor asks Redis about them, until their rows can be changed.
#[derive(Debug, Clone)]
pub struct StuckBatch {
    pub batch_id: Uuid,
    pub stream: String,
    pub rows: Vec<StuckRow>,
}

/// A row that could not be changed.
#[derive(Debug, Clone)]
pub struct StuckRow {
    pub event_id: Uuid,
    pub aggregate_type: String,
    pub aggregate_id: String,
    /// 0 to 63.
    pub partition: usize,
    /// What PostgreSQL said; `None` when it accepted the statement and did nothing.
    pub error: Option<String>,
}

impl StuckRow {
    /// Why, for people.
    #[must_use]
    pub fn reason(&self) -> &str {
        let silent = "PostgreSQL accepts the statement and changes nothing: row-level security, or a trigger that returns NULL";
        self.error.as_deref().unwrap_or(silent)
    }
}

/// `COALESCE` keeps the planner from the index of open batches, as in the settle.
const SETTLE_BATCH: &str = "
UPDATE {s}.outbox_batch SET settled_at = clock_timestamp(), appended = $2, last_entry = $3
WHERE batch_id = $1 AND COALESCE(settled_at, 'infinity') = 'infinity' AND appended IS NULL
RETURNING event_ids[1:appended] AS event_ids, stream";

const IS_OPEN: &str = "
SELECT EXISTS (SELECT FROM {s}.outbox_batch
               WHERE batch_id = $1 AND COALESCE(settled_at, 'infinity') = 'infinity')";

/// Rows by key, in as few days as there are, whatever the statistics say: see the settle.
const UNSENT: &str = "WHERE id = ANY ($1) AND id >= $2 AND id <= $3 AND status || '' IN ('PENDING', 'PROCESSING')";

const REFUSE: &str = "
UPDATE {s}.event_outbox
SET status = CASE WHEN $3::bigint IS NULL THEN 'FAILED' ELSE 'PENDING' END,
    retry_count = retry_count + CASE WHEN $3 IS NULL THEN 0 ELSE 1 END,
    next_retry_at = clock_timestamp() + $3 * interval '1 millisecond', last_error = $2
WHERE id = $1 AND status || '' IN ('PENDING', 'PROCESSING')";

const SET_ASIDE: &str = "
INSERT INTO {s}.outbox_batch (batch_id, relay_id, epoch, stream, event_ids, partitions, appended)
SELECT gen_random_uuid(), relay_id, epoch, stream, $2, $3, cardinality($2::uuid[]) FROM {s}.outbox_batch WHERE batch_id = $1
RETURNING batch_id";

const READ_STUCK: &str = "
SELECT event_ids, stream FROM {s}.outbox_batch
WHERE batch_id = $1 AND COALESCE(settled_at, 'infinity') = 'infinity' AND appended IS NOT NULL FOR NO KEY UPDATE";

/// `appended` is 0: the batch that it was set aside from counts these events, and is looked up after a failover of Redis.
const CLOSE_STUCK: &str = "UPDATE {s}.outbox_batch SET settled_at = clock_timestamp(), appended = 0 WHERE batch_id = $1";

impl OutboxRepository {
    /// Settles one batch in a transaction of its own: rows that can be changed become `PUBLISHED` (whatever the retention is), those that
    /// cannot are set aside in an open batch of their own. Rows that an operator has changed or deleted meanwhile are left alone.
    ///
    /// # Errors
    /// The journal cannot be changed; then nothing was done. When the answer was lost it may have been committed: the caller then resolves the
    /// open batches.
    pub async fn settle_rows(&self, connection: &mut PgConnection, settlement: &Settlement) -> Result<SettledRows, OutboxError> {
        let mut tx = connection.begin().await.map_err(self.error(DOING))?;
        // What is checked at the commit would not say which row it is about.
        tx.execute("SET CONSTRAINTS ALL IMMEDIATE").await.map_err(self.error(DOING))?;
        let batch = sqlx::query(self.sql(SETTLE_BATCH))
            .bind(settlement.batch_id)
            .bind(settlement.appended)
            .bind(settlement.last_entry.as_deref())
            .fetch_optional(&mut *tx)
            .await
            .map_err(self.error(DOING))?;
        let Some(batch) = batch else {
            let is_open = sqlx::query_scalar(self.sql(IS_OPEN)).bind(settlement.batch_id).fetch_one(&mut *tx).await;
            let doing = "settling a row of outbox_batch";
            let is_open: bool = is_open.map_err(self.error(doing))?;
            return if is_open {
                Err(OutboxError::Unchanged { doing, changed: 0, meant: 1 })
            } else {
                Ok(SettledRows::default())
            };
        };
        let (ids, stream) = batch_of(&batch).map_err(self.error(DOING))?;
        let rows = self.publish_rows(&mut tx, ids).await?;
        let mut unwritten = Vec::new();
        for refusal in &settlement.refusals {
            unwritten.extend(self.refuse_row(&mut tx, refusal).await?);
        }
        let stuck = self.set_aside(&mut tx, settlement.batch_id, stream, rows).await?;
        tx.commit().await.map_err(self.error(DOING))?;
        Ok(SettledRows { settled: true, stuck, unwritten })
    }

    /// Tries the rows of a stuck batch again. `None` when none is stuck any more, or somebody else has seen to it.
    ///
    /// # Errors
    /// As [`settle_rows`](Self::settle_rows).
    pub async fn settle_stuck(&self, connection: &mut PgConnection, batch_id: Uuid) -> Result<Option<StuckBatch>, OutboxError> {
        let mut tx = connection.begin().await.map_err(self.error(DOING))?;
        tx.execute("SET CONSTRAINTS ALL IMMEDIATE").await.map_err(self.error(DOING))?;
        let batch = sqlx::query(self.sql(READ_STUCK)).bind(batch_id).fetch_optional(&mut *tx).await.map_err(self.error(DOING))?;
        let Some(batch) = batch else { return Ok(None) };
        let (ids, stream) = batch_of(&batch).map_err(self.error(DOING))?;
        let rows = self.publish_rows(&mut tx, ids).await?;
        let is_stuck = !rows.is_empty();
        if !is_stuck {
            let closed = sqlx::query(self.sql(CLOSE_STUCK)).bind(batch_id).execute(&mut *tx).await.map_err(self.error(DOING))?;
            OutboxError::unless_changed("settling a row of outbox_batch", closed.rows_affected(), 1)?;
        }
        tx.commit().await.map_err(self.error(DOING))?;
        Ok(is_stuck.then_some(StuckBatch { batch_id, stream, rows }))
    }

    /// Marks these events `PUBLISHED`, as far as that can be done, and returns those that stay unsent. Where PostgreSQL raises an error, the
    /// rows are halved until it is known which they are.
    async fn publish_rows(&self, tx: &mut PgConnection, ids: Vec<Uuid>) -> Result<Vec<StuckRow>, OutboxError> {
        let (all, mut raised) = (ids.clone(), Vec::<(Uuid, String)>::new());
        let mut chunks = if ids.is_empty() { Vec::new() } else { vec![ids] };
        while let Some(mut chunk) = chunks.pop() {
            let Err(error) = self.try_rows(tx, &chunk).await? else { continue };
            if chunk.len() == 1 || raised.len() >= MOST_RAISED {
                raised.extend(chunk.into_iter().map(|id| (id, error.clone())));
            } else {
                chunks.push(chunk.split_off(chunk.len() / 2));
                chunks.push(chunk);
            }
        }
        self.unsent(tx, &all, |id| raised.iter().find(|(raised, _)| *raised == id).map(|(_, error)| error.clone())).await
    }

    /// One attempt in a savepoint. The inner error is what PostgreSQL said about these rows.
    async fn try_rows(&self, tx: &mut PgConnection, ids: &[Uuid]) -> Result<Result<(), String>, OutboxError> {
        let mut savepoint = tx.begin().await.map_err(self.error(DOING))?;
        let sql = format!("{KEEP} {UNSENT}");
        let (least, greatest) = (ids.iter().min(), ids.iter().max());
        let query = sqlx::query(self.sql(&sql)).bind(ids).bind(least).bind(greatest);
        match query.execute(&mut *savepoint).await.map_err(self.error(DOING)) {
            Ok(_) => savepoint.commit().await.map_err(self.error(DOING)).map(Ok),
            Err(error) if error.is_about_rows() => {
                savepoint.rollback().await.map_err(self.error(DOING))?;
                Ok(Err(said(&error)))
            }
            Err(error) => Err(error),
        }
    }

    /// Those of the events that are unsent still, each with what `error` knows of it.
    async fn unsent(
        &self,
        tx: &mut PgConnection,
        ids: &[Uuid],
        error: impl Fn(Uuid) -> Option<String>,
    ) -> Result<Vec<StuckRow>, OutboxError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let sql = format!("SELECT id, aggregate_type, aggregate_id, partition_no FROM {{s}}.event_outbox {UNSENT}");
        let query = sqlx::query(self.sql(&sql)).bind(ids).bind(ids.iter().min()).bind(ids.iter().max());
        let rows = query.fetch_all(tx).await.map_err(self.error(DOING))?;
        let stuck = |row: &PgRow| {
            let event_id = row.try_get("id")?;
            let partition = usize::try_from(row.try_get::<i16, _>("partition_no")?).unwrap_or(usize::MAX);
            let (aggregate_type, aggregate_id) = (readable(row, "aggregate_type")?, readable(row, "aggregate_id")?);
            Ok(StuckRow { event_id, aggregate_type, aggregate_id, partition, error: error(event_id) })
        };
        rows.iter().map(stuck).collect::<Result<_, sqlx::Error>>().map_err(self.error(DOING))
    }

    /// Writes a refusal down; returns its row when that cannot be done.
    async fn refuse_row(&self, tx: &mut PgConnection, refusal: &Refusal) -> Result<Option<StuckRow>, OutboxError> {
        let mut savepoint = tx.begin().await.map_err(self.error(DOING))?;
        let refuse = sqlx::query(self.sql(REFUSE))
            .bind(refusal.event_id)
            .bind(storable(&refusal.error))
            .bind(refusal.retry_after.map(millis))
            .execute(&mut *savepoint)
            .await
            .map_err(self.error(DOING));
        let error = match refuse {
            Ok(done) => {
                savepoint.commit().await.map_err(self.error(DOING))?;
                if done.rows_affected() > 0 {
                    return Ok(None);
                }
                None
            }
            Err(error) if error.is_about_rows() => {
                savepoint.rollback().await.map_err(self.error(DOING))?;
                Some(said(&error))
            }
            Err(error) => return Err(error),
        };
        Ok(self.unsent(tx, &[refusal.event_id], |_| error.clone()).await?.pop())
    }

    /// Gives rows that stay unsent an open batch of their own.
    async fn set_aside(
        &self,
        tx: &mut PgConnection,
        of: Uuid,
        stream: String,
        rows: Vec<StuckRow>,
    ) -> Result<Option<StuckBatch>, OutboxError> {
        if rows.is_empty() {
            return Ok(None);
        }
        let doing = "setting aside what cannot be settled";
        let partitions: Partitions = rows.iter().map(|row| row.partition).collect();
        let batch_id = sqlx::query_scalar(self.sql(SET_ASIDE))
            .bind(of)
            .bind(rows.iter().map(|row| row.event_id).collect::<Vec<_>>())
            .bind(partitions.bits())
            .fetch_optional(tx)
            .await
            .map_err(self.error(doing))?;
        let batch_id = batch_id.ok_or(OutboxError::Unchanged { doing, changed: 0, meant: 1 })?;
        Ok(Some(StuckBatch { batch_id, stream, rows }))
    }
}

fn batch_of(row: &PgRow) -> Result<(Vec<Uuid>, String), sqlx::Error> {
    Ok((row.try_get("event_ids")?, row.try_get("stream")?))
}

/// What PostgreSQL said, without what we were doing.
fn said(error: &OutboxError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
