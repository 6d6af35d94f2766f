//! The relay: claims committed events from the outbox, appends them to Redis Streams, and settles.
//!
//! ```text
//!             partitions taken            open batches resolved,
//!                                         lost ones unsent again            stop
//!  Connecting ──────────────► Recovering ────────────────────────► Active ───────► Stopped
//!      │  ▲  │                    ▲                                  │ │ ▲
//!      │  │  │ none is free       └── partitions come or go ─────────┘ │ │ Redis answers again
//!      │  │  ▼                                                         ▼ │
//!      │  │ Standby                             Unable (keeps its batches and keeps trying)
//!      ▼  │ session lost: back off, start again
//!     Unable
//! ```
//!
//! | file | what | I/O |
//! |---|---|---|
//! | `assignment` | which partitions to give and to take | none |
//! | `chain` | what must stand in a stream before the next batch | none |
//! | `cursor` | where the next claim has to look | none |
//! | `turns` | which events the next claim looks for, so that streams take turns | none |
//! | `pipeline` | what is between claim and settle, and what may start next | none |
//! | `exceptions` | what PostgreSQL does not let a relay settle | none |
//! | `waiting` | streams that cannot get on, and when to try them again | none (dice) |
//! | `retry` | when to try again | none (dice) |
//! | `append` | one batch: append it and find out what came of it | Redis |
//! | `engine` | the loop that starts and ends claims, appends and settles | both |
//! | `membership` | heartbeat, giving and taking partitions | PostgreSQL |
//! | `probe` | asks idle sessions whether they are alive | PostgreSQL |
//! | `repair` | open batches of earlier owners, and what a failover of Redis lost | both |
//! | `settling` | all that has ended at once, or batch by batch and row by row | PostgreSQL |
//! | `losses` | whether entries are gone behind the relay's back | both |
//! | `session` | connect, join, recover, run the engine | both |
//! | `sleep` | the sleep lock: how an idle relay is woken | PostgreSQL |
//!
//! The protocol and why it is safe: ARCHITECTURE.md.

/// A window of the protocol in which tests let the process die, by name. Nothing in a build without the feature `failpoints`.
macro_rules! crash_window {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name);
    };
}

mod append;
mod assignment;
mod chain;
pub mod cleanup;
mod cursor;
pub mod days;
mod engine;
mod exceptions;
pub(crate) mod losses;
mod markers;
mod membership;
mod pipeline;
mod probe;
#[cfg(test)]
mod protocol_model;
mod repair;
mod retry;
mod session;
mod settling;
mod sleep;
mod status;
mod turns;
mod unready;
mod waiting;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use futures_util::FutureExt;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinHandle};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::config::{ConfigError, Settings};
use crate::metrics;
use crate::outbox::{self, Address, OutboxError, OutboxRepository, OutboxStats};
use crate::streams::{Streams, StreamsError};
use session::{Relay, SessionError};
use status::Reporter;
pub use status::{RelayState, RelayStatus};

/// Why a relay could not start, or ended by itself.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RelayError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No event goes through the outbox of these settings.
    #[error(
        "the outbox is disabled (app.outbox.enabled or OUTBOX_ENABLED is false), so there is nothing to relay: set OUTBOX_ENABLED=true, or do not start a relay"
    )]
    OutboxDisabled,
    #[error("no {0} is set")]
    MissingUrl(&'static str),
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error(transparent)]
    Streams(#[from] StreamsError),
    #[error("the relay's task failed; this is a defect of the relay")]
    Task(#[source] JoinError),
}

/// The background task that publishes the outbox to Redis Streams.
#[derive(Debug, Clone)]
pub struct OutboxProcessor {
    settings: Settings,
    url: String,
    outbox: OutboxRepository,
    streams: Streams,
}

impl OutboxProcessor {
    /// Checks the settings and both URLs. Nothing is connected yet.
    ///
    /// # Errors
    /// A setting is out of its range, the outbox is disabled, or a URL is missing or malformed.
    pub fn new(settings: Settings) -> Result<Self, RelayError> {
        settings.validate()?;
        if !settings.outbox.enabled {
            return Err(RelayError::OutboxDisabled);
        }
        let url = settings.database.url_with_tls().ok_or(RelayError::MissingUrl("DATABASE_URL (app.database.url)"))?;
        let redis = settings.redis.url.as_deref().ok_or(RelayError::MissingUrl("REDIS_URL (app.redis.url)"))?;
        Address::parse(&url)?;
        let streams = Streams::new(redis, &settings.redis)?;
        Ok(Self { outbox: OutboxRepository::new(&settings.database.schema), streams, url, settings })
    }

    /// Starts the relay in a task of its own, on the current tokio runtime. It reaches the servers by itself, now and after
    /// every outage; what it is doing is in [`RelayHandle::status`].
    #[must_use]
    pub fn start(&self) -> RelayHandle {
        let reporter = Reporter::new(Uuid::now_v7());
        let (stop, stopped) = watch::channel(false);
        let wake = Arc::new(Notify::new());
        let relay = Relay {
            settings: Arc::new(self.settings.clone()),
            url: self.url.clone(),
            outbox: self.outbox.clone(),
            streams: self.streams.clone(),
            reporter: reporter.clone(),
            wake: wake.clone(),
            stop: stopped,
            has_tables: AtomicBool::new(false),
            has_own_sessions: AtomicBool::new(false),
            failures: AtomicU32::new(0),
            cleanup_due: tokio::sync::Mutex::new(tokio::time::Instant::now()),
        };
        let status = reporter.subscribe();
        RelayHandle { status, stop, waker: RelayWaker(wake), task: Some(tokio::spawn(run(reporter, supervise(relay)))) }
    }

    /// The statistics of the outbox (`getStats`), read on a connection of its own.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn stats(&self) -> Result<OutboxStats, OutboxError> {
        let mut connection = outbox::connect_plain(&self.url, "commitstream stats", self.settings.database.timeout).await?;
        let mut transaction = outbox::begin_reading(&mut connection).await?;
        let stats = self.outbox.stats(&mut transaction).await?;
        transaction.commit().await.map_err(self.outbox.error("reading the statistics"))?;
        Ok(stats)
    }
}

/// Ends as [`supervise`] does. A panic shows in the status, which would otherwise stay as it was.
async fn run(reporter: Reporter, relay: impl Future<Output = Result<(), RelayError>>) -> Result<(), RelayError> {
    match AssertUnwindSafe(relay).catch_unwind().await {
        Ok(ended) => ended,
        Err(panic) => {
            tracing::error!(relay = %reporter.status().relay_id, "the relay's task panicked; this is a defect of the relay");
            reporter.state(RelayState::Unable { reason: "the relay's task panicked; this is a defect of the relay".to_owned() });
            std::panic::resume_unwind(panic)
        }
    }
}

/// Session after session until told to stop. What cannot work ends it at the start, such as a schema without tables: waiting would
/// hide a mistake.
async fn supervise(relay: Relay) -> Result<(), RelayError> {
    let mut backoff = Backoff::default();
    let mut has_worked = false;
    loop {
        let (started, published) = (tokio::time::Instant::now(), relay.reporter.status().published);
        let error = match relay.session().await {
            Ok(()) => break,
            Err(error) => error,
        };
        let got_on = relay.reporter.status().published > published;
        if got_on || started.elapsed() > relay.settings.outbox.processor.lease_duration {
            (backoff, has_worked) = (Backoff::default(), true);
            relay.failures.store(0, Ordering::Relaxed);
        }
        let error = match error {
            SessionError::Outbox(error) if !has_worked && relay.is_refused(&error) => {
                relay.reporter.unable(&error);
                return Err(error.into());
            }
            error => error,
        };
        relay.failures.fetch_add(1, Ordering::Relaxed);
        match &error {
            SessionError::Outbox(error) => metrics::postgres_failed(error),
            SessionError::Streams(error) => metrics::redis_failed(error),
            SessionError::LeaseLost | SessionError::SteppedDown => {}
        }
        relay.reporter.failed(&error);
        tokio::select! {
            () = relay.stopped() => break,
            () = tokio::time::sleep(backoff.next()) => {}
        }
    }
    relay.reporter.state(RelayState::Stopped);
    Ok(())
}

/// A running relay. Dropping it stops the relay as [`stop`](Self::stop) does, without waiting for the end.
#[derive(Debug)]
pub struct RelayHandle {
    status: watch::Receiver<RelayStatus>,
    stop: watch::Sender<bool>,
    waker: RelayWaker,
    /// `None` when it has ended, and that was said.
    task: Option<JoinHandle<Result<(), RelayError>>>,
}

impl RelayHandle {
    /// What the relay is doing now.
    #[must_use]
    pub fn status(&self) -> RelayStatus {
        self.status.borrow().clone()
    }

    /// Changes of the status, to wait on.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<RelayStatus> {
        self.status.clone()
    }

    /// Wakes the relay after a commit in the same process, which is quicker than PostgreSQL's notification.
    #[must_use]
    pub fn waker(&self) -> RelayWaker {
        self.waker.clone()
    }

    /// Stops the relay: it claims no more, settles what is in flight (at most `shutdownTimeout`), gives its partitions back and ends.
    ///
    /// # Errors
    /// Why it had ended by itself, unless [`ended`](Self::ended) has said so before.
    pub async fn stop(mut self) -> Result<(), RelayError> {
        self.stop.send_replace(true);
        self.ended().await
    }

    /// Waits until the relay ends by itself, which it does only at the start, when it cannot work: the outbox tables or rights on them are
    /// missing, or a pooler shares its sessions. At once if it has ended. May be dropped at any await.
    ///
    /// # Errors
    /// Why it ended; the first time.
    pub async fn ended(&mut self) -> Result<(), RelayError> {
        let Some(task) = &mut self.task else { return Ok(()) };
        let ended = task.await;
        self.task = None;
        ended.map_err(RelayError::Task)?
    }
}

/// Wakes a relay of the same process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RelayWaker(Arc<Notify>);

impl RelayWaker {
    /// Makes the relay look at the outbox now.
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_of_the_relay_shows_in_its_status() {
        let reporter = Reporter::new(Uuid::now_v7());
        reporter.working(false);
        let status = reporter.subscribe();
        let ended = tokio::spawn(run(reporter, async { panic!("on purpose") })).await;
        assert!(ended.is_err_and(|error| error.is_panic()));
        let state = status.borrow().state.clone();
        assert!(matches!(&state, RelayState::Unable { reason } if reason.contains("panicked")), "{state:?}");
    }
}
