use thiserror::Error;

/// Why an event cannot be published, and then nothing was sent and the caller's transaction is untouched; or why it cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EventError {
    #[error("{field} is empty: give it 1 to {max} bytes", max = crate::event::EventEnvelope::MAX_NAME_BYTES)]
    Empty { field: &'static str },

    #[error("{field} has {bytes} bytes: at most {max} are allowed")]
    TooLong { field: &'static str, bytes: usize, max: usize },

    #[error("{field} contains a NUL character, which PostgreSQL cannot store: remove it")]
    Nul { field: &'static str },

    #[error("{field} holds JSON that PostgreSQL cannot store: {why}")]
    Json { field: &'static str, why: &'static str },

    #[error("aggregate_type {0:?} contains a brace: braces would change the Redis Cluster slot of its stream")]
    Brace(String),

    #[error("aggregate_type {0:?} ends in :dead: the streams of dead letters are named so")]
    Dead(String),

    #[error(
        "the event has {bytes} bytes of payload and headers as jsonb writes them: at most {max} are allowed (setting app.eventPublishing.maxPayloadBytes)"
    )]
    TooLarge { bytes: usize, max: usize },

    #[error("occurred_at {0} lies outside the years 1 to 9999")]
    Time(chrono::DateTime<chrono::Utc>),

    #[error("the event cannot be written as JSON")]
    Serialize(#[source] serde_json::Error),

    #[error("stream entry {entry} is not an event: {reason}")]
    Decode { entry: String, reason: String },

    #[error("the payload is not that of {event_type}")]
    Payload {
        event_type: String,
        #[source]
        source: serde_json::Error,
    },
}
