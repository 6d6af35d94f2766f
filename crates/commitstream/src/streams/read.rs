use std::collections::{BTreeSet, HashMap};

use redis::streams::{StreamId, StreamRangeReply};

use super::{DEAD, Streams, StreamsError};
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
    /// The streams of events under the prefix, sorted. Those of dead letters are left out.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn list(&self) -> Result<Vec<String>, StreamsError> {
        let mut streams = self.keys("listing streams").await?;
        streams.retain(|key| self.without_dead(key).is_none());
        Ok(streams)
    }

    /// The streams that have dead letters, or had some, sorted: the events' stream of each, for [`dead_letters`](Self::dead_letters).
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn dead_streams(&self) -> Result<Vec<String>, StreamsError> {
        let keys = self.keys("listing dead letters").await?;
        Ok(keys.iter().filter_map(|key| self.without_dead(key)).map(str::to_owned).collect())
    }

    /// Of the key of a stream of dead letters, that of the events' stream. The stream of the aggregate type `dead` is none.
    pub(super) fn without_dead<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_suffix(DEAD).filter(|stream| stream.len() > self.prefix.len())
    }

    /// Every stream under the prefix, sorted.
    async fn keys(&self, doing: &'static str) -> Result<Vec<String>, StreamsError> {
        let pattern = format!("{}*", escape_glob(&self.prefix));
        let mut found = BTreeSet::new();
        for master in self.masters(doing).await? {
            let mut cursor = 0_u64;
            loop {
                let mut scan = redis::cmd("SCAN");
                scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1_000).arg("TYPE").arg("stream");
                let (next, keys): (u64, Vec<String>) = master.query(doing, &scan).await?;
                found.extend(keys);
                cursor = next;
                if cursor == 0 {
                    break;
                }
            }
        }
        Ok(found.into_iter().collect())
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

    /// How a stream stands; `None` when there is none.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub(crate) async fn info(&self, stream: &str) -> Result<Option<StreamInfo>, StreamsError> {
        match self.query("looking at a stream", stream, redis::cmd("XINFO").arg("STREAM").arg(stream)).await {
            Ok(info) => Ok(Some(info)),
            Err(StreamsError::Refused { source, .. }) if source.detail() == Some("no such key") => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// `SCAN` matches globs; a prefix may hold characters that mean something there.
pub(super) fn escape_glob(text: &str) -> String {
    text.chars().flat_map(|c| if "*?[]\\^".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
}

/// What Redis says of a stream as a whole.
#[derive(Debug)]
pub(crate) struct StreamInfo {
    pub(super) length: u64,
    /// Redis 7 counts them; earlier versions do not.
    pub(super) entries_added: Option<u64>,
    pub(crate) first_id: Option<String>,
    /// Of the last entry there ever was.
    pub(crate) last_id: String,
}

impl StreamInfo {
    /// Entries may have been trimmed or deleted. Before Redis 7 nobody knows.
    pub(crate) fn is_trimmed(&self) -> bool {
        self.entries_added.is_none_or(|added| added > self.length)
    }
}

impl redis::FromRedisValue for StreamInfo {
    fn from_redis_value(value: redis::Value) -> Result<Self, redis::ParsingError> {
        let mut fields: HashMap<String, redis::Value> = redis::from_redis_value(value)?;
        let mut field = |name: &str| fields.remove(name).unwrap_or(redis::Value::Nil);
        let first: Option<(String, redis::Value)> = redis::from_redis_value(field("first-entry"))?;
        Ok(Self {
            length: redis::from_redis_value(field("length"))?,
            entries_added: redis::from_redis_value(field("entries-added"))?,
            first_id: first.map(|(id, _)| id),
            last_id: redis::from_redis_value(field("last-generated-id"))?,
        })
    }
}
