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

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::PgConnection;
use sqlx::postgres::PgListener;
use tokio::sync::Notify;

use crate::outbox::{OutboxError, OutboxRepository, RELAYS_CHANGED, TABLE_REPLACED};

/// Gives the connection back, and says whether the lock is held.
type Step = BoxFuture<'static, Result<(PgConnection, bool), OutboxError>>;

pub(super) struct SleepLock {
    outbox: OutboxRepository,
    state: State,
}

enum State {
    Awake(PgConnection),
    Asking(Step),
    Asleep(PgConnection),
    Releasing(Step),
    /// The session failed; the relay's session ends with it.
    Lost,
}

impl SleepLock {
    pub fn new(outbox: OutboxRepository, connection: PgConnection) -> Self {
        Self { outbox, state: State::Awake(connection) }
    }

    /// Asks for the lock unless that is done already.
    pub fn ask(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Awake(mut connection) => {
                let outbox = self.outbox.clone();
                let asked = async move {
                    let granted = outbox.lock_sleep(&mut connection).await?;
                    if granted {
                        outbox.notify(&mut connection).await?;
                    }
                    Ok((connection, granted))
                };
                State::Asking(asked.boxed())
            }
            other => other,
        };
    }

    /// Gives the lock back if it is held. One that is still asked for is given back once it is granted and this is called again.
    pub fn release(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Asleep(mut connection) => {
                let outbox = self.outbox.clone();
                State::Releasing(async move { outbox.unlock_sleep(&mut connection).await.map(|()| (connection, false)) }.boxed())
            }
            other => other,
        };
    }

    pub fn is_held(&self) -> bool {
        matches!(self.state, State::Asleep(_))
    }

    /// Waits for the step under way, if any; then it is time to look once more. When the lock was granted, nobody is missed after
    /// that. When it was given back, or not granted in time, events may have been committed meanwhile without a notification, and what was asked
    /// for in between was not heard. May be dropped at any await.
    pub async fn progress(&mut self) -> Result<(), OutboxError> {
        let done = match &mut self.state {
            State::Asking(step) | State::Releasing(step) => step.await,
            State::Awake(_) | State::Asleep(_) | State::Lost => std::future::pending().await,
        };
        self.state = State::Lost;
        let (connection, granted) = done?;
        self.state = if granted { State::Asleep(connection) } else { State::Awake(connection) };
        Ok(())
    }
}

/// Passes notifications on for as long as the session lives: to the engine, and what concerns the list of relays to the membership. A
/// reconnect may have missed some, so it wakes both.
pub(super) async fn listen(mut listener: PgListener, wake: &Notify, news: &Notify) -> OutboxError {
    loop {
        match listener.try_recv().await {
            Ok(Some(notification)) if notification.payload() == RELAYS_CHANGED => news.notify_one(),
            Ok(Some(notification)) if notification.payload() == TABLE_REPLACED => return OutboxError::Replaced,
            Ok(Some(_)) => wake.notify_one(),
            Ok(None) => {
                wake.notify_one();
                news.notify_one();
            }
            Err(source) => return OutboxError::Unreachable { doing: "listening for new events", source },
        }
    }
}
