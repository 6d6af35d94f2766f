//! What the members of a consumer group agree on: who has which aggregate in hand.
//!
//! Redis gives the entries of a group to whoever asks, so that two processes would handle two events of one aggregate at once. Here every
//! read is a script, and an entry of an aggregate that a member has in hand is that member's, whoever reads it. An aggregate that
//! nobody has is given out by a hash over the members. A member that has finished with an aggregate gives it back.
//!
//! Each member has a deadline that every call moves. What a dead one leaves is taken by one living member, entry by entry in the order of
//! the stream; until the last of it is taken, new entries of its aggregates queue up behind. A member that was taken over is told so by
//! its next call, and changes nothing any more. Each script is atomic, so none of this depends on clocks or on who comes first.

mod scripts;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use redis::{FromRedisValue, ParsingError, Script, ScriptInvocation, Value, from_redis_value};

use self::scripts::{CYCLE, FAIL, JOIN, LEAVE, TAKE};
use super::append::millis;
use super::{RETURNED, Streams, StreamsError, group_key};
use crate::config::StartFrom;
use crate::event::EventEnvelope;

/// Entries that wait for one member before the others stop reading.
const LONGEST_QUEUE: usize = 2_000;

/// Id of an entry: milliseconds and a sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct EntryId {
    pub millis: u64,
    pub sequence: u64,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.millis, self.sequence)
    }
}

impl FromStr for EntryId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (millis, sequence) = text.split_once('-').unwrap_or((text, "0"));
        Ok(Self { millis: millis.parse()?, sequence: sequence.parse()? })
    }
}

/// An entry that a member now has in hand.
#[derive(Debug)]
pub struct Received {
    pub id: EntryId,
    /// How often it was given to somebody, by Redis's count.
    pub deliveries: u32,
    /// Failed attempts so far, as a JSON array; empty when there is none.
    pub history: String,
    /// The one group that it is for, of an entry that was appended again for a dead letter.
    pub only_for: Option<String>,
    /// What is in it, or why it is no event. `None`: the entry is gone from the stream.
    pub event: Option<Result<EventEnvelope, String>>,
}

/// What one read brought.
#[derive(Debug)]
pub struct Cycle {
    /// The aggregates that were to be given back are given back; else some entries of theirs may be on their way here.
    pub released: bool,
    pub received: Vec<Received>,
    /// The end of what the group was given, when there was nothing new: a new entry has a higher id.
    pub end: Option<EntryId>,
}

/// The caller is no member any more: what it had in hand is with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakenOver;

/// One member of the group of one stream.
#[derive(Debug, Clone)]
pub struct Member {
    pub stream: String,
    pub group: String,
    pub name: String,
    /// It is dead when it was not heard of for so long.
    pub life: Duration,
}

impl Streams {
    /// Becomes a member, and makes the group if there is none. Returns whether it was made.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn join_group(&self, member: &Member, start: StartFrom) -> Result<bool, StreamsError> {
        let start = match start {
            StartFrom::Beginning => "0",
            StartFrom::Now => "$",
        };
        let mut call = JOIN.prepare_invoke();
        call.key(&member.stream).key(group_key(&member.stream, &member.group, "members"));
        call.arg(&member.group).arg(&member.name).arg(millis(member.life)).arg(start);
        Ok(self.invoke::<u8>("joining a consumer group", &member.stream, &call).await? == 1)
    }

    /// Acknowledges `done`, gives `released` back, and takes up to `count` entries: at most 1,000 of them, and 3,000 of each of the others. May
    /// be called again after an unknown outcome, with a higher `turn`; what that call had taken is then to be found with
    /// [`in_hand`](Self::in_hand).
    ///
    /// # Errors
    /// Redis is not reachable or refuses; `NOGROUP` if somebody has removed the group.
    pub async fn cycle(
        &self,
        member: &Member,
        turn: u64,
        done: &[EntryId],
        released: &[impl AsRef<str>],
        count: usize,
    ) -> Result<Result<Cycle, TakenOver>, StreamsError> {
        let mut call = common(&CYCLE, member);
        call.arg(LONGEST_QUEUE).arg(count).arg(turn).arg(done.len());
        for id in done {
            call.arg(id.to_string());
        }
        for aggregate in released {
            call.arg(aggregate.as_ref());
        }
        let Answer(reply) = self.invoke("reading a consumer group", &member.stream, &call).await?;
        Ok(reply)
    }

    /// Takes up to `count` entries of dead members, or that were returned: the next [`cycle`](Self::cycle) brings those that are for this member.
    /// Returns whether there may be more. Consumers that never were members count as dead when idle for as long as a member lives.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn take_over(&self, member: &Member, count: usize) -> Result<Result<(u64, bool), TakenOver>, StreamsError> {
        let mut call = common(&TAKE, member);
        call.arg(millis(member.life)).arg(count).arg(RETURNED);
        let reply: Vec<Value> = self.invoke("taking over from dead consumers", &member.stream, &call).await?;
        numbers(&reply).map(|n| n.map(|n| (n[0], n[1] == 1))).map_err(|error| self.unreadable(&member.stream, error))
    }

    /// Notes a failed attempt. `false`: the member does not have the entry in hand.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn note_failure(
        &self,
        member: &Member,
        id: EntryId,
        attempts: u32,
        history: &str,
    ) -> Result<Result<bool, TakenOver>, StreamsError> {
        let mut call = common(&FAIL, member);
        call.arg(id.to_string()).arg(attempts).arg(history);
        let reply: Vec<Value> = self.invoke("noting a failure", &member.stream, &call).await?;
        numbers(&reply).map(|n| n.map(|n| n[0] == 1)).map_err(|error| self.unreadable(&member.stream, error))
    }

    /// Up to `count` entries after `after` that the member has in hand by Redis's account, oldest first.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn in_hand(&self, member: &Member, after: EntryId, count: usize) -> Result<Vec<Received>, StreamsError> {
        let mut command = redis::cmd("XREADGROUP");
        command.arg("GROUP").arg(&member.group).arg(&member.name).arg("COUNT").arg(count);
        command.arg("STREAMS").arg(&member.stream).arg(after.to_string());
        let reply: Value = self.query("reading what is in hand", &member.stream, &command).await?;
        let entries = || -> Result<Vec<Received>, ParsingError> {
            let streams: Vec<(String, Vec<Row>)> = from_redis_value(reply)?;
            let entries = streams.into_iter().flat_map(|(_, entries)| entries);
            entries.map(|(id, fields)| received(&id, fields.unwrap_or_default(), 2, String::new())).collect()
        };
        entries().map_err(|error| self.unreadable(&member.stream, error))
    }

    /// The entries with these ids; those that are gone have no event.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn entries(&self, stream: &str, ids: &[EntryId]) -> Result<Vec<Received>, StreamsError> {
        let mut pipeline = redis::pipe();
        for id in ids {
            pipeline.cmd("XRANGE").arg(stream).arg(id.to_string()).arg(id.to_string());
        }
        let request = super::node::Request::Pipeline(&pipeline);
        let replies: Vec<Vec<(String, Vec<Value>)>> = self.send("reading entries again", stream, request).await?;
        let entries = ids.iter().zip(replies).map(|(id, reply)| {
            let fields = reply.into_iter().next().map(|(_, fields)| fields).unwrap_or_default();
            received(&id.to_string(), fields, 1, String::new())
        });
        entries.collect::<Result<_, _>>().map_err(|error| self.unreadable(stream, error))
    }

    /// Leaves the group: others take what the member has in hand, at once.
    ///
    /// # Errors
    /// Redis is not reachable or refuses; then others take it when the member's life is over.
    pub async fn leave_group(&self, member: &Member) -> Result<(), StreamsError> {
        let mut call = LEAVE.prepare_invoke();
        call.key(group_key(&member.stream, &member.group, "members")).arg(&member.name);
        self.invoke("leaving a consumer group", &member.stream, &call).await
    }

    /// Waits until the stream has an entry after `after`, or `patience` is over. Blocks its connection: see
    /// [`dedicated`](Self::dedicated).
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub(crate) async fn wait_for_entry(&self, stream: &str, after: EntryId, patience: Duration) -> Result<(), StreamsError> {
        let mut command = redis::cmd("XREAD");
        // 0 would wait for ever.
        command.arg("COUNT").arg(1).arg("BLOCK").arg(millis(patience).max(1)).arg("STREAMS").arg(stream).arg(after.to_string());
        self.query::<Value>("waiting for entries", stream, &command).await?;
        Ok(())
    }

    fn unreadable(&self, stream: &str, error: ParsingError) -> StreamsError {
        StreamsError::new(stream, "reading a consumer group", error.into())
    }
}

fn common<'a>(script: &'a Script, member: &Member) -> ScriptInvocation<'a> {
    let mut call = script.prepare_invoke();
    call.key(&member.stream);
    for name in ["members", "owners", "successors", "takers", "failures", "turns"] {
        call.key(group_key(&member.stream, &member.group, name));
    }
    call.arg(&member.group).arg(&member.name).arg(millis(member.life)).arg(group_key(&member.stream, &member.group, "queue:"));
    call
}

/// The numbers after `ok`.
fn numbers(reply: &[Value]) -> Result<Result<Vec<u64>, TakenOver>, ParsingError> {
    if is_gone(reply) {
        return Ok(Err(TakenOver));
    }
    let mut numbers = reply.iter().skip(1).map(|n| from_redis_value(n.clone())).collect::<Result<Vec<u64>, _>>()?;
    // Whatever an answer lacks, it does not say.
    numbers.resize(2, 0);
    Ok(Ok(numbers))
}

fn is_gone(reply: &[Value]) -> bool {
    matches!(reply.first(), Some(Value::BulkString(word)) if word == b"gone")
}

/// Id and fields of an entry; no fields when it is gone.
type Row = (String, Option<Vec<Value>>);

struct Answer(Result<Cycle, TakenOver>);

impl FromRedisValue for Answer {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        let reply: Vec<Value> = from_redis_value(value)?;
        if is_gone(&reply) {
            return Ok(Self(Err(TakenOver)));
        }
        let mut parts = reply.into_iter().skip(1);
        let mut part = || parts.next().unwrap_or(Value::Nil);
        let released: u8 = from_redis_value(part())?;
        let queued: Vec<(String, Vec<Value>, u32, String)> = from_redis_value(part())?;
        let new: Vec<(String, Vec<Value>)> = from_redis_value(part())?;
        let end: String = from_redis_value(part())?;
        let queued = queued.into_iter().map(|(id, fields, deliveries, history)| received(&id, fields, deliveries, history));
        let new = new.into_iter().map(|(id, fields)| received(&id, fields, 1, String::new()));
        Ok(Self(Ok(Cycle {
            released: released == 1,
            received: queued.chain(new).collect::<Result<_, _>>()?,
            end: end.parse().ok(),
        })))
    }
}

/// Reads names and values, moving the text.
fn received(id: &str, fields: Vec<Value>, deliveries: u32, history: String) -> Result<Received, ParsingError> {
    let id: EntryId = id.parse().map_err(|_| ParsingError::from(format!("{id:?} is no entry id")))?;
    if fields.is_empty() {
        return Ok(Received { id, deliveries, history, only_for: None, event: None });
    }
    let mut text = Vec::with_capacity(fields.len() / 2);
    let mut values = fields.into_iter();
    while let (Some(Value::BulkString(name)), Some(Value::BulkString(value))) = (values.next(), values.next()) {
        text.push((name, value));
    }
    let field = |name: &str| {
        let value = text.iter().find(|(known, _)| known == name.as_bytes()).map(|(_, value)| value);
        value.and_then(|value| std::str::from_utf8(value).ok())
    };
    let event = EventEnvelope::from_fields(&id.to_string(), field).map_err(|error| error.to_string());
    Ok(Received { id, deliveries, history, only_for: field("group").map(str::to_owned), event: Some(event) })
}
