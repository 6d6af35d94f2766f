//! A partition for each day, and what becomes of it.
//!
//! Each change is one short transaction that locks the whole table first, so nothing else on it is under way: a settle that
//! waits plans anew after the lock and finds a moved row where it is then. What is not locked within a moment is not waited for,
//! because producers queue behind the request.

use std::time::Duration;

use super::connection::begin;
use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Postgres, Row, Transaction};
use uuid::Uuid;

use super::attempts::{ATTEMPT, Attempts, MigrationProgress};
use super::{OutboxError, OutboxRepository};

/// Conversion of a table that is not partitioned.
const PARTITION: &str = include_str!("../../../../migrations/partition_event_outbox.sql");

/// Partitions are there for so many days after today.
const DAYS_AHEAD: u64 = 3;

/// Most rows that one change copies, while everybody waits.
const MOST_MOVED: i64 = 10_000;

/// The partitions are locked with the table, since every statement on them locks it first.
const LOCK: &str = "LOCK TABLE ONLY {s}.event_outbox IN ACCESS EXCLUSIVE MODE";

const TRIES: u32 = 3;
const BETWEEN_TRIES: Duration = Duration::from_secs(1);

/// Of each change: producers wait no longer for one lock that is not granted, nor for one statement under it.
const LIMITS: &str = "SET LOCAL lock_timeout = '200ms'; SET LOCAL statement_timeout = '5s'";

/// Of all attempts at the conversion, which somebody waits for.
const CONVERSION_LIMIT: Duration = Duration::from_secs(5);

/// A partition that has had its time.
#[derive(Debug, Clone)]
pub struct Overdue {
    pub name: String,
    /// As SQL has it, with the schema.
    pub(crate) table: String,
    /// On disk, with indexes.
    pub bytes: u64,
    pub fate: Fate,
}

/// What is to become of an overdue partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Drop,
    /// Many of its events were published within the retention: it is dropped when they are older.
    Wait,
    /// Many of its events are not published: the others are deleted one by one.
    RowByRow,
}

/// `unsettled` events are not published, `recent` ones were within the retention. To drop the partition means to move both.
fn fate(unsettled: i64, recent: i64) -> Fate {
    if unsettled > MOST_MOVED {
        Fate::RowByRow
    } else if unsettled + recent > MOST_MOVED {
        Fate::Wait
    } else {
        Fate::Drop
    }
}

/// The days up to [`DAYS_AHEAD`] after today that begin when the newest partition has ended.
fn missing(today: NaiveDate, covered_until: Option<DateTime<Utc>>) -> Vec<NaiveDate> {
    let is_missing = |day: &NaiveDate| covered_until.is_none_or(|end| start_of(*day) >= end);
    (0..=DAYS_AHEAD).filter_map(|n| today.checked_add_days(Days::new(n))).filter(is_missing).collect()
}

fn start_of(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(NaiveTime::MIN).and_utc()
}

/// The lowest UUIDv7 of a day.
fn first_id(day: NaiveDate) -> Uuid {
    let milliseconds = u128::try_from(start_of(day).timestamp_millis()).unwrap_or(0);
    Uuid::from_u128(milliseconds << 80 | 0x7000_8000_0000_0000_0000)
}

/// The partitions of event_outbox (`$1`) and when they end, by their upper bounds: whoever made them, and whatever they are called.
const DAYS: &str = r"
SELECT c.oid, c.relname::text AS name, format('%I.%I', n.nspname, c.relname) AS table, ends
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \(''([-0-9a-f]{36})''\)$') AS bound
CROSS JOIN LATERAL to_timestamp(('x' || left(replace(bound, '-', ''), 12))::bit(48)::bigint / 1000.0) AS ends
WHERE i.inhparent = to_regclass($1) AND bound IS NOT NULL";

/// What dropping the partition `{p}` would have to move, counted up to a limit (`$2`) that is too much. Each part goes by its index.
const COUNT: &str = "
SELECT (SELECT count(*) FROM (SELECT FROM {p} WHERE status IN ('PENDING', 'PROCESSING') LIMIT $2) AS unsent)
     + (SELECT count(*) FROM (SELECT FROM {p} WHERE status = 'FAILED' LIMIT $2) AS failed) AS unsettled,
       (SELECT count(*) FROM (SELECT FROM {p} WHERE status = 'PUBLISHED' AND published_at IS NULL LIMIT $2) AS undated)
     + (SELECT count(*) FROM (SELECT FROM {p} WHERE status = 'PUBLISHED'
                              AND published_at >= statement_timestamp() - $1 * interval '1 second' LIMIT $2) AS recent) AS recent";

/// The same rows.
const MOVE_SURVIVORS: &str = "
INSERT INTO {s}.event_outbox_rest ({columns}) OVERRIDING SYSTEM VALUE
SELECT {columns} FROM {p} WHERE status IN ('PENDING', 'PROCESSING')
UNION ALL SELECT {columns} FROM {p} WHERE status = 'FAILED'
UNION ALL SELECT {columns} FROM {p} WHERE status = 'PUBLISHED' AND published_at IS NULL
UNION ALL SELECT {columns} FROM {p} WHERE status = 'PUBLISHED'
                                      AND published_at >= statement_timestamp() - $1 * interval '1 second'";

/// Everything of the day that came before its partition.
const MOVE_EARLY: &str = "
WITH early AS (DELETE FROM {s}.event_outbox_rest WHERE id >= $1 AND id < $2 RETURNING *)
INSERT INTO {p} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM early";

/// What a new partition has of the others.
struct Shape {
    columns: String,
    parameters: String,
    owner: String,
}

impl OutboxRepository {
    /// Partitions `event_outbox` by day, in one transaction, unless it is partitioned. Producers wait meanwhile, for as long as it
    /// takes to read the table once; running relays connect anew. Returns how many rows had to be copied because their ids are no
    /// UUIDv7 of today or before, or `None` when there was nothing to do.
    ///
    /// # Errors
    /// Views, foreign keys or the like depend on the table, or transactions have had it locked for 5 seconds; nothing is changed.
    pub async fn partition_by_day(&self, connection: &mut PgConnection) -> Result<Option<u64>, OutboxError> {
        self.partition_by_day_within(connection, CONVERSION_LIMIT, &mut |_| ()).await
    }

    /// The same, with another limit on the time until the table can be locked. It is tried for a moment now and then, so that producers
    /// do not wait behind long transactions.
    ///
    /// # Errors
    /// The same.
    pub async fn partition_by_day_within(
        &self,
        connection: &mut PgConnection,
        limit: Duration,
        report: &mut (dyn FnMut(MigrationProgress) + Send),
    ) -> Result<Option<u64>, OutboxError> {
        let attempts = Attempts::within(limit);
        loop {
            match self.try_to_partition(connection).await {
                Err(error) => attempts.again(self, connection, error, report).await?,
                done => return done,
            }
        }
    }

    async fn try_to_partition(&self, connection: &mut PgConnection) -> Result<Option<u64>, OutboxError> {
        let doing = "partitioning event_outbox";
        let mut tx = begin(connection).await?;
        self.take_turns(&mut tx).await?;
        if self.is_partitioned(&mut tx).await? {
            return Ok(None);
        }
        tx.execute(ATTEMPT).await.map_err(self.error(doing))?;
        tx.execute(self.sql("SET LOCAL search_path TO {s}")).await.map_err(self.error(doing))?;
        tx.execute(PARTITION).await.map_err(self.busy(doing))?;
        let copied: i64 =
            self.scalar("SELECT count(*) FROM event_outbox_rest").fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        tx.commit().await.map_err(self.error(doing))?;
        Ok(Some(copied.cast_unsigned()))
    }

    /// The days without a partition, of today and the next, or `None` when the table has no partitions of this making.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn missing_days(&self, connection: &mut PgConnection) -> Result<Option<Vec<NaiveDate>>, OutboxError> {
        if !self.is_partitioned(connection).await? {
            return Ok(None);
        }
        let sql = format!("SELECT (statement_timestamp() AT TIME ZONE 'UTC')::date, (SELECT max(ends) FROM ({DAYS}) AS days)");
        let query = sqlx::query_as(AssertSqlSafe(sql)).persistent(self.prepares).bind(self.table("event_outbox"));
        let (today, covered_until) = query.fetch_one(connection).await.map_err(self.error("looking for the newest partition"))?;
        Ok(Some(missing(today, covered_until)))
    }

    /// The partitions whose day ended more than `retention` ago, oldest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn overdue(&self, connection: &mut PgConnection, retention: Duration) -> Result<Vec<Overdue>, OutboxError> {
        let doing = "looking for old partitions";
        let sql = format!(
            "SELECT name, days.table, COALESCE(pg_total_relation_size(oid), 0) FROM ({DAYS}) AS days
             WHERE ends < statement_timestamp() - $2 * interval '1 second' ORDER BY ends"
        );
        let query = sqlx::query_as(AssertSqlSafe(sql))
            .persistent(self.prepares)
            .bind(self.table("event_outbox"))
            .bind(retention.as_secs_f64());
        let old: Vec<(String, String, i64)> = query.fetch_all(&mut *connection).await.map_err(self.error(doing))?;
        let mut overdue = Vec::new();
        for (name, table, bytes) in old {
            let query = sqlx::query_as(AssertSqlSafe(COUNT.replace("{p}", &table))).persistent(self.prepares);
            let query = query.bind(retention.as_secs_f64()).bind(MOST_MOVED + 1);
            // What fails here must not abort the transaction of the caller.
            let mut attempt = connection.begin().await.map_err(self.error(doing))?;
            let (unsettled, recent) = match query.fetch_one(&mut *attempt).await {
                // undefined_table: somebody else has just dropped it.
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => {
                    attempt.rollback().await.map_err(self.error(doing))?;
                    continue;
                }
                counts => counts.map_err(self.error(doing))?,
            };
            attempt.commit().await.map_err(self.error(doing))?;
            overdue.push(Overdue { name, table, bytes: bytes.cast_unsigned(), fate: fate(unsettled, recent) });
        }
        Ok(overdue)
    }

    /// Makes the partition of a day, and moves the rows into it that came before. Returns its name, or `None` when somebody else
    /// made it, or too many rows would have to be moved: those stay where they are, and so do the others of that day.
    ///
    /// # Errors
    /// [`OutboxError::Busy`] when the table could not be locked at once; nothing is changed.
    pub async fn make_day(&self, connection: &mut PgConnection, day: NaiveDate) -> Result<Option<String>, OutboxError> {
        let doing = "making a partition";
        let name = day.format("event_outbox_p%Y%m%d").to_string();
        let (from, to) = (first_id(day), first_id(day + Days::new(1)));
        let early =
            self.sql("SELECT count(*) FROM (SELECT FROM {s}.event_outbox_rest WHERE id >= $1 AND id < $2 LIMIT $3) AS early");
        let early = self.scalar::<i64>(early).bind(from).bind(to).bind(MOST_MOVED + 1);
        if early.fetch_one(&mut *connection).await.map_err(self.error(doing))? > MOST_MOVED {
            return Ok(None);
        }
        let mut tx = self.locked(connection, doing).await?;
        if self.exists(&mut tx, &name).await? {
            return Ok(None);
        }
        let Shape { columns, parameters, owner } = self.shape(&mut tx).await?;
        let table = self.table(&name);
        let create = format!(
            "CREATE TABLE {table} (LIKE {{s}}.event_outbox INCLUDING ALL EXCLUDING IDENTITY){parameters};
             ALTER TABLE {table} OWNER TO {owner}"
        );
        tx.execute(self.sql(&create)).await.map_err(self.busy(doing))?;
        let sql = MOVE_EARLY.replace("{p}", &table).replace("{columns}", &columns);
        self.query(self.sql(&sql)).bind(from).bind(to).execute(&mut *tx).await.map_err(self.busy(doing))?;
        let attach = format!("ALTER TABLE {{s}}.event_outbox ATTACH PARTITION {table} FOR VALUES FROM ('{from}') TO ('{to}')");
        tx.execute(self.sql(&attach)).await.map_err(self.busy(doing))?;
        tx.commit().await.map_err(self.error(doing))?;
        Ok(Some(name))
    }

    /// Drops an overdue partition and moves those of its rows to `event_outbox_rest` that are not published or were within
    /// `retention`, with all their columns. Returns how many, or `None` when somebody else dropped it, or too many would have to be moved.
    ///
    /// # Errors
    /// [`OutboxError::Busy`] when the table could not be locked at once; nothing is changed.
    pub async fn drop_day(
        &self,
        connection: &mut PgConnection,
        overdue: &Overdue,
        retention: Duration,
    ) -> Result<Option<u64>, OutboxError> {
        let doing = "dropping a partition";
        let table = &overdue.table;
        let mut tx = self.locked(connection, doing).await?;
        let is_there = "SELECT EXISTS (SELECT FROM pg_inherits WHERE inhparent = to_regclass($1) AND inhrelid = to_regclass($2))";
        let is_there = self.scalar::<bool>(is_there).bind(self.table("event_outbox")).bind(table);
        if !is_there.fetch_one(&mut *tx).await.map_err(self.error(doing))? {
            return Ok(None);
        }
        let Shape { columns, .. } = self.shape(&mut tx).await?;
        // Before the rows are moved: event_outbox_rest takes no id that another partition is for.
        let detach = format!("ALTER TABLE {{s}}.event_outbox DETACH PARTITION {table}");
        tx.execute(self.sql(&detach)).await.map_err(self.busy(doing))?;
        let sql = MOVE_SURVIVORS.replace("{p}", table).replace("{columns}", &columns);
        let query = self.query(self.sql(&sql)).bind(retention.as_secs_f64());
        let moved = query.execute(&mut *tx).await.map_err(self.busy(doing))?.rows_affected();
        if moved > MOST_MOVED.cast_unsigned() {
            return Ok(None);
        }
        // The table is about to go: what a trigger kept from moving would be lost with it.
        let sql = COUNT.replace("{p}", table);
        let query = sqlx::query_as(AssertSqlSafe(sql)).bind(retention.as_secs_f64()).bind(MOST_MOVED + 1);
        let (unsettled, recent): (i64, i64) = query.fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        let meant = unsettled + recent;
        if moved < meant.unsigned_abs() {
            return Err(OutboxError::Unchanged { doing, changed: moved.cast_signed(), meant });
        }
        tx.execute(AssertSqlSafe(format!("DROP TABLE {table}"))).await.map_err(self.busy(doing))?;
        tx.commit().await.map_err(self.error(doing))?;
        Ok(Some(moved))
    }

    /// A transaction that has the whole table for itself. It tries several times, so that producers can go on in between.
    async fn locked<'c>(
        &self,
        connection: &'c mut PgConnection,
        doing: &'static str,
    ) -> Result<Transaction<'c, Postgres>, OutboxError> {
        let mut tx = begin(connection).await?;
        tx.execute(LIMITS).await.map_err(self.error(doing))?;
        for _ in 1..TRIES {
            let mut savepoint = tx.begin().await.map_err(self.error(doing))?;
            match savepoint.execute(self.sql(LOCK)).await.map_err(self.busy(doing)) {
                Err(OutboxError::Busy { .. }) => savepoint.rollback().await.map_err(self.error(doing))?,
                Err(error) => return Err(error),
                Ok(_) => {
                    savepoint.commit().await.map_err(self.error(doing))?;
                    return Ok(tx);
                }
            }
            tokio::time::sleep(BETWEEN_TRIES).await;
        }
        tx.execute(self.sql(LOCK)).await.map_err(self.busy(doing))?;
        Ok(tx)
    }

    async fn shape(&self, connection: &mut PgConnection) -> Result<Shape, OutboxError> {
        // PostgreSQL keeps no storage parameters for the partitioned table itself.
        let sql = "SELECT (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
                           WHERE attrelid = t.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '') AS columns,
                          COALESCE((SELECT ' WITH (' || array_to_string(reloptions, ', ') || ')'
                                    FROM pg_class WHERE oid = to_regclass($2)), '') AS parameters,
                          t.relowner::regrole::text AS owner
                   FROM pg_class t WHERE t.oid = to_regclass($1)";
        let doing = "reading the columns of event_outbox";
        let query = self.query(sql).bind(self.table("event_outbox")).bind(self.table("event_outbox_rest"));
        let row = query.fetch_one(connection).await.map_err(self.error(doing))?;
        let read = || -> Result<Shape, sqlx::Error> {
            Ok(Shape { columns: row.try_get("columns")?, parameters: row.try_get("parameters")?, owner: row.try_get("owner")? })
        };
        read().map_err(self.error(doing))
    }

    /// True for partitions of this making.
    pub(super) async fn is_partitioned(&self, connection: &mut PgConnection) -> Result<bool, OutboxError> {
        let sql = "SELECT EXISTS (SELECT FROM pg_partitioned_table
                                  WHERE partrelid = to_regclass($1) AND partdefid = to_regclass($2))";
        self.scalar(sql)
            .bind(self.table("event_outbox"))
            .bind(self.table("event_outbox_rest"))
            .fetch_one(connection)
            .await
            .map_err(self.error("looking for partitions"))
    }

    fn table(&self, name: &str) -> String {
        format!("{}.{name}", self.quoted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(day: u32) -> NaiveDate {
        NaiveDate::from_ymd_opt(2026, 11, day).unwrap()
    }

    #[test]
    fn partitions_are_made_for_today_and_three_days_where_there_is_none() {
        assert_eq!(missing(day(10), None), [day(10), day(11), day(12), day(13)]);
        assert_eq!(missing(day(10), Some(start_of(day(5)))), [day(10), day(11), day(12), day(13)]);
        assert_eq!(missing(day(10), Some(start_of(day(12)))), [day(12), day(13)]);
        assert_eq!(missing(day(10), Some(start_of(day(12)) + Duration::from_secs(3600))), [day(13)], "not twice");
        assert!(missing(day(10), Some(start_of(day(14)))).is_empty());
    }

    #[test]
    fn a_day_begins_with_its_lowest_id() {
        let midnight = first_id(day(25));
        assert_eq!(midnight.to_string(), "01a21000-8800-7000-8000-000000000000");
        let (seconds, nanoseconds) = midnight.get_timestamp().unwrap().to_unix();
        assert_eq!((i64::try_from(seconds).unwrap(), nanoseconds), (start_of(day(25)).timestamp(), 0));
    }

    #[test]
    fn a_partition_is_dropped_when_few_rows_survive_it() {
        assert_eq!(fate(0, 0), Fate::Drop);
        assert_eq!(fate(6_000, 4_000), Fate::Drop);
        assert_eq!(fate(6_000, 4_001), Fate::Wait);
        assert_eq!(fate(0, 10_001), Fate::Wait);
        assert_eq!(fate(10_001, 0), Fate::RowByRow);
        assert_eq!(fate(10_001, 10_001), Fate::RowByRow);
    }
}
