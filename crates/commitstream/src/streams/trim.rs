//! Trimming: what every consumer group of a stream has acknowledged, and what is above a hard cap.

use std::sync::LazyLock;
use std::time::Duration;

use redis::Script;

use super::append::millis;
use super::{Streams, StreamsError};

/// Most entries that one script removes, so that nobody waits for it for long.
const ENTRIES_PER_STEP: u64 = 1_000;

const DOING: &str = "trimming a stream";

/// Finds out where the part of a stream ends that every consumer group has acknowledged. Scripts that begin with it have
/// - `bound`: the id of the oldest entry that some group has not acknowledged, whether it was given to a consumer or not; an id
///   behind all entries if there is none; nil without a group or an entry;
/// - `behind`: the name of that group, or nil.
///
/// A pending entry that is in the stream no more has nothing to protect, so they are looked for from the oldest entry on. An id is two
/// numbers of 64 bits, which Lua cannot hold: they are compared as text. `pcall` keeps the error's own code; `call` would wrap
/// it on Redis 6.
const BOUND: &str = r"
    local function sortable(id)
        local millis, number = string.match(id, '^(%d+)-(%d+)$')
        return string.rep('0', 20 - #millis) .. millis .. string.rep('0', 20 - #number) .. number
    end
    local bound, behind
    local oldest = redis.pcall('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
    if oldest.err then return oldest end
    if oldest[1] then
        for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
            local group = {}
            for i = 1, #info, 2 do group[info[i]] = info[i + 1] end
            bound = bound or '18446744073709551615-18446744073709551615'
            local pending = redis.call('XPENDING', KEYS[1], group['name'], oldest[1][1], '+', 1)
            local next = redis.call('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)
            for _, found in ipairs({pending, next}) do
                if found[1] and sortable(found[1][1]) < sortable(bound) then
                    bound, behind = found[1][1], group['name']
                end
            end
        end
    end
";

/// The end of scripts that remove up to `limit` entries before `bound`, and say how many, and whether to call again. Whole nodes of the
/// stream first, for which no entry is read; then, one by one, what is left in the node of the bound.
const REMOVE: &str = r"
    local removed = redis.pcall('XTRIM', KEYS[1], 'MINID', '~', bound, 'LIMIT', limit)
    if type(removed) == 'table' then return removed end
    if removed > 0 then return {removed, 1} end
    local from = '-'
    while removed < limit do
        local entry = redis.call('XRANGE', KEYS[1], from, '(' .. bound, 'COUNT', 1)[1]
        if not entry then break end
        removed, from = removed + 1, '(' .. entry[1]
    end
    if removed > 0 then redis.call('XTRIM', KEYS[1], 'MAXLEN', redis.call('XLEN', KEYS[1]) - removed) end
    return {removed, removed == limit and 1 or 0}
";

/// Removes up to `ARGV[1]` acknowledged entries that are older than `ARGV[2]` milliseconds.
static REMOVE_OLD: LazyLock<Script> = LazyLock::new(|| {
    let old = r"
    local time = redis.call('TIME')
    local cutoff = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
    if not bound or cutoff <= 0 then return {0, 0} end
    cutoff = string.format('%.0f-0', cutoff)
    if sortable(cutoff) < sortable(bound) then bound = cutoff end
    local limit = tonumber(ARGV[1])
    ";
    Script::new(&[BOUND, old, REMOVE].concat())
});

/// Removes up to `ARGV[1]` acknowledged entries while there are more than `ARGV[2]`.
static REMOVE_SURPLUS: LazyLock<Script> = LazyLock::new(|| {
    let surplus = r"
    local limit = math.min(ARGV[1], redis.call('XLEN', KEYS[1]) - ARGV[2])
    if not bound or limit <= 0 then return {0, 0} end
    ";
    Script::new(&[BOUND, surplus, REMOVE].concat())
});

/// Removes up to `ARGV[1]` entries while there are more than `ARGV[2]`, whatever they are.
static REMOVE_UNREAD: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local length = redis.pcall('XLEN', KEYS[1])
        if type(length) == 'table' then return length end
        local removed = redis.pcall('XTRIM', KEYS[1], 'MAXLEN', math.max(ARGV[2], length - ARGV[1]))
        if type(removed) == 'table' then return removed end
        return {removed, removed > 0 and 1 or 0}
        ",
    )
});

/// How many entries are above `ARGV[1]`, and which group is behind.
static COUNT_EXCESS: LazyLock<Script> =
    LazyLock::new(|| Script::new(&[BOUND, "return {redis.call('XLEN', KEYS[1]) - ARGV[1], behind or ''}"].concat()));

/// What was removed from a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trimmed {
    /// Entries that every consumer group had acknowledged.
    pub acknowledged: u64,
    /// Entries that the hard cap removed from the first on that some group had not acknowledged; all of them where there is no group.
    pub unread: u64,
}

/// What a stream has above a hard cap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Excess {
    pub entries: u64,
    /// The consumer group that is furthest behind; `None` where there is no group, or none is behind.
    pub behind: Option<String>,
}

impl Streams {
    /// Removes what is older than `retention` by Redis's clock, and acknowledged by every consumer group: nothing that a group has not
    /// read, or has read and not acknowledged. A stream without a group is left alone.
    ///
    /// After that, with `max_entries` above 0, the oldest entries above that number are removed whatever they are: acknowledged
    /// ones first, then, after a warning in the log, the others.
    ///
    /// A thousand entries at a time, between which others have their turn; it may be dropped at any await.
    ///
    /// # Errors
    /// Redis is not reachable or refuses; what was removed until then stays removed.
    pub async fn trim(&self, stream: &str, retention: Duration, max_entries: u64) -> Result<Trimmed, StreamsError> {
        let acknowledged = self.remove(&REMOVE_OLD, stream, u64::MAX, millis(retention)).await?;
        let mut trimmed = Trimmed { acknowledged, unread: 0 };
        if max_entries == 0 {
            return Ok(trimmed);
        }
        if let Some(excess) = self.excess(stream, max_entries).await? {
            trimmed.acknowledged += self.remove(&REMOVE_SURPLUS, stream, excess.entries, max_entries).await?;
        }
        if let Some(Excess { entries, behind }) = self.excess(stream, max_entries).await? {
            let why = "removing entries that not every group has acknowledged: the stream is above app.streams.maxEntries";
            tracing::warn!(stream, entries, max_entries, group = behind, "{why}");
            trimmed.unread = self.remove(&REMOVE_UNREAD, stream, entries, max_entries).await?;
        }
        Ok(trimmed)
    }

    /// What the stream has above `max_entries`, and which consumer group is behind; `None` if it has no more than that.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn excess(&self, stream: &str, max_entries: u64) -> Result<Option<Excess>, StreamsError> {
        let mut call = COUNT_EXCESS.key(stream);
        let (entries, group): (i64, Vec<u8>) = self.invoke(DOING, stream, call.arg(max_entries)).await?;
        let behind = (!group.is_empty()).then(|| String::from_utf8_lossy(&group).into_owned());
        Ok(u64::try_from(entries).ok().filter(|entries| *entries > 0).map(|entries| Excess { entries, behind }))
    }

    /// Calls a script that removes entries until it has no more to remove, or `most` are gone: so this ends however fast others append.
    async fn remove(&self, script: &Script, stream: &str, most: u64, argument: u64) -> Result<u64, StreamsError> {
        let mut total = 0;
        while total < most {
            let mut call = script.key(stream);
            call.arg(ENTRIES_PER_STEP.min(most - total)).arg(argument);
            let (removed, more): (u64, bool) = self.invoke(DOING, stream, &call).await?;
            total += removed;
            if !more {
                break;
            }
        }
        Ok(total)
    }
}
