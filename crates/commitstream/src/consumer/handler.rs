//! What an application writes, and what the runtime calls.

use std::any::type_name;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::PgConnection;

use super::Delivery;
use crate::event::{DecodeEvent, EventEnvelope};
use crate::outbox::OutboxError;

/// Handles one event at a time; events of one aggregate in order and never two at once.
///
/// Delivery is at least once: after a crash, or when an acknowledgement is lost, an event comes again. An effect in PostgreSQL
/// happens once with a [`TransactionalHandler`]; for any other effect see [`Delivery::once`].
///
/// ```
/// use commitstream::consumer::{Delivery, Handler, HandlerError};
/// # #[derive(serde::Serialize, serde::Deserialize, commitstream::DomainEvent)]
/// # #[event(aggregate = "user")]
/// # struct UserCreated { #[event(key)] user_id: uuid::Uuid, email: String }
///
/// struct Greeter;
///
/// impl Handler<UserCreated> for Greeter {
///     async fn handle(&self, event: UserCreated, _delivery: &Delivery) -> Result<(), HandlerError> {
///         println!("welcome, {}", event.email);
///         Ok(())
///     }
/// }
/// ```
pub trait Handler<E>: Send + Sync + 'static {
    /// Returning `Ok` acknowledges the event. Any error type converts into a failure with `?`.
    fn handle(&self, event: E, delivery: &Delivery) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// Handles one event inside a PostgreSQL transaction that also holds its row of the inbox: what is written with `transaction`
/// happens once, however often the event is delivered.
pub trait TransactionalHandler<E>: Send + Sync + 'static {
    /// The runtime commits after `Ok` and rolls back after an error. An event that was handled before does not come here.
    ///
    /// PostgreSQL commits nothing after a statement that failed: to pass over such an error is a failure of the event, unless the statement ran
    /// in a savepoint (`transaction.begin()`).
    fn handle(
        &self,
        event: E,
        delivery: &Delivery,
        transaction: &mut PgConnection,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// Handles what is there, up to `batchSize` events at a time, each aggregate's in order.
pub trait BatchHandler<E>: Send + Sync + 'static {
    /// `Ok` acknowledges them all. After an error none counts as handled: each is delivered again, alone, so that the one at fault
    /// holds back its own aggregate only; together, where the error says that a server was away.
    fn handle(&self, events: Vec<(E, Delivery)>) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

impl<E: Send + 'static, H: Handler<E>> Handler<E> for Arc<H> {
    fn handle(&self, event: E, delivery: &Delivery) -> impl Future<Output = Result<(), HandlerError>> + Send {
        H::handle(self, event, delivery)
    }
}

/// Why an event was not handled, and so, when it comes again. Made from any error by `?`: a failure.
#[derive(Debug)]
pub enum HandlerError {
    /// Counts as a failed delivery: tried again with backoff, and after `maxDeliveries` a dead letter. Where the error or a cause of it is
    /// that PostgreSQL or Redis is away, a connection refused or lost, or a table missing, no delivery is counted, and it is tried again
    /// every second.
    Failed(Box<dyn Error + Send + Sync>),
    /// Nothing is wrong with the event, something that it needs is away: tried again after so long, as often as it takes, and never
    /// a dead letter.
    RetryLater { after: Duration, reason: String },
    /// As `RetryLater`, of an effect in [`Delivery::once`] that may have happened: no answer came in time, or the connection broke
    /// after the request. The next delivery does what its `WhenUnknown` says.
    OutcomeUnknown { after: Duration, reason: String },
    /// Trying again would not help: a dead letter at once.
    GiveUp { reason: String },
}

impl HandlerError {
    /// See [`HandlerError::RetryLater`].
    pub fn retry_later(after: Duration, reason: impl fmt::Display) -> Self {
        Self::RetryLater { after, reason: reason.to_string() }
    }

    /// See [`HandlerError::OutcomeUnknown`].
    pub fn outcome_unknown(after: Duration, reason: impl fmt::Display) -> Self {
        Self::OutcomeUnknown { after, reason: reason.to_string() }
    }

    /// See [`HandlerError::GiveUp`].
    pub fn give_up(reason: impl fmt::Display) -> Self {
        Self::GiveUp { reason: reason.to_string() }
    }
}

// Not an `Error` itself, as that would stand in the way of this conversion.
impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// A handler as the runtime knows it.
pub(super) trait AnyHandler: Send + Sync {
    /// Its type, for the log.
    fn name(&self) -> &'static str;

    /// Takes more than one event in a call.
    fn takes_batches(&self) -> bool {
        false
    }

    /// Whether the tables are there that it needs, for handlers that need some of ours.
    fn find_tables(&self) -> BoxFuture<'_, Result<(), OutboxError>> {
        std::future::ready(Ok(())).boxed()
    }

    /// `deliveries` is one, unless the handler takes batches.
    fn handle<'a>(&'a self, deliveries: &'a [Delivery]) -> BoxFuture<'a, Result<(), HandlerError>>;
}

/// A payload that cannot be read will not be readable the next time.
pub(super) fn decode<E: DecodeEvent>(delivery: &Delivery) -> Result<E, HandlerError> {
    E::decode(delivery.envelope()).map_err(|error| {
        let cause = error.source().map_or_else(String::new, |source| format!(": {source}"));
        HandlerError::give_up(format!("{error}{cause}"))
    })
}

fn first(deliveries: &[Delivery]) -> Result<&Delivery, HandlerError> {
    deliveries.first().ok_or_else(|| HandlerError::give_up("called without an event; this is a defect of the runtime"))
}

pub(super) struct Typed<E, H>(pub H, pub PhantomData<fn(E)>);

impl<E: DecodeEvent, H: Handler<E>> AnyHandler for Typed<E, H> {
    fn name(&self) -> &'static str {
        type_name::<H>()
    }

    fn handle<'a>(&'a self, deliveries: &'a [Delivery]) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let delivery = first(deliveries)?;
            self.0.handle(decode(delivery)?, delivery).await
        }
        .boxed()
    }
}

pub(super) struct Raw<H>(pub H);

impl<H: Handler<EventEnvelope>> AnyHandler for Raw<H> {
    fn name(&self) -> &'static str {
        type_name::<H>()
    }

    fn handle<'a>(&'a self, deliveries: &'a [Delivery]) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let delivery = first(deliveries)?;
            self.0.handle(delivery.envelope().clone(), delivery).await
        }
        .boxed()
    }
}

pub(super) struct Batch<E, H>(pub H, pub PhantomData<fn(E)>);

impl<E: DecodeEvent, H: BatchHandler<E>> AnyHandler for Batch<E, H> {
    fn name(&self) -> &'static str {
        type_name::<H>()
    }

    fn takes_batches(&self) -> bool {
        true
    }

    fn handle<'a>(&'a self, deliveries: &'a [Delivery]) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let read = deliveries.iter().map(|delivery| Ok((decode(delivery)?, delivery.clone())));
            let events: Result<Vec<(E, Delivery)>, HandlerError> = read.collect();
            self.0.handle(events?).await
        }
        .boxed()
    }
}
