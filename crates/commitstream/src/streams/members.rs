//! What the members of a consumer group agree on: who has which aggregate in hand.
//!
//! Redis gives the entries of a group to whoever asks, so that two processes would handle two events of one aggregate at once. Here every
//! read is a script, and an entry of an aggregate that a member has in hand is that member's, whoever reads it. An aggregate that
//! nobody has is given out by a hash over the members. A member that has finished with an aggregate gives it back.
//!
//! Each member has a deadline that every call moves. What a dead one leaves is taken by one living member, entry by entry in the order of
//! the stream; until the last of it is taken, new entries of its aggregates queue up behind. A member that was taken over is told so by
//! its next call, and changes nothing any more. Each script is atomic, so none of this depends on clocks or on who comes first.

mod life;
mod scripts;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use redis::{FromRedisValue, ParsingError, Script, ScriptInvocation, Value, from_redis_value};

use self::scripts::{CYCLE, DESCRIBE, JOIN, PENDING, SWEEP, TAKE};
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
    /// 1, and how often a member died that had it at work; by Redis's count.
    pub deliveries: u32,
    /// It was in hand when a member died: say before it is handled that it is at work.
    pub inherited: bool,
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

/// What a takeover came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Takeover {
    pub entries: u64,
    /// There may be more.
    pub more: bool,
    /// The dead whose names are still in use, by all members: see [`sweep`](Streams::sweep).
    pub forwarded: u64,
}

/// How far a member has come with forgetting the dead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sweep {
    /// `0` at the end.
    cursor: String,
    names: Vec<String>,
}

impl Sweep {
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.cursor == "0"
    }
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
    /// [`pending_of`](Self::pending_of).
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
    /// Consumers that never were members count as dead when idle for as long as a member lives.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn take_over(&self, member: &Member, count: usize) -> Result<Result<Takeover, TakenOver>, StreamsError> {
        let mut call = common(&TAKE, member);
        call.arg(millis(member.life)).arg(count).arg(RETURNED);
        let reply: Vec<Value> = self.invoke("taking over from dead consumers", &member.stream, &call).await?;
        let takeover = |n: Vec<u64>| Takeover { entries: n[0], more: n[1] == 1, forwarded: n[2] };
        numbers(&reply).map(|n| n.map(takeover)).map_err(|error| self.unreadable(&member.stream, error))
    }

    /// Up to `count` ids after `after` that the member has in hand by Redis's account, oldest first, each with its deliveries.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn pending_of(
        &self,
        member: &Member,
        after: EntryId,
        count: usize,
    ) -> Result<Result<Vec<(EntryId, u32)>, TakenOver>, StreamsError> {
        let mut call = common(&PENDING, member);
        call.arg(after.to_string()).arg(count);
        let Rows(rows) = self.invoke("reading what is in hand", &member.stream, &call).await?;
        let Ok(rows) = rows else { return Ok(Err(TakenOver)) };
        let rows = rows.into_iter().map(|row: (String, u32)| Ok((entry_id(&row.0)?, row.1)));
        Ok(Ok(rows.collect::<Result<_, _>>().map_err(|error| self.unreadable(&member.stream, error))?))
    }

    /// The aggregate of each of these entries, empty where the entry is gone, and the failed attempts that were noted.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn describe(
        &self,
        member: &Member,
        ids: &[EntryId],
    ) -> Result<Result<Vec<(EntryId, String, String)>, TakenOver>, StreamsError> {
        let mut call = common(&DESCRIBE, member);
        for id in ids {
            call.arg(id.to_string());
        }
        let Rows(rows) = self.invoke("reading what is in hand", &member.stream, &call).await?;
        let Ok(rows) = rows else { return Ok(Err(TakenOver)) };
        let rows = rows.into_iter().map(|row: (String, String, String)| Ok((entry_id(&row.0)?, row.1, row.2)));
        Ok(Ok(rows.collect::<Result<_, _>>().map_err(|error| self.unreadable(&member.stream, error))?))
    }

    /// One step of forgetting the dead whose place the member has taken. The first has no `from`. Returns aggregates that are the member's,
    /// some of which it may have nothing of; without `all`, none unless there is somebody to forget.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn sweep(
        &self,
        member: &Member,
        from: Option<&Sweep>,
        all: bool,
    ) -> Result<Result<(Sweep, Vec<String>), TakenOver>, StreamsError> {
        let mut call = common(&SWEEP, member);
        call.arg(from.map_or("0", |sweep| &sweep.cursor)).arg(u8::from(all));
        for name in from.into_iter().flat_map(|sweep| &sweep.names) {
            call.arg(name);
        }
        let reply: Vec<Value> = self.invoke("forgetting dead consumers", &member.stream, &call).await?;
        if is_gone(&reply) {
            return Ok(Err(TakenOver));
        }
        let mut parts = reply.into_iter().skip(1);
        let mut part = || parts.next().unwrap_or(Value::Nil);
        let mut read = || -> Result<_, ParsingError> {
            let sweep = Sweep { cursor: from_redis_value(part())?, names: from_redis_value(part())? };
            Ok((sweep, from_redis_value(part())?))
        };
        read().map(Ok).map_err(|error| self.unreadable(&member.stream, error))
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
    call.arg(&member.group).arg(&member.name).arg(millis(member.life)).arg(group_key(&member.stream, &member.group, ""));
    call
}

/// The numbers after `ok`.
fn numbers(reply: &[Value]) -> Result<Result<Vec<u64>, TakenOver>, ParsingError> {
    if is_gone(reply) {
        return Ok(Err(TakenOver));
    }
    let mut numbers = reply.iter().skip(1).map(|n| from_redis_value(n.clone())).collect::<Result<Vec<u64>, _>>()?;
    // Whatever an answer lacks, it does not say.
    numbers.resize(3, 0);
    Ok(Ok(numbers))
}

fn is_gone(reply: &[Value]) -> bool {
    matches!(reply.first(), Some(Value::BulkString(word)) if word == b"gone")
}

/// The second part of an answer.
struct Rows<T>(Result<Vec<T>, TakenOver>);

impl<T: FromRedisValue> FromRedisValue for Rows<T> {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        let reply: Vec<Value> = from_redis_value(value)?;
        if is_gone(&reply) {
            return Ok(Self(Err(TakenOver)));
        }
        Ok(Self(Ok(from_redis_value(reply.into_iter().nth(1).unwrap_or(Value::Nil))?)))
    }
}

fn entry_id(text: &str) -> Result<EntryId, ParsingError> {
    text.parse().map_err(|_| ParsingError::from(format!("{text:?} is no entry id")))
}

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
        let queued: Vec<(String, Vec<Value>, u32, String, u8)> = from_redis_value(part())?;
        let new: Vec<(String, Vec<Value>)> = from_redis_value(part())?;
        let end: String = from_redis_value(part())?;
        let queued = queued.into_iter().map(|(id, fields, deliveries, history, inherited)| {
            received(&id, fields, deliveries, history).map(|entry| Received { inherited: inherited == 1, ..entry })
        });
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
    let (id, inherited) = (entry_id(id)?, false);
    if fields.is_empty() {
        return Ok(Received { id, deliveries, inherited, history, only_for: None, event: None });
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
    Ok(Received { id, deliveries, inherited, history, only_for: field("group").map(str::to_owned), event: Some(event) })
}
