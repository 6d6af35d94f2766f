//! Failed events by their causes, and what operators do about them: in bounded steps, each of which is one transaction that says in
//! `outbox_audit` who did it.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::text::readable;
use super::{OutboxError, OutboxRepository};

/// The newest failed events that are looked at to group or count them: to find the cause of each takes 5 µs.
const LOOKED_AT: i64 = 10_000;

/// Failed events that are looked at where somebody asked for a count of all: some seconds.
const ALL: i64 = 2_000_000;

/// Failed events that one step looks at, and so the most that it changes.
const STEP: i64 = 1_000;

/// Groups of failed events that are listed.
const GROUPS: i64 = 200;

/// What failed events have in common: the beginning of the error, with `#` for each digit. Forms of browsers change ends of lines.
pub(super) const CAUSE: &str = r"translate(left(COALESCE(last_error, ''), 150), E'0123456789\r\n\t', '##########   ')";

/// Which failed events are meant; what is `None` is left open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FailureFilter {
    pub event_type: Option<String>,
    /// As [`FailureGroup::cause`].
    pub cause: Option<String>,
}

/// In the words of the audit.
impl fmt::Display for FailureFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.event_type, &self.cause) {
            (None, None) => write!(f, "all failed events"),
            (Some(event_type), None) => write!(f, "all failed {event_type}"),
            (None, Some(cause)) => write!(f, "all that failed with: {cause}"),
            (Some(event_type), Some(cause)) => write!(f, "all {event_type} that failed with: {cause}"),
        }
    }
}

/// Failed events of one type with one cause.
#[derive(Debug, Clone, Serialize)]
pub struct FailureGroup {
    pub event_type: String,
    pub cause: String,
    /// The whole error of one of them.
    pub example: String,
    pub events: i64,
    pub oldest: DateTime<Utc>,
    pub newest: DateTime<Utc>,
}

/// Failed events by type and cause.
#[derive(Debug, Clone, Serialize)]
pub struct FailureGroups {
    /// Largest first, at most 200.
    pub groups: Vec<FailureGroup>,
    /// Groups that are not among these.
    pub more: i64,
    /// In all groups.
    pub events: Counted,
}

/// A number that is exact, or the least that it can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Counted {
    pub events: i64,
    /// There may be more: so many were looked at that the counting stopped.
    pub at_least: bool,
}

/// What an operator does about failed events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// `PENDING` again, with all their attempts.
    Retry,
    /// Deleted for good.
    Discard,
}

impl Remedy {
    /// As the audit has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Discard => "discard",
        }
    }

    /// They become waiting events, which keeps their order among themselves and before what comes later.
    fn change(self) -> &'static str {
        match self {
            Self::Retry => {
                "UPDATE {s}.event_outbox SET status = 'PENDING', retry_count = 0, last_error = NULL, next_retry_at = statement_timestamp()"
            }
            Self::Discard => "DELETE FROM {s}.event_outbox",
        }
    }
}

/// What a page has shown of the failed events: their rows as they stood then. What has failed or was changed since is not among them. Text for
/// a form, as PostgreSQL writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(String);

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Snapshot {
    type Err = &'static str;

    /// `xmin:xmax:xid,xid,...`, in order.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers = || {
            let (low, rest) = text.split_once(':')?;
            let (high, active) = rest.split_once(':')?;
            let active = active.split(',').filter(|xid| !xid.is_empty());
            [low].into_iter().chain(active).chain([high]).map(|number| number.parse::<u64>().ok()).collect::<Option<Vec<_>>>()
        };
        let is_one = numbers().is_some_and(|numbers| {
            let is_before_the_end = numbers.len() == 2 || numbers[numbers.len() - 2] < numbers[numbers.len() - 1];
            numbers[0] > 0 && numbers.is_sorted() && is_before_the_end
        });
        if is_one { Ok(Self(text.to_owned())) } else { Err("this does not say what was shown: load the page before it again") }
    }
}

/// Failed events that match, and what they were when they were counted.
#[derive(Debug, Clone)]
pub struct Shown {
    pub events: Counted,
    pub snapshot: Snapshot,
}

/// Who does something, and in which words the audit says to what.
#[derive(Debug, Clone, Copy)]
pub struct Deed<'a> {
    pub who: &'a str,
    pub about: &'a str,
}

/// Where a step ended: the place of an event among the failed ones, by aggregate and `seq`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct FailurePlace {
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub seq: i64,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemedyStep {
    pub changed: i64,
    /// Where the next step begins; `None` when all have been looked at.
    pub next: Option<FailurePlace>,
}

/// `looked` are failed events; of those that match, what the statement says is done, and the audit says so. `COALESCE` keeps the planner
/// from the indexes of failed events: what is changed is found by key.
const REMEDY: &str = "
WITH looked AS MATERIALIZED ({looked}), changed AS (
    {change} WHERE id = ANY (ARRAY(SELECT id FROM looked WHERE matches)) AND COALESCE(status, '') = 'FAILED' RETURNING id
), noted AS (
    INSERT INTO {s}.outbox_audit (who, action, about, events, event_ids)
    SELECT $1, '{action}', $2, count(*), array_agg(id) FROM changed HAVING count(*) > 0
)
SELECT (SELECT count(*) FROM changed) AS changed, (SELECT count(*) FROM looked) AS looked,
       ARRAY(SELECT id FROM looked WHERE matches EXCEPT SELECT id FROM changed) AS unchanged, aggregate_type, aggregate_id, seq
FROM (SELECT) AS one LEFT JOIN
     (SELECT aggregate_type, aggregate_id, seq FROM looked ORDER BY aggregate_type DESC, aggregate_id DESC, seq DESC LIMIT 1) AS last ON true";

/// By aggregate, and in each by `seq`: so a retry of many in steps keeps the order. In the planner's words the conditions of the other
/// indexes do not apply. A row that was written after the snapshot is another one than was shown: `xmin` is who wrote it, without the epoch, which is that
/// of the newest transactions or the one before. (Snapshots say nothing of subtransactions: what one that was under way had written counts as shown.)
const STEPWISE: &str = "
    SELECT id, aggregate_type, aggregate_id, seq,
           ($6::text IS NULL OR event_type = $6) AND ($7::text IS NULL OR {cause} = $7)
             AND ($8::text IS NULL OR pg_visible_in_snapshot(
                 (xmin::text::bigint + (((SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint) - xmin::text::bigint) >> 32 << 32))::text::xid8,
                 (SELECT $8::text::pg_snapshot))) AS matches
    FROM {s}.event_outbox
    WHERE status || '' = 'FAILED' AND (aggregate_type, aggregate_id, seq) > ($3, $4, $5)
    ORDER BY aggregate_type, aggregate_id, seq LIMIT {step}";

const NAMED: &str = "
    SELECT id, aggregate_type, aggregate_id, seq, true AS matches FROM {s}.event_outbox
    WHERE id = ANY ($3::uuid[]) AND COALESCE(status, '') = 'FAILED'";

impl OutboxRepository {
    /// The newest 10,000 failed events by type and cause; if there are more, each number is the least that it can be.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn failure_groups(&self, connection: &mut PgConnection) -> Result<FailureGroups, OutboxError> {
        let doing = "grouping failed events";
        let sql = format!(
            "SELECT event_type, cause, (array_agg(example))[1] AS example, count(*) AS events, min(created_at) AS oldest, max(created_at) AS newest,
                    count(*) OVER () AS all_groups, (sum(count(*)) OVER ())::bigint AS all_events
             FROM (SELECT event_type, {CAUSE} AS cause, left(COALESCE(last_error, ''), 1000) AS example, created_at
                   FROM {{s}}.event_outbox WHERE status = 'FAILED' ORDER BY created_at DESC LIMIT {LOOKED_AT}) AS looked
             GROUP BY event_type, cause ORDER BY events DESC, event_type, cause LIMIT {GROUPS}"
        );
        let rows = self.query(self.sql(&sql)).fetch_all(connection).await.map_err(self.error(doing))?;
        let groups = rows.iter().map(group).collect::<Result<Vec<_>, _>>().map_err(self.error(doing))?;
        let of_all = |column: &str| rows.first().map_or(Ok(0), |row| row.try_get::<i64, _>(column)).map_err(self.error(doing));
        let (all, events) = (of_all("all_groups")?, of_all("all_events")?);
        let more = all - i64::try_from(groups.len()).unwrap_or(all);
        Ok(FailureGroups { groups, more, events: Counted { events, at_least: events >= LOOKED_AT } })
    }

    /// How many failed events match, of the newest 10,000.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn count_failed(&self, connection: &mut PgConnection, filter: &FailureFilter) -> Result<Shown, OutboxError> {
        self.count_newest_failed(connection, filter, LOOKED_AT).await
    }

    /// How many failed events match, of the newest 2,000,000: about a second for each million, and more where they are not in memory.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn count_all_failed(&self, connection: &mut PgConnection, filter: &FailureFilter) -> Result<Shown, OutboxError> {
        self.count_newest_failed(connection, filter, ALL).await
    }

    async fn count_newest_failed(
        &self,
        connection: &mut PgConnection,
        filter: &FailureFilter,
        most: i64,
    ) -> Result<Shown, OutboxError> {
        let doing = "counting failed events";
        let sql = format!(
            "SELECT count(*) FILTER (WHERE ($1::text IS NULL OR event_type = $1) AND ($2::text IS NULL OR {CAUSE} = $2)) AS events,
                    count(*) >= $3 AS at_least, pg_current_snapshot()::text AS snapshot
             FROM (SELECT event_type, last_error FROM {{s}}.event_outbox WHERE status = 'FAILED'
                   ORDER BY created_at DESC LIMIT $3) AS looked"
        );
        let row = self
            .query(self.sql(&sql))
            .bind(&filter.event_type)
            .bind(&filter.cause)
            .bind(most)
            .fetch_one(connection)
            .await
            .map_err(self.error(doing))?;
        let read = || {
            let events = Counted { events: row.try_get("events")?, at_least: row.try_get("at_least")? };
            Ok(Shown { events, snapshot: Snapshot(row.try_get("snapshot")?) })
        };
        read().map_err(self.error(doing))
    }

    /// One step through the failed events that match: looks at the next 1,000 after the place, in the order of their aggregates. With
    /// a snapshot, only rows that are as they were then are changed.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; then this step did nothing.
    pub async fn remedy_step(
        &self,
        connection: &mut PgConnection,
        deed: Deed<'_>,
        remedy: Remedy,
        filter: &FailureFilter,
        after: &FailurePlace,
        shown: Option<&Snapshot>,
    ) -> Result<RemedyStep, OutboxError> {
        let sql = statement(&STEPWISE.replace("{cause}", CAUSE).replace("{step}", &STEP.to_string()), remedy);
        let query = self.query(self.sql(&sql)).bind(deed.who).bind(deed.about);
        let query = query.bind(&after.aggregate_type).bind(&after.aggregate_id).bind(after.seq);
        let row = query
            .bind(&filter.event_type)
            .bind(&filter.cause)
            .bind(shown.map(|snapshot| &snapshot.0))
            .fetch_one(&mut *connection)
            .await
            .map_err(self.error("changing failed events"))?;
        self.stepped(connection, &row, remedy).await
    }

    /// The same for the failed ones among these events, all in one step.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; then nothing was done.
    pub async fn remedy_events(
        &self,
        connection: &mut PgConnection,
        deed: Deed<'_>,
        remedy: Remedy,
        ids: &[Uuid],
    ) -> Result<RemedyStep, OutboxError> {
        let row = self
            .query(self.sql(&statement(NAMED, remedy)))
            .bind(deed.who)
            .bind(deed.about)
            .bind(ids)
            .fetch_one(&mut *connection)
            .await
            .map_err(self.error("changing failed events"))?;
        Ok(RemedyStep { next: None, ..self.stepped(connection, &row, remedy).await? })
    }

    async fn stepped(&self, connection: &mut PgConnection, row: &PgRow, remedy: Remedy) -> Result<RemedyStep, OutboxError> {
        let doing = "changing failed events";
        let step = step_of(row).map_err(self.error(doing))?;
        let unchanged: Vec<Uuid> = row.try_get("unchanged").map_err(self.error(doing))?;
        if !unchanged.is_empty() {
            self.are_unfailed(connection, step.changed, &unchanged).await?;
        }
        if remedy == Remedy::Retry && step.changed > 0 {
            self.notify(connection).await?;
        }
        Ok(step)
    }

    /// Somebody else may have changed these events in the meantime. If they are still `FAILED`, PostgreSQL has done nothing about them.
    async fn are_unfailed(&self, connection: &mut PgConnection, changed: i64, ids: &[Uuid]) -> Result<(), OutboxError> {
        let doing = "changing failed events";
        let sql = "SELECT count(*) FROM {s}.event_outbox WHERE id = ANY ($1) AND COALESCE(status, '') = 'FAILED'";
        let failed: i64 = sqlx::query_scalar(self.sql(sql)).bind(ids).fetch_one(connection).await.map_err(self.error(doing))?;
        if failed == 0 { Ok(()) } else { Err(OutboxError::Unchanged { doing, changed, meant: changed + failed }) }
    }
}

fn statement(looked: &str, remedy: Remedy) -> String {
    REMEDY.replace("{looked}", looked).replace("{change}", remedy.change()).replace("{action}", remedy.name())
}

fn step_of(row: &PgRow) -> Result<RemedyStep, sqlx::Error> {
    let is_full = row.try_get::<i64, _>("looked")? >= STEP;
    let last = || {
        Ok::<_, sqlx::Error>(FailurePlace {
            aggregate_type: readable(row, "aggregate_type")?,
            aggregate_id: readable(row, "aggregate_id")?,
            seq: row.try_get("seq")?,
        })
    };
    Ok(RemedyStep { changed: row.try_get("changed")?, next: if is_full { Some(last()?) } else { None } })
}

fn group(row: &PgRow) -> Result<FailureGroup, sqlx::Error> {
    Ok(FailureGroup {
        event_type: readable(row, "event_type")?,
        cause: row.try_get("cause")?,
        example: row.try_get("example")?,
        events: row.try_get("events")?,
        oldest: row.try_get("oldest")?,
        newest: row.try_get("newest")?,
    })
}
