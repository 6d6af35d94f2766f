//! One session of a relay: connect, wait for the lease, resolve what was left open, then run until something fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::PgConnection;
use sqlx::postgres::{PgListener, PgPoolOptions};
use thiserror::Error;
use tokio::sync::Notify;
use uuid::Uuid;

use super::cleanup;
use super::engine::{Engine, Parts};
use super::retry::Backoff;
use super::sleep::{self, SleepLock};
use super::status::{RelayState, Reporter};
use crate::config::Settings;
use crate::outbox::{self, OpenBatch, OutboxError, OutboxRepository, Settlement};
use crate::streams::Streams;

/// How often a relay that stands by looks whether the lease is free, at least.
const STANDBY_LOOK: Duration = Duration::from_millis(500);

/// Why a session ended before it was told to.
#[derive(Debug, Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error("another relay has taken the lease over, or the batch journal was changed by hand")]
    LeaseLost,
}

/// What every session of one relay shares.
pub(super) struct Relay {
    pub relay_id: Uuid,
    pub settings: Arc<Settings>,
    pub url: String,
    pub outbox: OutboxRepository,
    pub streams: Streams,
    pub reporter: Reporter,
    pub wake: Arc<Notify>,
    pub stop: tokio::sync::watch::Receiver<bool>,
    /// The outbox tables were there once: if they are missing later, that is an outage and not a mistake.
    pub has_tables: AtomicBool,
}

impl Relay {
    /// Runs one session. `Ok` means that it was told to stop, and has settled what it could.
    pub async fn session(&self) -> Result<(), SessionError> {
        self.reporter.connecting();
        let connect = async {
            let mut lease = self.connect("commitstream relay: lease").await?;
            bounded("looking for the outbox tables", self.timeout(), self.outbox.check_migrated(&mut lease)).await?;
            Ok::<_, OutboxError>(lease)
        };
        let mut lease = tokio::select! {
            connected = connect => connected?,
            () = self.stopped() => return Ok(()),
        };
        self.has_tables.store(true, Ordering::Relaxed);
        let Some(epoch) = self.wait_for_lease(&mut lease).await? else { return Ok(()) };
        let ended = self.own(&mut lease, epoch).await;
        if ended.is_ok() {
            bounded("releasing the lease", self.timeout(), self.outbox.release_leases(&mut lease, self.relay_id)).await?;
        }
        ended
    }

    /// Waits until the lease is this relay's, and returns its epoch; `None` when it was told to stop instead.
    async fn wait_for_lease(&self, lease: &mut PgConnection) -> Result<Option<i64>, SessionError> {
        let life = self.settings.outbox.processor.lease_duration;
        loop {
            let taken = bounded("taking the lease", self.timeout(), self.outbox.take_leases(lease, self.relay_id, life)).await?;
            if taken.is_some() {
                return Ok(taken);
            }
            self.reporter.state(RelayState::Standby);
            tokio::select! {
                () = self.stopped() => return Ok(None),
                () = tokio::time::sleep(STANDBY_LOOK.min(life / 4)) => {}
            }
        }
    }

    /// The part of the session in which the lease is held: its renewal, the listener and the clean-up run beside the engine.
    async fn own(&self, lease: &mut PgConnection, epoch: i64) -> Result<(), SessionError> {
        self.reporter.state(RelayState::Recovering);
        let renew = self.renew(lease);
        let work = async {
            let mut claims = self.connect("commitstream relay: claims").await?;
            let settles = self.connect("commitstream relay: settles").await?;
            let mut sleep = self.connect("commitstream relay: sleep lock").await?;
            let listener = self.listener(&mut sleep).await?;
            if !self.recover(&mut claims).await? {
                return Ok(());
            }
            self.reporter.state(RelayState::Active);
            let mut engine = Engine::new(Parts {
                outbox: self.outbox.clone(),
                streams: self.streams.clone(),
                settings: self.settings.clone(),
                reporter: self.reporter.clone(),
                relay_id: self.relay_id,
                epoch,
                claims,
                settles,
                sleep: SleepLock::new(self.outbox.clone(), sleep),
            });
            tokio::select! {
                ended = engine.run(&self.wake, self.stopped()) => ended,
                error = sleep::listen(listener, &self.wake) => Err(error.into()),
                () = cleanup::run(&self.outbox, &self.settings, &self.url) => Ok(()),
            }
        };
        let deadline = async {
            self.stopped().await;
            tokio::time::sleep(self.settings.outbox.processor.shutdown_timeout).await;
        };
        tokio::select! {
            ended = work => ended,
            lost = renew => Err(lost),
            () = deadline => {
                tracing::warn!("stopped before everything in flight was settled: the next relay resolves the open batches");
                Ok(())
            }
        }
    }

    /// Renews the lease for as long as it can.
    async fn renew(&self, lease: &mut PgConnection) -> SessionError {
        let life = self.settings.outbox.processor.lease_duration;
        loop {
            tokio::time::sleep(life / 3).await;
            match bounded("renewing the lease", life, self.outbox.renew_leases(lease, self.relay_id, life)).await {
                Ok(true) => {}
                Ok(false) => return SessionError::LeaseLost,
                Err(error) => return error.into(),
            }
        }
    }

    /// Recovery: every batch that is not settled was left open by an earlier owner, or by an earlier session of this relay
    /// whose commit or append went unanswered. Its marker says what became of it; where there is none it is aborted, and can no
    /// longer be appended by anybody. False when told to stop instead.
    async fn recover(&self, connection: &mut PgConnection) -> Result<bool, SessionError> {
        let open = bounded("reading open batches", self.timeout(), self.outbox.open_batches(connection)).await?;
        if !open.is_empty() {
            tracing::info!(batches = open.len(), "resolving open batches");
        }
        for batch in open {
            tokio::select! {
                () = self.stopped() => return Ok(false),
                recovered = self.recover_batch(connection, &batch) => recovered?,
            }
        }
        Ok(true)
    }

    async fn recover_batch(&self, connection: &mut PgConnection, batch: &OpenBatch) -> Result<(), SessionError> {
        let life = self.settings.outbox.processor.marker_life;
        let mut backoff = Backoff::default();
        let marker = loop {
            match self.streams.resolve(&batch.stream, batch.batch_id, life).await {
                Ok(marker) => break marker,
                Err(error) => {
                    self.reporter.unable(&error);
                    tokio::time::sleep(backoff.next()).await;
                }
            }
        };
        let events = usize::try_from(batch.events).unwrap_or(0);
        let appended = i32::try_from(marker.count(events)).unwrap_or(i32::MAX);
        let settlement = Settlement { batch_id: batch.batch_id, appended, refusals: Vec::new() };
        tracing::info!(batch = %batch.batch_id, stream = batch.stream, events, appended, "open batch resolved");
        bounded("settling a recovered batch", self.timeout(), self.outbox.settle(connection, &[settlement])).await?;
        self.reporter.count(u64::try_from(appended).unwrap_or(0), 0, 0);
        Ok(())
    }

    async fn listener(&self, connection: &mut PgConnection) -> Result<PgListener, OutboxError> {
        let doing = "listening for new events";
        let channel = bounded(doing, self.timeout(), self.outbox.wake_channel(connection)).await?;
        let listen = async {
            let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(self.timeout()).connect(&self.url).await?;
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(&channel).await?;
            Ok(listener)
        };
        let typed = async { listen.await.map_err(|source: sqlx::Error| OutboxError::Unreachable { doing, source }) };
        bounded(doing, self.timeout(), typed).await
    }

    async fn connect(&self, name: &str) -> Result<PgConnection, OutboxError> {
        outbox::connect(&self.url, name, self.timeout()).await
    }

    /// Waits until the relay is told to stop, or its handle is gone.
    pub async fn stopped(&self) {
        let mut stop = self.stop.clone();
        // An error means that the handle was dropped, which stops the relay too.
        drop(stop.wait_for(|stop| *stop).await);
    }

    fn timeout(&self) -> Duration {
        self.settings.database.timeout
    }
}

/// Gives up on a server that does not answer: a half-open connection would otherwise hold the relay for ever.
pub(super) async fn bounded<T>(
    doing: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<T, OutboxError>>,
) -> Result<T, OutboxError> {
    tokio::time::timeout(limit, call).await.map_err(|_| OutboxError::Timeout { doing, limit })?
}
