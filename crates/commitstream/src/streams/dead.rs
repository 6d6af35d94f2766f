use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use redis::{Script, Value};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::bury::{FIELDS, buried_key};
use super::node::Request;
use super::read::Entry;
use super::{RETURNED, Streams, StreamsError, dead_stream, group_key};

/// A function that makes an entry pending again for a group, or a copy of it if the stream has it no more, and remembers that for a day: a
/// second call changes nothing, even when the event was handled meanwhile. What is refused is refused before the marker is written.
///
/// What is pending already is left alone: in a cluster, the consumer that buried it may be about to acknowledge it.
const DELIVER: &str = r"
    local function deliver(fields)
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
            for i = 1, #fields do add[#add + 1] = fields[i] end
            local added = redis.pcall(unpack(add))
            if type(added) == 'table' and added.err then return added end
            answer = {'copy', added}
        end
        redis.call('SET', KEYS[3], answer[1], 'PX', ARGV[4])
        redis.call('HDEL', KEYS[2], ARGV[2])
        return answer
    end
";

/// Where the dead letter is on another node: its fields are given (`ARGV[5]` and on), and it is deleted after that.
static RETRY: LazyLock<Script> = LazyLock::new(|| {
    let given = r"
    local fields = {}
    for i = 5, #ARGV do fields[#fields + 1] = ARGV[i] end
    return deliver(fields)
    ";
    Script::new(&[DELIVER, given].concat())
});

/// Where it is beside its stream: the dead letter `ARGV[5]` of the stream KEYS[4], whose last fields are named `ARGV[6]` and on, is deleted
/// together with its delivery. So no payload leaves Redis, and many can be called for at once.
/// With its text, since a pipeline loads it before it calls it.
static RETRY_HERE: LazyLock<(Script, String)> = LazyLock::new(|| {
    let here = r"
    local letters = redis.pcall('XRANGE', KEYS[4], ARGV[5], ARGV[5])
    if letters.err then return letters end
    if not letters[1] then return {'before', ''} end
    local fields, own = letters[1][2], #ARGV - 5
    local of_event = {}
    for i = 1, #fields - 2 * own do of_event[i] = fields[i] end
    for i = 1, own do
        if fields[#of_event + 2 * i - 1] ~= ARGV[5 + i] then return {'empty', ''} end
    end
    if #of_event == 0 then return {'empty', ''} end
    if of_event[#of_event - 1] ~= ARGV[6] or of_event[#of_event] ~= ARGV[1] then
        of_event[#of_event + 1], of_event[#of_event + 2] = ARGV[6], ARGV[1]
    end
    local answer = deliver(of_event)
    if answer.err or answer[1] == 'pending' then return answer end
    local deleted = redis.pcall('XDEL', KEYS[4], ARGV[5])
    if type(deleted) == 'table' then return deleted end
    return answer
    ";
    let text = [DELIVER, here].concat();
    (Script::new(&text), text)
});

/// How long a retry is remembered whose dead letter was left behind: a day.
const MARKER_LIFE_MS: u64 = 86_400_000;

/// Dead letters that one pipeline delivers.
const RETRIED_AT_ONCE: usize = 200;

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

    /// Deletes dead letters of one stream for good.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn discard_dead_letters(&self, stream: &str, dead_ids: &[&str]) -> Result<(), StreamsError> {
        if dead_ids.is_empty() {
            return Ok(());
        }
        let dead = dead_stream(stream);
        self.query("discarding dead letters", &dead, redis::cmd("XDEL").arg(&dead).arg(dead_ids)).await
    }

    /// Delivers a dead letter to its group again, and to no other, and removes it then. Calling it again is safe.
    ///
    /// # Errors
    /// [`StreamsError::NoGroup`] and [`StreamsError::EmptyDeadLetter`]; else Redis is not reachable or refuses. The dead letter is still
    /// there then.
    pub async fn retry_dead(&self, letter: &DeadLetter) -> Result<RetriedAs, StreamsError> {
        if self.is_cluster() {
            return self.retry_across_nodes(letter).await;
        }
        let mut answers = self.retry_here(std::slice::from_ref(letter)).await?;
        answers.pop().unwrap_or(Ok(RetriedAs::Before))
    }

    /// The same for any number of dead letters, in their order, with the answer to each.
    ///
    /// # Errors
    /// An outage: some of them may have been delivered. Calling it again is safe.
    pub async fn retry_dead_letters(&self, letters: &[DeadLetter]) -> Result<Vec<Result<RetriedAs, StreamsError>>, StreamsError> {
        let mut answers = Vec::with_capacity(letters.len());
        if self.is_cluster() {
            for letter in letters {
                answers.push(match self.retry_across_nodes(letter).await {
                    Err(error) if error.is_outage() => return Err(error),
                    answer => answer,
                });
            }
        } else {
            for letters in letters.chunks(RETRIED_AT_ONCE) {
                answers.extend(self.retry_here(letters).await?);
            }
        }
        Ok(answers)
    }

    /// One pipeline, on the one node that there is.
    async fn retry_here(&self, letters: &[DeadLetter]) -> Result<Vec<Result<RetriedAs, StreamsError>>, StreamsError> {
        let Some(first) = letters.first() else { return Ok(Vec::new()) };
        let node = self.node_of(RETRYING, &first.stream).await?;
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors();
        let (script, text) = &*RETRY_HERE;
        pipeline.cmd("SCRIPT").arg("LOAD").arg(text);
        for DeadLetter { stream, group, entry, dead_id, .. } in letters {
            pipeline.cmd("EVALSHA").arg(script.get_hash()).arg(4);
            pipeline.arg(stream).arg(group_key(stream, group, "failures")).arg(retried_key(stream, group, dead_id));
            pipeline.arg(dead_stream(stream)).arg(group).arg(entry).arg(RETURNED).arg(MARKER_LIFE_MS).arg(dead_id).arg(&FIELDS);
        }
        let replies: Vec<Value> = node.send(RETRYING, Request::Pipeline(&pipeline)).await?;
        let mut answers = Vec::with_capacity(letters.len());
        for (letter, reply) in letters.iter().zip(replies.into_iter().skip(1)) {
            let read = match reply {
                Value::ServerError(error) => Err(error.into()),
                reply => redis::from_redis_value::<(String, String)>(reply).map_err(redis::RedisError::from),
            };
            answers.push(match read.map_err(|error| node.typed(RETRYING, error)) {
                Ok((how, detail)) => answered(letter, &how, detail),
                Err(outage) if outage.is_outage() => {
                    node.close();
                    return Err(outage);
                }
                Err(refused) => Err(no_group(letter, refused)),
            });
        }
        Ok(answers)
    }

    async fn retry_across_nodes(&self, letter: &DeadLetter) -> Result<RetriedAs, StreamsError> {
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
        // First of all: from now on the entry may be buried again.
        let key = buried_key(stream, group, entry);
        self.query::<()>(RETRYING, &key, redis::cmd("DEL").arg(&key)).await?;
        let mut call = RETRY.prepare_invoke();
        call.key(stream).key(group_key(stream, group, "failures")).key(retried_key(stream, group, dead_id));
        call.arg(group).arg(entry).arg(RETURNED).arg(MARKER_LIFE_MS);
        for (name, value) in &fields {
            call.arg(name.as_slice()).arg(value.as_slice());
        }
        let answer: Result<(String, String), _> = self.invoke(RETRYING, stream, &call).await;
        let (how, detail) = answer.map_err(|error| no_group(letter, error))?;
        let retried = answered(letter, &how, detail)?;
        if !matches!(retried, RetriedAs::Pending(_)) {
            self.discard_dead(stream, dead_id).await.map_err(StreamsError::after_some_were_written)?;
        }
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

/// Key that says how a dead letter was delivered again, in the slot of the stream.
fn retried_key(stream: &str, group: &str, dead_id: &str) -> String {
    format!("{{{stream}}}:retried:{group}:{dead_id}")
}

fn answered(letter: &DeadLetter, how: &str, detail: String) -> Result<RetriedAs, StreamsError> {
    Ok(match how {
        "pending" => RetriedAs::Pending(detail),
        "entry" => RetriedAs::Entry,
        "copy" => RetriedAs::Copy(detail),
        "empty" => {
            let DeadLetter { stream, dead_id, .. } = letter.clone();
            return Err(StreamsError::EmptyDeadLetter { stream, dead_id });
        }
        _ => RetriedAs::Before,
    })
}

fn no_group(letter: &DeadLetter, error: StreamsError) -> StreamsError {
    match error {
        StreamsError::Refused { source, .. } if source.code() == Some("NOGROUP") => {
            StreamsError::NoGroup { stream: letter.stream.clone(), group: letter.group.clone() }
        }
        error => error,
    }
}

type Field = (Vec<u8>, Vec<u8>);
