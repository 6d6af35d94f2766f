//! What every program of the example does at its start and its end.

use std::io;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::config::Settings;
use commitstream::consumer::ConsumerHandle;
use commitstream::outbox::OutboxRepository;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing_subscriber::EnvFilter;

use crate::schema;

/// Longest wait for a connection, and for a statement: a request must end.
const DATABASE_LIMIT: Duration = Duration::from_secs(5);

/// Runs a program to its end. `#[tokio::main]` would wait then for a handler that holds its thread.
///
/// # Errors
/// Those of the program.
pub fn run(program: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(program);
    runtime.shutdown_background();
    ended
}

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
    let url = settings.database.url_with_tls().context("set DATABASE_URL=postgres://user:password@host:5432/database")?;
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

/// The signals that end a program. They come from a thread of their own: handlers may hold all threads of the program's runtime.
pub struct Signals {
    told: mpsc::Receiver<()>,
    /// It ends with the receiver.
    _thread: thread::JoinHandle<()>,
}

impl Signals {
    /// From now on they are caught. Call it before anything is begun that must be ended in order.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn catch() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (mut interrupt, mut terminate) = {
            let _of = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let (tell, told) = mpsc::channel(1);
        let wait = async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    () = tell.closed() => return,
                }
                // One that was not looked at yet says the same.
                tell.try_send(()).ok();
            }
        };
        let thread = thread::Builder::new().name("signals".to_owned()).spawn(move || runtime.block_on(wait))?;
        Ok(Self { told, _thread: thread })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        // The thread does not end before `self`.
        self.told.recv().await;
    }
}

/// Lets a consumer work until a signal, and then finish what it has in hand, within `app.consumer.shutdownTimeout`.
///
/// # Errors
/// A handler holds its thread and did not end, or a task of the consumer failed.
pub async fn consume(consumer: ConsumerHandle, mut signals: Signals) -> Result<()> {
    signals.next().await;
    tracing::info!("finishing what is in hand");
    let status = consumer.stop().await?;
    tracing::info!(handled = status.handled, failed = status.failed, dead = status.dead, "stopped");
    Ok(())
}
