//! What a request can fail with, and what its client is told.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use commitstream::outbox::OutboxError;
use commitstream::publisher::PublishError;
use serde_json::json;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ApiError {
    #[error("not an e-mail address: {0:?}")]
    Address(String),
    #[error("an amount is positive")]
    Amount,
    #[error("this e-mail address is registered already")]
    EmailTaken,
    #[error("no such user")]
    UnknownUser,
    #[error(transparent)]
    Database(sqlx::Error),
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// Rules that the database keeps are looked for in its answer: a look beforehand could be outdated by the time of the INSERT.
impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        match error.as_database_error().and_then(|refusal| refusal.constraint()) {
            Some("users_email_key") => Self::EmailTaken,
            Some("payments_user_id_fkey" | "trainings_user_id_fkey") => Self::UnknownUser,
            _ => Self::Database(error),
        }
    }
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Address(_) | Self::Amount => StatusCode::UNPROCESSABLE_ENTITY,
            Self::EmailTaken => StatusCode::CONFLICT,
            Self::UnknownUser => StatusCode::NOT_FOUND,
            error if error.is_outage() => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(_) | Self::Publish(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// A server is away, and the same request may succeed later.
    fn is_outage(&self) -> bool {
        match self {
            Self::Database(error) => matches!(error, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut),
            Self::Publish(PublishError::Streams(error)) => error.is_outage(),
            Self::Publish(PublishError::Outbox(error)) => {
                matches!(error, OutboxError::Unreachable { .. } | OutboxError::Timeout { .. })
            }
            _ => false,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        // What is our own trouble is for our log, with all its causes; a client learns only whether trying again may help.
        let message = match status {
            StatusCode::SERVICE_UNAVAILABLE => "not now; try again later".to_owned(),
            StatusCode::INTERNAL_SERVER_ERROR => "something went wrong here".to_owned(),
            _ => self.to_string(),
        };
        if status.is_server_error() {
            tracing::error!("a request failed: {:#}", anyhow::Error::new(self));
        }
        (status, Json(json!({ "error": message }))).into_response()
    }
}
