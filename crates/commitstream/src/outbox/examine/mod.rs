//! What [`doctor`](crate::doctor) wants to know of PostgreSQL and the outbox: facts, without a verdict.
//!
//! Nothing here changes anything, and nothing reads a table in full: counts stop at [`COUNTED`], sizes are those of the statistics. Each
//! look is a short read-only transaction with time-outs of its own, so that one that fails leaves the others alone.

mod backlog;
mod barriers;
mod horizon;
mod schema;
mod server;
mod tables;

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::{Connection, Executor, PgConnection, Postgres, Transaction};

pub use backlog::{Backlog, FailedFacts, History, OpenFacts};
pub use barriers::{Barrier, BarrierKind};
pub use horizon::{Holder, HolderKind};
pub(super) use schema::expected_indexes;
pub use schema::{Difference, Recorded, Rights, SchemaFacts};
pub use server::ServerFacts;
pub use tables::{SizeFacts, TableFacts};

use super::{KnownStream, OutboxError, OutboxRepository, Pause, RelayRow, SequenceFacts};
use crate::doctor::Clock;
use crate::streams::Owner;

/// Rows are counted up to this; one more means "more".
pub const COUNTED: i64 = 10_000;

/// The planner keeps to indexes, whatever the statistics say, and a look waits neither for a lock nor for a slow disk.
const LIMITS: &str = "SET TRANSACTION READ ONLY; SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = '5s'; \
                      SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_mergejoin = off; \
                      SET LOCAL enable_hashjoin = off; SET LOCAL jit = off; SET LOCAL search_path TO {s}";

/// What leads to PostgreSQL.
#[derive(Debug)]
pub enum PostgresFacts {
    /// A pooler that gives sessions to others between transactions. Nothing else was asked through it.
    Pooled,
    Direct(Box<DirectFacts>),
}

/// Each part is there, or why it is not.
#[derive(Debug)]
pub struct DirectFacts {
    pub clock: Result<Clock, OutboxError>,
    pub server: Result<ServerFacts, OutboxError>,
    pub horizon: Result<Vec<Holder>, OutboxError>,
    pub rights: Result<Rights, OutboxError>,
    pub recorded: Result<Recorded, OutboxError>,
    /// `None` without a current outbox to ask.
    pub outbox: Option<OutboxFacts>,
}

/// Of an outbox whose migration is there.
#[derive(Debug)]
pub struct OutboxFacts {
    pub schema: Result<SchemaFacts, OutboxError>,
    pub barriers: Result<Vec<Barrier>, OutboxError>,
    pub sizes: Result<SizeFacts, OutboxError>,
    pub backlog: Result<Backlog, OutboxError>,
    pub failed: Result<FailedFacts, OutboxError>,
    pub history: Result<History, OutboxError>,
    pub open: Result<OpenFacts, OutboxError>,
    pub owner: Result<Owner, OutboxError>,
    /// The streams that relays have written to.
    pub streams: Result<Vec<KnownStream>, OutboxError>,
    pub relays: Result<Vec<RelayRow>, OutboxError>,
    pub pause: Result<Option<Pause>, OutboxError>,
    /// Days without a partition; `None` when the table is not partitioned by day.
    pub missing_days: Result<Option<Vec<chrono::NaiveDate>>, OutboxError>,
    pub sequences: Result<Vec<SequenceFacts>, OutboxError>,
    /// The insert trigger leaves out what PostgreSQL does not prepare.
    pub is_two_phase: Result<bool, OutboxError>,
}

/// Whether events flow out of the outbox: the part of [`OutboxFacts`] that is cheap enough to be asked every few seconds.
#[derive(Debug)]
pub struct OutboxFlow {
    pub relays: Result<Vec<RelayRow>, OutboxError>,
    pub pause: Result<Option<Pause>, OutboxError>,
    pub backlog: Result<Backlog, OutboxError>,
    pub failed: Result<FailedFacts, OutboxError>,
}

impl OutboxRepository {
    /// Asks whether events flow. Counts stop at [`COUNTED`], each look is a short read-only transaction.
    pub async fn flow(&self, connection: &mut PgConnection) -> OutboxFlow {
        OutboxFlow {
            relays: self.relays(connection).await,
            pause: self.paused(connection).await,
            backlog: self.examine_backlog(connection).await,
            failed: self.failed_facts(connection).await,
        }
    }

    /// Looks at the server that `url` leads to and at the outbox there. Two sessions, each closed at the end.
    ///
    /// # Errors
    /// PostgreSQL cannot be reached within `limit`, or refuses the login.
    pub async fn examine(&self, url: &str, limit: Duration) -> Result<PostgresFacts, OutboxError> {
        let mut connection = super::connection::open(url, "commitstream doctor", limit).await?;
        // Without a second session (the server may have none left) a pooler is not found, and everything else is.
        if let Ok(mut second) = super::connection::open(url, "commitstream doctor", limit).await {
            let pooled =
                super::connection::is_pooled(&mut connection, &mut second).await.map_err(self.error("looking for a pooler"))?;
            second.close().await.ok();
            if pooled {
                return Ok(PostgresFacts::Pooled);
            }
        }
        connection.execute("SET lock_timeout = '1s'; SET statement_timeout = '5s'").await.map_err(self.error("connecting"))?;
        let facts = self.examine_by(&mut connection).await;
        connection.close().await.ok();
        Ok(PostgresFacts::Direct(Box::new(facts)))
    }

    /// The same on a session that there is.
    pub async fn examine_by(&self, connection: &mut PgConnection) -> DirectFacts {
        let rights = self.rights(connection).await;
        let recorded = self.recorded(connection).await;
        let is_there = matches!(&recorded, Ok(recorded) if recorded.is_current_or_newer());
        DirectFacts {
            clock: self.clock(connection).await,
            server: self.server_facts(connection).await,
            horizon: self.horizon(connection).await,
            outbox: if is_there { Some(self.outbox_facts(connection).await) } else { None },
            rights,
            recorded,
        }
    }

    async fn outbox_facts(&self, connection: &mut PgConnection) -> OutboxFacts {
        OutboxFacts {
            schema: self.schema_facts(connection).await,
            barriers: self.barriers(connection).await,
            sizes: self.size_facts(connection).await,
            backlog: self.examine_backlog(connection).await,
            failed: self.failed_facts(connection).await,
            history: self.history(connection).await,
            open: self.open_facts(connection).await,
            owner: self.owner(connection).await,
            streams: self.known_streams(connection, "").await.map(|(_, streams)| streams),
            relays: self.relays(connection).await,
            pause: self.paused(connection).await,
            missing_days: self.missing_days(connection).await,
            sequences: self.sequence_facts(connection).await,
            is_two_phase: self.is_two_phase(connection).await,
        }
    }

    async fn sequence_facts(&self, connection: &mut PgConnection) -> Result<Vec<SequenceFacts>, OutboxError> {
        let mut tx = self.looking("comparing sequences with their tables", connection).await?;
        self.sequences(&mut tx).await
    }

    /// The server's clock against that of this machine.
    async fn clock(&self, connection: &mut PgConnection) -> Result<Clock, OutboxError> {
        let (before, asked) = (Utc::now(), Instant::now());
        let time: DateTime<Utc> =
            self.scalar("SELECT clock_timestamp()").fetch_one(connection).await.map_err(self.error("reading the clock"))?;
        Ok(Clock::measured(before, asked.elapsed(), time))
    }

    /// A transaction for one look. It ends when it is dropped.
    async fn looking<'c>(
        &self,
        doing: &'static str,
        connection: &'c mut PgConnection,
    ) -> Result<Transaction<'c, Postgres>, OutboxError> {
        let mut tx = connection.begin().await.map_err(self.error(doing))?;
        tx.execute(self.sql(LIMITS)).await.map_err(self.error(doing))?;
        Ok(tx)
    }
}
