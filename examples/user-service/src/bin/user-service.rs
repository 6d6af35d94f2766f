//! The user service.
//!
//!     commitstream migrate
//!     cargo run -p commitstream-examples --bin user-service      # DATABASE_URL, REDIS_URL, LISTEN
//!     commitstream relay                                         # in another terminal
//!     curl -i localhost:8080/users -H 'Content-Type: application/json' -d '{"email": "ada@example.org"}'

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::publisher::HybridEventPublisher;
use commitstream_examples::process::{self, Signals};
use commitstream_examples::service::{Service, router};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// How long requests that have begun may take after a signal.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    process::run(run())
}

async fn run() -> Result<()> {
    process::start_log();
    let mut signals = Signals::catch()?;
    let settings = process::settings()?;
    let pool = process::database(&settings).await?;
    let publisher = Arc::new(HybridEventPublisher::new(&settings)?);

    let address = process::variable("LISTEN", "127.0.0.1:8080");
    let listener = TcpListener::bind(&address).await.with_context(|| format!("cannot listen on {address} (LISTEN)"))?;
    tracing::info!("listening on http://{}", listener.local_addr()?);

    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(Service { pool: pool.clone(), publisher })).with_graceful_shutdown(async {
        // Sent or dropped, both mean stop.
        drop(stopped.await);
    });
    let mut server = tokio::spawn(server.into_future());
    tokio::select! {
        ended = &mut server => return Ok(ended??),
        () = signals.next() => tracing::info!("finishing the requests that have begun"),
    }
    drop(stop);
    tokio::time::timeout(SHUTDOWN_LIMIT, server).await.context("requests were cut off: they took too long to end")???;
    pool.close().await;
    Ok(())
}
