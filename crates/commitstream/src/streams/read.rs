use std::collections::HashMap;
use std::sync::LazyLock;

use redis::Script;
use redis::streams::{StreamId, StreamRangeReply};

use super::node::Request;
use super::{DEAD, Streams, StreamsError, dead_stream};
use crate::event::{EventEnvelope, EventError};

/// One entry of a stream.
#[derive(Debug, Clone)]
pub struct Entry {
    pub stream: String,
    /// Redis's id, `<milliseconds>-<sequence>`.
    pub id: String,
    fields: HashMap<String, String>,
}

impl Entry {
    pub(super) fn new(stream: &str, entry: &StreamId) -> Self {
        let text = |value: &redis::Value| match value {
            redis::Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            other => format!("{other:?}"),
        };
        let fields = entry.map.iter().map(|(name, value)| (name.clone(), text(value))).collect();
        Self { stream: stream.to_owned(), id: entry.id.clone(), fields }
    }

    /// The event in the entry.
    ///
    /// # Errors
    /// The entry was written by something else, or is malformed.
    pub fn envelope(&self) -> Result<EventEnvelope, EventError> {
        EventEnvelope::from_fields(&self.id, |name| self.fields.get(name).map(String::as_str))
    }

    /// Bytes of all fields and their names.
    pub(crate) fn bytes(&self) -> usize {
        self.fields.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// A field as it stands in the entry.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }
}

impl Streams {
    /// The streams that have dead letters, sorted: the events' stream of each, for [`dead_letters`](Self::dead_letters).
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn dead_streams(&self) -> Result<Vec<String>, StreamsError> {
        let doing = "listing dead letters";
        let streams = self.list().await?;
        let mut found = Vec::new();
        for (node, streams) in self.by_node(doing, streams, |stream| dead_stream(stream)).await? {
            for streams in streams.chunks(KEYS_AT_ONCE) {
                let mut look = redis::pipe();
                for stream in streams {
                    look.cmd("EXISTS").arg(dead_stream(stream));
                }
                let there: Vec<bool> = node.send(doing, Request::Pipeline(&look)).await?;
                found.extend(streams.iter().zip(there).filter(|(_, there)| *there).map(|(stream, _)| stream.clone()));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Of the key of a stream of dead letters, that of the events' stream. The stream of the aggregate type `dead` is none.
    pub(super) fn without_dead<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_suffix(DEAD).filter(|stream| stream.len() > self.prefix.len())
    }

    /// Up to `count` entries after the entry id `after` (`0` is before the first), oldest first.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn range(&self, stream: &str, after: &str, count: usize) -> Result<Vec<Entry>, StreamsError> {
        self.between(stream, after, "+", count).await
    }

    /// As [`range`](Self::range), up to and including the entry id `last`.
    pub(crate) async fn between(&self, stream: &str, after: &str, last: &str, count: usize) -> Result<Vec<Entry>, StreamsError> {
        let mut command = redis::cmd("XRANGE");
        command.arg(stream).arg(format!("({after}")).arg(last).arg("COUNT").arg(count);
        let reply: StreamRangeReply = self.query("reading a stream", stream, &command).await?;
        Ok(reply.ids.iter().map(|entry| Entry::new(stream, entry)).collect())
    }

    /// The newest `count` entries, oldest first.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn newest(&self, stream: &str, count: usize) -> Result<Vec<Entry>, StreamsError> {
        let mut command = redis::cmd("XREVRANGE");
        command.arg(stream).arg("+").arg("-").arg("COUNT").arg(count);
        let reply: StreamRangeReply = self.query("reading a stream", stream, &command).await?;
        Ok(reply.ids.iter().rev().map(|entry| Entry::new(stream, entry)).collect())
    }

    /// Number of entries; 0 when there is no such stream.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn len(&self, stream: &str) -> Result<u64, StreamsError> {
        self.query("measuring a stream", stream, redis::cmd("XLEN").arg(stream)).await
    }

    /// Number of entries of each stream, in their order.
    pub(crate) async fn lens(&self, streams: &[String]) -> Result<Vec<u64>, StreamsError> {
        let doing = "measuring streams";
        let mut lens = vec![0; streams.len()];
        for (node, of_node) in self.by_node(doing, 0..streams.len(), |at| streams[*at].clone()).await? {
            for of_node in of_node.chunks(KEYS_AT_ONCE) {
                let mut look = redis::pipe();
                for at in of_node {
                    look.cmd("XLEN").arg(&streams[*at]);
                }
                let found: Vec<u64> = node.send(doing, Request::Pipeline(&look)).await?;
                of_node.iter().zip(found).for_each(|(at, len)| lens[*at] = len);
            }
        }
        Ok(lens)
    }

    /// How a stream stands; `None` when there is none. No payload is sent for it.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub(crate) async fn state(&self, stream: &str) -> Result<Option<StreamInfo>, StreamsError> {
        let found: Vec<(u64, i64, String, String)> = self.invoke("looking at a stream", stream, &STATE.key(stream)).await?;
        Ok(found.into_iter().next().map(|(length, entries_added, first_id, last_id)| StreamInfo {
            length,
            entries_added: u64::try_from(entries_added).ok(),
            first_id: Some(first_id).filter(|id| !id.is_empty()),
            last_id,
        }))
    }
}

/// Keys that one pipeline asks for.
const KEYS_AT_ONCE: usize = 500;

/// What `XINFO STREAM` says, without its entries.
static STATE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
        if info.err then
            if string.find(info.err, 'no such key', 1, true) then return {} end
            return info
        end
        local fields = {}
        for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
        local first = fields['first-entry']
        return {{fields['length'], fields['entries-added'] or -1, first and first[1] or '', fields['last-generated-id']}}
        ",
    )
});

/// `SCAN` matches globs; a prefix may hold characters that mean something there.
pub(super) fn escape_glob(text: &str) -> String {
    text.chars().flat_map(|c| if "*?[]\\^".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
}

/// What Redis says of a stream as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    pub length: u64,
    /// Redis 7 counts them; earlier versions do not.
    pub entries_added: Option<u64>,
    pub first_id: Option<String>,
    /// Of the last entry there ever was.
    pub last_id: String,
}

impl StreamInfo {
    /// Entries may have been trimmed or deleted. Before Redis 7 nobody knows.
    #[must_use]
    pub fn is_trimmed(&self) -> bool {
        self.entries_added.is_none_or(|added| added > self.length)
    }
}
