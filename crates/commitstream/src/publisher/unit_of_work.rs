use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use thiserror::Error;
use uuid::Uuid;

use super::{HybridEventPublisher, PublishError};
use crate::event::{DomainEvent, EventEnvelope};
use crate::outbox;

/// A transaction together with the events that belong to it. Dropped without [`commit`](Self::commit), it rolls back and
/// publishes nothing, on either lane.
///
/// ```no_run
/// # use commitstream::{DomainEvent, publisher::{HybridEventPublisher, CommitError}};
/// # async fn register(publisher: &HybridEventPublisher, pool: &sqlx::PgPool, event: &dyn DomainEvent)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// let mut work = publisher.begin(pool).await?;
/// sqlx::query("INSERT INTO users (email) VALUES ('ada@example.org')").execute(work.connection()).await?;
/// work.publish(event).await?;
/// work.commit().await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct UnitOfWork<'a> {
    publisher: &'a HybridEventPublisher,
    transaction: Transaction<'static, Postgres>,
    pool: PgPool,
    /// Statements of the application have run that may have failed. What the outbox accepted after them shows that none did.
    unchecked: bool,
    /// High-frequency events, to be sent after the commit.
    held: Vec<EventEnvelope>,
}

/// Why a unit of work did not end as it should.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The commit failed. If the connection was lost, it may have been carried out all the same; held events were not sent.
    #[error("the transaction could not be committed")]
    Commit(#[source] sqlx::Error),
    /// The data and its critical events are committed; these high-frequency events are not known to be in their streams.
    #[error("the transaction is committed, but {} high-frequency events were not sent", events.len())]
    NotSent {
        events: Vec<EventEnvelope>,
        #[source]
        source: PublishError,
    },
}

impl<'a> UnitOfWork<'a> {
    pub(super) fn new(publisher: &'a HybridEventPublisher, transaction: Transaction<'static, Postgres>, pool: PgPool) -> Self {
        Self { publisher, transaction, pool, unchecked: false, held: Vec::new() }
    }

    /// The transaction, for business data.
    pub fn connection(&mut self) -> &mut PgConnection {
        self.unchecked = true;
        &mut self.transaction
    }

    /// Publishes one event with this unit of work; returns its id.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub async fn publish(&mut self, event: &dyn DomainEvent) -> Result<Uuid, PublishError> {
        Ok(self.publish_all(&[event]).await?.into_iter().next().unwrap_or_default())
    }

    /// Publishes many: critical ones go into the outbox now, the others are held back until the commit.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub async fn publish_all(&mut self, events: &[&dyn DomainEvent]) -> Result<Vec<Uuid>, PublishError> {
        let sorted = self.publisher.sort(events)?;
        if !sorted.outbox.is_empty() {
            self.unchecked = true;
            self.publisher.outbox.insert(&mut self.transaction, &sorted.outbox).await?;
            self.unchecked = false;
        }
        self.held.extend(sorted.streams);
        Ok(sorted.ids)
    }

    /// Commits, wakes a relay of this process, and sends what was held back.
    ///
    /// # Errors
    /// [`CommitError`] tells a failed commit from events that could not be sent after it.
    pub async fn commit(self) -> Result<(), CommitError> {
        let Self { publisher, transaction, pool, unchecked, held } = self;
        let committed = if unchecked { outbox::commit_unless_aborted(transaction).await } else { transaction.commit().await };
        committed.map_err(CommitError::Commit)?;
        if let Some(waker) = &publisher.waker {
            waker.wake();
        }
        if held.is_empty() {
            return Ok(());
        }
        let streams = match publisher.streams() {
            Ok(streams) => streams,
            Err(source) => return Err(CommitError::NotSent { events: held, source }),
        };
        match streams.send(&held).await {
            Ok(()) => Ok(()),
            Err(outage) if publisher.falls_back(&outage) => {
                let events = outage.unconfirmed;
                let inserted = publisher.outbox.insert_alone(&pool, &events).await;
                inserted.map_err(|source| CommitError::NotSent { events, source })
            }
            Err(failed) => Err(CommitError::NotSent { events: failed.unconfirmed, source: failed.error.into() }),
        }
    }

    /// Rolls back: nothing is published. The same happens when the unit of work is dropped.
    ///
    /// # Errors
    /// The connection was lost; the server then rolls back by itself.
    pub async fn rollback(self) -> Result<(), sqlx::Error> {
        self.transaction.rollback().await
    }
}
