//! What every benchmark works with: the servers, the sizes, and the state in which a round begins.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use commitstream::config::Settings;
use commitstream::outbox::OutboxRepository;
use commitstream::streams::Streams;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgConnection, PgPool};

use super::workload::{self, AGGREGATE_TYPE, State};
use crate::commands::servers::Servers;
use crate::output::{Progress, count};

/// Tables of an application, beside the outbox.
const TABLES: &str = "
    CREATE TABLE bench_order (number bigint PRIMARY KEY, customer text NOT NULL, amount_cents bigint NOT NULL);
    CREATE TABLE bench_row (number bigint NOT NULL)";

/// A retention of more than nothing, in days: that of the default settings.
pub const KEPT: u32 = 7;
/// Most rounds of one figure.
pub const MOST_ROUNDS: u32 = 99;

/// How much is done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scale {
    /// At most so many rows, and a moment instead of a longer time.
    pub events: Option<u64>,
    /// Instead of a benchmark's own number of rounds.
    pub rounds: Option<u32>,
}

pub struct Stage {
    pub settings: Settings,
    pub streams: Streams,
    pub scale: Scale,
    /// The servers are nobody else's.
    pub is_private: bool,
    progress: Mutex<Progress>,
}

impl Stage {
    pub fn new(servers: &Servers, scale: Scale) -> anyhow::Result<Self> {
        let (settings, streams) = (servers.settings.clone(), servers.streams()?);
        Ok(Self { settings, streams, scale, is_private: servers.are_private(), progress: Mutex::new(Progress::start()) })
    }

    /// Creates the tables.
    pub async fn migrate(&self) -> anyhow::Result<()> {
        self.streams.ping().await?;
        let mut connection = self.connect("set-up").await?;
        OutboxRepository::new(&self.settings.database.schema).migrate(&mut connection).await?;
        sqlx::raw_sql(TABLES).execute(&mut connection).await?;
        Ok(())
    }

    /// The same after all tables were dropped.
    pub async fn start_anew(&self, connection: &mut PgConnection) -> anyhow::Result<()> {
        self.streams.remove_all().await?;
        let sql = format!("DROP SCHEMA \"{}\" CASCADE", self.settings.database.schema);
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await?;
        self.migrate().await
    }

    /// A session as an application has one, in the schema of the benchmarks.
    pub async fn connect(&self, of: &str) -> anyhow::Result<PgConnection> {
        let mut connection = self.options(of)?.connect().await?;
        let path = sqlx::query("SELECT set_config('search_path', $1, false)").bind(&self.settings.database.schema);
        path.execute(&mut connection).await?;
        Ok(connection)
    }

    /// The same for a pool of sessions.
    pub async fn pool(&self, of: &str, connections: u32) -> anyhow::Result<PgPool> {
        let schema = self.settings.database.schema.clone();
        // Asking a connection whether it is there would cost a round trip each time.
        let options = PgPoolOptions::new().max_connections(connections).test_before_acquire(false);
        let options = options.after_connect(move |connection, _| {
            let path = schema.clone();
            Box::pin(async move {
                sqlx::query("SELECT set_config('search_path', $1, false)").bind(path).execute(connection).await.map(drop)
            })
        });
        Ok(options.connect_with(self.options(of)?).await?)
    }

    fn options(&self, of: &str) -> anyhow::Result<PgConnectOptions> {
        let url = self.settings.database.url.as_deref().context("benchmarks have a database")?;
        let options: PgConnectOptions = url.parse()?;
        Ok(options.application_name(&format!("commitstream bench: {of}")))
    }

    /// The rows of a benchmark that is defined with `full`.
    pub fn events(&self, full: u64) -> u64 {
        self.scale.events.map_or(full, |events| events.min(full))
    }

    /// How long a benchmark runs that is defined with `full`.
    pub fn time(&self, full: Duration) -> Duration {
        if self.scale.events.is_some() { full.min(Duration::from_secs(1)) } else { full }
    }

    /// The numbers of the rounds, from 1, of a benchmark that has so many by itself.
    pub fn rounds(&self, usual: u32) -> std::ops::RangeInclusive<u32> {
        1..=self.scale.rounds.unwrap_or(usual)
    }

    pub fn tell(&self, text: impl FnOnce() -> String) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).tell(text);
    }

    pub fn clear_progress(&self) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Empties the tables and removes the streams. No relay may run.
    pub async fn clear(&self, connection: &mut PgConnection) -> anyhow::Result<()> {
        sqlx::raw_sql("TRUNCATE event_outbox, outbox_batch").execute(connection).await?;
        Ok(self.streams.remove_all().await?)
    }

    /// The state in which each side of a round begins: these rows and nothing else, analysed, with no work left to do for the server.
    pub async fn prepare(&self, connection: &mut PgConnection, events: u64, what: &str) -> anyhow::Result<()> {
        self.clear(connection).await?;
        self.fill(connection, events, what).await?;
        self.settle(connection).await
    }

    /// Adds waiting rows.
    pub async fn fill(&self, connection: &mut PgConnection, events: u64, what: &str) -> anyhow::Result<()> {
        self.fill_with(connection, events, State::Waiting, what).await
    }

    /// Adds rows in this state.
    pub async fn fill_with(&self, connection: &mut PgConnection, events: u64, state: State, what: &str) -> anyhow::Result<()> {
        let told = |filled| self.tell(|| format!("{what}: filling, {} of {}", count(filled), count(events)));
        Ok(workload::fill(connection, events, state, told).await?)
    }

    /// Statistics are fresh, and no checkpoint is due.
    pub async fn settle(&self, connection: &mut PgConnection) -> anyhow::Result<()> {
        sqlx::raw_sql("VACUUM (ANALYZE) event_outbox").execute(&mut *connection).await?;
        sqlx::raw_sql("VACUUM (ANALYZE) outbox_batch").execute(&mut *connection).await?;
        match sqlx::raw_sql("CHECKPOINT").execute(&mut *connection).await {
            // On servers of the user, the user may lack the right.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42501") => Ok(()),
            done => Ok(done.map(drop)?),
        }
    }

    /// Entries in the one stream.
    pub async fn entries(&self) -> anyhow::Result<u64> {
        Ok(self.streams.len(&self.streams.stream_of(AGGREGATE_TYPE)).await?)
    }
}

/// A whole number for a division.
pub fn per_second(events: u64, took: Duration) -> f64 {
    events as f64 / took.as_secs_f64().max(1e-9)
}
