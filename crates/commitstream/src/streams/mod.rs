//! All Redis commands: the append of the protocol, the direct lane, reading, and trimming.

mod append;
mod cluster;
mod connection;
mod error;
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
pub use connection::Streams;
pub use error::StreamsError;
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
