//! `/livez` and `/readyz`: 200 or 503, and why, for probes and for people.

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use commitstream::doctor::Verdict;
use commitstream::relay::{RelayState, RelayStatus};
use serde::Serialize;

use super::Shared;

/// The answer of a probe.
#[derive(Debug, Serialize)]
struct Health {
    ok: bool,
    /// As `commitstream relays` shows it.
    state: &'static str,
    reason: String,
    /// Of the 64, those that this relay works on.
    partitions: u32,
    /// Whether events flow, from all producers to all consumers, as it was lately: what `commitstream stats` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<Verdict>,
}

impl Health {
    fn new(status: &RelayStatus, ok: bool, reason: impl Into<String>) -> Self {
        Self { ok, state: status.state.name(), reason: reason.into(), partitions: status.partitions, verdict: None }
    }
}

impl IntoResponse for Health {
    fn into_response(self) -> axum::response::Response {
        let code = if self.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (code, Json(self)).into_response()
    }
}

/// Fails where a restart may help.
pub async fn livez(State(shared): State<Shared>) -> impl IntoResponse {
    let stalled = shared.progress.borrow().stalled(Instant::now(), shared.settings.http.stalled_after);
    live(&shared.status.borrow(), stalled)
}

/// Succeeds while both servers can be used. What else is wrong is said and does not count: no other instance would do better.
pub async fn readyz(State(shared): State<Shared>) -> impl IntoResponse {
    let verdict = shared.verdict.borrow().clone();
    Health { verdict, ..ready(&shared.status.borrow()) }
}

/// A restart mends a relay that stands still though both servers answer it. It brings back no server, and no event that was refused.
fn live(status: &RelayStatus, stalled: Option<Duration>) -> Health {
    match (&status.state, stalled) {
        (RelayState::Stopped, _) => Health::new(status, false, "the relay has ended"),
        // A restart does not help a stream that waits for somebody to act.
        (RelayState::Active, Some(_)) if status.waiting.is_some() => Health::new(status, true, waits(status)),
        (RelayState::Active, Some(stalled)) => {
            let reason = format!("events are due, and none was settled for {} s", stalled.as_secs());
            Health::new(status, false, reason)
        }
        _ => Health::new(status, true, "the relay runs"),
    }
}

fn waits(status: &RelayStatus) -> &str {
    status.waiting.as_deref().unwrap_or_default()
}

fn ready(status: &RelayStatus) -> Health {
    match &status.state {
        RelayState::Active if status.waiting.is_some() => Health::new(status, true, waits(status)),
        RelayState::Active => Health::new(status, true, "publishing, or waiting for events"),
        RelayState::Standby => Health::new(status, true, "both servers can be used; other relays have all partitions"),
        RelayState::Paused => Health::new(status, true, "an operator has paused publishing"),
        RelayState::Recovering => Health::new(status, true, "finding out what became of batches that were left open"),
        RelayState::Connecting => Health::new(status, false, "connecting to PostgreSQL and Redis"),
        RelayState::Unable { reason } => Health::new(status, false, reason),
        RelayState::Stopped => Health::new(status, false, "the relay has ended"),
        _ => Health::new(status, false, "unknown state"),
    }
}
