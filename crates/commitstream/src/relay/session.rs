//! One session of a relay: connect, join the others, and work on the partitions that are its own until something fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use sqlx::PgConnection;
use sqlx::postgres::PgListener;
use thiserror::Error;
use tokio::sync::Notify;

use super::cleanup;
use super::engine::{Connections, Engine, Parts};
use super::losses;
use super::markers::{self, Markers};
use super::membership::Membership;
use super::probe::probe_all;
use super::repair::{Prepared, Repair, Scope};
use super::sleep::{self, SleepLock};
use super::status::{RelayState, Reporter};
use crate::backoff::Backoff;
use crate::config::Settings;
use crate::outbox::{self, Address, Continued, Lease, OutboxError, OutboxRepository, Partitions};
use crate::streams::{Streams, StreamsError};

/// The owner of this partition cleans up for all.
const CLEANS_UP: usize = 0;

/// What a stop may take beyond `shutdownTimeout`, to leave the list of relays.
const LAST_WORD: Duration = Duration::from_secs(1);

/// The first attempt to connect takes no longer, twice as long the next: the address of a host that has vanished may lead elsewhere by then.
const QUICK_CONNECT: Duration = Duration::from_secs(3);

/// Why a session ended before it was told to.
#[derive(Debug, Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error(transparent)]
    Streams(#[from] StreamsError),
    #[error("another relay has taken partitions over, or the batch journal was changed by hand")]
    LeaseLost,
    #[error("this relay cannot use Redis and another one can: its partitions are for the others")]
    SteppedDown,
}

/// What every session of one relay shares.
pub(super) struct Relay {
    pub settings: Arc<Settings>,
    pub url: String,
    pub outbox: OutboxRepository,
    pub streams: Streams,
    pub reporter: Reporter,
    pub wake: Arc<Notify>,
    pub stop: tokio::sync::watch::Receiver<bool>,
    /// The outbox tables were there once: if they are missing later, that is an outage and not a mistake.
    pub has_tables: AtomicBool,
    /// Its sessions were found to be its own.
    pub has_own_sessions: AtomicBool,
    /// Sessions that failed one after the other.
    pub failures: AtomicU32,
    /// When this relay next cleans up, if it is its turn.
    pub cleanup_due: tokio::sync::Mutex<tokio::time::Instant>,
}

impl Relay {
    /// Runs one session. `Ok` means that it was told to stop, and has settled what it could.
    pub async fn session(&self) -> Result<(), SessionError> {
        self.reporter.connecting();
        let news = Arc::new(Notify::new());
        let enter = async {
            let (mut connection, address) = self.enter().await?;
            bounded("looking for the outbox tables", self.timeout(), self.outbox.check_migrated(&mut connection)).await?;
            self.has_tables.store(true, Ordering::Relaxed);
            let owner = bounded("finding out which outbox this is", self.timeout(), self.outbox.owner(&mut connection)).await?;
            let (table, listener) = self.listener(&mut connection, &address).await?;
            Ok::<_, OutboxError>((connection, address, table, listener, self.streams.owned_by(owner)))
        };
        let (connection, address, table, listener, streams) = tokio::select! {
            entered = enter => entered?,
            () = self.stopped() => return Ok(()),
        };
        let (outbox, settings, markers) = (self.outbox.clone(), self.settings.clone(), Markers::default());
        let mut membership = Membership::new(outbox, settings, self.reporter.clone(), markers.clone(), connection, news.clone());
        membership.watch_table(table);
        let work_and_leave = async {
            self.take_part(&mut membership, &streams, &markers, &address).await?;
            membership.leave().await?;
            // Leaving has brought the last settles to disk.
            let life = self.settings.outbox.processor.settled_marker_life;
            markers::shorten(&markers.take_due(), &self.streams, life).await;
            Ok(())
        };
        tokio::select! {
            ended = work_and_leave => ended,
            error = sleep::listen(listener, &self.wake, &news) => Err(error.into()),
            () = self.deadline() => {
                tracing::warn!("stopped before everything in flight was settled: the next owners resolve the open batches");
                if !matches!(tokio::time::timeout(LAST_WORD, membership.leave()).await, Ok(Ok(()))) {
                    tracing::warn!("PostgreSQL did not answer: the others notice that this relay is gone by its sessions, or after leaseDuration");
                }
                Ok(())
            }
        }
    }

    /// Waiting would not help. Tables that were there before are away for a while.
    pub fn is_refused(&self, error: &OutboxError) -> bool {
        error.cannot_work() && !(error.is_not_migrated() && self.has_tables.load(Ordering::Relaxed))
    }

    /// The first session, whose server is that of the others. Nothing is set in it before it is known to be the relay's own.
    async fn enter(&self) -> Result<(PgConnection, Address), OutboxError> {
        let (name, limit) = ("commitstream relay: heartbeat", self.connect_limit());
        let (mut connection, address) = Address::parse(&self.url)?.reach(name, limit).await?;
        if !self.has_own_sessions.load(Ordering::Relaxed) {
            outbox::check_own(&mut connection, &address, name, limit).await?;
            self.has_own_sessions.store(true, Ordering::Relaxed);
        }
        outbox::set_up(&mut connection, limit).await?;
        Ok((connection, address))
    }

    async fn take_part(
        &self,
        membership: &mut Membership,
        streams: &Streams,
        markers: &Markers,
        address: &Address,
    ) -> Result<(), SessionError> {
        tokio::select! {
            ready = self.wait_for_redis(membership) => ready?,
            () = self.stopped() => return Ok(()),
        }
        membership.join().await?;
        let mut connections = None;
        while !self.is_stopped() {
            membership.rebalance().await?;
            let lease = membership.lease();
            if lease.partitions.is_empty() {
                self.reporter.state(if membership.is_paused() { RelayState::Paused } else { RelayState::Standby });
                tokio::select! {
                    () = membership.wait() => {}
                    () = self.stopped() => {}
                }
                continue;
            }
            let (change, is_paused) = (Notify::new(), membership.is_paused());
            let opened = match connections.take() {
                Some(connections) => connections,
                None => self.connections(address).await?,
            };
            tokio::select! {
                worked = self.work(lease, is_paused, opened, streams, markers, &change) => connections = worked?,
                error = membership.keep(&change) => return Err(error),
            }
        }
        Ok(())
    }

    /// A relay that cannot use Redis takes no partition: another one might.
    async fn wait_for_redis(&self, membership: &mut Membership) -> Result<(), SessionError> {
        let mut backoff = Backoff::default();
        while let Err(error) = self.streams.any_answers().await {
            crate::metrics::redis_failed(&error);
            self.reporter.unable(&error);
            membership.announce().await?;
            tokio::time::sleep(backoff.next()).await;
        }
        Ok(())
    }

    /// Resolves what earlier owners left, then runs the engine until it is told to stop or partitions come or go; then everything in
    /// flight is settled. While relays are paused, all of this but the claims goes on: what Redis loses meanwhile is noticed.
    /// Returns the connections for the next time, unless it was told to stop before it came to need them.
    async fn work(
        &self,
        lease: Lease,
        is_paused: bool,
        mut connections: Connections,
        streams: &Streams,
        markers: &Markers,
        change: &Notify,
    ) -> Result<Option<Connections>, SessionError> {
        self.reporter.state(RelayState::Recovering);
        // They may have waited for long while there was no partition.
        probe_all(&mut connections).await?;
        let repair = self.repair(streams);
        let prepared = tokio::select! {
            prepared = self.prepare(lease, &repair, &mut connections) => prepared?,
            () = self.stopped() => return Ok(None),
        };
        self.reporter.working(is_paused);
        let parts = Parts { is_paused, repair, lease, prepared, markers: markers.clone() };
        let until = async {
            tokio::select! {
                () = self.stopped() => {}
                () = change.notified() => {}
            }
        };
        let engine = Engine::new(parts, connections);
        if !lease.partitions.contains(CLEANS_UP) {
            return engine.run(&self.wake, until).await.map(Some);
        }
        tokio::select! {
            ended = engine.run(&self.wake, until) => ended.map(Some),
            never = cleanup::run(&self.outbox, streams, &self.settings, &self.url, &self.cleanup_due) => match never {},
            never = losses::run(&self.outbox, streams, &self.settings, &self.url) => match never {},
        }
    }

    /// Recovers and looks up, and keeps an eye on the sleep lock: if it is granted now, that is news for the others. What was settled
    /// lately of partitions that the relay had before, its chains know.
    async fn prepare(&self, lease: Lease, repair: &Repair, connections: &mut Connections) -> Result<Prepared, SessionError> {
        let Connections { claims, sleep, known, .. } = connections;
        let unknown = lease.partitions.without(known.as_ref().map_or_else(Partitions::default, |known| known.partitions));
        let scope = Scope { partitions: lease.partitions, unknown, streams: None };
        let mut prepare = std::pin::pin!(async {
            self.continue_sequences(claims).await?;
            repair.prepare(claims, &scope).await
        });
        loop {
            tokio::select! {
                prepared = &mut prepare => return prepared,
                done = sleep.progress() => done?,
            }
        }
    }

    /// Nothing is claimed while newer events would get lower numbers than older ones.
    async fn continue_sequences(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        let set = self.outbox.continue_sequences(connection);
        for Continued { column, was, highest, now, unsent_below } in bounded("comparing sequences", self.timeout(), set).await? {
            tracing::warn!(
                column,
                was,
                highest,
                now,
                unsent_below,
                "a sequence had begun anew and was set above what its table holds: events that were written meanwhile have numbers \
                 below `was`, and may be published before older ones of their aggregates"
            );
        }
        Ok(())
    }

    async fn connections(&self, address: &Address) -> Result<Connections, OutboxError> {
        let limit = self.connect_limit();
        let claims = outbox::connect_to(address, "commitstream relay: claims", limit);
        let settles = async {
            let mut settles = outbox::connect_to(address, "commitstream relay: settles", limit).await?;
            // A settle that a crash undoes leaves its batch open, and the marker says what became of it.
            bounded("connecting", limit, self.outbox.commit_without_waiting(&mut settles)).await?;
            Ok(settles)
        };
        let waiting = address.clone().that_waits();
        let sleep = outbox::connect_to(&waiting, "commitstream relay: sleep lock", limit);
        let (claims, settles, sleep) = tokio::try_join!(claims, settles, sleep)?;
        Ok(Connections { claims, settles, sleep: SleepLock::new(self.outbox.clone(), sleep), known: None })
    }

    /// Also the number of the table whose inserts are heard of.
    async fn listener(&self, connection: &mut PgConnection, address: &Address) -> Result<(i64, PgListener), OutboxError> {
        let doing = "listening for new events";
        let table = bounded(doing, self.timeout(), self.outbox.table_oid(connection)).await?;
        Ok((table, outbox::listen_at(address, &outbox::channel_of(table), self.connect_limit()).await?))
    }

    /// Grows while nothing can be reached, up to the time-out of the settings.
    fn connect_limit(&self) -> Duration {
        let doubled = 2_u32.saturating_pow(self.failures.load(Ordering::Relaxed).min(16));
        QUICK_CONNECT.saturating_mul(doubled).min(self.timeout())
    }

    /// Waits until the relay is told to stop, or its handle is gone.
    pub async fn stopped(&self) {
        let mut stop = self.stop.clone();
        // An error means that the handle was dropped, which stops the relay too.
        drop(stop.wait_for(|stop| *stop).await);
    }

    fn is_stopped(&self) -> bool {
        *self.stop.borrow() || self.stop.has_changed().is_err()
    }

    /// Waits until a stop has taken too long.
    async fn deadline(&self) {
        self.stopped().await;
        tokio::time::sleep(self.settings.outbox.processor.shutdown_timeout).await;
    }

    pub fn timeout(&self) -> Duration {
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
