//! All SQL on the outbox tables. Nothing outside this module names them.
//!
//! Every statement is one method of [`OutboxRepository`] on a connection that the caller owns, so that a publish runs in the caller's
//! transaction and the relay decides which session does what.

mod address;
mod admin;
mod attempts;
mod audit;
mod audit_settle;
mod backlog;
mod blocked;
mod claim;
mod cleanup;
mod connection;
mod days;
mod error;
pub mod examine;
mod failures;
mod glance;
mod inbox;
mod indexes;
mod insert;
mod journal;
mod lease;
mod life;
mod migrations;
mod operators;
mod relays;
mod search;
mod sequences;
mod settle;
mod settle_rows;
mod stats;
mod streams;
mod text;
mod two_phase;
mod wake;

pub use address::Address;
pub use admin::{FailedEvent, Selection};
pub use attempts::MigrationProgress;
pub(crate) use audit::{EntryLines, ReadStream};
pub use audit::{Finding, Findings};
pub use backlog::Backlog;
pub use blocked::BlockedAggregate;
pub use claim::{Batch, Claim, ClaimRequest, OutboxEvent};
pub(crate) use connection::{IN_FAILED_TRANSACTION, check_own, commit_unless_aborted, connect_to, listen_at, set_up};
pub use connection::{begin, begin_reading, connect, connect_own, connect_plain, for_people};
pub use days::{Fate, Overdue};
pub use error::OutboxError;
pub(crate) use error::{is_outage, is_outage_code};
pub use failures::{
    Counted, Deed, FailureFilter, FailureGroup, FailureGroups, FailurePlace, Remedy, RemedyStep, Shown, Snapshot,
};
pub use glance::Glance;
pub use journal::{JournalBatch, OpenBatch, Requeued};
pub use lease::{Lease, Partitions};
pub use life::{EventBatch, EventDetail};
pub use migrations::{LATEST_VERSION, Migrated};
pub use operators::{AuditRow, Pause};
pub use relays::{Heartbeat, Members, RelayBatches, RelayRow};
pub use search::{EventPage, EventSearch, EventStatus, EventSummary, SearchPlace};
pub use sequences::{Continued, SequenceFacts};
pub use settle::{AfterPublishing, Refusal, Settlement};
pub use settle_rows::{SettledRows, StuckBatch, StuckRow};
pub use stats::OutboxStats;
pub use streams::{KnownStream, StreamLook};
pub(crate) use wake::{RELAYS_CHANGED, TABLE_REPLACED, channel_of};

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::{Query, QueryScalar};
use sqlx::{AssertSqlSafe, FromRow, Postgres, SqlSafeStr};

/// Number of partitions that aggregates are spread over; `outbox_lease` has a row for each.
pub const PARTITIONS: usize = 64;

/// Data access to the outbox of one schema. Cheap to clone; holds no connection.
#[derive(Debug, Clone)]
pub struct OutboxRepository {
    schema: String,
    quoted: String,
    /// Statements get a name, and are planned once for a session.
    prepares: bool,
}

impl OutboxRepository {
    /// The outbox in `schema` (setting `app.database.schema`).
    #[must_use]
    pub fn new(schema: &str) -> Self {
        Self { schema: schema.to_owned(), quoted: format!("\"{}\"", schema.replace('"', "\"\"")), prepares: true }
    }

    /// The same for commands, whose sessions a pooler may share: their statements get no name, under which the next owner of the session
    /// would find them. To be used in transactions of [`begin`] and [`begin_reading`], which keep such a session.
    #[must_use]
    pub fn without_prepared_statements(self) -> Self {
        Self { prepares: false, ..self }
    }

    fn query<'q>(&self, sql: impl SqlSafeStr) -> Query<'q, Postgres, PgArguments> {
        sqlx::query(sql).persistent(self.prepares)
    }

    fn scalar<'q, T>(&self, sql: impl SqlSafeStr) -> QueryScalar<'q, Postgres, T, PgArguments>
    where
        (T,): for<'r> FromRow<'r, PgRow>,
    {
        sqlx::query_scalar(sql).persistent(self.prepares)
    }

    /// The statement with `{s}` replaced by the quoted schema. Names are qualified, because a publish must not depend on,
    /// or change, the caller's `search_path`, and a pooler in transaction mode keeps no session settings.
    fn sql(&self, template: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(template.replace("{s}", &self.quoted))
    }

    /// Types an error of the driver.
    pub(crate) fn error(&self, doing: &'static str) -> impl FnOnce(sqlx::Error) -> OutboxError {
        let schema = self.schema.clone();
        move |source| OutboxError::from_sqlx(doing, &schema, source)
    }
}

/// A time that people may have set with SQL, as far as it is a date: the driver cannot read `infinity`, nor all years that PostgreSQL has.
/// `created_at` and `occurred_at` are within these bounds by constraint.
fn dated(column: &str) -> String {
    format!("CASE WHEN {column} BETWEEN '0001-01-02 00:00:00+00' AND '{LAST_DATE}' THEN {column} END")
}

/// Whether the next attempt at an event is after all dates: somebody has set it to `infinity`, so that it is not tried.
fn parked(next_retry_at: &str) -> String {
    format!("COALESCE({next_retry_at} > '{LAST_DATE}', false)")
}

const LAST_DATE: &str = "9999-12-30 00:00:00+00";

/// Which rows were published by now. Those that somebody made `PUBLISHED` with SQL may have no time, or one that is no date or yet to come,
/// and would stand before or behind all others.
const PUBLISHED: &str = "status = 'PUBLISHED' AND published_at > '-infinity' AND published_at <= statement_timestamp()";

/// As statements take durations.
fn millis(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
