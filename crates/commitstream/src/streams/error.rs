use std::time::Duration;

use redis::{ErrorKind, RedisError, ServerErrorKind};
use thiserror::Error;

use super::server::{Address, split};

/// A command for one type of values met another.
const WRONG_TYPE: &str = "WRONGTYPE";

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

    /// A sentinel does not say where the master is. Nothing was written.
    #[error(
        "the sentinel at {sentinel} refuses the login while {doing}: set REDIS_SENTINEL_PASSWORD (app.redis.sentinelPassword) to the \
         password of the sentinels, or leave it out where they have none"
    )]
    SentinelLogin {
        sentinel: String,
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
    #[error("Redis refused while {doing}{}: {source}", key.as_ref().map_or_else(String::new, |key| format!(" (the key {key})")))]
    Refused {
        doing: &'static str,
        /// What is there is at fault (WRONGTYPE).
        key: Option<String>,
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
         redis-cluster://[user:password@]host:port,host:port, the same with rediss, or unix:///path/of/socket[?db=0&user=..&pass=..]"
    )]
    Url(#[source] RedisError),

    #[error("the certificates for Redis cannot be used: check app.redis.tls (REDIS_CA_FILE, REDIS_CERT_FILE, REDIS_KEY_FILE)")]
    Tls(#[source] RedisError),
}

impl StreamsError {
    /// Types an error of a command that was sent.
    pub(super) fn new(server: &str, doing: &'static str, source: RedisError) -> Self {
        let server = server.to_owned();
        match kind_of(&source) {
            Kind::Refused => Self::Refused { doing, key: None, source },
            Kind::Unable => Self::Unavailable { server, doing, source },
            Kind::Lost => Self::OutcomeUnknown { server, doing, source },
        }
    }

    /// "Nothing was written" is not true of a call of several steps whose first ones were confirmed.
    pub(super) fn after_some_were_written(self) -> Self {
        match self {
            Self::Unavailable { server, doing, source } | Self::SentinelLogin { sentinel: server, doing, source } => {
                Self::OutcomeUnknown { server, doing, source }
            }
            other => other,
        }
    }

    /// Nothing was sent to this server, because it did not answer a moment ago.
    pub(crate) fn not_tried(server: &str) -> Self {
        let what = "not tried: it did not answer a moment ago, and a transaction shall not wait for it";
        let source = RedisError::from((ErrorKind::Io, what));
        Self::Unavailable { server: server.to_owned(), doing: "publishing to streams", source }
    }

    /// Which server failed, where one did.
    pub(crate) fn server(&self) -> Option<&str> {
        match self {
            Self::Unavailable { server, .. }
            | Self::OutcomeUnknown { server, .. }
            | Self::SentinelLogin { sentinel: server, .. } => Some(server),
            _ => None,
        }
    }

    /// An error of a step before the command itself, which was not sent then.
    pub(super) fn before_it_was_sent(self, server: &str) -> Self {
        match self {
            Self::Refused { doing, source, .. } => Self::Unavailable { server: server.to_owned(), doing, source },
            Self::OutcomeUnknown { server, doing, source } => Self::Unavailable { server, doing, source },
            other => other,
        }
    }

    /// Names the key, where Redis does not.
    pub(super) fn about(self, key: &str) -> Self {
        match self {
            Self::Refused { doing, source, .. } if source.code() == Some(WRONG_TYPE) => {
                Self::Refused { doing, key: Some(key.to_owned()), source }
            }
            other => other,
        }
    }

    /// The node that the cluster has moved the slot to. Without a host, it is that of the node that said so.
    /// <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#moved-redirection>
    pub(super) fn moved_to(&self) -> Option<Address> {
        let Self::Unavailable { server, source, .. } = self else { return None };
        if source.kind() != ErrorKind::Server(ServerErrorKind::Moved) {
            return None;
        }
        let (host, port) = split(source.redirect_node()?.0)?;
        match host.as_str() {
            "" | "?" => Some((split(server)?.0, port)),
            _ => Some((host, port)),
        }
    }

    /// True when Redis is at its `maxmemory`: it writes again when there is room, and goes on acknowledging meanwhile.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Unavailable { source, .. } if source.code() == Some("OOM"))
    }

    /// True when a server could not do it for any stream: it is away, cannot work now, or its answer was lost.
    pub(crate) fn is_of_server(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::OutcomeUnknown { .. } | Self::NotReplicated { .. })
    }

    /// True when the same call may succeed later: an outage, not a fault of the event.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. }
                | Self::SentinelLogin { .. }
                | Self::OutcomeUnknown { .. }
                | Self::StrangeMarker { .. }
                | Self::NotReplicated { .. }
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

/// True when an `XADD` was refused because of its own fields (`streamAppendItem` in the server's `t_stream.c`). Every other refusal, also one
/// that is not known here, would meet the next event of the stream as well: a key of another type, a missing permission, an unknown
/// command, ids that are used up. The script of the append looks for the same words.
pub(super) fn concerns_event(error: &str) -> bool {
    error.contains("too large to be stored")
}

#[cfg(test)]
mod tests {
    use redis::{RedisResult, Value, from_redis_value};

    use super::*;

    /// What the redis crate makes of the server's words.
    fn said(words: &str) -> StreamsError {
        let value = redis::parse_redis_value(format!("-{words}\r\n").as_bytes()).expect("an answer");
        let read: RedisResult<Value> = value.extract_error().and_then(|value| Ok(from_redis_value(value)?));
        StreamsError::new("10.0.0.7:6379", "testing", read.expect_err("an error"))
    }

    #[test]
    fn a_redirection_without_a_host_leads_to_that_of_the_node_that_was_asked() {
        let to = |host: &str, port| Some((host.to_owned(), port));
        assert_eq!(said("MOVED 3999 10.0.0.8:6381").moved_to(), to("10.0.0.8", 6_381));
        assert_eq!(said("MOVED 3999 :6381").moved_to(), to("10.0.0.7", 6_381));
        assert_eq!(said("MOVED 3999 ?:6381").moved_to(), to("10.0.0.7", 6_381));
        assert_eq!(said("MOVED 3999 fd00::2:6381").moved_to(), to("fd00::2", 6_381));
        assert_eq!(said("ASK 3999 10.0.0.8:6381").moved_to(), None);
        assert_eq!(said("LOADING a moment").moved_to(), None);
    }

    #[test]
    fn a_key_of_another_type_is_named() {
        let error = said("WRONGTYPE Operation against a key holding the wrong kind of value").about("events:user");
        assert!(error.to_string().contains("events:user"), "{error}");
        assert!(!error.is_outage());
        let other = said("NOPERM no permission").about("events:user");
        assert!(matches!(other, StreamsError::Refused { key: None, .. }), "{other:?}");
    }
}
