//! The sleep lock: how an idle relay is woken at once, and a busy one costs producers no `NOTIFY`.
//!
//! ```text
//!            nothing found               granted: look once more, then sleep
//!   Awake ────────────────► Asking ────────────────────────────────────────► Asleep
//!     ▲                        │ busy again                                     │ busy for a while
//!     └──────────────── Releasing ◄─────────────────────────────────────────────┘
//! ```
//!
//! From *Asking* on, every producer's commit notifies. When the lock is granted, no producer that did not notify is between
//! insert and commit; so one look after that misses nobody.
//!
//! With several relays one holds the lock and the others wait for it, asleep as well: as long as one holds it, producers notify.
//! They wait some seconds at a time and look in between, since a statement that waits holds back vacuum. Whoever is granted it tells the others, because a look at that moment is what they need, too.
//!
//! A session that died in silence keeps the lock until PostgreSQL notices. That makes no relay deaf: as long as anybody holds the lock,
//! producers notify.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::postgres::PgListener;
use sqlx::{Acquire, PgConnection};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::probe::{LONGEST_ANSWER, PROBE_EVERY, next_probe, probe};
use super::session::bounded;
use crate::outbox::{OutboxError, OutboxRepository, RELAYS_CHANGED, TABLE_REPLACED};

/// One request for the lock. A statement that waits keeps its snapshot, and that holds back vacuum; and a session that waits cannot be
/// asked whether it is alive.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Gives the connection back, and says whether the lock is held.
type Step = BoxFuture<'static, Result<(PgConnection, bool), OutboxError>>;

pub(super) struct SleepLock {
    outbox: OutboxRepository,
    state: State,
    next_probe: Instant,
}

enum State {
    Awake(PgConnection),
    Asking(Step),
    Asleep(PgConnection),
    Releasing(Step),
    /// Awake or asleep, as `held` says, while the session is asked whether it is alive.
    Probing {
        step: Step,
        held: bool,
    },
    /// The session failed; the relay's session ends with it.
    Lost,
}

impl SleepLock {
    pub fn new(outbox: OutboxRepository, connection: PgConnection) -> Self {
        Self { outbox, state: State::Awake(connection), next_probe: next_probe() }
    }

    /// Asks for the lock unless that is done already.
    pub fn ask(&mut self) {
        let outbox = self.outbox.clone();
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Awake(connection) => State::Asking(ask(outbox, connection).boxed()),
            State::Probing { step, held: false } => State::Asking(async move { ask(outbox, step.await?.0).await }.boxed()),
            other => other,
        };
    }

    /// Gives the lock back if it is held. One that is still asked for is given back once it is granted and this is called again.
    pub fn release(&mut self) {
        let outbox = self.outbox.clone();
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Asleep(connection) => State::Releasing(release(outbox, connection).boxed()),
            State::Probing { step, held: true } => State::Releasing(async move { release(outbox, step.await?.0).await }.boxed()),
            other => other,
        };
    }

    pub fn is_held(&self) -> bool {
        matches!(self.state, State::Asleep(_) | State::Probing { held: true, .. })
    }

    /// Asks the session now whether it is alive, unless a step is under way.
    pub async fn probe(&mut self) -> Result<(), OutboxError> {
        match &mut self.state {
            State::Awake(connection) | State::Asleep(connection) => probe(connection).await,
            _ => Ok(()),
        }
    }

    /// Waits for the step under way, if any; then it is time to look once more. When the lock was granted, nobody is missed after
    /// that. When it was given back, or not granted in time, events may have been committed meanwhile without a notification, and what was asked
    /// for in between was not heard. Meanwhile an idle session is asked whether it is alive. May be dropped at any await.
    pub async fn progress(&mut self) -> Result<(), OutboxError> {
        loop {
            let (done, is_probe) = match &mut self.state {
                State::Asking(step) | State::Releasing(step) => (step.await, false),
                State::Probing { step, .. } => (step.await, true),
                State::Awake(_) | State::Asleep(_) => {
                    tokio::time::sleep_until(self.next_probe).await;
                    self.start_probe();
                    continue;
                }
                State::Lost => std::future::pending().await,
            };
            self.state = State::Lost;
            let (connection, granted) = done?;
            self.state = if granted { State::Asleep(connection) } else { State::Awake(connection) };
            self.next_probe = next_probe();
            if !is_probe {
                return Ok(());
            }
        }
    }

    fn start_probe(&mut self) {
        let (mut connection, held) = match std::mem::replace(&mut self.state, State::Lost) {
            State::Awake(connection) => (connection, false),
            State::Asleep(connection) => (connection, true),
            other => {
                self.state = other;
                return;
            }
        };
        let step = async move { probe(&mut connection).await.map(|()| (connection, held)) };
        self.state = State::Probing { step: step.boxed(), held };
    }
}

async fn ask(outbox: OutboxRepository, mut connection: PgConnection) -> Result<(PgConnection, bool), OutboxError> {
    let doing = "waiting for the wake-up lock";
    let lock = outbox.lock_sleep(&mut connection, LONGEST_WAIT);
    let granted = bounded(doing, LONGEST_WAIT + LONGEST_ANSWER, lock).await?;
    if granted {
        bounded(doing, LONGEST_ANSWER, outbox.notify(&mut connection)).await?;
    }
    Ok((connection, granted))
}

async fn release(outbox: OutboxRepository, mut connection: PgConnection) -> Result<(PgConnection, bool), OutboxError> {
    bounded("releasing the wake-up lock", LONGEST_ANSWER, outbox.unlock_sleep(&mut connection)).await?;
    Ok((connection, false))
}

/// Passes notifications on for as long as the session lives: to the engine, and what concerns the list of relays to the membership. A
/// session that is lost, or does not answer when it is asked, ends it: notifications may have been missed.
pub(super) async fn listen(mut listener: PgListener, wake: &Notify, news: &Notify) -> OutboxError {
    let doing = "listening for new events";
    listener.eager_reconnect(false);
    loop {
        // To receive may be given up at any time without losing a notification.
        let received = match tokio::time::timeout(PROBE_EVERY, listener.try_recv()).await {
            Ok(received) => received,
            Err(_) => {
                let asked = match listener.acquire().await {
                    Ok(connection) => probe(connection).await,
                    Err(source) => Err(OutboxError::Unreachable { doing, source }),
                };
                match asked {
                    Ok(()) => continue,
                    Err(error) => return error,
                }
            }
        };
        match received {
            Ok(Some(notification)) if notification.payload() == RELAYS_CHANGED => news.notify_one(),
            Ok(Some(notification)) if notification.payload() == TABLE_REPLACED => return OutboxError::Replaced,
            Ok(Some(_)) => wake.notify_one(),
            Ok(None) => {
                return OutboxError::Unreachable {
                    doing,
                    source: std::io::Error::from(std::io::ErrorKind::ConnectionReset).into(),
                };
            }
            Err(source) => return OutboxError::Unreachable { doing, source },
        }
    }
}
