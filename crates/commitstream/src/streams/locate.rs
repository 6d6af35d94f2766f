//! Where an event is: its entry, and what each consumer group has done with that.

use std::sync::LazyLock;

use redis::Script;
use serde::Serialize;
use uuid::Uuid;

use super::node::Request;
use super::{Streams, StreamsError, dead_stream};

/// Looks for entries whose field `ARGV[1]` is `ARGV[2]`, from the entry id `ARGV[3]` downwards, until `ARGV[4]` are found: the id of
/// each, and its field `group`. Redis does nothing else meanwhile, so it ends after 2,000 entries or 4 MiB of them.
static FIND: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local upper, copied, found = ARGV[3], 0, {}
        for _ = 1, 200 do
            local entries = redis.pcall('XREVRANGE', KEYS[1], upper, '-', 'COUNT', 10)
            if entries.err then return entries end
            for _, entry in ipairs(entries) do
                local fields, matches, group = entry[2], false, ''
                for i = 1, #fields, 2 do
                    copied = copied + #fields[i] + #fields[i + 1]
                    if fields[i] == ARGV[1] and fields[i + 1] == ARGV[2] then matches = true end
                    if fields[i] == 'group' then group = fields[i + 1] end
                end
                if matches then found[#found + 1] = {entry[1], group} end
                if #found >= tonumber(ARGV[4]) then return found end
            end
            if #entries < 10 or copied >= 4194304 then return found end
            upper = '(' .. entries[#entries][1]
        end
        return found
        ",
    )
});

const DOING: &str = "looking for an event";

/// What a consumer group has done with an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Delivery {
    /// The group has not come to it.
    NotDelivered,
    /// A consumer has it in hand, or it waits for another attempt.
    Pending { consumer: String, deliveries: u64, idle_ms: u64 },
    /// Not pending any more. It may have been given up, and its dead letter be gone or too far back.
    Acknowledged,
    /// The group gave it up: the id of the dead letter.
    Dead { dead_id: String },
}

/// A consumer group, and what it has done with an entry.
#[derive(Debug, Clone, Serialize)]
pub struct GroupDelivery {
    pub group: String,
    pub delivery: Delivery,
}

/// How a stream stands as a whole.
#[derive(Debug, Clone, Serialize)]
pub struct StreamFigures {
    pub stream: String,
    pub entries: u64,
    /// All there ever were; before Redis 7 nobody knows.
    pub entries_added: Option<u64>,
    /// Bytes, as estimated by Redis from samples.
    pub memory: Option<u64>,
    /// Older entries have been trimmed away.
    pub first_id: Option<String>,
    pub last_id: String,
}

impl Streams {
    /// The id of an event's entry, looked for among the entries up to `last`, the last one of its batch, or if that is not known, among
    /// those before the time `until_ms` of the server's clock: 2,000 entries or 4 MiB of them.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn entry_of(
        &self,
        stream: &str,
        event: Uuid,
        last: Option<&str>,
        until_ms: i64,
    ) -> Result<Option<String>, StreamsError> {
        let upper = last.map_or_else(|| until_ms.max(0).to_string(), str::to_owned);
        let found = self.entries_with(stream, ("id", &event.hyphenated().to_string()), &upper, 1).await?;
        Ok(found.into_iter().next().map(|(id, _)| id))
    }

    /// The ids of the newest entries up to `upper` with this field, and the `group` that each names.
    async fn entries_with(
        &self,
        stream: &str,
        (name, value): (&str, &str),
        upper: &str,
        most: usize,
    ) -> Result<Vec<(String, String)>, StreamsError> {
        let mut call = FIND.prepare_invoke();
        call.key(stream).arg(name).arg(value).arg(upper).arg(most);
        self.invoke(DOING, stream, &call).await
    }

    /// What each consumer group of the stream has done with an entry. Of dead letters the newest 2,000 are looked at, or 4 MiB
    /// of them.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn deliveries(&self, stream: &str, entry: &str) -> Result<Vec<GroupDelivery>, StreamsError> {
        let groups = self.group_positions(stream).await?;
        if groups.is_empty() {
            return Ok(Vec::new());
        }
        let mut look = redis::pipe();
        for (group, _) in &groups {
            look.cmd("XPENDING").arg(stream).arg(group).arg(entry).arg(entry).arg(1);
        }
        type Pending = Vec<(String, String, u64, u64)>;
        let pending: Vec<Pending> = self.send(DOING, stream, Request::Pipeline(&look)).await?;
        let dead = self.entries_with(&dead_stream(stream), ("entry", entry), "+", groups.len()).await?;
        let delivery = |(group, last): (String, String), pending: Pending| {
            let letter = dead.iter().find(|(_, of)| *of == group);
            let delivery = match (pending.into_iter().next(), letter) {
                (Some((_, consumer, idle_ms, deliveries)), _) => Delivery::Pending { consumer, deliveries, idle_ms },
                (None, Some((dead_id, _))) => Delivery::Dead { dead_id: dead_id.clone() },
                (None, None) if position(&last) < position(entry) => Delivery::NotDelivered,
                (None, None) => Delivery::Acknowledged,
            };
            GroupDelivery { group, delivery }
        };
        Ok(groups.into_iter().zip(pending).map(|(group, pending)| delivery(group, pending)).collect())
    }

    /// How a stream stands; `None` when there is none.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn figures(&self, stream: &str) -> Result<Option<StreamFigures>, StreamsError> {
        let Some(info) = self.state(stream).await? else { return Ok(None) };
        let memory = self.query("measuring a stream", stream, redis::cmd("MEMORY").arg("USAGE").arg(stream)).await;
        let memory = match memory {
            // A user of Redis may not be allowed to ask.
            Err(StreamsError::Refused { .. }) => None,
            memory => memory?,
        };
        Ok(Some(StreamFigures {
            stream: stream.to_owned(),
            entries: info.length,
            entries_added: info.entries_added,
            memory,
            first_id: info.first_id,
            last_id: info.last_id,
        }))
    }
}

/// An entry id as numbers.
pub(crate) fn position(id: &str) -> (u64, u64) {
    let (millis, sequence) = id.split_once('-').unwrap_or((id, "0"));
    (millis.parse().unwrap_or_default(), sequence.parse().unwrap_or_default())
}
