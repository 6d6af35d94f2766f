use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use redis::streams::StreamReadReply;
use tokio::time::{Instant, timeout_at};

use super::read::Entry;
use super::{Streams, StreamsError};

/// Longest wait of a call.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Longest wait of one blocking read: so long, a connection that is dead is not noticed.
const LONGEST_BLOCK: Duration = Duration::from_secs(1);

impl Streams {
    /// Follows streams on connections of its own: one, or in a cluster, one for each stream. `positions` maps each stream to
    /// the entry id after which to start.
    #[must_use]
    pub fn tail(&self, positions: BTreeMap<String, String>) -> StreamTail {
        let mut tail = StreamTail { streams: self.clone(), groups: Vec::new(), reads: FuturesUnordered::new() };
        positions.iter().for_each(|(stream, after)| tail.follow(stream, after));
        tail
    }
}

/// New entries of several streams, as they come.
#[derive(Debug)]
pub struct StreamTail {
    streams: Streams,
    groups: Vec<Group>,
    /// On their way. A read that is not over when a call ends goes on, and a later call has its answer.
    reads: FuturesUnordered<BoxFuture<'static, (usize, ReadAnswer)>>,
}

type ReadAnswer = Result<Option<StreamReadReply>, StreamsError>;

/// Streams that one command can read: all or, in a cluster, one, since others are in other slots.
#[derive(Debug)]
struct Group {
    connection: Streams,
    positions: BTreeMap<String, String>,
    is_being_read: bool,
}

impl StreamTail {
    /// Adds a stream unless it is followed already.
    pub fn follow(&mut self, stream: &str, after: &str) {
        if self.groups.iter().any(|group| group.positions.contains_key(stream)) {
            return;
        }
        let position = (stream.to_owned(), after.to_owned());
        match self.groups.first_mut() {
            Some(group) if !self.streams.is_cluster() => group.positions.extend([position]),
            _ => {
                let connection = self.streams.dedicated(LONGEST_BLOCK);
                self.groups.push(Group { connection, positions: [position].into(), is_being_read: false });
            }
        }
    }

    /// Waits up to `patience` (5 s at most) for entries, and returns up to `count` of each stream.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn next(&mut self, count: usize, patience: Duration) -> Result<Vec<Entry>, StreamsError> {
        let deadline = Instant::now() + patience.min(LONGEST_WAIT);
        if self.groups.is_empty() {
            tokio::time::sleep_until(deadline).await;
        }
        loop {
            self.start_reads(count, deadline);
            let mut answer = timeout_at(deadline, self.reads.next()).await.ok().flatten();
            let (mut entries, mut failure) = (Vec::new(), None);
            while let Some((at, read)) = answer {
                match read {
                    Ok(reply) => self.groups[at].take(reply, &mut entries),
                    Err(error) => failure = Some(error),
                }
                self.groups[at].is_being_read = false;
                answer = self.reads.next().now_or_never().flatten();
            }
            match failure {
                // Entries come first: the failure comes again.
                Some(error) if entries.is_empty() => return Err(error),
                None if entries.is_empty() && Instant::now() < deadline => {}
                _ => return Ok(entries),
            }
        }
    }

    fn start_reads(&mut self, count: usize, deadline: Instant) {
        let block = deadline.saturating_duration_since(Instant::now()).min(LONGEST_BLOCK).as_millis();
        for (at, group) in self.groups.iter_mut().enumerate().filter(|(_, group)| !group.is_being_read) {
            group.is_being_read = true;
            let mut command = redis::cmd("XREAD");
            // 0 would wait for ever.
            command.arg("COUNT").arg(count).arg("BLOCK").arg(u64::try_from(block).unwrap_or(1).max(1)).arg("STREAMS");
            command.arg(group.positions.keys().collect::<Vec<_>>());
            command.arg(group.positions.values().collect::<Vec<_>>());
            let key = group.positions.keys().next().cloned().unwrap_or_default();
            let connection = group.connection.clone();
            let read = async move { (at, connection.query("following streams", &key, &command).await) };
            self.reads.push(read.boxed());
        }
    }
}

impl Group {
    fn take(&mut self, reply: Option<StreamReadReply>, entries: &mut Vec<Entry>) {
        for key in reply.into_iter().flat_map(|reply| reply.keys) {
            if let Some(last) = key.ids.last() {
                self.positions.insert(key.key.clone(), last.id.clone());
            }
            entries.extend(key.ids.iter().map(|entry| Entry::new(&key.key, entry)));
        }
    }
}
