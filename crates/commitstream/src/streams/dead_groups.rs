//! Dead letters by their causes, without their payloads.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use redis::Script;
use serde::Serialize;

use super::{Streams, StreamsError, dead_stream};

/// Up to 1,000 dead letters or 1 MiB of them: id, group, type, time and the beginning of the reason of each. Redis does nothing else
/// meanwhile. The fields of a dead letter follow those of its event, so they are looked for from the end.
static PAGE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local last, found, copied = ARGV[1], {}, 0
        repeat
            local entries = redis.pcall('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 20)
            if entries.err then return entries end
            for _, entry in ipairs(entries) do
                local fields = entry[2]
                local known = {}
                last = entry[1]
                for i = #fields - 1, 1, -2 do
                    copied = copied + #fields[i + 1]
                    known[fields[i]] = known[fields[i]] or fields[i + 1]
                end
                found[#found + 1] = {last, known['group'] or '', known['type'] or '', known['dead_at'] or '',
                    string.sub(known['reason'] or '', 1, 300)}
            end
        until #entries < 20 or #found >= 1000 or copied >= 1048576
        return {last, found}
        ",
    )
});

/// Dead letters that are looked at for one answer.
const LOOKED_AT: u64 = 10_000;

/// Bytes of a reason that make its cause, as the script cuts it.
const LOOKED_INTO: usize = 300;

/// Characters of a cause.
const LONGEST_CAUSE: usize = 100;

/// Dead letters of one stream, group, type and cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeadGroup {
    /// Where the events were, such as `events:user`.
    pub stream: String,
    pub group: String,
    pub event_type: String,
    pub cause: String,
    /// The reason of one of them, at most 300 bytes.
    pub example: String,
    pub letters: u64,
    pub oldest: Option<DateTime<Utc>>,
    pub newest: Option<DateTime<Utc>>,
    /// The newest of them; what came later was not looked at.
    pub last_id: String,
}

/// Dead letters by cause.
#[derive(Debug, Clone, Default)]
pub struct DeadGroups {
    /// The largest first.
    pub groups: Vec<DeadGroup>,
    /// There are more than were looked at: each number is the least that it can be.
    pub at_least: bool,
}

impl Streams {
    /// The dead letters of these streams by group, type and cause; 10,000 of them are looked at, the oldest of each stream first.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn dead_groups(&self, streams: &[String]) -> Result<DeadGroups, StreamsError> {
        let mut found: BTreeMap<(String, String, String, String), DeadGroup> = BTreeMap::new();
        let (mut looked_at, mut at_least) = (0, false);
        for stream in streams {
            let (key, mut after) = (dead_stream(stream), "0".to_owned());
            loop {
                if looked_at >= LOOKED_AT {
                    at_least = true;
                    break;
                }
                let mut call = PAGE.key(&key);
                let (last, page): (String, Vec<Row>) = self.invoke("reading dead letters", &key, call.arg(&after)).await?;
                looked_at += page.len() as u64;
                if page.is_empty() {
                    break;
                }
                after = last;
                page.into_iter().for_each(|row| take_in(&mut found, stream, row));
            }
        }
        let mut groups: Vec<DeadGroup> = found.into_values().collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.letters));
        Ok(DeadGroups { groups, at_least })
    }
}

/// Id, group, type, time and reason.
type Row = (String, String, String, String, Vec<u8>);

fn take_in(
    found: &mut BTreeMap<(String, String, String, String), DeadGroup>,
    stream: &str,
    (id, group, event_type, at, reason): Row,
) {
    let example = String::from_utf8_lossy(&reason).into_owned();
    let cause = cause_of(&example);
    let at = at.parse().ok();
    let key = (stream.to_owned(), group.clone(), event_type.clone(), cause.clone());
    let of = found.entry(key).or_insert_with(|| DeadGroup {
        stream: stream.to_owned(),
        group,
        event_type,
        cause,
        example,
        letters: 0,
        oldest: at,
        newest: at,
        last_id: String::new(),
    });
    of.letters += 1;
    of.newest = at.or(of.newest);
    of.last_id = id;
}

/// What reasons have in common that differ in ids and numbers only: each word with a digit becomes `#`.
#[must_use]
pub fn cause_of(reason: &str) -> String {
    let is_of_word = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let beginning = String::from_utf8_lossy(&reason.as_bytes()[..reason.len().min(LOOKED_INTO)]);
    let (mut cause, mut word) = (String::new(), String::new());
    for c in beginning.chars().chain([' ']) {
        if is_of_word(c) {
            word.push(c);
            continue;
        }
        cause += if word.contains(|c: char| c.is_ascii_digit()) { "#" } else { &word };
        word.clear();
        // Forms of browsers change ends of lines.
        cause.push(if c.is_control() { ' ' } else { c });
    }
    cause.pop();
    cause.chars().take(LONGEST_CAUSE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_that_differ_in_ids_and_numbers_have_one_cause() {
        let id = "0190c5b5-7c1e-7c61-8b6e-1f2e3d4c5b6a";
        assert_eq!(cause_of(&format!("no user {id}: HTTP 404")), "no user #: HTTP #");
        assert_eq!(cause_of("no user 7: HTTP 404"), "no user #: HTTP #");
        assert_eq!(cause_of("a\nb"), "a b");
        let long = "x ".repeat(149) + "\u{10ffff}5";
        let cut = String::from_utf8_lossy(&long.as_bytes()[..LOOKED_INTO]).into_owned();
        assert_eq!(cause_of(&long), cause_of(&cut), "the script cuts bytes, not characters");
        assert_eq!(cause_of("cannot connect"), "cannot connect");
        assert_eq!(cause_of(""), "");
        assert_eq!(cause_of(&"ä".repeat(500)).chars().count(), LONGEST_CAUSE);
    }
}
