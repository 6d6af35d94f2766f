//! The address, the connections and their limits, the end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use commitstream::config::{Loaded, Source};
use futures_util::FutureExt;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::Shared;
use crate::console;

const KEY: &str = "app.http.listen";

/// Connections at a time. The last place is kept free: whoever sent no whole request for longest makes room, so that nobody shuts out a
/// probe by being silent or slow.
const MAX_CONNECTIONS: usize = 64;
/// Bytes of the head of a request, and fields in it.
const MAX_HEAD: usize = 16 << 10;
const MAX_FIELDS: usize = 64;
/// Bytes of the body of a request.
const MAX_BODY: usize = 64 << 10;
/// Until the head of a request is there, also on a connection that is kept open.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Until the head of the answer is there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a stop waits for answers under way.
const GRACE: Duration = Duration::from_secs(2);
/// After a connection that could not be accepted, for want of file descriptors for example.
const PAUSE: Duration = Duration::from_millis(100);

/// The address that was set cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({KEY}, from {origin})")]
pub struct ListenError {
    address: SocketAddr,
    origin: Source,
    source: io::Error,
}

/// Binds the address of the settings; `None` where nothing is to be served. The default address may be another relay's: then this one works
/// without.
pub async fn listen(loaded: &Loaded) -> Result<Option<TcpListener>, ListenError> {
    let Some(address) = loaded.settings.http.listen else { return Ok(None) };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if loaded.source(KEY) == Source::Default => {
            let advice = "set HTTP_LISTEN to another address, or to off";
            tracing::warn!("no health and no metrics: cannot listen on {address}, the default: {error}; {advice}");
            Ok(None)
        }
        Err(source) => Err(ListenError { address, origin: loaded.source(KEY), source }),
    }
}

/// Serves until it is stopped or dropped.
pub struct HttpServer {
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl HttpServer {
    /// Starts it on an address that is bound.
    pub fn start(listener: TcpListener, shared: Shared) -> anyhow::Result<Self> {
        let address = listener.local_addr()?;
        let settings = Arc::clone(&shared.settings);
        tracing::info!("health and metrics on http://{address}: /livez, /readyz, /metrics");
        let mut routes = super::routes(shared);
        if settings.console.enabled {
            let (console, generated) = console::routes(&settings, address)?;
            routes = routes.merge(console);
            tracing::info!("console on http://{address}/console");
            if let Some(password) = generated {
                tracing::info!("password of the console for this run: {password}; CONSOLE_PASSWORD sets one");
            }
        }
        Ok(Self::serve(listener, routes))
    }

    /// The same limits for other routes.
    pub fn serve(listener: TcpListener, routes: Router) -> Self {
        let (stop, stopped) = watch::channel(());
        Self { stop, task: tokio::spawn(serve(listener, limited(routes), stopped)) }
    }

    /// Accepts no more, and waits a moment for answers under way.
    pub async fn stop(self) {
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!("the HTTP server failed: {error}; this is a defect");
        }
    }
}

fn limited(routes: Router) -> Router {
    routes.layer(DefaultBodyLimit::max(MAX_BODY)).layer(middleware::from_fn(answered))
}

/// Within the time, and also where a defect makes it panic: the panic would end the connection without a word.
async fn answered(request: Request, next: Next) -> Result<Response, Infallible> {
    let path = request.uri().path().to_owned();
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind();
    Ok(match timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => {
            tracing::error!("the answer to {path} panicked, as told on standard error; this is a defect");
            let told = "this failed by a defect of commitstream: please report what its standard error says\n";
            (StatusCode::INTERNAL_SERVER_ERROR, told).into_response()
        }
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "this took too long\n").into_response(),
    })
}

/// Until `stopped` has no sender any more.
async fn serve(listener: TcpListener, routes: Router, mut stopped: watch::Receiver<()>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_headers(MAX_FIELDS).max_buf_size(MAX_HEAD);
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    // Each with the number of its latest request, or of its beginning.
    let mut open: Vec<(AbortHandle, Arc<AtomicU64>)> = Vec::new();
    let numbers = Arc::new(AtomicU64::new(0));
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, client)) => {
                    let routes = TowerToHyperService::new(routes.clone());
                    let latest = Arc::new(AtomicU64::new(numbers.fetch_add(1, Relaxed)));
                    let (numbers, heard) = (Arc::clone(&numbers), Arc::clone(&latest));
                    let service = service_fn(move |mut request| {
                        heard.store(numbers.fetch_add(1, Relaxed), Relaxed);
                        request.extensions_mut().insert(ConnectInfo(client));
                        routes.call(request)
                    });
                    let connection = http.serve_connection(TokioIo::new(stream), service);
                    let task = connections.spawn(graceful.watch(connection));
                    open.retain(|(task, _)| !task.is_finished());
                    open.push((task, latest));
                    make_room(&open);
                }
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    sleep(PAUSE).await;
                }
            },
            Some(ended) = connections.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!("a connection ended: {error}"),
                Err(error) if error.is_cancelled() => tracing::debug!("a connection made room for others"),
                Err(error) => tracing::error!("a connection failed: {error}; this is a defect"),
            },
            _ = stopped.changed() => break,
        }
    }
    drop(listener);
    if timeout(GRACE, graceful.shutdown()).await.is_err() {
        tracing::debug!(connections = connections.len(), "connections are cut off");
    }
    // Dropping `connections` ends what is left.
}

/// Ends the connection that was heard of least lately when all places are taken.
fn make_room(open: &[(AbortHandle, Arc<AtomicU64>)]) {
    let longest = open.iter().min_by_key(|(_, latest)| latest.load(Relaxed));
    if let Some((task, _)) = longest.filter(|_| open.len() >= MAX_CONNECTIONS) {
        task.abort();
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_answered_and_the_next_request_too() -> anyhow::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let panics = || async {
            if true {
                panic!("a defect")
            }
        };
        let server =
            HttpServer::serve(listener, Router::new().route("/defect", get(panics)).route("/", get(|| async { "well" })));
        let mut stream = TcpStream::connect(address).await?;
        stream
            .write_all(b"GET /defect HTTP/1.1\r\nHost: h\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .await?;
        let mut answers = String::new();
        stream.read_to_string(&mut answers).await?;
        assert!(
            answers.starts_with("HTTP/1.1 500") && answers.contains("HTTP/1.1 200") && answers.ends_with("well"),
            "{answers}"
        );
        server.stop().await;
        Ok(())
    }
}
