use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::future::try_join_all;
use redis::{Cmd, Script};
use uuid::Uuid;

use super::error::{concerns_event, is_unable_code};
use super::node::{Node, Request};
use super::{Streams, StreamsError, marker_key};
use crate::event::rfc3339;
use crate::outbox::{Batch, OutboxEvent};

/// Step 2 of the protocol, atomic: the marker and the entries are written together, and a second call changes nothing.
///
/// KEYS[3] and on are the markers of the batches that went before it. Where one is missing, or says that nothing was appended (a new
/// owner has resolved it since), this server has lost a suffix of the stream: nothing is appended, since what was lost must come first.
///
/// The marker is written first, because whatever Redis may lack (memory, a disk, the permission) then fails before the first
/// entry. `pcall` keeps the error's own code; `call` would wrap it on Redis 6. The command is added: Redis 7.0 does not say which one a user
/// may not run in a script.
///
/// If the first entry is refused and the entry itself is not at fault, the marker is taken back: nothing was written, and the same
/// batch can be appended later. `PEXPIRE` deletes, since a user who may append need not have the right to `DEL`.
static APPEND: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local function refused(reply, command)
            return {err = reply.err .. ' (' .. command .. ')'}
        end
        local marker = redis.pcall('GET', KEYS[2])
        if type(marker) == 'table' and marker.err then return refused(marker, 'GET') end
        if marker then return {marker, '', ''} end
        for i = 3, #KEYS do
            local before = redis.pcall('GET', KEYS[i])
            if type(before) == 'table' and before.err then return refused(before, 'GET') end
            if not before or before == 'aborted' then return {'lost', KEYS[i], ''} end
        end
        local last = ''
        local count = tonumber(ARGV[2])
        local set = redis.pcall('SET', KEYS[2], count, 'PX', ARGV[1])
        if set.err then return refused(set, 'SET') end
        for i = 0, count - 1 do
            local at = 4 + i * 6
            local reply
            if ARGV[at + 5] == '' then
                reply = redis.pcall('XADD', KEYS[1], '*', 'id', ARGV[at], 'type', ARGV[at + 1], 'aggregate_type', ARGV[3],
                    'aggregate_id', ARGV[at + 2], 'occurred_at', ARGV[at + 3], 'payload', ARGV[at + 4])
            else
                reply = redis.pcall('XADD', KEYS[1], '*', 'id', ARGV[at], 'type', ARGV[at + 1], 'aggregate_type', ARGV[3],
                    'aggregate_id', ARGV[at + 2], 'occurred_at', ARGV[at + 3], 'payload', ARGV[at + 4],
                    'headers', ARGV[at + 5])
            end
            if type(reply) == 'table' and reply.err then
                local of_event = string.find(reply.err, 'too large to be stored', 1, true)
                if i == 0 and not of_event and redis.pcall('PEXPIRE', KEYS[2], 0) == 1 then
                    return refused(reply, 'XADD')
                end
                redis.call('SET', KEYS[2], i, 'PX', ARGV[1])
                return {tostring(i), reply.err .. ' (XADD)', last}
            end
            last = reply
        end
        return {ARGV[2], '', last}
        ",
    )
});

/// Sets the marker to `aborted` only if absent, and says what it is: after this the batch can no longer be appended.
static RESOLVE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local marker = redis.pcall('GET', KEYS[1])
        if type(marker) == 'table' and marker.err then return marker end
        if marker then return marker end
        local set = redis.pcall('SET', KEYS[1], 'aborted', 'PX', ARGV[1])
        if set.err then return set end
        return 'aborted'
        ",
    )
});

/// The marker of a batch that can no longer be appended.
const ABORTED: &str = "aborted";

/// Whether a marker, if there is one, says that its batch was appended.
pub(super) fn is_appended(marker: Option<&str>) -> bool {
    marker.is_some_and(|text| text != ABORTED)
}

/// What an append came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    pub marker: Marker,
    /// Id of the last entry, when this very call appended it.
    pub last_entry: Option<String>,
    /// Why the event after the last appended was refused.
    pub refusal: Option<StreamRefusal>,
}

/// A refusal of one `XADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRefusal {
    pub error: String,
    /// The event itself is at fault. Whatever else Redis says, it would say of every event of this stream.
    pub of_event: bool,
    /// Redis could not work just then, for any stream.
    pub outage: bool,
}

/// The decision record of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// So many events of the batch, from the first, are in the stream.
    Appended(usize),
    /// Nothing is in the stream, and nothing can come.
    Aborted,
}

impl Marker {
    /// How many of `events` the marker says are in the stream.
    #[must_use]
    pub fn count(self, events: usize) -> usize {
        match self {
            Self::Appended(count) => count.min(events),
            Self::Aborted => 0,
        }
    }

    fn parse(stream: &str, batch_id: Uuid, text: String) -> Result<Self, StreamsError> {
        match text.parse() {
            Ok(count) => Ok(Self::Appended(count)),
            Err(_) if text == ABORTED => Ok(Self::Aborted),
            Err(_) => Err(StreamsError::StrangeMarker { key: marker_key(stream, batch_id), value: text }),
        }
    }
}

impl Streams {
    /// Appends the first `count` events of a batch to its stream, or learns from its marker what became of it, and waits for replicas
    /// as the settings say. Calling it again is safe. `predecessors` are batches that this stream must hold already.
    ///
    /// # Errors
    /// An outage ([`StreamsError::is_outage`]): call again. A refusal of the call itself (`NOPERM` on a key, a marker of another
    /// type), or [`StreamsError::Lost`]: nothing of this call was written.
    pub async fn append(
        &self,
        batch: &Batch,
        predecessors: &[Uuid],
        count: usize,
        marker_life: Duration,
    ) -> Result<Appended, StreamsError> {
        let Batch { id: batch_id, stream, events, .. } = batch;
        let events = &events[..count.min(events.len())];
        let command = append_command(batch, predecessors, events, marker_life);
        let call = Request::Large { script: &APPEND, command: &command };
        let noted = self.note_written(std::iter::once(batch.aggregate_type.as_str()));
        let (answer, ()) = tokio::join!(self.send("appending a batch", stream, call), noted);
        let (marker, error, last): (String, String, String) = answer?;
        if marker == "lost" {
            return Err(StreamsError::Lost { stream: stream.clone(), marker: error });
        }
        self.await_replicas(stream, *batch_id, marker_life).await?;
        let refusal = (!error.is_empty()).then(|| {
            let code = error.split(' ').next().unwrap_or_default();
            StreamRefusal { of_event: concerns_event(&error), outage: is_unable_code(code), error: error.clone() }
        });
        let last_entry = (!last.is_empty()).then_some(last);
        Ok(Appended { marker: Marker::parse(stream, *batch_id, marker)?, last_entry, refusal })
    }

    /// Recovery: what became of a batch. If nothing is known of it, it is aborted.
    ///
    /// # Errors
    /// As for [`append`](Self::append).
    pub async fn resolve(&self, stream: &str, batch_id: Uuid, marker_life: Duration) -> Result<Marker, StreamsError> {
        let mut call = RESOLVE.prepare_invoke();
        call.key(marker_key(stream, batch_id)).arg(millis(marker_life));
        let marker: String = self.invoke("resolving a batch", stream, &call).await?;
        self.await_replicas(stream, batch_id, marker_life).await?;
        Marker::parse(stream, batch_id, marker)
    }

    /// Shortens the life of the markers of settled batches. They are needed only to notice a failover.
    ///
    /// # Errors
    /// Markers then live on until they expire by themselves.
    pub async fn expire_markers(&self, batches: &[(String, Uuid)], life: Duration) -> Result<(), StreamsError> {
        let doing = "shortening the life of markers";
        let groups = self.by_node(doing, batches, |(stream, _)| stream.clone()).await?;
        let expire = async |(node, batches): &(Arc<Node>, Vec<&(String, Uuid)>)| {
            let mut pipeline = redis::pipe();
            for (stream, batch_id) in batches {
                pipeline.cmd("PEXPIRE").arg(marker_key(stream, *batch_id)).arg(millis(life)).ignore();
            }
            node.send::<()>(doing, Request::Pipeline(&pipeline)).await
        };
        try_join_all(groups.iter().map(expire)).await?;
        Ok(())
    }
}

/// The call of `APPEND`. Its arguments are written into one buffer, where the redis crate's own calls of scripts have one for each.
fn append_command(batch: &Batch, predecessors: &[Uuid], events: &[OutboxEvent], marker_life: Duration) -> Cmd {
    let bytes: usize = events.iter().map(|event| event.payload.as_ref().map_or(0, String::len) + event.headers.len()).sum();
    let mut command = Cmd::with_capacity(6 + predecessors.len() + 6 * events.len(), bytes + 300 + 200 * events.len());
    command.arg("EVALSHA").arg(APPEND.get_hash()).arg(2 + predecessors.len());
    command.arg(&batch.stream).arg(marker_key(&batch.stream, batch.id));
    for before in predecessors {
        command.arg(marker_key(&batch.stream, *before));
    }
    command.arg(millis(marker_life)).arg(events.len()).arg(&batch.aggregate_type);
    let mut id = Uuid::encode_buffer();
    for event in events {
        command.arg(&*event.id.hyphenated().encode_lower(&mut id)).arg(&event.event_type).arg(&event.aggregate_id);
        command.arg(rfc3339(event.occurred_at)).arg(event.payload.as_deref().unwrap_or_default()).arg(&event.headers);
    }
    command
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
