use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use redis::Script;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::bury::{FIELDS, buried_key};
use super::read::Entry;
use super::{RETURNED, Streams, StreamsError, dead_stream, group_key};

/// Makes an entry pending again for a group, or a copy of it if the stream has it no more, and remembers that for a day: a second
/// call changes nothing, even when the event was handled meanwhile. What is refused is refused before the marker is written.
///
/// What is pending already is left alone: in a cluster, the consumer that buried it may be about to acknowledge it.
static RETRY: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local retried = redis.pcall('GET', KEYS[3])
        if type(retried) == 'table' and retried.err then return retried end
        if retried then return {'before', ''} end
        local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
        if pending.err then return pending end
        local entries = redis.pcall('XRANGE', KEYS[1], ARGV[2], ARGV[2])
        if entries.err then return entries end
        local answer
        if #entries > 0 then
            if #pending > 0 then return {'pending', pending[1][2]} end
            local claimed = redis.pcall('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[2], 'FORCE', 'JUSTID')
            if claimed.err then return claimed end
            answer = {'entry', ''}
        else
            local add = {'XADD', KEYS[1], '*'}
            for i = 5, #ARGV do add[#add + 1] = ARGV[i] end
            local added = redis.pcall(unpack(add))
            if type(added) == 'table' and added.err then return added end
            answer = {'copy', added}
        end
        redis.call('SET', KEYS[3], answer[1], 'PX', ARGV[4])
        redis.call('HDEL', KEYS[2], ARGV[2])
        return answer
        ",
    )
});

/// How long a retry is remembered whose dead letter was left behind: a day.
const MARKER_LIFE_MS: u64 = 86_400_000;

const READING: &str = "reading dead letters";
const RETRYING: &str = "delivering a dead letter again";

/// An event that a consumer group gave up, and why. What is not there was not in the entry, or the entry was gone.
#[derive(Debug, Clone, Serialize)]
pub struct DeadLetter {
    /// Where the event was, such as `events:user`; the dead letter itself is in [`dead_stream`] of it.
    pub stream: String,
    /// Of the dead letter, `<milliseconds>-<sequence>`.
    pub dead_id: String,
    pub group: String,
    /// Id of the entry that was given up.
    pub entry: String,
    pub reason: String,
    pub attempts: u32,
    /// JSON array of the failed attempts.
    pub history: Option<Box<RawValue>>,
    pub dead_at: Option<DateTime<Utc>>,
    pub event_id: Option<String>,
    pub event_type: Option<String>,
    pub aggregate_type: Option<String>,
    pub aggregate_id: Option<String>,
    pub occurred_at: Option<String>,
    pub payload: Option<Box<RawValue>>,
    pub headers: Option<Box<RawValue>>,
}

/// How a dead letter was delivered again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetriedAs {
    /// The entry is pending again, for [`RETURNED`].
    Entry,
    /// The entry had been trimmed away: its event has a new entry of this id, whose last field `group` names the only group that it
    /// is for.
    Copy(String),
    /// Earlier: only the dead letter had been left behind, or not even that.
    Before,
    /// Nothing was done, and the dead letter stays: this consumer of the group has the entry in hand.
    Pending(String),
}

impl DeadLetter {
    fn new(stream: &str, entry: &Entry) -> Self {
        let field = |name: &str| entry.field(name).map(str::to_owned);
        let json = |name: &str| {
            let text = entry.field(name)?;
            RawValue::from_string(text.to_owned()).or_else(|_| to_raw_value(text)).ok()
        };
        Self {
            stream: stream.to_owned(),
            dead_id: entry.id.clone(),
            group: field("group").unwrap_or_default(),
            entry: field("entry").unwrap_or_default(),
            reason: field("reason").unwrap_or_default(),
            attempts: entry.field("attempts").and_then(|text| text.parse().ok()).unwrap_or_default(),
            history: json("history"),
            dead_at: entry.field("dead_at").and_then(|text| text.parse().ok()),
            event_id: field("id"),
            event_type: field("type"),
            aggregate_type: field("aggregate_type"),
            aggregate_id: field("aggregate_id"),
            occurred_at: field("occurred_at"),
            payload: json("payload"),
            headers: json("headers"),
        }
    }
}

impl Streams {
    /// Up to `count` dead letters of the events in `stream` after the dead letter `after` (`0` is before the first), oldest first.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn dead_letters(&self, stream: &str, after: &str, count: usize) -> Result<Vec<DeadLetter>, StreamsError> {
        let entries = self.range(&dead_stream(stream), after, count).await?;
        Ok(entries.iter().map(|entry| DeadLetter::new(stream, entry)).collect())
    }

    /// The dead letter of this id, if there is one.
    ///
    /// # Errors
    /// Redis is not reachable or refuses; the latter also of what is no id.
    pub async fn dead_letter(&self, stream: &str, dead_id: &str) -> Result<Option<DeadLetter>, StreamsError> {
        let dead = dead_stream(stream);
        let mut command = redis::cmd("XRANGE");
        command.arg(&dead).arg(dead_id).arg(dead_id);
        let found: redis::streams::StreamRangeReply = self.query(READING, &dead, &command).await?;
        Ok(found.ids.first().map(|entry| DeadLetter::new(stream, &Entry::new(&dead, entry))))
    }

    /// Deletes a dead letter for good; `false` if there is none of this id.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn discard_dead(&self, stream: &str, dead_id: &str) -> Result<bool, StreamsError> {
        let dead = dead_stream(stream);
        self.query("discarding a dead letter", &dead, redis::cmd("XDEL").arg(&dead).arg(dead_id)).await
    }

    /// Delivers a dead letter to its group again, and to no other, and removes it then. Calling it again is safe.
    ///
    /// # Errors
    /// [`StreamsError::NoGroup`] and [`StreamsError::EmptyDeadLetter`]; else Redis is not reachable or refuses. The dead letter is still
    /// there then.
    pub async fn retry_dead(&self, letter: &DeadLetter) -> Result<RetriedAs, StreamsError> {
        let DeadLetter { stream, group, entry, dead_id, .. } = letter;
        let dead = dead_stream(stream);
        let Some(mut fields) = self.fields_of_event(&dead, dead_id).await? else { return Ok(RetriedAs::Before) };
        if fields.is_empty() {
            return Err(StreamsError::EmptyDeadLetter { stream: stream.clone(), dead_id: dead_id.clone() });
        }
        // A copy that is dead again is marked as one already.
        let mark = (FIELDS[0].as_bytes().to_vec(), group.as_bytes().to_vec());
        if fields.last() != Some(&mark) {
            fields.push(mark);
        }
        if self.is_cluster() {
            // First of all: from now on the entry may be buried again.
            let key = buried_key(stream, group, entry);
            self.query::<()>(RETRYING, &key, redis::cmd("DEL").arg(&key)).await?;
        }
        let mut call = RETRY.prepare_invoke();
        call.key(stream).key(group_key(stream, group, "failures")).key(format!("{{{stream}}}:retried:{group}:{dead_id}"));
        call.arg(group).arg(entry).arg(RETURNED).arg(MARKER_LIFE_MS);
        for (name, value) in &fields {
            call.arg(name.as_slice()).arg(value.as_slice());
        }
        let (how, detail): (String, String) = match self.invoke(RETRYING, stream, &call).await {
            Err(StreamsError::Refused { source, .. }) if source.code() == Some("NOGROUP") => {
                return Err(StreamsError::NoGroup { stream: stream.clone(), group: group.clone() });
            }
            answer => answer?,
        };
        let retried = match how.as_str() {
            "pending" => return Ok(RetriedAs::Pending(detail)),
            "entry" => RetriedAs::Entry,
            "copy" => RetriedAs::Copy(detail),
            _ => RetriedAs::Before,
        };
        self.discard_dead(stream, dead_id).await.map_err(StreamsError::after_some_were_written)?;
        Ok(retried)
    }

    /// The fields that a dead letter has from its entry, as they are; `None` if there is no such dead letter. None at all are those of
    /// what is no dead letter.
    async fn fields_of_event(&self, dead: &str, dead_id: &str) -> Result<Option<Vec<Field>>, StreamsError> {
        let mut command = redis::cmd("XRANGE");
        command.arg(dead).arg(dead_id).arg(dead_id);
        let entries: Vec<(String, Vec<Field>)> = self.query(READING, dead, &command).await?;
        let Some((_, mut fields)) = entries.into_iter().next() else { return Ok(None) };
        let own = fields.split_off(fields.len().saturating_sub(FIELDS.len()));
        let is_dead_letter = own.iter().map(|(name, _)| name.as_slice()).eq(FIELDS.map(str::as_bytes));
        Ok(Some(if is_dead_letter { fields } else { Vec::new() }))
    }
}

type Field = (Vec<u8>, Vec<u8>);
