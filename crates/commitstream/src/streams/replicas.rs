//! `WAIT`: a batch counts as appended once enough replicas have it.

use std::time::Duration;

use uuid::Uuid;

use super::append::millis;
use super::node::Request;
use super::{Streams, StreamsError, marker_key};
use crate::config::RedisSettings;

const DOING: &str = "waiting for replicas";

pub(super) struct Replicas {
    count: u32,
    timeout: Duration,
    /// `WAIT` blocks the connection that it runs on.
    connection: Streams,
}

impl Replicas {
    /// `None` if nothing is to be waited for.
    pub fn new(streams: &Streams, settings: &RedisSettings) -> Option<Self> {
        let (count, timeout) = (settings.wait_replicas, settings.wait_timeout);
        (count > 0).then(|| Self { count, timeout, connection: streams.dedicated(timeout) })
    }
}

impl Streams {
    /// Returns when enough replicas have what became of the batch, if any are to be waited for.
    ///
    /// `WAIT` speaks of the last write on its own connection. So the marker's life is set once more before it, in the same
    /// pipeline: on whatever connection and after whatever reconnection, the replicas that confirm this write have
    /// the marker, and with it the entries. If the marker is gone, a failover has lost the batch meanwhile.
    ///
    /// # Errors
    /// Always an outage: the batch is in the stream, or was. Append it again.
    pub(super) async fn await_replicas(&self, stream: &str, batch_id: Uuid, marker_life: Duration) -> Result<(), StreamsError> {
        let Some(Replicas { count, timeout, connection }) = self.replicas.as_deref() else { return Ok(()) };
        let mut wait = redis::pipe();
        wait.cmd("PEXPIRE").arg(marker_key(stream, batch_id)).arg(millis(marker_life));
        wait.cmd("WAIT").arg(count).arg(millis(*timeout));
        let too_few = |confirmed, source| {
            let (stream, wanted, timeout) = (stream.to_owned(), *count, *timeout);
            Err(StreamsError::NotReplicated { stream, confirmed, wanted, timeout, source })
        };
        match connection.send::<(bool, u32)>(DOING, stream, Request::Blocking(&wait)).await {
            Ok((true, confirmed)) if confirmed >= *count => Ok(()),
            Ok((true, confirmed)) => too_few(confirmed, None),
            Ok((false, _)) => too_few(0, None),
            Err(StreamsError::Refused { source, .. }) => too_few(0, Some(source)),
            Err(error) => Err(error.after_some_were_written()),
        }
    }
}
