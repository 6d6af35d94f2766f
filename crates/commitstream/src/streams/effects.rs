use std::sync::LazyLock;
use std::time::Duration;

use redis::{Script, ScriptInvocation};
use uuid::Uuid;

use super::append::millis;
use super::{Streams, StreamsError, group_key};
use crate::consumer::Known;

const BEGUN: &str = "begun";
const DONE: &str = "done";
const DOING: &str = "noting an effect";

/// Notes that an effect begins, unless there is a note. KEYS: the effect, and the key of versions before effects had names.
///
/// It begins with a write that removes nothing, because Redis refuses for want of memory only what a script writes first: a full Redis
/// gets room when events are handled and acknowledged.
static BEGIN: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local before = redis.call('GET', KEYS[1]) or redis.call('GET', KEYS[2])
        if before then return before end
        redis.call('DEL', KEYS[1])
        redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
        return false
        ",
    )
});

/// Notes what has become of it. KEYS as above. ARGV: the note, which may be empty, and its time to live.
static NOTE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        redis.call('DEL', KEYS[1], KEYS[2])
        if ARGV[1] ~= '' then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
        return 1
        ",
    )
});

/// An effect of the handling of one event by one group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effect<'a> {
    pub stream: &'a str,
    pub group: &'a str,
    pub event_id: Uuid,
    pub name: &'a str,
}

impl Effect<'_> {
    fn add_keys(&self, call: &mut ScriptInvocation<'_>) {
        let unnamed = group_key(self.stream, self.group, &format!("effect:{}", self.event_id));
        call.key(format!("{unnamed}:{}", self.name)).key(unnamed);
    }
}

impl Streams {
    /// Notes that an effect begins, unless a note is there already; says what was known before.
    pub(crate) async fn begin_effect(&self, effect: Effect<'_>, ttl: Duration) -> Result<Known, StreamsError> {
        let mut call = BEGIN.prepare_invoke();
        effect.add_keys(&mut call);
        call.arg(BEGUN).arg(millis(ttl));
        let before: Option<String> = self.invoke(DOING, effect.stream, &call).await?;
        Ok(match before.as_deref() {
            None => Known::Nothing,
            Some(DONE) => Known::Done,
            Some(_) => Known::Begun,
        })
    }

    /// Notes what has become of it.
    pub(crate) async fn note_effect(&self, effect: Effect<'_>, known: Known, ttl: Duration) -> Result<(), StreamsError> {
        let note = match known {
            Known::Nothing => "",
            Known::Begun => BEGUN,
            Known::Done => DONE,
        };
        let mut call = NOTE.prepare_invoke();
        effect.add_keys(&mut call);
        call.arg(note).arg(millis(ttl));
        self.invoke(DOING, effect.stream, &call).await
    }
}
