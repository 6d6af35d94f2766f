//! One server and the connection to it.
//!
//! A connection that has died in silence (a host that vanished, a NAT that dropped its entry) looks like one whose server is slow. So
//! one that was idle, or has not answered for a while, is tested before it is used, and a call that waits for long has another
//! connection opened meanwhile. Whoever gives up waiting, or is dropped, leaves nothing behind that the next call would trust.

use std::future::pending;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{
    Arg, Cmd, ConnectionInfo, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult, Script, ScriptInvocation,
    ServerErrorKind, Value, from_redis_value,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::StreamsError;
use super::open::{Access, timed_out};
use super::sentinel::Sentinels;

/// After so long without a command, a connection is tested before it is used: Redis may have been restarted meanwhile, and the
/// outcome of the command would be unknown although it never arrived.
const IDLE_MS: u64 = 100;

/// After so long without an answer, a connection is tested however much it is used.
const SILENT_MS: u64 = 1_000;

/// A request of more bytes may take long on a slow network, on a connection that is well.
const MOST_BYTES_IN_DOUBT: usize = 1 << 20;

/// How the server is found.
pub(super) enum Way {
    Direct(Box<ConnectionInfo>),
    /// The master is asked for before each attempt to connect.
    Sentinels(Arc<Sentinels>),
}

/// A connection to one server that is opened when first needed and again after it broke.
pub(super) struct Node {
    /// Its name in messages.
    pub name: Arc<str>,
    way: Way,
    access: Access,
    /// Never held while waiting.
    slot: StdMutex<Option<Link>>,
    /// Who tests or opens a connection does so alone.
    opening: Mutex<()>,
    turn: Mutex<()>,
    born: Instant,
}

/// An open connection. Clones share it.
#[derive(Clone)]
struct Link {
    connection: MultiplexedConnection,
    times: Arc<Times>,
}

/// In milliseconds since the node was made.
struct Times {
    used: AtomicU64,
    heard: AtomicU64,
}

impl Link {
    fn new(connection: MultiplexedConnection, now: u64) -> Self {
        Self { connection, times: Arc::new(Times { used: now.into(), heard: now.into() }) }
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.times, &other.times)
    }

    fn heard(&self, now: u64) {
        self.times.heard.fetch_max(now, Ordering::Relaxed);
        self.times.used.fetch_max(now, Ordering::Relaxed);
    }

    fn needs_test(&self, now: u64) -> bool {
        let since = |time: &AtomicU64| now.saturating_sub(time.load(Ordering::Relaxed));
        since(&self.times.used) > IDLE_MS || since(&self.times.heard) > SILENT_MS
    }
}

/// Returns when the server has answered, whatever it said.
async fn ping(mut connection: MultiplexedConnection) -> RedisResult<()> {
    match redis::cmd("PING").exec_async(&mut connection).await {
        Err(error) if error.code().is_none() => Err(error),
        _ => Ok(()),
    }
}

/// What can be sent.
#[derive(Clone, Copy)]
pub(super) enum Request<'a> {
    Command(&'a Cmd),
    Pipeline(&'a Pipeline),
    /// One at a time: what stood behind it on the connection would wait for its own answer and for that of this one.
    Blocking(&'a Pipeline),
    Script(&'a ScriptInvocation<'a>),
    /// A call of a script, as an `EVALSHA` command.
    Large {
        script: &'a Script,
        command: &'a Cmd,
    },
}

impl Request<'_> {
    /// About; calls of small scripts count as nothing.
    fn bytes(&self) -> usize {
        let arg = |arg: Arg<&[u8]>| if let Arg::Simple(bytes) = arg { bytes.len() } else { 0 };
        let command = |command: &Cmd| command.args_iter().map(arg).sum::<usize>();
        match self {
            Self::Command(cmd) | Self::Large { command: cmd, .. } => command(cmd),
            Self::Pipeline(pipeline) | Self::Blocking(pipeline) => pipeline.cmd_iter().map(command).sum(),
            Self::Script(_) => 0,
        }
    }
}

impl Node {
    pub fn new(way: Way, access: Access) -> Self {
        let name = match &way {
            Way::Direct(info) => info.addr().to_string(),
            Way::Sentinels(sentinels) => sentinels.to_string(),
        };
        let (slot, opening, turn) = (StdMutex::default(), Mutex::default(), Mutex::default());
        Self { name: name.into(), way, access, slot, opening, turn, born: Instant::now() }
    }

    pub fn typed(&self, doing: &'static str, source: RedisError) -> StreamsError {
        StreamsError::new(&self.name, doing, source)
    }

    pub async fn query<T: FromRedisValue>(&self, doing: &'static str, command: &Cmd) -> Result<T, StreamsError> {
        self.send(doing, Request::Command(command)).await
    }

    /// Sends once, and never again by itself.
    pub async fn send<T: FromRedisValue>(&self, doing: &'static str, request: Request<'_>) -> Result<T, StreamsError> {
        let _turn = if let Request::Blocking(_) = request { Some(self.turn.lock().await) } else { None };
        let link = self.link(doing).await?;
        let mut connection = link.connection.clone();
        let answer = async {
            match request {
                Request::Command(command) => command.query_async(&mut connection).await,
                Request::Pipeline(pipeline) | Request::Blocking(pipeline) => pipeline.query_async(&mut connection).await,
                Request::Script(script) => script.invoke_async(&mut connection).await,
                Request::Large { script, command } => call(script, command, &mut connection).await,
            }
        };
        let answer: RedisResult<Value> = tokio::select! {
            biased;
            answer = answer => answer,
            () = self.is_dead(&link, request) => Err(timed_out("the connection is dead: the server answers on another one")),
        };
        let read = answer.and_then(|value| from_redis_value(value).map_err(RedisError::from));
        self.judge(doing, &link, read)
    }

    /// The shared connection. Waiting for one, in all, takes no longer than the time-out to connect.
    async fn link(&self, doing: &'static str) -> Result<Link, StreamsError> {
        let deadline = Instant::now() + self.access.connect;
        if let Some(link) = self.trusted() {
            return Ok(link);
        }
        let Ok(_turn) = timeout_at(deadline, self.opening.lock()).await else {
            let source = timed_out("timed out while waiting for a connection");
            return Err(StreamsError::Unavailable { server: self.name.to_string(), doing, source });
        };
        if let Some(link) = self.trusted() {
            return Ok(link);
        }
        // Taken out first: who is dropped meanwhile leaves no connection behind that is in doubt.
        let doubted = self.slot().take();
        let link = match doubted {
            Some(link) => self.tested_or_new(doing, link, deadline).await?,
            None => self.open(doing, deadline).await?,
        };
        *self.slot() = Some(link.clone());
        Ok(link)
    }

    /// The connection, if it may be used as it is.
    fn trusted(&self) -> Option<Link> {
        let (slot, now) = (self.slot(), self.now());
        let link = slot.as_ref().filter(|link| !link.needs_test(now))?;
        link.times.used.store(now, Ordering::Relaxed);
        Some(link.clone())
    }

    /// The same connection if it answers, or another one. It may only be slow, as the server may be: so both are tried from a
    /// moment on, and whichever answers first is used.
    async fn tested_or_new(&self, doing: &'static str, link: Link, deadline: Instant) -> Result<Link, StreamsError> {
        let mut pong = pin!(ping(link.connection.clone()));
        match timeout(self.access.connect / 8, &mut pong).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return self.open(doing, deadline).await,
            Err(_) => tokio::select! {
                Ok(()) = &mut pong => {}
                opened = self.open(doing, deadline) => return opened,
            },
        }
        link.heard(self.now());
        Ok(link)
    }

    async fn open(&self, doing: &'static str, deadline: Instant) -> Result<Link, StreamsError> {
        let access = Access { connect: deadline.saturating_duration_since(Instant::now()), ..self.access.clone() };
        let unavailable = |source| StreamsError::Unavailable { server: self.name.to_string(), doing, source };
        let connection = match &self.way {
            Way::Direct(info) => access.open(info).await.map_err(unavailable)?,
            Way::Sentinels(sentinels) => sentinels.master(&access).await.map_err(|why| why.typed(sentinels, doing))?.0,
        };
        Ok(Link::new(connection, self.now()))
    }

    /// Returns when a call has waited for half of its limit, the server has answered on another connection since, and this call has still
    /// no answer: the server takes what comes first, so it will not come. The other connection is there for the next call.
    async fn is_dead(&self, link: &Link, request: Request<'_>) {
        sleep(self.access.response / 2).await;
        let may_take_long = !self.access.block.is_zero() || request.bytes() > MOST_BYTES_IN_DOUBT;
        if may_take_long || self.replace(link).await.is_err() {
            // The limit of the answer decides.
            pending::<()>().await;
        }
        sleep(self.access.response / 10).await;
    }

    /// Has another connection take the place of this one, unless one has already.
    async fn replace(&self, link: &Link) -> Result<(), StreamsError> {
        let _turn = self.opening.lock().await;
        if self.slot().as_ref().is_none_or(|current| current.is(link)) {
            let other = self.open("looking whether it answers", Instant::now() + self.access.connect).await?;
            *self.slot() = Some(other);
        }
        Ok(())
    }

    /// Nobody has to be asked where it is.
    pub fn is_direct(&self) -> bool {
        matches!(self.way, Way::Direct(_))
    }

    /// Where it is at the moment, and the login there.
    pub async fn place(&self) -> Option<ConnectionInfo> {
        match &self.way {
            Way::Direct(info) => Some(info.as_ref().clone()),
            Way::Sentinels(sentinels) => Some(sentinels.master(&self.access).await.ok()?.1),
        }
    }

    /// Gives the connection up: the next call opens another, which may lead to another server.
    pub fn close(&self) {
        *self.slot() = None;
    }

    /// Types the error, and gives up a connection that broke or stalled.
    fn judge<T>(&self, doing: &'static str, link: &Link, answer: RedisResult<T>) -> Result<T, StreamsError> {
        let error = match answer {
            Ok(answer) => {
                link.heard(self.now());
                return Ok(answer);
            }
            Err(source) => self.typed(doing, source),
        };
        if !matches!(error, StreamsError::OutcomeUnknown { .. }) {
            link.heard(self.now());
        }
        // After READONLY or a time-out the same connection may go on failing while a new one reaches the new master.
        if error.is_outage() && error.moved_to().is_none() {
            let mut slot = self.slot();
            if slot.as_ref().is_some_and(|current| current.is(link)) {
                *slot = None;
            }
        }
        Err(error)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Link>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Calls a script, after loading it where the server does not know it.
async fn call(script: &Script, command: &Cmd, connection: &mut MultiplexedConnection) -> RedisResult<Value> {
    match command.query_async(connection).await {
        Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
            script.prepare_invoke().load_async(connection).await?;
            command.query_async(connection).await
        }
        answer => answer,
    }
}
