use thiserror::Error;

/// Why something on the outbox tables did not happen.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OutboxError {
    #[error(
        "schema \"{schema}\" has no current outbox tables: run `commitstream migrate`, or apply the files of migrations/ that are missing"
    )]
    NotMigrated {
        schema: String,
        #[source]
        source: Option<sqlx::Error>,
    },

    #[error(
        "the outbox tables in schema \"{schema}\" have version {found}, and this build needs {needed}: stop the relays, then run `commitstream migrate`, or apply the files of migrations/ that are missing"
    )]
    Outdated { schema: String, found: i32, needed: i32 },

    #[error(
        "schema \"{schema}\" holds an event_outbox that this migration did not create: move it away (CREATE SCHEMA old; ALTER TABLE event_outbox SET SCHEMA old), migrate, then copy its unsent rows"
    )]
    ForeignTable { schema: String },

    #[error("PostgreSQL cannot be reached while {doing}: is it running, and is the URL right (DATABASE_URL)?")]
    Unreachable {
        doing: &'static str,
        #[source]
        source: sqlx::Error,
    },

    #[error(
        "PostgreSQL did not answer within {limit:?} while {doing} (settings app.database.timeout, leaseDuration): it is unreachable, overloaded, or a lock stands in the way"
    )]
    Timeout { doing: &'static str, limit: std::time::Duration },

    #[error("a session of PostgreSQL did not answer within {limit:?}: its connection is dead, or the server does nothing at all")]
    Silent { limit: std::time::Duration },

    #[error("event_outbox is in use, so nothing was changed while {doing}: a long transaction, a backup or vacuum has it locked")]
    Busy {
        doing: &'static str,
        #[source]
        source: sqlx::Error,
    },

    #[error(
        "the outbox tables are up to date, but not all of their indexes: run `commitstream migrate` again, and start relays after it"
    )]
    IndexesMissing(#[source] Box<OutboxError>),

    #[error(
        "a relay is at work, and may send events while they are being marked: pause the relays first (commitstream relays pause)"
    )]
    NotPaused,

    #[error("event_outbox was replaced by another table: what listened on the old one starts anew")]
    Replaced,

    #[error(
        "the sequence of event_outbox.seq has begun anew: the next number is {next}, and the table holds {highest}, so newer events would overtake \
         older ones. This user may not set it; as the owner of the table, run: {statement}"
    )]
    SequenceBehind { next: i64, highest: i64, statement: String },

    #[error("the database URL is not usable: write postgres://user:password@host:5432/database")]
    Url(#[source] sqlx::Error),

    #[error("the database URL has {option}, which is not supported: {instead}")]
    UrlOption { option: &'static str, instead: &'static str },

    #[error("none of the hosts {hosts} in the database URL can be reached and takes writes")]
    NoHost {
        hosts: String,
        #[source]
        source: Option<Box<OutboxError>>,
    },

    #[error(
        "the database URL leads through a pooler that gives sessions to others between transactions, and a relay, the console, verify and migrate need sessions of their own: give them the address of PostgreSQL itself (publishing and other commands may go through the pooler)"
    )]
    SharedSession,

    #[error(
        "a pooler has mixed up prepared statements while {doing}: give a relay, a console or doctor the address of PostgreSQL itself; to publish, set app.database.preparedStatements = false, or use PgBouncer 1.21 or newer"
    )]
    Pooler {
        doing: &'static str,
        #[source]
        source: sqlx::Error,
    },

    #[error(
        "PostgreSQL accepted the statement and changed {changed} of {meant} rows while {doing}: row-level security or a trigger that returns NULL is in the way (`commitstream doctor` names it)"
    )]
    Unchanged { doing: &'static str, changed: i64, meant: i64 },

    #[error(
        "event {event_id} is in the stream {stream} (batch {batch_id}), but its row cannot become PUBLISHED ({reason}); it is not sent again. Rows like this one: {rows}"
    )]
    Unsettled { event_id: uuid::Uuid, batch_id: uuid::Uuid, stream: String, reason: String, rows: usize },

    #[error("Redis refused event {event_id}, and its row cannot say so ({reason}). Rows like this one: {rows}")]
    Unwritten { event_id: uuid::Uuid, reason: String, rows: usize },

    #[error("PostgreSQL refused while {doing}")]
    Database {
        doing: &'static str,
        #[source]
        source: sqlx::Error,
    },
}

impl OutboxError {
    pub(super) fn from_sqlx(doing: &'static str, schema: &str, source: sqlx::Error) -> Self {
        // https://www.postgresql.org/docs/current/errcodes-appendix.html
        let code = source.as_database_error().and_then(|e| e.code()).map(|code| code.into_owned());
        match (&source, code.as_deref()) {
            // undefined_table, undefined_column, invalid_schema_name
            (_, Some("42P01" | "42703" | "3F000")) => Self::NotMigrated { schema: schema.to_owned(), source: Some(source) },
            // duplicate_prepared_statement, invalid_sql_statement_name
            (_, Some("42P05" | "26000")) => Self::Pooler { doing, source },
            (sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed, _) => {
                Self::Unreachable { doing, source }
            }
            _ => Self::Database { doing, source },
        }
    }

    /// True when the tables are missing or too old, which waiting does not mend.
    #[must_use]
    pub fn is_not_migrated(&self) -> bool {
        matches!(self, Self::NotMigrated { .. } | Self::Outdated { .. })
    }

    /// True when PostgreSQL answered, undid the statement and goes on: what stood in the way is a row, or what is set up around it.
    #[must_use]
    pub fn is_about_rows(&self) -> bool {
        match self {
            Self::Database { source: source @ sqlx::Error::Database(_), .. } => !is_outage(source),
            Self::Unchanged { .. } => true,
            _ => false,
        }
    }

    /// Of a statement that was meant to change so many rows.
    pub(super) fn unless_changed(doing: &'static str, changed: u64, meant: usize) -> Result<(), Self> {
        let (changed, meant) = (i64::try_from(changed).unwrap_or(i64::MAX), i64::try_from(meant).unwrap_or(i64::MAX));
        if changed == meant { Ok(()) } else { Err(Self::Unchanged { doing, changed, meant }) }
    }

    /// True when waiting does not help a program that starts: the tables, the rights, the URL or a statement are wrong
    /// (class 42 of <https://www.postgresql.org/docs/current/errcodes-appendix.html>, and `feature_not_supported`).
    pub(crate) fn cannot_work(&self) -> bool {
        match self {
            Self::Url(_) | Self::UrlOption { .. } | Self::SharedSession => true,
            Self::Database { source, .. } => {
                let code = source.as_database_error().and_then(|error| error.code());
                code.is_some_and(|code| code.starts_with("42") || code == "0A000")
            }
            _ => self.is_not_migrated(),
        }
    }

    /// True when PostgreSQL says that this user may not do it: `insufficient_privilege`,
    /// <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        let Self::Database { source, .. } = self else { return false };
        source.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == "42501")
    }
}

/// True when the database was away or busy, so that the same statement may succeed later; false when it is at fault itself.
pub(crate) fn is_outage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| is_outage_code(&code)),
        _ => false,
    }
}

/// The same of what PostgreSQL answered: classes 08 connection, 53 resources, 57P0 shutdown; serialization_failure, deadlock_detected,
/// read_only_sql_transaction.
pub(crate) fn is_outage_code(code: &str) -> bool {
    ["08", "53", "57P0"].iter().any(|class| code.starts_with(class)) || ["40001", "40P01", "25006"].contains(&code)
}
