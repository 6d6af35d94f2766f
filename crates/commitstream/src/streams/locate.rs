//! Where an event is: its entry, and what each consumer group has done with that.

use std::sync::LazyLock;

use redis::Script;
use serde::Serialize;
use uuid::Uuid;

use super::node::Request;
use super::{Streams, StreamsError, dead_stream};

/// Looks for the entry of an event, from the entry id `ARGV[2]` downwards, among 2,000 entries at most.
static FIND: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local upper = ARGV[2]
        for _ = 1, 20 do
            local entries = redis.pcall('XREVRANGE', KEYS[1], upper, '-', 'COUNT', 100)
            if entries.err then return entries end
            for _, entry in ipairs(entries) do
                if entry[2][1] == 'id' and entry[2][2] == ARGV[1] then return entry[1] end
            end
            if #entries < 100 then return '' end
            upper = '(' .. entries[#entries][1]
        end
        return ''
        ",
    )
});

/// The newest dead letters of a stream that are looked at.
const DEAD_LOOKED_AT: usize = 200;

const DOING: &str = "looking for an event";

/// What a consumer group has done with an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Delivery {
    /// The group has not come to it.
    NotDelivered,
    /// A consumer has it in hand, or it waits for another attempt.
    Pending {
        consumer: String,
        deliveries: u64,
        idle_ms: u64,
    },
    Acknowledged,
    /// The group gave it up: the id of the dead letter.
    Dead {
        dead_id: String,
    },
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
    /// The id of an event's entry: among the 2,000 entries up to `last`, the last one of its batch, if that is known; then among those
    /// before the time `until_ms` of the server's clock.
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
        let event = event.hyphenated().to_string();
        for upper in last.map(str::to_owned).into_iter().chain([until_ms.max(0).to_string()]) {
            let mut call = FIND.prepare_invoke();
            call.key(stream).arg(&event).arg(upper);
            let found: String = self.invoke(DOING, stream, &call).await?;
            if !found.is_empty() {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// What each consumer group of the stream has done with an entry. Of dead letters the newest 200 are looked at.
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
        let dead = self.newest(&dead_stream(stream), DEAD_LOOKED_AT).await?;
        let delivery = |(group, last): (String, String), pending: Pending| {
            let letter = dead.iter().find(|l| l.field("group") == Some(&group) && l.field("entry") == Some(entry));
            let delivery = match (pending.into_iter().next(), letter) {
                (Some((_, consumer, idle_ms, deliveries)), _) => Delivery::Pending { consumer, deliveries, idle_ms },
                (None, Some(letter)) => Delivery::Dead { dead_id: letter.id.clone() },
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
        let Some(info) = self.info(stream).await? else { return Ok(None) };
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
fn position(id: &str) -> (u64, u64) {
    let (millis, sequence) = id.split_once('-').unwrap_or((id, "0"));
    (millis.parse().unwrap_or_default(), sequence.parse().unwrap_or_default())
}
