//! A handler's PostgreSQL transaction, with the row of the inbox that makes its effect happen once.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgConnection, PgPool, Postgres, Transaction};
use thiserror::Error;
use tokio::time::timeout;

use super::handler::{AnyHandler, decode};
use super::{Delivery, HandlerError, TransactionalHandler};
use crate::event::DecodeEvent;
use crate::outbox::{self, OutboxError, OutboxRepository};

/// Rows removed in one statement, and how often old ones are looked for.
const ROWS: u32 = 1_000;
const INTERVAL: Duration = Duration::from_secs(60 * 60);

/// What needs nothing but the connection is answered within this, or the connection is dead.
const LONGEST_ANSWER: Duration = Duration::from_secs(2);
/// A connection that takes longer to test is reason to test all.
const SUSPICIOUS: Duration = Duration::from_secs(1);

/// The inbox of one consumer group.
#[derive(Debug, Clone)]
pub(super) struct Inbox {
    pub pool: PgPool,
    pub outbox: OutboxRepository,
    pub retention: Duration,
    /// Of beginning and of ending a transaction.
    pub timeout: Duration,
}

impl Inbox {
    /// Removes old rows now and then every hour. A failure is logged: it must not stop the consumer.
    pub async fn clean_up(self) -> Infallible {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            match self.forget_old().await {
                Ok(0) => tracing::debug!("nothing in the inbox is old enough to be removed"),
                Ok(rows) => tracing::info!(rows, "old rows of the inbox removed"),
                Err(error) => tracing::warn!(%error, "the inbox could not be cleaned up; tried again in an hour"),
            }
        }
    }

    async fn find(&self) -> Result<(), OutboxError> {
        let doing = "looking for the inbox";
        let look = async {
            let mut lent = self.lend().await.map_err(self.outbox.error(doing))?;
            self.outbox.find_inbox(lent.connection().map_err(self.outbox.error(doing))?).await?;
            lent.give_back();
            Ok::<_, OutboxError>(())
        };
        let timed_out = OutboxError::Timeout { doing, limit: self.timeout };
        timeout(self.timeout, look).await.unwrap_or(Err(timed_out))
    }

    async fn forget_old(&self) -> Result<u64, OutboxError> {
        let doing = "cleaning up the inbox";
        let late = |_| OutboxError::Timeout { doing, limit: self.timeout };
        let mut lent = timeout(self.timeout, self.lend()).await.map_err(late)?.map_err(self.outbox.error(doing))?;
        let mut rows = 0;
        loop {
            let connection = lent.connection().map_err(self.outbox.error(doing))?;
            let forget = self.outbox.forget(connection, self.retention, ROWS);
            let removed = timeout(self.timeout, forget).await.map_err(late)??;
            rows += removed;
            if removed < u64::from(ROWS) {
                lent.give_back();
                return Ok(rows);
            }
        }
    }

    /// A connection of the pool. The pool tests what is idle without a limit of its own: each connection that died in silence would take
    /// the whole of its `acquire_timeout`. So the first that does not answer in time is reason to test all that are idle, at once.
    async fn lend(&self) -> Result<Lent, sqlx::Error> {
        if self.pool.num_idle() > 0 {
            if let Ok(lent) = timeout(SUSPICIOUS, self.tested()).await {
                return lent;
            }
            self.weed().await;
        }
        self.tested().await
    }

    /// Pools may be told not to test what they give out.
    async fn tested(&self) -> Result<Lent, sqlx::Error> {
        let mut lent = Lent(Some(self.pool.acquire().await?));
        if !self.pool.options().get_test_before_acquire() {
            lent.connection()?.ping().await?;
        }
        Ok(lent)
    }

    /// Closes idle connections that do not answer.
    async fn weed(&self) {
        let idle = std::iter::from_fn(|| self.pool.try_acquire()).take(self.pool.num_idle());
        let tested = idle.map(|connection| async {
            let mut lent = Lent(Some(connection));
            let Ok(connection) = lent.connection() else { return };
            if matches!(timeout(LONGEST_ANSWER, connection.ping()).await, Ok(Ok(()))) {
                lent.give_back();
            }
        });
        join_all(tested.collect::<Vec<_>>()).await;
    }
}

/// A connection of the pool that goes back only if it has answered last, and is closed otherwise: the pool tests what comes back, without a
/// limit of time, and a connection that died in silence would keep its place in the pool for ever.
struct Lent(Option<PoolConnection<Postgres>>);

impl Lent {
    fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.0.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }

    fn give_back(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

pub(super) struct Transactional<E, H> {
    pub handler: H,
    pub inbox: Inbox,
    pub event: PhantomData<fn(E)>,
}

impl<E: DecodeEvent, H: TransactionalHandler<E>> Transactional<E, H> {
    async fn handle_once(&self, delivery: &Delivery) -> Result<(), HandlerError> {
        let event = decode(delivery)?;
        // Nothing here is the event's fault.
        let mut lent = self.bounded(BEGINNING, self.inbox.lend()).await?;
        let connection = lent.connection().map_err(|error| self.failed(error))?;
        let (result, is_alive) = self.in_transaction(connection, event, delivery).await;
        if is_alive {
            lent.give_back();
        }
        result
    }

    /// Also whether the connection has answered last.
    async fn in_transaction(
        &self,
        connection: &mut PgConnection,
        event: E,
        delivery: &Delivery,
    ) -> (Result<(), HandlerError>, bool) {
        let (mut transaction, is_new) = match self.begin(connection, delivery).await {
            Ok(begun) => begun,
            Err(error) => return (Err(error.into()), false),
        };
        let handled = if is_new {
            self.handler.handle(event, delivery, &mut transaction).await
        } else {
            tracing::debug!(event = %delivery.event_id(), group = delivery.group(), "handled before");
            Ok(())
        };
        if handled.is_err() || !is_new {
            let ended = timeout(LONGEST_ANSWER, transaction.rollback()).await;
            return (handled, matches!(ended, Ok(Ok(()))));
        }
        // An unknown outcome is an outage: the next delivery finds the row or does not.
        let (doing, limit) = ("committing a handler's transaction", self.inbox.timeout);
        match timeout(limit, outbox::commit_unless_aborted(transaction)).await {
            Ok(Ok(())) => (Ok(()), true),
            Ok(Err(error)) => (Err(aborted(error)), false),
            Err(_) => (Err(NoInbox(OutboxError::Timeout { doing, limit }).into()), false),
        }
    }

    async fn begin<'c>(
        &self,
        connection: &'c mut PgConnection,
        delivery: &Delivery,
    ) -> Result<(Transaction<'c, Postgres>, bool), NoInbox> {
        let silent = |_| NoInbox(OutboxError::Silent { limit: LONGEST_ANSWER });
        let begun = timeout(LONGEST_ANSWER, connection.begin()).await.map_err(silent)?;
        let mut transaction = begun.map_err(|error| self.failed(error))?;
        let limit = self.inbox.timeout;
        let remember = self.inbox.outbox.remember(&mut transaction, delivery.group(), delivery.event_id());
        let late = |_| NoInbox(OutboxError::Timeout { doing: BEGINNING, limit });
        let is_new = timeout(limit, remember).await.map_err(late)?.map_err(NoInbox)?;
        Ok((transaction, is_new))
    }

    fn failed(&self, error: sqlx::Error) -> NoInbox {
        NoInbox(self.inbox.outbox.error(BEGINNING)(error))
    }

    async fn bounded<T>(&self, doing: &'static str, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, NoInbox> {
        let limit = self.inbox.timeout;
        let worked = timeout(limit, work).await.map_err(|_| NoInbox(OutboxError::Timeout { doing, limit }))?;
        worked.map_err(|error| self.failed(error))
    }
}

const BEGINNING: &str = "beginning a handler's transaction";

/// The inbox could not be asked, whatever the event.
#[derive(Debug, Error)]
#[error(transparent)]
pub(super) struct NoInbox(OutboxError);

/// Says what a handler did that makes PostgreSQL undo everything.
fn aborted(error: sqlx::Error) -> HandlerError {
    match error.as_database_error().and_then(|error| error.code()) {
        Some(code) if code == outbox::IN_FAILED_TRANSACTION => HandlerError::from(
            "the handler passed over the error of a statement, after which PostgreSQL commits nothing: return that error, \
             avoid it (ON CONFLICT DO NOTHING), or run the statement in a savepoint (transaction.begin())",
        ),
        _ => error.into(),
    }
}

impl<E: DecodeEvent, H: TransactionalHandler<E>> AnyHandler for Transactional<E, H> {
    fn name(&self) -> &'static str {
        std::any::type_name::<H>()
    }

    fn handle<'a>(&'a self, deliveries: &'a [Delivery]) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            for delivery in deliveries {
                self.handle_once(delivery).await?;
            }
            Ok(())
        }
        .boxed()
    }

    fn find_tables(&self) -> BoxFuture<'_, Result<(), OutboxError>> {
        self.inbox.find().boxed()
    }
}
