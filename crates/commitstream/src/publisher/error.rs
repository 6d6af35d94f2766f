use thiserror::Error;

use crate::event::EventError;
use crate::outbox::OutboxError;
use crate::streams::StreamsError;

/// Why events were not published.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The event is at fault; nothing was sent.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The insert failed. The transaction is aborted, as after any failed statement: roll it back.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// Redis is down or refused; see [`StreamsError`] for what that says of the events.
    #[error(transparent)]
    Streams(#[from] StreamsError),
    #[error("no {0} is set, and this publisher needs it")]
    MissingUrl(&'static str),
}
