use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::StreamsError;
use crate::config::RedisSettings;

/// After so long without a command, a connection is tried before it is used: Redis may have been restarted meanwhile, and the
/// outcome of the command would be unknown although it never arrived.
const IDLE: Duration = Duration::from_millis(100);

/// A connection to Redis that is opened when first needed and again after it broke. Cheap to clone; clones share it.
///
/// Nothing is repeated here: a command that may have been carried out is reported as such
/// ([`StreamsError::OutcomeUnknown`]), and the caller knows whether repeating it is safe.
#[derive(Clone)]
pub struct Streams {
    pub(super) prefix: Arc<str>,
    client: Client,
    server: Arc<str>,
    connect_timeout: Duration,
    response_timeout: Duration,
    slot: Arc<Mutex<Slot>>,
}

#[derive(Default)]
struct Slot {
    /// Counts the connections, so that a failure of an old one does not close its successor.
    generation: u64,
    connection: Option<MultiplexedConnection>,
    last_used: Option<Instant>,
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").field("server", &self.server).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Streams {
    /// Prepares a connection to `url`; nothing is sent yet.
    ///
    /// # Errors
    /// The URL cannot be read.
    pub fn new(url: &str, settings: &RedisSettings) -> Result<Self, StreamsError> {
        let client = Client::open(url).map_err(StreamsError::Url)?;
        let server = client.get_connection_info().addr().to_string();
        Ok(Self {
            prefix: settings.stream_prefix.as_str().into(),
            client,
            server: server.into(),
            connect_timeout: settings.connect_timeout,
            response_timeout: settings.response_timeout,
            slot: Arc::default(),
        })
    }

    /// Key of the stream that events of `aggregate_type` go to.
    #[must_use]
    pub fn stream_of(&self, aggregate_type: &str) -> String {
        format!("{}{aggregate_type}", self.prefix)
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// Redis is not reachable or not able to answer.
    pub async fn ping(&self) -> Result<(), StreamsError> {
        self.query("asking for a sign of life", &redis::cmd("PING")).await
    }

    /// Longest wait of one blocking read.
    pub(super) const LONGEST_BLOCK: Duration = Duration::from_secs(5);

    /// Limit of the answer to a blocking read.
    pub(super) fn read_timeout(&self) -> Duration {
        self.response_timeout + Self::LONGEST_BLOCK
    }

    pub(super) fn typed(&self, doing: &'static str, source: RedisError) -> StreamsError {
        StreamsError::new(&self.server, doing, source)
    }

    /// A connection of its own with the same settings, for calls that block the connection they run on.
    #[must_use]
    pub(super) fn dedicated(&self, response_timeout: Duration) -> Self {
        Self { slot: Arc::default(), response_timeout, ..self.clone() }
    }

    pub(super) async fn query<T: FromRedisValue>(&self, doing: &'static str, command: &Cmd) -> Result<T, StreamsError> {
        let (generation, mut connection) = self.connection(doing).await?;
        let answer = command.query_async(&mut connection).await;
        self.judge(doing, generation, answer).await
    }

    pub(super) async fn query_pipeline<T: FromRedisValue>(
        &self,
        doing: &'static str,
        pipeline: &Pipeline,
    ) -> Result<T, StreamsError> {
        let (generation, mut connection) = self.connection(doing).await?;
        let answer = pipeline.query_async(&mut connection).await;
        self.judge(doing, generation, answer).await
    }

    pub(super) async fn invoke<T: FromRedisValue>(
        &self,
        doing: &'static str,
        script: &redis::ScriptInvocation<'_>,
    ) -> Result<T, StreamsError> {
        let (generation, mut connection) = self.connection(doing).await?;
        let answer = script.invoke_async(&mut connection).await;
        self.judge(doing, generation, answer).await
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
            let config = AsyncConnectionConfig::new()
                .set_connection_timeout(Some(self.connect_timeout))
                .set_response_timeout(Some(self.response_timeout));
            let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            slot.generation += 1;
            slot.connection = Some(connection.clone());
            Ok((slot.generation, connection))
        };
        let timed_out = || RedisError::from((ErrorKind::Io, "timed out while connecting"));
        let connected = tokio::time::timeout(self.connect_timeout, connect).await.unwrap_or_else(|_| Err(timed_out()));
        connected.map_err(|source: RedisError| StreamsError::Unavailable { server: self.server.to_string(), doing, source })
    }

    /// Types the error, and gives up a connection that broke or stalled.
    async fn judge<T>(&self, doing: &'static str, generation: u64, answer: Result<T, RedisError>) -> Result<T, StreamsError> {
        let error = match answer {
            Ok(answer) => return Ok(answer),
            Err(source) => self.typed(doing, source),
        };
        // After READONLY or a time-out the same connection may go on failing while a new one reaches the new master.
        if error.is_outage() {
            let mut slot = self.slot.lock().await;
            if slot.generation == generation {
                slot.connection = None;
            }
        }
        Err(error)
    }
}
