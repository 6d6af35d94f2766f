//! A handler's PostgreSQL transaction, with the row of the inbox that makes its effect happen once.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::PgPool;
use thiserror::Error;

use super::handler::{AnyHandler, decode};
use super::{Delivery, HandlerError, TransactionalHandler};
use crate::event::DecodeEvent;
use crate::outbox::{self, OutboxError, OutboxRepository};

/// Rows removed in one statement, and how often old ones are looked for.
const ROWS: u32 = 1_000;
const INTERVAL: Duration = Duration::from_secs(60 * 60);

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
            let mut connection = self.pool.acquire().await.map_err(self.outbox.error(doing))?;
            self.outbox.find_inbox(&mut connection).await
        };
        let timed_out = OutboxError::Timeout { doing, limit: self.timeout };
        tokio::time::timeout(self.timeout, look).await.unwrap_or(Err(timed_out))
    }

    async fn forget_old(&self) -> Result<u64, OutboxError> {
        let mut connection = self.pool.acquire().await.map_err(self.outbox.error("cleaning up the inbox"))?;
        let mut rows = 0;
        loop {
            let removed = self.outbox.forget(&mut connection, self.retention, ROWS).await?;
            rows += removed;
            if removed < u64::from(ROWS) {
                return Ok(rows);
            }
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
        let Inbox { pool, outbox, .. } = &self.inbox;
        // Nothing here is the event's fault.
        let begin = async {
            let mut transaction = pool.begin().await.map_err(outbox.error(BEGINNING)).map_err(NoInbox)?;
            let is_new = outbox.remember(&mut transaction, delivery.group(), delivery.event_id()).await.map_err(NoInbox)?;
            Ok::<_, HandlerError>((transaction, is_new))
        };
        let (mut transaction, is_new) = self.bounded(BEGINNING, begin).await?;
        if !is_new {
            tracing::debug!(event = %delivery.event_id(), group = delivery.group(), "handled before");
            return Ok(());
        }
        self.handler.handle(event, delivery, &mut transaction).await?;
        // An unknown outcome is an outage: the next delivery finds the row or does not.
        self.bounded("committing a handler's transaction", async {
            outbox::commit_unless_aborted(transaction).await.map_err(aborted)
        })
        .await
    }

    async fn bounded<T>(
        &self,
        doing: &'static str,
        work: impl Future<Output = Result<T, HandlerError>>,
    ) -> Result<T, HandlerError> {
        let limit = self.inbox.timeout;
        let timed_out = || NoInbox(OutboxError::Timeout { doing, limit });
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out().into()))
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
