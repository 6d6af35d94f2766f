//! All Redis commands: the append of the protocol, the direct lane, reading, and trimming.

mod append;
mod bury;
mod cluster;
mod connection;
mod effects;
mod error;
mod group;
mod node;
mod presence;
mod publish;
mod read;
mod remove;
mod replicas;
mod sentinel;
mod server;
mod tail;
mod trim;

pub use append::{Appended, Marker, StreamRefusal};
pub use bury::Burial;
pub use connection::Streams;
pub use error::StreamsError;
pub use group::{Cycle, EntryId, Member, Received, TakenOver};
pub use presence::Presence;
pub use publish::NotPublished;
pub use read::Entry;
pub use tail::StreamTail;
pub use trim::{Excess, Trimmed};

/// Key of the marker that decides whether a batch was appended. It shares the hash slot of its stream, so that one script
/// may touch both in Redis Cluster.
fn marker_key(stream: &str, batch_id: uuid::Uuid) -> String {
    format!("{{{stream}}}:batch:{batch_id}")
}

/// Key of what the members of a consumer group share, in the hash slot of its stream.
fn group_key(stream: &str, group: &str, name: &str) -> String {
    format!("{{{stream}}}:group:{group}:{name}")
}

/// What the key of a stream of dead letters ends in; so no aggregate type may.
pub(crate) const DEAD: &str = ":dead";

/// Key of the stream that takes the dead letters of `stream`.
#[must_use]
pub fn dead_stream(stream: &str) -> String {
    format!("{stream}{DEAD}")
}
