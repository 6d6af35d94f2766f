//! What the daemon serves over HTTP: health, metrics and the console.
//!
//! | file | what |
//! |---|---|
//! | `server` | the address, the connections and their limits, the end |
//! | `health` | `/livez` and `/readyz` |
//! | `openmetrics` | the other format of `/metrics` |

mod health;
mod openmetrics;
mod server;

use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use commitstream::config::Settings;
use commitstream::doctor::Verdict;
use commitstream::relay::RelayStatus;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::sync::watch;

use crate::commands::relay::Progress;
pub use server::{HttpServer, ListenError, listen};

/// What all routes see.
#[derive(Clone)]
pub struct Shared {
    pub settings: Arc<Settings>,
    pub status: watch::Receiver<RelayStatus>,
    pub progress: watch::Receiver<Progress>,
    /// `None` until it was looked at.
    pub verdict: watch::Receiver<Option<Verdict>>,
    pub metrics: PrometheusHandle,
}

/// The text format of Prometheus.
/// <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>
const METRICS_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of histograms, in seconds: from a round trip on one host to an outage.
const SECONDS: [f64; 16] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0];
/// The same, in events.
const EVENTS: [f64; 9] = [1.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1_000.0, 5_000.0, 10_000.0];

/// Records what the library measures, from now on.
pub fn record_metrics() -> anyhow::Result<PrometheusHandle> {
    let install = || {
        PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
            .set_buckets_for_metric(Matcher::Suffix("_events".to_owned()), &EVENTS)?
            .install_recorder()
    };
    let metrics = install().context("cannot record metrics")?;
    commitstream::metrics::describe();
    Ok(metrics)
}

/// All routes.
fn routes(shared: Shared) -> Router {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

async fn metrics(State(shared): State<Shared>, headers: HeaderMap) -> impl IntoResponse {
    let text = shared.metrics.render();
    if openmetrics::is_asked_for(&headers) {
        return ([(CONTENT_TYPE, openmetrics::FORMAT)], openmetrics::of(&text));
    }
    ([(CONTENT_TYPE, METRICS_FORMAT)], text)
}
