use std::time::Duration;

use redis::{ErrorKind, RedisError, ServerErrorKind};
use thiserror::Error;

/// Why something on Redis did not happen.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamsError {
    /// Redis could not be reached, or cannot work now. Says nothing about the event, and nothing was written.
    #[error("Redis at {server} is unavailable while {doing}: check that it runs, lets this user in, and has memory (REDIS_URL)")]
    Unavailable {
        server: String,
        doing: &'static str,
        #[source]
        source: RedisError,
    },

    /// The command was sent and no answer came: it may have been carried out.
    #[error("Redis at {server} gave no answer while {doing}: whether it was carried out is unknown")]
    OutcomeUnknown {
        server: String,
        doing: &'static str,
        #[source]
        source: RedisError,
    },

    /// Redis answered, and will answer the same again: the event, the key or the permission is at fault.
    #[error("Redis refused while {doing}: {source}")]
    Refused {
        doing: &'static str,
        #[source]
        source: RedisError,
    },

    /// Some events of a `publish_all` were refused, the others are in their streams. The ids are those of envelopes: to
    /// know them beforehand, publish the events' envelopes.
    #[error("Redis refused {} of {total} events; the first: {}", refused.len(), refused.first().map_or("", |(_, why)| why))]
    PartlyRefused { total: usize, refused: Vec<(uuid::Uuid, String)> },

    /// Guessing what became of the batch could lose it or send it twice.
    #[error("the marker {key} holds {value:?}, which this relay did not write: delete the key if its batch is in no stream")]
    StrangeMarker { key: String, value: String },

    /// A batch that Redis had acknowledged is gone: a failover has lost the end of the stream, or somebody deleted keys. What is
    /// lost has to be appended again before anything newer.
    #[error("Redis has lost what it had acknowledged of {stream}: {marker} is gone")]
    Lost { stream: String, marker: String },

    /// The batch is in its stream, but a failover might lose it: append it again, and wait again.
    #[error(
        "{confirmed} of {wanted} replicas confirmed a batch in {stream} within {timeout:?}: check the replicas (app.redis.waitReplicas)"
    )]
    NotReplicated {
        stream: String,
        confirmed: u32,
        wanted: u32,
        timeout: Duration,
        /// Why nothing could be asked.
        #[source]
        source: Option<RedisError>,
    },

    #[error("the stream {stream} has no consumer group {group}: start its consumer, which makes the group, and retry then")]
    NoGroup { stream: String, group: String },

    /// The entry had been trimmed away before it was buried.
    #[error("the dead letter {dead_id} of {stream} holds no event that could be delivered again: discard it")]
    EmptyDeadLetter { stream: String, dead_id: String },

    #[error(
        "the Redis URL is not usable: write redis://[user:password@]host:port[/db], \
         redis-sentinel://[user:password@]host:port,host:port/[db]#master, \
         redis-cluster://[user:password@]host:port,host:port, or the same with rediss"
    )]
    Url(#[source] RedisError),
}

impl StreamsError {
    /// Types an error of a command that was sent.
    pub(super) fn new(server: &str, doing: &'static str, source: RedisError) -> Self {
        let server = server.to_owned();
        match kind_of(&source) {
            Kind::Refused => Self::Refused { doing, source },
            Kind::Unable => Self::Unavailable { server, doing, source },
            Kind::Lost => Self::OutcomeUnknown { server, doing, source },
        }
    }

    /// "Nothing was written" is not true of a call of several steps whose first ones were confirmed.
    pub(super) fn after_some_were_written(self) -> Self {
        match self {
            Self::Unavailable { server, doing, source } => Self::OutcomeUnknown { server, doing, source },
            other => other,
        }
    }

    /// An error of a step before the command itself, which was not sent then.
    pub(super) fn before_it_was_sent(self, server: &str) -> Self {
        match self {
            Self::Refused { doing, source } => Self::Unavailable { server: server.to_owned(), doing, source },
            Self::OutcomeUnknown { server, doing, source } => Self::Unavailable { server, doing, source },
            other => other,
        }
    }

    /// The address of the node that the cluster has moved the slot to.
    pub(super) fn moved_to(&self) -> Option<&str> {
        let Self::Unavailable { source, .. } = self else { return None };
        let is_moved = source.kind() == ErrorKind::Server(ServerErrorKind::Moved);
        source.redirect_node().filter(|_| is_moved).map(|(address, _)| address)
    }

    /// True when Redis is at its `maxmemory`: it writes again when there is room, and goes on acknowledging meanwhile.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Unavailable { source, .. } if source.code() == Some("OOM"))
    }

    /// True when the same call may succeed later: an outage, not a fault of the event.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::OutcomeUnknown { .. } | Self::StrangeMarker { .. } | Self::NotReplicated { .. }
        )
    }
}

/// The same of a call that somebody else made.
pub(crate) fn is_outage(error: &RedisError) -> bool {
    kind_of(error) != Kind::Refused
}

/// What an error says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The server answered that it cannot work now; nothing was written.
    Unable,
    /// The server answered no.
    Refused,
    /// There was no answer that makes sense.
    Lost,
}

fn kind_of(error: &RedisError) -> Kind {
    match error.kind() {
        ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::ReadOnly
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::TryAgain
            | ServerErrorKind::Moved
            | ServerErrorKind::Ask,
        ) => Kind::Unable,
        ErrorKind::Server(_) | ErrorKind::Extension if error.code().is_some_and(is_unable_code) => Kind::Unable,
        ErrorKind::Server(_) | ErrorKind::Extension => Kind::Refused,
        ErrorKind::AuthenticationFailed => Kind::Unable,
        _ => Kind::Lost,
    }
}

/// Codes with which Redis says that it cannot work now, whatever the event. <https://redis.io/docs/latest/develop/reference/protocol-spec/>
/// leaves the list open; these stand in the server's source.
pub(super) fn is_unable_code(code: &str) -> bool {
    matches!(
        code,
        "OOM"
            | "MISCONF"
            | "LOADING"
            | "READONLY"
            | "CLUSTERDOWN"
            | "MASTERDOWN"
            | "TRYAGAIN"
            | "MOVED"
            | "ASK"
            | "BUSY"
            | "UNKILLABLE"
            | "NOREPLICAS"
            | "NOAUTH"
            | "WRONGPASS"
            | "NOMASTERLINK"
            | "UNBLOCKED"
    )
}

/// True for codes that will refuse every event of the stream alike.
pub(super) fn concerns_whole_stream(code: &str) -> bool {
    matches!(code, "WRONGTYPE" | "NOPERM")
}
