//! What the daemon serves over HTTP: health, metrics and the console.
//!
//! | file | what |
//! |---|---|
//! | `server` | the address, the connections and their limits, the end |
//! | `health` | `/livez` and `/readyz` |

mod health;
mod server;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use commitstream::relay::RelayStatus;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::watch;

pub use server::{HttpServer, ListenError, listen};

/// What all routes see.
#[derive(Clone)]
pub struct Shared {
    pub status: watch::Receiver<RelayStatus>,
    pub metrics: PrometheusHandle,
}

/// The text format of Prometheus.
/// <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>
const METRICS_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All routes.
fn routes(shared: Shared) -> Router {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    ([(CONTENT_TYPE, METRICS_FORMAT)], shared.metrics.render())
}
