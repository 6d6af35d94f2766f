//! What every program of the example does at its start and its end.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::config::Settings;
use commitstream::consumer::ConsumerHandle;
use commitstream::outbox::OutboxRepository;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::schema;

/// Longest wait for a connection, and for a statement: a request must end.
const DATABASE_LIMIT: Duration = Duration::from_secs(5);

/// Logs to standard error; `RUST_LOG` chooses what.
pub fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// A variable of the environment, or what holds without it.
#[must_use]
pub fn variable(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// The settings of `application.conf`, if there is one, and of the environment.
///
/// # Errors
/// A setting is wrong; the error says which.
pub fn settings() -> Result<Settings> {
    Ok(Settings::load(None, |name| std::env::var(name).ok(), &[])?.settings)
}

/// The database, with the tables of the outbox (which are only looked for) and of the service (which are made).
///
/// # Errors
/// `DATABASE_URL` is missing, PostgreSQL cannot be reached, or `commitstream migrate` has not run.
pub async fn database(settings: &Settings) -> Result<PgPool> {
    let url = settings.database.url.as_deref().context("set DATABASE_URL=postgres://user:password@host:5432/database")?;
    let limit = DATABASE_LIMIT.as_millis().to_string();
    let options = url.parse::<PgConnectOptions>().context("DATABASE_URL is no PostgreSQL URL")?;
    let pool = PgPoolOptions::new()
        .acquire_timeout(DATABASE_LIMIT)
        .connect_with(options.options([("statement_timeout", limit)]))
        .await
        .context("cannot connect to PostgreSQL")?;
    OutboxRepository::new(&settings.database.schema).check_migrated(&mut *pool.acquire().await?).await?;
    schema::migrate(&pool).await.context("cannot create the tables of the service")?;
    Ok(pool)
}

/// The signals that end a program.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From now on they are caught. Call it before anything is begun that must be ended in order.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn catch() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Lets a consumer work until a signal, and then finish what it has in hand.
///
/// # Errors
/// A task of the consumer failed.
pub async fn consume(consumer: ConsumerHandle, mut signals: Signals) -> Result<()> {
    signals.next().await;
    tracing::info!("finishing what is in hand");
    let status = consumer.stop().await?;
    tracing::info!(handled = status.handled, failed = status.failed, dead = status.dead, "stopped");
    Ok(())
}
