//! Changes that lock tables, in short attempts: whoever waits for a lock makes all that come later wait behind it, so a migration
//! beside a backup of an hour would stop producers for an hour.

use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::Instant;

use super::{OutboxError, OutboxRepository};

/// Producers wait no longer behind one attempt, and then have the time between two for themselves.
pub(super) const ATTEMPT: &str = "SET LOCAL lock_timeout = '200ms'";
const BETWEEN_ATTEMPTS: Duration = Duration::from_secs(1);

/// The session that has the table for longest, as far as this user may see it.
const HOLDER: &str = "
SELECT format('session %s%s%s', a.pid, COALESCE(' of ' || NULLIF(a.usename, ''), ''), COALESCE(', ' || NULLIF(a.application_name, ''), ''))
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.relation = to_regclass($1) OR l.relation IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass($1)))
ORDER BY a.xact_start LIMIT 1";

/// What takes its time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MigrationProgress {
    /// The table is in use by this session, if one is seen. Producers go on between attempts.
    Waiting { holder: Option<String> },
    /// An index is built while producers and relays go on.
    Building { index: String },
}

/// Attempts at one change, and how long they may take in all.
pub(super) struct Attempts {
    until: Instant,
}

impl Attempts {
    pub fn within(limit: Duration) -> Self {
        // A limit beyond all time is a year.
        let year = Duration::from_secs(365 * 86_400);
        Self { until: Instant::now() + limit.min(year) }
    }

    /// Waits for the next attempt, or gives the error back if it is not [`OutboxError::Busy`] or the time is over.
    pub async fn again(
        &self,
        outbox: &OutboxRepository,
        connection: &mut PgConnection,
        error: OutboxError,
        report: &mut (dyn FnMut(MigrationProgress) + Send),
    ) -> Result<(), OutboxError> {
        if !matches!(error, OutboxError::Busy { .. }) || Instant::now() + BETWEEN_ATTEMPTS > self.until {
            return Err(error);
        }
        let query = sqlx::query_scalar(HOLDER).bind(format!("{}.event_outbox", outbox.quoted));
        let holder = query.fetch_optional(connection).await.map_err(outbox.error("looking who uses event_outbox"))?;
        report(MigrationProgress::Waiting { holder });
        tokio::time::sleep(BETWEEN_ATTEMPTS).await;
        Ok(())
    }
}

impl OutboxRepository {
    /// As [`OutboxRepository::error`], where a limit of the session may have run out.
    pub(super) fn busy(&self, doing: &'static str) -> impl FnOnce(sqlx::Error) -> OutboxError {
        let otherwise = self.error(doing);
        move |source| match source.as_database_error().and_then(|error| error.code()).as_deref() {
            // lock_not_available, query_canceled, deadlock_detected
            Some("55P03" | "57014" | "40P01") => OutboxError::Busy { doing, source },
            _ => otherwise(source),
        }
    }
}
