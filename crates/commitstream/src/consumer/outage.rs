//! Which errors of handlers say nothing about the event.

use std::error::Error;
use std::io;
use std::sync::Arc;

use redis::RedisError;
use sqlx::error::DatabaseError;

use super::inbox::NoInbox;
use crate::outbox::OutboxError;
use crate::streams::StreamsError;

/// A server was away. The first cause that is known decides: an error that shows itself as what it wraps (anyhow's, or one with
/// `#[error(transparent)]`) hides that very cause, and leaves the ones beneath it.
pub(super) fn is_outage(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(verdict) = verdict(error) {
            return verdict;
        }
        cause = error.source();
    }
    false
}

/// A table or schema that is missing is not the event's fault: `undefined_table`, `invalid_schema_name`.
const MISSING: [&str; 2] = ["42P01", "3F000"];

fn is_outage_code(code: &str) -> bool {
    crate::outbox::is_outage_code(code) || MISSING.contains(&code)
}

fn verdict(error: &(dyn Error + 'static)) -> Option<bool> {
    if error.is::<NoInbox>() {
        return Some(true);
    }
    if let Some(error) = error.downcast_ref::<OutboxError>()
        && error.is_not_migrated()
    {
        return Some(true);
    }
    if let Some(error) = error.downcast_ref::<StreamsError>() {
        return Some(error.is_outage());
    }
    if let Some(error) = error.downcast_ref::<RedisError>() {
        return Some(crate::streams::is_outage(error));
    }
    if let Some(error) = error.downcast_ref::<sqlx::Error>() {
        let is_missing = error.as_database_error().and_then(|error| error.code()).is_some_and(|code| is_outage_code(&code));
        return Some(is_missing || crate::outbox::is_outage(error));
    }
    if let Some(error) = error.downcast_ref::<Box<dyn DatabaseError>>() {
        return Some(error.code().is_some_and(|code| is_outage_code(&code)));
    }
    // How the driver of Redis keeps what a connection said.
    if let Some(error) = error.downcast_ref::<Arc<dyn Error + Send + Sync>>() {
        return verdict(error.as_ref());
    }
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return is_lost(error.kind()).then_some(true);
    }
    // It has no cause that could be looked at.
    (error.to_string() == sqlx::Error::PoolTimedOut.to_string()).then_some(true)
}

fn is_lost(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, NotConnected,
        TimedOut, UnexpectedEof,
    };
    matches!(
        kind,
        BrokenPipe
            | ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | NetworkUnreachable
            | NotConnected
            | TimedOut
            | UnexpectedEof
    )
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use thiserror::Error;

    use super::*;
    use crate::consumer::HandlerError;

    #[derive(Debug, Error)]
    #[error(transparent)]
    struct Transparent(sqlx::Error);

    fn refused() -> sqlx::Error {
        io::Error::from(io::ErrorKind::ConnectionRefused).into()
    }

    fn outage(error: impl Into<HandlerError>) -> bool {
        match error.into() {
            HandlerError::Failed(error) => is_outage(error.as_ref()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_outage_is_known_however_it_is_wrapped() {
        for error in [refused, || sqlx::Error::PoolTimedOut] {
            assert!(outage(error()));
            assert!(outage(Transparent(error())));
            assert!(outage(anyhow::Error::from(error())));
            assert!(outage(anyhow::Error::from(Transparent(error()))));
            assert!(outage(Err::<(), _>(error()).context("writing the receipt").unwrap_err()));
        }
        assert!(outage(anyhow::Error::from(RedisError::from(io::Error::from(io::ErrorKind::ConnectionReset)))));
    }

    #[test]
    fn what_is_wrong_with_an_event_is_no_outage() {
        assert!(!outage(sqlx::Error::RowNotFound));
        assert!(!outage(anyhow::Error::from(sqlx::Error::RowNotFound)));
        assert!(!outage(Transparent(sqlx::Error::ColumnNotFound("email".into()))));
        assert!(!outage(io::Error::from(io::ErrorKind::NotFound)));
        assert!(!outage(anyhow::anyhow!("no such user")));
    }
}
