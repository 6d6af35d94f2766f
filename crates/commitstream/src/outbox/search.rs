//! Finding events for people, at a cost that does not grow with the table: a page looks at a bounded number of rows, along an
//! index that is there for the relay anyway, and says where it stopped.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::failures::CAUSE;
use super::text::{readable, readable_or_null};
use super::{OutboxError, OutboxRepository, dated};

/// Rows that one page looks at, at most.
const LOOKED_AT: i64 = 20_000;

/// The clock that gave an event its id may be that of the application, and differ from the database's by so much.
const CLOCKS_DIFFER: TimeDelta = TimeDelta::minutes(1);

/// How an event stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventStatus {
    /// Not published yet, on its way or not.
    Pending,
    /// Named by an open batch: on its way to Redis.
    Processing,
    Published,
    Failed,
}

impl EventStatus {
    pub const ALL: [Self; 4] = [Self::Pending, Self::Processing, Self::Published, Self::Failed];

    /// As the table has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Processing => "PROCESSING",
            Self::Published => "PUBLISHED",
            Self::Failed => "FAILED",
        }
    }

    pub(super) fn of(status: &str, is_open: bool) -> Self {
        match status {
            "PUBLISHED" => Self::Published,
            "FAILED" => Self::Failed,
            "PROCESSING" => Self::Processing,
            _ if is_open => Self::Processing,
            _ => Self::Pending,
        }
    }
}

/// Which events are looked for; what is `None` is left open.
#[derive(Debug, Clone, Default)]
pub struct EventSearch {
    pub event_type: Option<String>,
    pub aggregate_type: Option<String>,
    pub aggregate_id: Option<String>,
    pub status: Option<EventStatus>,
    /// Of the last failed attempt, as [`FailureGroup::cause`](super::FailureGroup::cause) has it.
    pub cause: Option<String>,
    /// Of the insertion, by the database's clock. Unless the status is `Pending` or `Failed`, only events whose ids are UUIDv7 are found by time.
    pub from: Option<DateTime<Utc>>,
    pub until: Option<DateTime<Utc>>,
}

/// One event, for a list.
#[derive(Debug, Clone, Serialize)]
pub struct EventSummary {
    pub id: Uuid,
    pub seq: i64,
    pub event_type: String,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub status: EventStatus,
    pub retry_count: i32,
    pub created_at: DateTime<Utc>,
    pub published_at: Option<DateTime<Utc>>,
    /// Its beginning.
    pub last_error: Option<String>,
}

/// Some of the events that were looked for, newest first.
#[derive(Debug, Clone, Default)]
pub struct EventPage {
    pub events: Vec<EventSummary>,
    /// Where the next page begins; `None` at the end. It is there also when fewer events were found than asked for: then the bound of
    /// rows was reached.
    pub next: Option<SearchPlace>,
}

/// A place in the order of a search, as text for a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchPlace {
    /// By what the walk goes besides the id; empty where it goes by the id alone.
    by: String,
    id: Uuid,
}

impl fmt::Display for SearchPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}~{}", self.by, self.id)
    }
}

impl FromStr for SearchPlace {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = "not a place in a search: begin at its first page";
        let (by, id) = text.split_once('~').ok_or(malformed)?;
        let is_known = by.is_empty() || by.parse::<i64>().is_ok() || by.parse::<DateTime<Utc>>().is_ok();
        if !is_known {
            return Err(malformed);
        }
        Ok(Self { by: by.to_owned(), id: id.parse().map_err(|_| malformed)? })
    }
}

/// Along which index a search goes. Each has an upper bound `$1`, `$2` that is not in it; `$3` and `$4` are the aggregate's type and id.
struct Walk {
    condition: &'static str,
    order: &'static str,
    /// The first part of a place, as text.
    by: &'static str,
}

/// By the primary key, and so by time for UUIDv7. `$1` is a lower bound here.
const BY_ID: Walk = Walk { condition: "e.id < $2 AND e.id >= $1::text::uuid", order: "e.id DESC", by: "''" };
const IN_FLIGHT: Walk = Walk {
    condition: "e.id < $2 AND e.id >= $1::text::uuid
        AND e.id = ANY (ARRAY(SELECT unnest(event_ids) FROM {s}.outbox_batch WHERE settled_at IS NULL))",
    ..BY_ID
};
const UNSENT: Walk = Walk {
    condition: "e.status IN ('PENDING', 'PROCESSING') AND (e.seq, e.id) < ($1::text::bigint, $2)",
    order: "e.seq DESC, e.id DESC",
    by: "e.seq::text",
};
const FAILED: Walk = Walk {
    condition: "e.status = 'FAILED' AND (e.created_at, e.id) < ($1::text::timestamptz, $2)",
    order: "e.created_at DESC, e.id DESC",
    by: "to_char(e.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
};

/// In the words of the index.
const FAILED_OF_AGGREGATE: Walk = Walk {
    condition: "e.status || '' = 'FAILED' AND e.aggregate_type = $3 AND e.aggregate_id = $4 AND (e.seq, e.id) < ($1::text::bigint, $2)",
    ..UNSENT
};

impl Walk {
    fn of(search: &EventSearch) -> Self {
        match search.status {
            Some(EventStatus::Failed) if search.aggregate_type.is_some() && search.aggregate_id.is_some() => FAILED_OF_AGGREGATE,
            Some(EventStatus::Pending) => UNSENT,
            Some(EventStatus::Processing) => IN_FLIGHT,
            Some(EventStatus::Failed) => FAILED,
            Some(EventStatus::Published) | None => BY_ID,
        }
    }

    /// The rows that a page may look at.
    fn rows(&self) -> String {
        let Self { condition, order, by } = self;
        let published_at = dated("e.published_at");
        format!(
            "(SELECT e.id, e.seq, e.event_type, e.aggregate_type, e.aggregate_id, e.status, e.retry_count, e.created_at,
                     {published_at} AS published_at, left(e.last_error, 300) AS last_error, {by} AS by
              FROM {{s}}.event_outbox e WHERE {condition} ORDER BY {order} LIMIT {LOOKED_AT}) AS looked"
        )
    }

    /// `$1` and `$2`.
    fn bounds(&self, search: &EventSearch, after: Option<&SearchPlace>) -> (String, Uuid) {
        let until = search.until.map_or(Uuid::max(), |until| lowest_id(until.checked_add_signed(CLOCKS_DIFFER).unwrap_or(until)));
        if self.by == BY_ID.by {
            let from = search.from.map_or(Uuid::nil(), |from| lowest_id(from.checked_sub_signed(CLOCKS_DIFFER).unwrap_or(from)));
            return (from.to_string(), after.map_or(until, |after| after.id));
        }
        let end = |walk: &str| if walk == UNSENT.by { i64::MAX.to_string() } else { "infinity".to_owned() };
        match after {
            Some(after) => (after.by.clone(), after.id),
            None => match search.until {
                Some(until) if self.by == FAILED.by => (until.to_rfc3339(), Uuid::nil()),
                _ => (end(self.by), Uuid::max()),
            },
        }
    }
}

/// The lowest UUIDv7 of a time.
fn lowest_id(time: DateTime<Utc>) -> Uuid {
    let millis = u64::try_from(time.timestamp_millis()).unwrap_or_default().min((1 << 48) - 1);
    uuid::Builder::from_unix_timestamp_millis(millis, &[0; 10]).into_uuid()
}

impl OutboxRepository {
    /// Up to `limit` events after the place, newest first. Looks at 20,000 rows at most: a search for what is rare comes back with what it
    /// has found, and with the place where it goes on.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked, or the place is of another search.
    pub async fn search(
        &self,
        connection: &mut PgConnection,
        search: &EventSearch,
        after: Option<&SearchPlace>,
        limit: i64,
    ) -> Result<EventPage, OutboxError> {
        let doing = "searching events";
        let walk = Walk::of(search);
        let (by, id) = walk.bounds(search, after);
        let sql = format!(
            "SELECT looked.*, looked.id = ANY (ARRAY(SELECT unnest(event_ids) FROM {{s}}.outbox_batch WHERE settled_at IS NULL)) AS is_open
             FROM {}
             WHERE ($3::text IS NULL OR aggregate_type = $3) AND ($4::text IS NULL OR aggregate_id = $4)
               AND ($5::text IS NULL OR event_type = $5) AND ($6::text IS NULL OR status = $6)
               AND ($7::timestamptz IS NULL OR created_at >= $7) AND ($8::timestamptz IS NULL OR created_at < $8)
               AND ($9::text IS NULL OR {CAUSE} = $9)
             LIMIT $10",
            walk.rows()
        );
        // What the walk says of the status is said.
        let status = search.status.filter(|status| *status == EventStatus::Published).map(EventStatus::name);
        let rows = sqlx::query(self.sql(&sql))
            .bind(&by)
            .bind(id)
            .bind(&search.aggregate_type)
            .bind(&search.aggregate_id)
            .bind(&search.event_type)
            .bind(status)
            .bind(search.from)
            .bind(search.until)
            .bind(&search.cause)
            .bind(limit + 1)
            .fetch_all(&mut *connection)
            .await
            .map_err(self.error(doing))?;
        let mut found = rows.iter().map(summary).collect::<Result<Vec<_>, _>>().map_err(self.error(doing))?;
        let has_more = i64::try_from(found.len()).is_ok_and(|found| found > limit);
        if has_more {
            found.pop();
        }
        let next = match found.last() {
            Some((_, place)) if has_more => Some(place.clone()),
            _ => self.last_looked_at(connection, &walk, search, (&by, id)).await?,
        };
        Ok(EventPage { events: found.into_iter().map(|(event, _)| event).collect(), next })
    }

    /// Where a search stopped that came to the bound of rows.
    async fn last_looked_at(
        &self,
        connection: &mut PgConnection,
        walk: &Walk,
        search: &EventSearch,
        (by, id): (&str, Uuid),
    ) -> Result<Option<SearchPlace>, OutboxError> {
        let doing = "searching events";
        let sql = format!("SELECT id, by FROM {} OFFSET {} LIMIT 1", walk.rows(), LOOKED_AT - 1);
        let query = sqlx::query(self.sql(&sql)).bind(by).bind(id).bind(&search.aggregate_type).bind(&search.aggregate_id);
        let row = query.fetch_optional(connection).await.map_err(self.error(doing))?;
        row.as_ref().map(place).transpose().map_err(self.error(doing))
    }
}

fn place(row: &PgRow) -> Result<SearchPlace, sqlx::Error> {
    Ok(SearchPlace { by: row.try_get("by")?, id: row.try_get("id")? })
}

fn summary(row: &PgRow) -> Result<(EventSummary, SearchPlace), sqlx::Error> {
    let event = EventSummary {
        id: row.try_get("id")?,
        seq: row.try_get("seq")?,
        event_type: readable(row, "event_type")?,
        aggregate_type: readable(row, "aggregate_type")?,
        aggregate_id: readable(row, "aggregate_id")?,
        status: EventStatus::of(row.try_get("status")?, row.try_get("is_open")?),
        retry_count: row.try_get("retry_count")?,
        created_at: row.try_get("created_at")?,
        published_at: row.try_get("published_at")?,
        last_error: readable_or_null(row, "last_error")?,
    };
    Ok((event, place(row)?))
}
