//! One server and the connection to it.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult, Script,
    ScriptInvocation, ServerErrorKind, Value, from_redis_value,
};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::StreamsError;
use super::sentinel::Sentinels;

/// After so long without a command, a connection is tried before it is used: Redis may have been restarted meanwhile, and the
/// outcome of the command would be unknown although it never arrived.
const IDLE: Duration = Duration::from_millis(100);

/// Limits of one attempt to connect, and of the answer to one command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub connect: Duration,
    pub response: Duration,
}

impl Limits {
    pub async fn open(self, info: ConnectionInfo) -> RedisResult<MultiplexedConnection> {
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(self.connect)).set_response_timeout(Some(self.response));
        Client::open(info)?.get_multiplexed_async_connection_with_config(&config).await
    }
}

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
    limits: Limits,
    slot: Mutex<Slot>,
    turn: Mutex<()>,
}

#[derive(Default)]
struct Slot {
    /// Counts the connections, so that a failure of an old one does not close its successor.
    generation: u64,
    connection: Option<MultiplexedConnection>,
    last_used: Option<Instant>,
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

impl Node {
    pub fn new(way: Way, limits: Limits) -> Self {
        let name = match &way {
            Way::Direct(info) => info.addr().to_string(),
            Way::Sentinels(sentinels) => sentinels.to_string(),
        };
        Self { name: name.into(), way, limits, slot: Mutex::default(), turn: Mutex::default() }
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
        let (generation, mut connection) = self.connection(doing).await?;
        let answer: RedisResult<Value> = match request {
            Request::Command(command) => command.query_async(&mut connection).await,
            Request::Pipeline(pipeline) | Request::Blocking(pipeline) => pipeline.query_async(&mut connection).await,
            Request::Script(script) => script.invoke_async(&mut connection).await,
            Request::Large { script, command } => call(script, command, &mut connection).await,
        };
        let read = answer.and_then(|value| from_redis_value(value).map_err(RedisError::from));
        self.judge(doing, generation, read).await
    }

    /// The shared connection. Waiting for one, in all, takes no longer than the time-out to connect.
    async fn connection(&self, doing: &'static str) -> Result<(u64, MultiplexedConnection), StreamsError> {
        let connect = async {
            let mut slot = self.slot.lock().await;
            let idle = slot.last_used.replace(Instant::now()).is_none_or(|used| used.elapsed() > IDLE);
            if let Some(mut connection) = slot.connection.clone() {
                if !idle || redis::cmd("PING").exec_async(&mut connection).await.is_ok() {
                    return Ok((slot.generation, connection));
                }
                slot.connection = None;
            }
            let connection = match &self.way {
                Way::Direct(info) => self.limits.open(info.as_ref().clone()).await?,
                Way::Sentinels(sentinels) => sentinels.master(self.limits).await?.0,
            };
            slot.generation += 1;
            slot.connection = Some(connection.clone());
            Ok((slot.generation, connection))
        };
        let timed_out = || RedisError::from((ErrorKind::Io, "timed out while connecting"));
        let connected = tokio::time::timeout(self.limits.connect, connect).await.unwrap_or_else(|_| Err(timed_out()));
        connected.map_err(|source: RedisError| StreamsError::Unavailable { server: self.name.to_string(), doing, source })
    }

    /// Nobody has to be asked where it is.
    pub fn is_direct(&self) -> bool {
        matches!(self.way, Way::Direct(_))
    }

    /// Where it is at the moment, and the login there.
    pub async fn place(&self) -> RedisResult<ConnectionInfo> {
        match &self.way {
            Way::Direct(info) => Ok(info.as_ref().clone()),
            Way::Sentinels(sentinels) => Ok(sentinels.master(self.limits).await?.1),
        }
    }

    /// Gives the connection up: the next call opens another, which may lead to another server.
    pub async fn close(&self) {
        self.slot.lock().await.connection = None;
    }

    /// Types the error, and gives up a connection that broke or stalled.
    async fn judge<T>(&self, doing: &'static str, generation: u64, answer: RedisResult<T>) -> Result<T, StreamsError> {
        let error = match answer {
            Ok(answer) => return Ok(answer),
            Err(source) => self.typed(doing, source),
        };
        // After READONLY or a time-out the same connection may go on failing while a new one reaches the new master.
        if error.is_outage() && error.moved_to().is_none() {
            let mut slot = self.slot.lock().await;
            if slot.generation == generation {
                slot.connection = None;
            }
        }
        Err(error)
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
