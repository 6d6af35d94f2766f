//! The scripts of the members of a consumer group: each is atomic.

use std::sync::LazyLock;

use redis::Script;

/// Redis refuses for want of memory only what a script writes first. Each script begins with a write that it allows and that changes
/// nothing, so that a full Redis can go on with what makes room: entries are acknowledged, and trimmed then. What is written besides
/// is little, and bounded by what members have in hand.
const NOW: &str = r"
local function begin_when_full(members) redis.call('ZREM', members, '') end
local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
";

/// KEYS: stream, members, owners, successors, takers, failures, turns. ARGV: group, member, life, prefix of the keys.
const COMMON: &str = r"
local stream, members, owners, successors, takers, failures = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local group, me, life, queue = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] .. 'queue:'
local started = ARGV[4] .. 'started:'
-- 0 is the score of one that has left.
if (tonumber(redis.call('ZSCORE', members, me) or 0)) == 0 then return {'gone'} end
local group_is_there = redis.pcall('XPENDING', stream, group)
if group_is_there.err then return group_is_there end
local time = now()
begin_when_full(members)
redis.call('ZADD', members, time + life, me)

local resolved = {}
local function resolve(name)
    local found = resolved[name]
    if found then return found end
    found = name
    while true do
        local heir = redis.call('HGET', successors, found)
        if not heir then break end
        found = heir
    end
    resolved[name] = found
    return found
end

local function aggregate_of(fields)
    if fields[7] == 'aggregate_id' then return fields[8] end
    for i = 1, #fields, 2 do
        if fields[i] == 'aggregate_id' then return fields[i + 1] end
    end
    return ''
end
";

/// Makes the group if it is new, and becomes a member. KEYS: stream, members. ARGV: group, member, life, start.
pub(super) static JOIN: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{}",
        r"
        begin_when_full(KEYS[2])
        local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[4], 'MKSTREAM')
        if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
        redis.call('ZADD', KEYS[2], now() + tonumber(ARGV[3]), ARGV[2])
        if made.err then return 0 end
        return 1
        "
    ))
});

/// Acknowledges, gives aggregates back, and takes entries. Further ARGV: how many may queue up for another member, how many entries to
/// take, number of the call, how many acknowledgements, these, and the aggregates.
///
/// A call that arrives after a later one of its member, because its connection stalled, does nothing: the member has given it up, and
/// would not know of the entries that it takes, nor that it gives back what is in hand again.
pub(super) static CYCLE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local longest, count, turn, done = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
        if turn <= tonumber(redis.call('HGET', KEYS[7], me) or 0) then return {'late'} end
        redis.call('HSET', KEYS[7], me, turn)
        if done > 0 then
            redis.call('XACK', stream, group, unpack(ARGV, 9, 8 + done))
            if redis.call('EXISTS', failures) == 1 then redis.call('HDEL', failures, unpack(ARGV, 9, 8 + done)) end
        end

        local mine = queue .. me
        local released = 1
        if #ARGV > 8 + done then
            if redis.call('LLEN', mine) > 0 then
                released = 0
            else
                local names = {unpack(ARGV, 9 + done)}
                local held, free = redis.call('HMGET', owners, unpack(names)), {}
                for i, name in ipairs(names) do
                    if held[i] and resolve(held[i]) == me then free[#free + 1] = name end
                end
                if #free > 0 then redis.call('HDEL', owners, unpack(free)) end
            end
        end

        local queued = {}
        if count > 0 then
            for _, id in ipairs(redis.call('LPOP', mine, count) or {}) do
                local inherited = string.sub(id, 1, 1) == '!'
                if inherited then id = string.sub(id, 2) end
                local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
                if pending and pending[2] == me then
                    local entry = redis.call('XRANGE', stream, id, id)[1]
                    queued[#queued + 1] =
                        {id, entry and entry[2] or {}, pending[4], redis.call('HGET', failures, id) or '', inherited and 1 or 0}
                end
            end
        end

        local new, last = {}, ''
        local room = count - #queued
        -- Some that queued up may be known and done already; what stands behind them comes before anything new.
        if room > 0 and redis.call('LLEN', mine) > 0 then room = 0 end
        if room > 0 then
            local living = redis.call('ZRANGEBYSCORE', members, time, '+inf')
            for _, name in ipairs(living) do
                if name ~= me and redis.call('LLEN', queue .. name) > longest then room = 0 end
            end
            table.sort(living)
            local reply = false
            if room > 0 then
                reply = redis.pcall('XREADGROUP', 'GROUP', group, me, 'COUNT', room, 'STREAMS', stream, '>')
                if reply and reply.err then return reply end
            end
            if reply then
                local entries, names, fresh, given = reply[1][2], {}, {}, {}
                for i, entry in ipairs(entries) do names[i] = aggregate_of(entry[2]) end
                local held = redis.call('HMGET', owners, unpack(names))
                for i, entry in ipairs(entries) do
                    local name, owner = names[i], held[i] or fresh[names[i]]
                    if not owner then
                        owner = me
                        if #living > 1 then
                            local hash = #name
                            for _, byte in ipairs({string.byte(name, -6, -1)}) do hash = (hash * 31 + byte) % 1000003 end
                            owner = living[hash % #living + 1]
                        end
                        fresh[name] = owner
                        given[#given + 1] = name
                        given[#given + 1] = owner
                    elseif owner ~= me then
                        owner = resolve(owner)
                    end
                    if owner == me then
                        new[#new + 1] = entry
                    else
                        redis.call('XCLAIM', stream, group, owner, 0, entry[1], 'JUSTID')
                        redis.call('RPUSH', queue .. owner, entry[1])
                    end
                end
                if #given > 0 then redis.call('HSET', owners, unpack(given)) end
            elseif room > 0 then
                for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
                    local fields = {}
                    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
                    if fields['name'] == group then last = fields['last-delivered-id'] end
                end
            end
        end
        return {'ok', released, queued, new, last}
        "
    ))
});

/// Takes what the dead have left, or others have returned. Further ARGV: idle time of consumers that never were members, how many
/// entries, and who stands for what was returned.
///
/// Silence counts no delivery. Only an entry that its member had said to be at work counts one: it may be what ended the process.
/// What came from a member is marked with `!` in the queue, so that the new one says before it begins with it.
pub(super) static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local idle, room = tonumber(ARGV[5]), tonumber(ARGV[6])
        local taken = 0

        local function take(name, was_member)
            local rows = redis.call('XPENDING', stream, group, '-', '+', room, name)
            for _, row in ipairs(rows) do
                local id, target, count, mark = row[1], me, row[4], ''
                if was_member then
                    count, mark = count + redis.call('HEXISTS', started .. name, id), '!'
                else
                    local entry = redis.call('XRANGE', stream, id, id)[1]
                    local aggregate = entry and aggregate_of(entry[2]) or ''
                    local owner = redis.call('HGET', owners, aggregate)
                    if owner then target = resolve(owner) else redis.call('HSET', owners, aggregate, me) end
                end
                redis.call('XCLAIM', stream, group, target, 0, id, 'RETRYCOUNT', count, 'JUSTID')
                redis.call('RPUSH', queue .. target, mark .. id)
            end
            taken = taken + #rows
            room = room - #rows
            -- Asked for more than there were, so this was the rest.
            return room > 0
        end

        for _, name in ipairs(redis.call('ZRANGEBYSCORE', members, '-inf', '(' .. time)) do
            local taker = redis.call('HGET', takers, name)
            if not taker then redis.call('HSET', takers, name, me) end
            redis.call('ZREM', members, name)
        end
        local work = redis.call('HGETALL', takers)
        for i = 1, #work, 2 do
            local name = work[i]
            if room > 0 and resolve(work[i + 1]) == me and take(name, true) then
                redis.call('HSET', successors, name, me)
                redis.call('HDEL', takers, name)
                redis.call('HDEL', KEYS[7], name)
                redis.call('DEL', queue .. name, started .. name)
                redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
            end
        end
        for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
            local fields = {}
            for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
            local name = fields['name']
            if room > 0 and fields['pending'] > 0 and not redis.call('ZSCORE', members, name)
                and redis.call('HEXISTS', takers, name) == 0 and (name == ARGV[7] or fields['idle'] >= idle) then
                take(name, false)
            end
        end
        if redis.call('HLEN', takers) == 0 and redis.call('XPENDING', stream, group)[1] == 0 then
            redis.call('DEL', owners, successors)
        end
        return {'ok', taken, room > 0 and 0 or 1, redis.call('HLEN', successors)}
        "
    ))
});

/// Notes a failed attempt of an entry that the member has in hand. Further ARGV: entry id, deliveries, the whole history.
pub(super) static FAIL: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local id = ARGV[5]
        local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
        if not pending or pending[2] ~= me then return {'ok', 0} end
        redis.call('HSET', failures, id, ARGV[7])
        redis.call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', ARGV[6], 'JUSTID')
        redis.call('HDEL', started .. me, id)
        return {'ok', 1}
        "
    ))
});

/// Acknowledges one entry at once, with what was noted of it. Further ARGV: entry id.
pub(super) static ACKNOWLEDGE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local id = ARGV[5]
        local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
        if not pending or pending[2] ~= me then return {'ok', 0} end
        redis.call('XACK', stream, group, id)
        redis.call('HDEL', failures, id)
        return {'ok', 1}
        "
    ))
});

/// Lists what the member has by Redis's account, ids only. Further ARGV: after which id, how many.
pub(super) static PENDING: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local found = {}
        for i, row in ipairs(redis.call('XPENDING', stream, group, '(' .. ARGV[5], '+', ARGV[6], me)) do
            found[i] = {row[1], row[4]}
        end
        return {'ok', found}
        "
    ))
});

/// The aggregate of entries, and what was noted of them, without their payloads. Further ARGV: their ids.
pub(super) static DESCRIBE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local rows = {}
        for i = 5, #ARGV do
            local entry = redis.call('XRANGE', stream, ARGV[i], ARGV[i])[1]
            rows[#rows + 1] =
                {ARGV[i], entry and aggregate_of(entry[2]) or '', redis.call('HGET', failures, ARGV[i]) or ''}
        end
        return {'ok', rows}
        "
    ))
});

/// A step of forgetting the dead that the member is the heir of: what they owned becomes its own, a page at a time, and is returned with
/// what was its own before. After the last page nothing refers to their names. Further ARGV: cursor, 1 to go through all even if there is
/// nobody to forget, and the names, after the first step.
pub(super) static SWEEP: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{COMMON}{}",
        r"
        local cursor, names, own = ARGV[5], {unpack(ARGV, 7)}, {}
        if cursor == '0' then
            local known = redis.call('HGETALL', successors)
            for i = 1, #known, 2 do
                -- One call passes the names on: it has room for so many.
                if #names < 1000 and known[i] ~= me and resolve(known[i]) == me then names[#names + 1] = known[i] end
            end
            if #names == 0 and ARGV[6] == '0' then return {'ok', '0', {}, {}} end
        end
        local page = redis.call('HSCAN', owners, cursor, 'COUNT', 500)
        for i = 1, #page[2], 2 do
            local aggregate, owner = page[2][i], page[2][i + 1]
            if resolve(owner) == me then
                if owner ~= me then redis.call('HSET', owners, aggregate, me) end
                own[#own + 1] = aggregate
            end
        end
        if page[1] == '0' then
            local work = redis.call('HGETALL', takers)
            for i = 1, #work, 2 do
                if work[i + 1] ~= me and resolve(work[i + 1]) == me then redis.call('HSET', takers, work[i], me) end
            end
            -- One whose heir was among the names has this member for its heir.
            local known = redis.call('HGETALL', successors)
            for i = 1, #known, 2 do
                if known[i + 1] ~= me and resolve(known[i + 1]) == me then redis.call('HSET', successors, known[i], me) end
            end
            if #names > 0 then redis.call('HDEL', successors, unpack(names)) end
        end
        return {'ok', page[1], names, own}
        "
    ))
});

/// Moves the deadline of a member, and nothing else. Returns 0 if it is none any more. KEYS: members. ARGV: member, life.
pub(super) static HEARTBEAT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "{NOW}{}",
        r"
        if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) == 0 then return 0 end
        begin_when_full(KEYS[1])
        redis.call('ZADD', KEYS[1], now() + tonumber(ARGV[2]), ARGV[1])
        return 1
        "
    ))
});

/// Notes which entries a member has at work, instead of what it said before. Returns 0 if it is no member any more. KEYS: members, started.
/// ARGV: member, ids.
pub(super) static START: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) == 0 then return 0 end
        redis.call('DEL', KEYS[2])
        for i = 2, #ARGV do redis.call('HSET', KEYS[2], ARGV[i], 1) end
        return 1
        ",
    )
});

/// Ends the membership at once: others take what is left. What they took before and counted as perhaps deadly was not: the member is
/// there to say so. KEYS: members, started, stream. ARGV: member, group, then ids that were at work, each with its deliveries.
pub(super) static LEAVE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        redis.call('DEL', KEYS[2])
        redis.call('ZADD', KEYS[1], 'XX', 0, ARGV[1])
        for i = 3, #ARGV, 2 do
            local pending = redis.pcall('XPENDING', KEYS[3], ARGV[2], ARGV[i], ARGV[i], 1)
            local row = not pending.err and pending[1]
            if row and row[2] ~= ARGV[1] and row[4] > tonumber(ARGV[i + 1]) then
                redis.call('XCLAIM', KEYS[3], ARGV[2], row[2], 0, ARGV[i], 'RETRYCOUNT', row[4] - 1, 'JUSTID')
            end
        end
        return 1
        ",
    )
});
