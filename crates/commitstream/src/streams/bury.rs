use std::sync::LazyLock;

use chrono::Utc;
use redis::{Script, ScriptInvocation};

use super::node::Request;
use super::{Streams, StreamsError, dead_stream, group_key};
use crate::event::rfc3339;

/// Moves a pending entry to the dead letters, atomically with its acknowledgement: the copy is taken back if Redis refuses the latter.
///
/// An entry of somebody else's could have thousands of fields, more than `unpack` can pass on; the first 1,000 values are kept.
static BURY: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
        if pending.err then return pending end
        if #pending == 0 or pending[1][2] ~= ARGV[2] then return 0 end
        -- Redis refuses for want of memory only what a script writes first.
        if ARGV[4] == 'when full' then redis.call('HDEL', KEYS[3], '') end
        local entries = redis.pcall('XRANGE', KEYS[1], ARGV[3], ARGV[3])
        if entries.err then return entries end
        local add = {'XADD', KEYS[2], '*'}
        local fields = entries[1] and entries[1][2] or {}
        for i = 1, math.min(#fields, 1000) do add[#add + 1] = fields[i] end
        for i = 5, #ARGV do add[#add + 1] = ARGV[i] end
        local added = redis.pcall(unpack(add))
        if type(added) == 'table' and added.err then return added end
        local acknowledged = redis.pcall('XACK', KEYS[1], ARGV[1], ARGV[3])
        if type(acknowledged) == 'table' and acknowledged.err then
            redis.pcall('XDEL', KEYS[2], added)
            return acknowledged
        end
        redis.call('HDEL', KEYS[3], ARGV[3])
        return 1
        ",
    )
});

/// The second step in a cluster: writes the dead letter unless its marker says that an earlier call did.
static LAY: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local laid = redis.pcall('GET', KEYS[2])
        if type(laid) == 'table' and laid.err then return laid end
        if laid then return laid end
        if ARGV[2] == 'when full' then redis.call('DEL', KEYS[2]) end
        local add = {'XADD', KEYS[1], '*'}
        for i = 3, #ARGV do add[#add + 1] = ARGV[i] end
        local added = redis.pcall(unpack(add))
        if type(added) == 'table' and added.err then return added end
        redis.call('SET', KEYS[2], added, 'PX', ARGV[1])
        return added
        ",
    )
});

/// The third step in a cluster: acknowledges what is still pending for this consumer.
static ACKNOWLEDGE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
        if pending.err then return pending end
        if #pending == 0 then return 1 end
        if pending[1][2] ~= ARGV[2] then return 0 end
        local acknowledged = redis.pcall('XACK', KEYS[1], ARGV[1], ARGV[3])
        if type(acknowledged) == 'table' and acknowledged.err then return acknowledged end
        redis.call('HDEL', KEYS[2], ARGV[3])
        return 1
        ",
    )
});

const DOING: &str = "burying an entry";

/// How long a call that was not answered can be repeated in a cluster: a day.
const MARKER_LIFE_MS: u64 = 86_400_000;

/// Values of an entry that are kept, names included.
const KEPT: usize = 1_000;

/// The fields that a dead letter has behind those of the entry, in this order.
pub(super) const FIELDS: [&str; 6] = ["group", "entry", "reason", "attempts", "history", "dead_at"];

/// An entry that a consumer group gives up.
#[derive(Debug, Clone, Copy)]
pub struct Burial<'a> {
    pub stream: &'a str,
    pub group: &'a str,
    /// Who has the entry in hand.
    pub consumer: &'a str,
    pub entry: &'a str,
    pub reason: &'a str,
    pub attempts: u32,
    /// JSON array of the failed attempts.
    pub history: &'a str,
}

impl Burial<'_> {
    /// What the dead letter has behind the entry's own fields.
    fn add_fields(&self, call: &mut ScriptInvocation<'_>) {
        let [group, entry, reason, attempts, history, dead_at] = FIELDS;
        call.arg(group).arg(self.group).arg(entry).arg(self.entry).arg(reason).arg(self.reason);
        call.arg(attempts).arg(self.attempts).arg(history).arg(self.history).arg(dead_at).arg(rfc3339(Utc::now()));
    }

    fn failures(&self) -> String {
        group_key(self.stream, self.group, "failures")
    }
}

/// What a dead letter does where Redis has no memory.
#[derive(Debug, Clone, Copy)]
enum Room {
    /// It is refused.
    Needed,
    /// It is written.
    Taken,
}

impl Room {
    fn word(self) -> &'static str {
        match self {
            Self::Needed => "",
            Self::Taken => "when full",
        }
    }
}

/// Key that says which dead letter an entry became, in the slot of the dead letters.
pub(super) fn buried_key(stream: &str, group: &str, entry: &str) -> String {
    format!("{{{}}}:buried:{group}:{entry}", dead_stream(stream))
}

impl Streams {
    /// Writes the dead letter of an entry and acknowledges the entry, both or neither. Does nothing and returns `false` if the entry is
    /// not pending for this consumer: an earlier call whose answer was lost has done it, or another consumer has taken the entry over. So
    /// calling it again is safe.
    ///
    /// In a cluster, where both streams are on different nodes, the dead letter comes first. If the consumer loses the entry between the
    /// two, the dead letter is there although another consumer has the entry.
    ///
    /// # Errors
    /// Redis is not reachable or refuses, also because the group is gone.
    pub async fn bury(&self, burial: &Burial<'_>) -> Result<bool, StreamsError> {
        self.bury_with(burial, Room::Needed).await
    }

    /// As [`bury`](Self::bury), also where Redis is at its `maxmemory`: an entry that waits for its dead letter keeps what stands behind
    /// it from being trimmed, so that there would never be room. Each adds to what is too much already: be sparing with it.
    pub(crate) async fn bury_when_full(&self, burial: &Burial<'_>) -> Result<bool, StreamsError> {
        self.bury_with(burial, Room::Taken).await
    }

    async fn bury_with(&self, burial: &Burial<'_>, room: Room) -> Result<bool, StreamsError> {
        if self.is_cluster() {
            return self.bury_in_cluster(burial, room).await;
        }
        let mut call = BURY.prepare_invoke();
        call.key(burial.stream).key(dead_stream(burial.stream)).key(burial.failures());
        call.arg(burial.group).arg(burial.consumer).arg(burial.entry).arg(room.word());
        burial.add_fields(&mut call);
        self.invoke(DOING, burial.stream, &call).await
    }

    async fn bury_in_cluster(&self, burial: &Burial<'_>, room: Room) -> Result<bool, StreamsError> {
        type Pending = Vec<(String, String, u64, u64)>;
        type Entries = Vec<(String, Vec<Vec<u8>>)>;
        let Burial { stream, group, consumer, entry, .. } = *burial;
        let mut look = redis::pipe();
        look.cmd("XPENDING").arg(stream).arg(group).arg(entry).arg(entry).arg(1);
        look.cmd("XRANGE").arg(stream).arg(entry).arg(entry);
        let (pending, entries): (Pending, Entries) = self.send(DOING, stream, Request::Pipeline(&look)).await?;
        if pending.first().is_none_or(|(_, owner, ..)| owner != consumer) {
            return Ok(false);
        }
        let dead = dead_stream(stream);
        let mut lay = LAY.prepare_invoke();
        lay.key(&dead).key(buried_key(stream, group, entry)).arg(MARKER_LIFE_MS).arg(room.word());
        for value in entries.iter().flat_map(|(_, fields)| fields).take(KEPT) {
            lay.arg(value.as_slice());
        }
        burial.add_fields(&mut lay);
        self.invoke::<String>(DOING, &dead, &lay).await?;
        let mut acknowledge = ACKNOWLEDGE.prepare_invoke();
        acknowledge.key(stream).key(burial.failures()).arg(group).arg(consumer).arg(entry);
        self.invoke(DOING, stream, &acknowledge).await.map_err(StreamsError::after_some_were_written)
    }
}
