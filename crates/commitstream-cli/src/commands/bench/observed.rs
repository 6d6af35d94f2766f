//! `observed`: the drain while everything watches it, against the drain that nothing watches.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use axum::Router;
use axum::http::Uri;
use sqlx::PgConnection;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::figure::{Aim, Figure, Measured, Round};
use super::process::RelayProcess;
use super::scale::{all_entries, none_is_left};
use super::stage::{Stage, per_second};
use super::visitor::Visitor;
use super::workload::State;
use crate::output::count;

const EVENTS: u64 = 300_000;
const ROUNDS: u32 = 5;
/// Of so many events, one is sampled.
const SAMPLED_OF: u32 = 100;
/// Between two questions for the metrics. Prometheus usually asks every 15 s.
const SCRAPE: Duration = Duration::from_secs(1);

const PASSWORD: &str = "of the benchmark";
const LOOPBACK: &str = "127.0.0.1:0";

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("observed").await?;
    let (mut like, mut all) = (Vec::new(), Vec::new());
    let receiver = Receiver::start().await?;
    for round in stage.rounds(ROUNDS) {
        let side = |name: &str| format!("observed, {name}, round {round}");
        let traced = State::Traced { of: SAMPLED_OF };
        let watched = one_side(stage, &mut connection, traced, Some(&receiver), &side("watched")).await?;
        let unwatched = one_side(stage, &mut connection, traced, None, &side("unwatched")).await?;
        let untraced = one_side(stage, &mut connection, State::Waiting, None, &side("untraced")).await?;
        like.push(Round::new(watched, unwatched));
        all.push(Round::new(watched, untraced));
    }
    stage.clear(&mut connection).await?;
    let (requests, least) = (receiver.requests.load(Ordering::Relaxed), stage.rounds(ROUNDS).count() as u64);
    ensure!(requests >= least, "only {requests} requests with spans came in {least} rounds");
    let figures = vec![
        Figure::new("observed", "events/s", Some(Aim::RatioAtLeast(0.97)), like),
        Figure::new("observed, against events without headers", "events/s", None, all),
    ];
    let notes = vec![format!("{} requests with spans of 1 in {SAMPLED_OF} events came to the receiver", count(requests))];
    Ok(Measured { name: "observed", figures, notes })
}

/// Events a second of a relay in a process of its own, which `receiver` and others watch if there is one.
async fn one_side(
    stage: &Stage,
    connection: &mut PgConnection,
    state: State,
    receiver: Option<&Receiver>,
    what: &str,
) -> anyhow::Result<f64> {
    let events = stage.events(EVENTS);
    stage.clear(connection).await?;
    stage.fill_with(connection, events, state, what).await?;
    stage.settle(connection).await?;
    let address = free_address().await?;
    let environment = receiver.map(|receiver| {
        [
            ("HTTP_LISTEN", address.to_string()),
            ("CONSOLE_PASSWORD", PASSWORD.to_owned()),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", receiver.address)),
        ]
    });
    let relay = RelayProcess::start_with(stage, environment.as_ref().map_or(&[], |all| &all[..])).await?;
    let started = Instant::now();
    let watched = async {
        match receiver {
            Some(_) => watch(address).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        drained = all_entries(stage, events, what) => drained?,
        watched = watched => watched.context("the relay could not be watched")?,
    }
    let rate = per_second(events, started.elapsed());
    relay.stop().await?;
    none_is_left(connection).await?;
    Ok(rate)
}

/// An open console with its live numbers, and a scraper of metrics; it ends with an error only.
async fn watch(address: SocketAddr) -> anyhow::Result<()> {
    let visitor = Visitor::log_in(address, PASSWORD).await?;
    visitor.send("GET", "/console", "", |_| false).await?;
    let live = visitor.send("GET", "/console/live", "", |_| false);
    tokio::try_join!(scrape(&visitor), live).map(drop)
}

async fn scrape(visitor: &Visitor) -> anyhow::Result<()> {
    loop {
        visitor.send("GET", "/metrics", "", |_| false).await?;
        tokio::time::sleep(SCRAPE).await;
    }
}

async fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind(LOOPBACK).await?.local_addr()?)
}

/// Takes spans by OTLP, and lets them go.
struct Receiver {
    address: SocketAddr,
    requests: Arc<AtomicU64>,
    /// Ends with this.
    _server: JoinSet<std::io::Result<()>>,
}

impl Receiver {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind(LOOPBACK).await?;
        let (address, requests) = (listener.local_addr()?, Arc::new(AtomicU64::new(0)));
        let counter = requests.clone();
        let count = async move |uri: Uri, _body: axum::body::Bytes| {
            counter.fetch_add(u64::from(uri.path() == "/v1/traces"), Ordering::Relaxed);
        };
        let mut server = JoinSet::new();
        server.spawn(axum::serve(listener, Router::new().fallback(count)).into_future());
        Ok(Self { address, requests, _server: server })
    }
}
