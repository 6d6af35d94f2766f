use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use redis::{Script, Value, from_redis_value};
use serde::Serialize;

use super::locate::position;
use super::node::Request;
use super::read::StreamInfo;
use super::{RETURNED, Streams, StreamsError, dead_stream, group_key};

/// A page of a stream without its payloads: the id of its last entry, and what each entry has as the `group` of a dead letter. Redis does
/// nothing else meanwhile, so it ends after 1,000 entries or 1 MiB of them.
static PAGE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local last, groups, copied = ARGV[1], {}, 0
        repeat
            local entries = redis.pcall('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 20)
            if entries.err then return entries end
            for _, entry in ipairs(entries) do
                local fields = entry[2]
                last = entry[1]
                for i = 2, #fields, 2 do copied = copied + #fields[i] end
                groups[#groups + 1] = fields[#fields - 11] == 'group' and fields[#fields - 10] or ''
            end
        until #entries < 20 or #groups >= 1000 or copied >= 1048576
        return {last, groups}
        ",
    )
});

static NEXT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local entries = redis.pcall('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1)
        if entries.err then return entries end
        return entries[1] and entries[1][1] or false
        ",
    )
});

const MOST_DEAD: u64 = GroupInfo::COUNTED as u64;

/// Most consumers of a group that are looked at.
const MOST_CONSUMERS: usize = 10_000;

const DOING: &str = "looking at consumer groups";

/// How a consumer group stands.
#[derive(Debug, Clone, Serialize)]
pub struct GroupInfo {
    pub stream: String,
    pub group: String,
    pub consumers: Vec<GroupConsumer>,
    /// Entries that were delivered and not yet acknowledged: in hand, or waiting for another attempt.
    pub pending: u64,
    /// How long ago the oldest of them was written, by the server's clock.
    pub oldest_pending_age_ms: Option<u64>,
    /// Entries that were not delivered yet; `None` if they are more than [`GroupInfo::COUNTED`] and Redis does not know their number.
    pub behind: Option<u64>,
    /// How long ago the oldest of those was written, by the server's clock.
    pub oldest_behind_age_ms: Option<u64>,
    /// Id of the last entry that was delivered.
    pub last_delivered: String,
    /// Dead letters; `None` if those of the stream are more than [`GroupInfo::COUNTED`].
    pub dead: Option<u64>,
}

/// How much a consumer group has still to handle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLag {
    pub stream: String,
    pub group: String,
    /// Entries that it has not acknowledged, whether they were delivered or not. Those that were not are counted up to
    /// [`GroupInfo::COUNTED`] where Redis does not know their number.
    pub events: u64,
}

/// A consumer of a group.
#[derive(Debug, Clone, Serialize)]
pub struct GroupConsumer {
    pub name: String,
    pub pending: u64,
    pub oldest_pending_age_ms: Option<u64>,
    /// Since it last read or claimed something.
    pub idle_ms: u64,
    /// Whether it has reported lately; `None` if it is not among those that report: it has left, or is of another library.
    pub alive: Option<bool>,
}

impl GroupInfo {
    /// Entries that are counted one by one.
    pub const COUNTED: usize = 5_000;

    /// Its consumers, but for [`RETURNED`], which is no process.
    pub fn processes(&self) -> impl Iterator<Item = &GroupConsumer> {
        self.consumers.iter().filter(|consumer| !consumer.is_returned())
    }

    /// True when it has no consumer, or none of those that report is alive.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        let mut reporting = self.processes().filter_map(|consumer| consumer.alive).peekable();
        self.processes().next().is_none() || (reporting.peek().is_some() && !reporting.any(|alive| alive))
    }
}

impl GroupConsumer {
    /// True of [`RETURNED`], which is no process.
    #[must_use]
    pub fn is_returned(&self) -> bool {
        self.name == RETURNED
    }
}

impl Streams {
    /// The consumer groups of a stream; none if there is no such stream.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn groups(&self, stream: &str) -> Result<Vec<GroupInfo>, StreamsError> {
        let groups = self.group_list(stream).await?;
        if groups.is_empty() {
            return Ok(Vec::new());
        }
        let Some(state) = self.state(stream).await? else { return Ok(Vec::new()) };
        let dead = self.dead_by_group(&dead_stream(stream)).await?;
        let mut infos = Vec::with_capacity(groups.len());
        for group in groups {
            let dead = dead.as_ref().map(|counts| counts.get(&group.name).copied().unwrap_or_default());
            match self.group(stream, &state, group, dead).await {
                Ok(info) => infos.push(info),
                // It was destroyed meanwhile.
                Err(StreamsError::Refused { source, .. }) if source.code() == Some("NOGROUP") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(infos)
    }

    /// How far the consumer groups of a stream are behind; none if there is no such stream.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn lags(&self, stream: &str) -> Result<Vec<GroupLag>, StreamsError> {
        let mut lags = Vec::new();
        let groups = self.group_list(stream).await?;
        if groups.is_empty() {
            return Ok(lags);
        }
        let Some(state) = self.state(stream).await? else { return Ok(lags) };
        for group in groups {
            let behind = self.behind(stream, &state, &group).await?.unwrap_or(GroupInfo::COUNTED as u64);
            lags.push(GroupLag { stream: stream.to_owned(), group: group.name, events: behind + group.pending });
        }
        Ok(lags)
    }

    /// Entries that were not delivered yet; `None` if they are too many to count.
    ///
    /// What Redis says of it (`lag`) is a wrong number in Redis 7.0 once entries were trimmed unread, or deleted, or the group was set
    /// back. So it is believed where nothing was ever removed; elsewhere entries are counted, and above the bound it is believed as far
    /// as it is possible.
    async fn behind(&self, stream: &str, state: &StreamInfo, group: &Group) -> Result<Option<u64>, StreamsError> {
        if position(&group.last_delivered) >= position(&state.last_id) {
            return Ok(Some(0));
        }
        let possible = group.lag.filter(|lag| *lag <= state.length);
        if possible.is_some() && !state.is_trimmed() {
            return Ok(possible);
        }
        let counted = self.walk(stream, &group.last_delivered).await?.map(|entries| entries.len() as u64);
        Ok(counted.or(possible.filter(|lag| *lag > GroupInfo::COUNTED as u64)))
    }

    /// The groups of a stream, each with the id of the last entry that was delivered to it.
    pub(super) async fn group_positions(&self, stream: &str) -> Result<Vec<(String, String)>, StreamsError> {
        let groups = self.group_list(stream).await?;
        Ok(groups.into_iter().map(|group| (group.name, group.last_delivered)).collect())
    }

    async fn group_list(&self, stream: &str) -> Result<Vec<Group>, StreamsError> {
        match self.query(DOING, stream, redis::cmd("XINFO").arg("GROUPS").arg(stream)).await {
            Err(StreamsError::Refused { source, .. }) if source.detail() == Some("no such key") => Ok(Vec::new()),
            answer => answer,
        }
    }

    async fn group(&self, stream: &str, state: &StreamInfo, group: Group, dead: Option<u64>) -> Result<GroupInfo, StreamsError> {
        let behind = self.behind(stream, state, &group).await?;
        let Group { name, last_delivered, .. } = group;
        let mut look = redis::pipe();
        look.cmd("TIME");
        look.cmd("XPENDING").arg(stream).arg(&name);
        look.cmd("XINFO").arg("CONSUMERS").arg(stream).arg(&name);
        look.cmd("ZRANGE").arg(group_key(stream, &name, "members")).arg(0).arg(MOST_CONSUMERS - 1).arg("WITHSCORES");
        type Answers = ((u64, u64), (u64, Option<String>, Value, Value), Vec<Consumer>, Vec<(String, f64)>);
        let (time, pending, mut consumers, members): Answers = self.send(DOING, stream, Request::Pipeline(&look)).await?;
        let now = time.0 * 1_000 + time.1 / 1_000;
        consumers.truncate(MOST_CONSUMERS);
        let members: HashMap<String, f64> = members.into_iter().collect();
        let oldest = self.oldest_pending(stream, &name, &consumers).await?;
        let next = if behind == Some(0) { None } else { self.next_after(stream, &last_delivered).await? };
        let age = |id: &String| id.split('-').next()?.parse().ok().map(|written: u64| now.saturating_sub(written));
        let consumers = consumers.into_iter().map(|consumer| GroupConsumer {
            oldest_pending_age_ms: oldest.get(&consumer.name).and_then(age),
            alive: members.get(&consumer.name).map(|deadline| *deadline > now as f64),
            pending: consumer.pending,
            idle_ms: consumer.idle_ms,
            name: consumer.name,
        });
        Ok(GroupInfo {
            stream: stream.to_owned(),
            consumers: consumers.collect(),
            pending: pending.0,
            oldest_pending_age_ms: pending.1.as_ref().and_then(age),
            oldest_behind_age_ms: next.as_ref().and_then(age),
            behind,
            last_delivered,
            dead,
            group: name,
        })
    }

    /// The id of the first entry after this one, without reading its payload.
    async fn next_after(&self, stream: &str, id: &str) -> Result<Option<String>, StreamsError> {
        let mut call = NEXT.key(stream);
        self.invoke(DOING, stream, call.arg(id)).await
    }

    /// The id of the oldest entry of each consumer that has any.
    async fn oldest_pending(
        &self,
        stream: &str,
        group: &str,
        consumers: &[Consumer],
    ) -> Result<HashMap<String, String>, StreamsError> {
        type Pending = Vec<(String, String, u64, u64)>;
        let busy: Vec<&Consumer> = consumers.iter().filter(|consumer| consumer.pending > 0).collect();
        if busy.is_empty() {
            return Ok(HashMap::new());
        }
        let mut look = redis::pipe();
        for consumer in busy {
            look.cmd("XPENDING").arg(stream).arg(group).arg("-").arg("+").arg(1).arg(&consumer.name);
        }
        let found: Vec<Pending> = self.send(DOING, stream, Request::Pipeline(&look)).await?;
        Ok(found.into_iter().flatten().map(|(id, consumer, ..)| (consumer, id)).collect())
    }

    /// How many dead letters each group has; `None` if there are too many to look at.
    async fn dead_by_group(&self, dead: &str) -> Result<Option<BTreeMap<String, u64>>, StreamsError> {
        let mut counts = BTreeMap::new();
        match self.len(dead).await? {
            0 => return Ok(Some(counts)),
            1..=MOST_DEAD => {}
            _ => return Ok(None),
        }
        let Some(groups) = self.walk(dead, "0").await? else { return Ok(None) };
        groups.into_iter().for_each(|group| *counts.entry(group).or_default() += 1);
        Ok(Some(counts))
    }

    /// What each entry after this one has as the `group` of a dead letter; `None` if there are too many to look at.
    async fn walk(&self, key: &str, after: &str) -> Result<Option<Vec<String>>, StreamsError> {
        let (mut found, mut after) = (Vec::new(), after.to_owned());
        while found.len() <= GroupInfo::COUNTED {
            let mut call = PAGE.prepare_invoke();
            call.key(key).arg(&after);
            let (last, page): (String, Vec<String>) = self.invoke(DOING, key, &call).await?;
            if page.is_empty() {
                return Ok(Some(found));
            }
            found.extend(page);
            after = last;
        }
        Ok(None)
    }
}

/// One of `XINFO GROUPS`. Before Redis 7 there is no `lag`; where entries were deleted, it is not known.
struct Group {
    name: String,
    last_delivered: String,
    pending: u64,
    lag: Option<u64>,
}

/// One of `XINFO CONSUMERS`.
struct Consumer {
    name: String,
    pending: u64,
    idle_ms: u64,
}

impl redis::FromRedisValue for Group {
    fn from_redis_value(value: Value) -> Result<Self, redis::ParsingError> {
        let mut fields: HashMap<String, Value> = from_redis_value(value)?;
        let mut field = |name: &str| fields.remove(name).unwrap_or(Value::Nil);
        Ok(Self {
            name: from_redis_value(field("name"))?,
            last_delivered: from_redis_value(field("last-delivered-id"))?,
            pending: from_redis_value(field("pending"))?,
            lag: from_redis_value(field("lag"))?,
        })
    }
}

impl redis::FromRedisValue for Consumer {
    fn from_redis_value(value: Value) -> Result<Self, redis::ParsingError> {
        let mut fields: HashMap<String, Value> = from_redis_value(value)?;
        let mut field = |name: &str| fields.remove(name).unwrap_or(Value::Nil);
        Ok(Self {
            name: from_redis_value(field("name"))?,
            pending: from_redis_value(field("pending"))?,
            idle_ms: from_redis_value(field("idle"))?,
        })
    }
}
