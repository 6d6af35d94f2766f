//! Which streams this outbox has written to. The key space of Redis is everybody's: another application's prefix may begin with ours.
//!
//! A hash under the prefix has a field for each aggregate type, with the outbox that wrote to its stream first; the field `{owner}:<id>` of
//! an outbox says when its relay was there last, and which it is. No aggregate type has a brace in it, so neither field nor key is taken
//! for one. The hash is kept for convenience: a relay writes it anew from its tables (`outbox_stream`), a direct publisher once an hour.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::Script;

use super::{DEAD, Streams, StreamsError};

/// Notes aggregate types (`ARGV[4]` and on) as written to by the outbox `ARGV[1]` (empty: by a publisher without one), which `ARGV[2]`
/// describes. Says who else wrote to them first, unless that outbox was not seen for `ARGV[3]` milliseconds: it is gone then.
static NOTE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local owner, time = ARGV[1], redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        if owner ~= '' then
            local set = redis.pcall('HSET', KEYS[1], '{owner}:' .. owner, string.format('%.0f', now) .. ' ' .. ARGV[2])
            if type(set) == 'table' then return set end
        end
        local others = {}
        for i = 4, #ARGV do
            local first = redis.pcall('HGET', KEYS[1], ARGV[i])
            if type(first) == 'table' and first.err then return first end
            local other
            if first and first ~= owner and first ~= '' and owner ~= '' then
                local seen = redis.call('HGET', KEYS[1], '{owner}:' .. first)
                local at = seen and tonumber(string.match(seen, '^%d+')) or 0
                if now - at < tonumber(ARGV[3]) then other = string.match(seen, '^%d+ (.*)$') or first end
            end
            if other then
                others[#others + 1] = ARGV[i]
                others[#others + 1] = other
            elseif not first or (owner ~= '' and first ~= owner) then
                local set = redis.pcall('HSET', KEYS[1], ARGV[i], owner)
                if type(set) == 'table' then return set end
            end
        end
        return others
        ",
    )
});

/// An outbox that was not seen for so long is gone: its streams go to whoever else writes to them.
const GONE_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// A stream is noted again after so long, and sooner after a refusal.
const AGAIN_AFTER: Duration = Duration::from_secs(60 * 60);
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Types that one call notes.
const TYPES_PER_CALL: usize = 500;

/// Types that are remembered as noted. Where there are more, some are noted again.
const MOST_NOTED: usize = 10_000;

const DOING: &str = "noting the streams of this outbox";

/// An outbox, as those that share its Redis see it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The same for every relay of the outbox, and for no other.
    pub id: String,
    /// For people.
    pub name: String,
}

/// A stream that another outbox writes to as well.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SharedStream {
    pub stream: String,
    /// The outbox that was there first, in words.
    pub with: String,
}

/// What this process has noted lately.
#[derive(Debug, Default)]
pub(super) struct Registry {
    owner: Option<Owner>,
    /// When an aggregate type is to be noted again.
    due: Mutex<HashMap<String, Instant>>,
}

impl Registry {
    /// Those that are due, once each. They count as noted for a while, so that nobody notes them twice at a time.
    fn take_due<'a>(&self, types: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
        let now = Instant::now();
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = BTreeSet::new();
        let mut last = None;
        for name in types {
            // Most events of a batch are of one type.
            if last.replace(name) == Some(name) || due.get(name).is_some_and(|at| *at > now) {
                continue;
            }
            if due.len() >= MOST_NOTED {
                due.clear();
            }
            due.insert(name.to_owned(), now + RETRY_AFTER);
            taken.insert(name);
        }
        taken
    }

    /// They are to be noted with the next event.
    fn not_noted(&self, types: &BTreeSet<&str>) {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.retain(|name, _| !types.contains(name.as_str()));
    }

    fn noted(&self, types: &BTreeSet<&str>) {
        let until = Instant::now() + AGAIN_AFTER;
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.extend(types.iter().map(|name| ((*name).to_owned(), until)));
    }
}

/// What stands in the hash.
#[derive(Debug, Clone, Default)]
pub struct Registered {
    /// Aggregate type → id of the outbox that was there first; empty where no outbox was.
    pub types: BTreeMap<String, String>,
    /// By id: when its relay was there last, in milliseconds of Redis's clock, and its name.
    pub owners: BTreeMap<String, (u64, String)>,
}

impl Registered {
    fn read(fields: HashMap<String, String>) -> Self {
        let mut registered = Self::default();
        for (field, value) in fields {
            if let Some(id) = field.strip_prefix("{owner}:") {
                let (at, name) = value.split_once(' ').unwrap_or((&value, ""));
                registered.owners.insert(id.to_owned(), (at.parse().unwrap_or(0), name.to_owned()));
            } else if !field.ends_with(DEAD) {
                registered.types.insert(field, value);
            }
        }
        registered
    }

    /// Another outbox whose relay was there lately.
    fn is_alive(&self, id: &str, now_ms: u64) -> bool {
        let gone_after = u64::try_from(GONE_AFTER.as_millis()).unwrap_or(u64::MAX);
        self.owners.get(id).is_some_and(|(at, _)| now_ms.saturating_sub(*at) < gone_after)
    }

    /// The types that the outbox of this id looks after: its own, and while it is alone there, those that no outbox writes to.
    pub fn of(&self, id: &str, now_ms: u64) -> Vec<&str> {
        let alone = !self.owners.keys().any(|other| other != id && self.is_alive(other, now_ms));
        let own = |owner: &str| owner == id || (alone && !self.is_alive(owner, now_ms));
        self.types.iter().filter(|(_, owner)| own(owner)).map(|(name, _)| name.as_str()).collect()
    }

    /// The names of other outboxes whose relays were there lately.
    pub fn others(&self, id: &str, now_ms: u64) -> Vec<&str> {
        let others = self.owners.iter().filter(|(other, _)| *other != id && self.is_alive(other, now_ms));
        others.map(|(_, (_, name))| name.as_str()).collect()
    }
}

impl Streams {
    /// The same connection, whose appends are those of this outbox.
    #[must_use]
    pub fn owned_by(&self, owner: Owner) -> Self {
        let mut streams = self.clone();
        streams.registry = Arc::new(Registry { owner: Some(owner), due: Mutex::default() });
        streams
    }

    pub(crate) fn owner(&self) -> Option<&Owner> {
        self.registry.owner.as_ref()
    }

    /// Key of the hash. No stream has a brace in its name.
    pub(crate) fn registry_key(&self) -> String {
        format!("{}{REGISTRY}", self.prefix)
    }

    /// Notes those of these aggregate types that were not noted lately. What is noted late or never is not trimmed and not
    /// listed, so a failure fails no append.
    pub(super) async fn note_written<'a>(&self, types: impl Iterator<Item = &'a str>) {
        let due = self.registry.take_due(types);
        if due.is_empty() {
            return;
        }
        match self.note(&due.iter().copied().collect::<Vec<_>>()).await {
            Ok(_) => self.registry.noted(&due),
            Err(error) if error.is_outage() => {
                self.registry.not_noted(&due);
                tracing::debug!(%error, "streams will be noted later");
            }
            Err(error) => {
                let key = self.registry_key();
                tracing::warn!(%error, key, "cannot note the streams that are written to: they are neither listed nor trimmed; see `commitstream doctor`");
            }
        }
    }

    /// Notes streams of this outbox, given by their keys, and that its relay is here. Answers which of them another one wrote to first.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub(crate) async fn register(&self, streams: &[String]) -> Result<Vec<SharedStream>, StreamsError> {
        let types: Vec<&str> = streams.iter().filter_map(|stream| stream.strip_prefix(&*self.prefix)).collect();
        self.note(&types).await
    }

    async fn note(&self, types: &[&str]) -> Result<Vec<SharedStream>, StreamsError> {
        let key = self.registry_key();
        let (id, name) = self.owner().map_or(("", ""), |owner| (&owner.id, &owner.name));
        let mut shared = Vec::new();
        // Without a type, too: the relay is here.
        for types in std::iter::once(types).filter(|types| types.is_empty()).chain(types.chunks(TYPES_PER_CALL)) {
            let mut call = NOTE.key(&key);
            call.arg(id).arg(name).arg(super::append::millis(GONE_AFTER)).arg(types);
            let others: Vec<(String, String)> = self.invoke(DOING, &key, &call).await?;
            shared.extend(others.into_iter().map(|(of, with)| SharedStream { stream: self.stream_of(&of), with }));
        }
        Ok(shared)
    }

    pub(crate) async fn registered(&self) -> Result<Registered, StreamsError> {
        let key = self.registry_key();
        let fields = self.query("reading the streams of this outbox", &key, redis::cmd("HGETALL").arg(&key)).await?;
        Ok(Registered::read(fields))
    }

    /// Redis's clock.
    pub(crate) async fn now_ms(&self) -> Result<u64, StreamsError> {
        let key = self.registry_key();
        let (seconds, micros): (u64, u64) = self.query("reading the clock", &key, &redis::cmd("TIME")).await?;
        Ok(seconds * 1_000 + micros / 1_000)
    }

    /// The streams of events that relays and publishers of this prefix have written to, sorted. Those of dead letters are left out.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn list(&self) -> Result<Vec<String>, StreamsError> {
        Ok(self.registered().await?.types.keys().map(|of| self.stream_of(of)).collect())
    }

    /// Those of them that the outbox of [`owned_by`](Self::owned_by) looks after: none that another one wrote to first.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub(crate) async fn own(&self) -> Result<Vec<String>, StreamsError> {
        let (registered, now) = (self.registered().await?, self.now_ms().await?);
        let id = self.owner().map_or("", |owner| &owner.id);
        Ok(registered.of(id, now).into_iter().map(|of| self.stream_of(of)).collect())
    }
}

/// What follows the prefix in the key of the hash.
pub(super) const REGISTRY: &str = "{streams}";

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const DAY: u64 = 24 * 60 * 60 * 1_000;

    fn registered(owners: &[(&str, u64)]) -> Registered {
        let types = [("user", "a"), ("order", "b"), ("tick", "")].map(|(of, id)| (of.to_owned(), id.to_owned()));
        let owners = owners.iter().map(|(id, at)| (format!("{{owner}}:{id}"), format!("{at} the database of {id}")));
        Registered::read(types.into_iter().chain(owners).collect())
    }

    #[test]
    fn an_outbox_looks_after_its_own_streams_and_after_others_when_it_is_alone() {
        let two = registered(&[("a", NOW), ("b", NOW - DAY / 2)]);
        assert_eq!(two.of("a", NOW), ["user"]);
        assert_eq!(two.of("b", NOW), ["order"]);
        assert_eq!(two.of("c", NOW), [""; 0]);
        assert_eq!(two.others("a", NOW), ["the database of b"]);
        let one = registered(&[("a", NOW), ("b", NOW - DAY)]);
        assert_eq!(one.of("a", NOW), ["order", "tick", "user"]);
        assert_eq!(one.others("a", NOW), [""; 0]);
        assert_eq!(registered(&[]).of("a", NOW), ["order", "tick", "user"]);
    }

    #[test]
    fn a_type_is_noted_once_in_a_while() {
        let registry = Registry::default();
        assert_eq!(registry.take_due(["a", "a", "b", "a"].into_iter()), BTreeSet::from(["a", "b"]));
        assert!(registry.take_due(["b", "a"].into_iter()).is_empty());
        registry.noted(&BTreeSet::from(["a"]));
        let due = registry.due.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(due["a"] > due["b"]);
    }
}
