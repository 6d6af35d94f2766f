use std::collections::{BTreeSet, HashMap};

use redis::streams::{StreamId, StreamRangeReply};

use super::{Streams, StreamsError};
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

    /// A field as it stands in the entry.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }
}

impl Streams {
    /// The streams under the prefix, sorted.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn list(&self) -> Result<Vec<String>, StreamsError> {
        let doing = "listing streams";
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
        let mut command = redis::cmd("XRANGE");
        command.arg(stream).arg(format!("({after}")).arg("+").arg("COUNT").arg(count);
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
}

/// `SCAN` matches globs; a prefix may hold characters that mean something there.
pub(super) fn escape_glob(text: &str) -> String {
    text.chars().flat_map(|c| if "*?[]\\^".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
}
