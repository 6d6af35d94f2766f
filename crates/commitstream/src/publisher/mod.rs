//! What an application publishes with.
//!
//! | publisher | way |
//! |---|---|
//! | [`HybridEventPublisher`] | by lane, strategy and overrides |
//! | [`PostgresOutboxPublisher`] | always the outbox, in the caller's transaction |
//! | [`RedisStreamsPublisher`] | always straight to streams |
//!
//! All three are a [`DomainEventPublisher`], so a service can be given any of them.

mod breaker;
mod error;
mod hybrid;
mod outbox;
mod routing;
mod streams;
mod unit_of_work;

pub use error::PublishError;
pub use hybrid::HybridEventPublisher;
pub use outbox::PostgresOutboxPublisher;
pub use routing::route;
pub use streams::RedisStreamsPublisher;
pub use unit_of_work::{CommitError, UnitOfWork};

use futures_util::future::{BoxFuture, FutureExt};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::event::{DomainEvent, EventEnvelope, EventError};

/// The interface an application service is given.
///
/// The connection is in the signature so that the transaction cannot be forgotten: pass `&mut transaction`. What goes through the
/// outbox is inserted there, and commits or rolls back with the business data; what goes straight to streams does not use it.
pub trait DomainEventPublisher: Send + Sync {
    /// Publishes events, in order within each lane, with one statement or pipeline a lane; returns their ids. An
    /// [`EventEnvelope`](crate::EventEnvelope) is an event too, so headers travel this way.
    ///
    /// # Errors
    /// See [`PublishError`]. All events are checked before anything is sent: if one is not valid, none is published.
    fn publish_all<'a>(
        &'a self,
        connection: &'a mut PgConnection,
        events: &'a [&'a dyn DomainEvent],
    ) -> BoxFuture<'a, Result<Vec<Uuid>, PublishError>>;

    /// Publishes one event; returns its id.
    ///
    /// # Errors
    /// See [`PublishError`].
    fn publish<'a>(
        &'a self,
        connection: &'a mut PgConnection,
        event: &'a dyn DomainEvent,
    ) -> BoxFuture<'a, Result<Uuid, PublishError>> {
        async move {
            let events = [event];
            let ids = self.publish_all(connection, &events).await?;
            Ok(ids.into_iter().next().unwrap_or_default())
        }
        .boxed()
    }
}

/// The wire form of each event, checked.
fn envelopes_of(events: &[&dyn DomainEvent], max_payload_bytes: usize) -> Result<Vec<EventEnvelope>, EventError> {
    let envelopes = events.iter().map(|event| event.envelope()).collect::<Result<Vec<_>, _>>()?;
    #[cfg(feature = "otel")]
    let envelopes = crate::trace::mark(envelopes);
    envelopes.iter().try_for_each(|envelope| envelope.validate(max_payload_bytes))?;
    Ok(envelopes)
}

fn ids_of(envelopes: &[EventEnvelope]) -> Vec<Uuid> {
    envelopes.iter().map(|e| e.id).collect()
}
