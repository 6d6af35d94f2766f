//! All Redis commands: the append of the protocol, the direct lane, reading, consumer groups and their dead letters, trimming.

mod append;
mod bury;
mod cluster;
mod connection;
mod dead;
mod dead_groups;
mod effects;
mod error;
pub mod examine;
mod groups;
mod locate;
mod members;
mod node;
mod open;
mod presence;
mod publish;
mod read;
mod registry;
#[cfg(feature = "lab")]
mod remove;
mod replicas;
mod sentinel;
mod server;
mod tail;
mod trim;

pub use append::{Appended, Marker, StreamRefusal};
pub use bury::Burial;
pub use connection::Streams;
pub use dead::{DeadLetter, RetriedAs};
pub use dead_groups::{DeadGroup, DeadGroups, cause_of};
pub(crate) use effects::Effect;
pub use error::StreamsError;
pub(crate) use error::is_outage;
pub use groups::{GroupConsumer, GroupInfo, GroupLag};
pub(crate) use locate::position;
pub use locate::{Delivery, GroupDelivery, StreamFigures};
pub use members::{Cycle, EntryId, Member, Received, Sweep, TakenOver, Takeover};
pub use presence::Presence;
pub use publish::NotPublished;
pub use read::{Entry, StreamInfo};
pub use registry::{Owner, Registered, SharedStream};
pub use tail::StreamTail;
pub use trim::{Excess, Trimmed};

/// Key of the marker that decides whether a batch was appended. It shares the hash slot of its stream, so that one script
/// may touch both in Redis Cluster.
fn marker_key(stream: &str, batch_id: uuid::Uuid) -> String {
    format!("{{{stream}}}:batch:{batch_id}")
}

/// Key of what the consumers of a group keep beside their stream, in its hash slot: `members`, `owners`, `failures`; an empty name makes their prefix.
fn group_key(stream: &str, group: &str, name: &str) -> String {
    format!("{{{stream}}}:group:{group}:{name}")
}

/// A consumer of every group that nobody is: a living one takes over what is pending for it.
pub const RETURNED: &str = "returned";

/// What the key of a stream of dead letters ends in; so no aggregate type may.
pub(crate) const DEAD: &str = ":dead";

/// Key of the stream that takes the dead letters of `stream`.
#[must_use]
pub fn dead_stream(stream: &str) -> String {
    format!("{stream}{DEAD}")
}
