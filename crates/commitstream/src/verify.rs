//! Audits outbox and journal against the streams: is every event where it should be, once, and in order?
//!
//! The streams are read first, a page at a time, into temporary tables of the session; then PostgreSQL compares these with the
//! outbox in one snapshot, on its disk. So memory stays bounded on both sides, whatever their size. The outbox is only read, unless
//! [`republish`] is called after that.
//!
//! Relays, producers and the clean-up may go on meanwhile. None of them makes a finding:
//!
//! * *Published, and not in what was read.* Only rows that were published before the audit began (by the database's clock) count
//!   as missing. An event is published after its entry was written, and reading began later still.
//! * *In a stream, and not published.* The snapshot is taken after the reading, and an event is named by an open batch, then
//!   settled in one transaction. So an entry that was read belongs to an open or a settled batch of the snapshot.
//! * *Appended while a stream is read.* Reading ends at the entry that was the last one at its beginning.
//! * *Trimmed while a stream is read.* What the stream begins with is looked up after its reading.
//! * *Removed by the clean-up.* Its entry counts as unknown; its journal row, while there is one, still says what was appended.

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt};
use serde::Serialize;
use sqlx::PgConnection;
use thiserror::Error;

use crate::outbox::{EntryLines, OutboxError, OutboxRepository, ReadStream};
use crate::streams::{Entry, StreamInfo, Streams, StreamsError};

pub use crate::outbox::{Finding, Findings};

/// Most entries of one page.
const LARGEST_PAGE: usize = 1_000;

/// Entries of the first page of a stream, whose sizes nobody knows yet.
const FIRST_PAGE: usize = 20;

/// Streams that are begun to be read at a time: with many short ones, one round trip after the other would take too long.
const AT_ONCE: usize = 8;

/// What a page should hold, in bytes of fields.
const PAGE_BYTES: usize = 1 << 20;

/// What an audit found.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Streams under the prefix, and their entries that were read.
    pub streams: u64,
    pub entries: u64,
    /// Rows by status; `pending` are all that are still to be sent.
    pub published: u64,
    pub pending: u64,
    pub failed: u64,
    /// Batches on their way.
    pub open_batches: u64,
    /// Published by a row, or by a settled batch whose row was removed since, and in no stream.
    pub missing: Findings,
    /// Entries beyond the first of their event.
    pub duplicated: Findings,
    /// Entries behind one of their aggregate with a higher `seq`. Also what came late on purpose: an event that had failed and was
    /// retried, and those of producers that raced on one aggregate without a lock.
    pub out_of_order: Findings,
    /// In a stream, while the row says that it is still to be sent, or failed, and no batch is on its way with it.
    pub unsettled: Findings,
    /// In the stream of another aggregate type.
    pub misplaced: Findings,
    /// Could not be checked: published, and absent from a stream that was trimmed, at the beginning where it was. No fault.
    pub trimmed: u64,
    /// Could not be checked: published since the audit began, and absent from what was read. No fault.
    pub later: u64,
    /// Entries without a row: of the high-frequency lane, or the row was removed. No fault.
    pub unknown: u64,
    /// Of those, the ones that no clean-up explains, in streams to which the outbox writes: they came after the oldest published row
    /// that is there. Of the high-frequency lane, deleted by hand, or lost by PostgreSQL in a failover or restore. No fault by itself.
    #[serde(skip_serializing_if = "Findings::is_empty")]
    pub rowless: Findings,
}

impl Report {
    /// Each kind of fault, by name.
    #[must_use]
    pub fn faults(&self) -> [(&'static str, &Findings); 5] {
        [
            ("missing", &self.missing),
            ("duplicated", &self.duplicated),
            ("out of order", &self.out_of_order),
            ("unsettled", &self.unsettled),
            ("misplaced", &self.misplaced),
        ]
    }

    /// Nothing is at fault.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.faults().iter().all(|(_, findings)| findings.count == 0)
    }
}

/// How far an audit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Of `total` entries, as many as there were at the beginning.
    Reading { entries: u64, total: u64 },
    /// PostgreSQL compares the entries with its tables.
    Comparing { entries: u64 },
}

/// Why an audit did not come to its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error(transparent)]
    Streams(#[from] StreamsError),
    /// Everything would be published again.
    #[error(
        "no relay of this outbox is known to have written to this Redis (nothing in the key {key} says so): are REDIS_URL and STREAM_PREFIX ({prefix}) those of the relay? A relay that runs says so within some seconds"
    )]
    NotOurRedis { prefix: String, key: String },
    /// What is missing under this prefix is under another one.
    #[error("the journal says that some of what is missing is in {stream}: STREAM_PREFIX ({prefix}) is not what it was then")]
    OtherPrefix { stream: String, prefix: String },
}

/// Audits the outbox against every stream that it has written to under the prefix of `streams`, and names the first `named` events of each
/// fault.
///
/// The session must be a direct one, not through a pooler in transaction mode, and its user needs the right to create temporary tables
/// (`TEMP`, which everybody has by default); so a standby cannot be asked. It takes less than 1 KiB of temporary space there for each entry.
///
/// # Errors
/// PostgreSQL or Redis cannot be asked.
pub async fn run(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    streams: &Streams,
    named: u32,
    mut progress: impl FnMut(Progress),
) -> Result<Report, VerifyError> {
    let prefix = streams.stream_of("");
    let (began, known) = outbox.begin_audit(connection, &prefix).await?;
    // Those of the high-frequency lane are known in Redis only.
    let keys: Vec<String> = known.into_iter().chain(streams.list().await?).collect::<BTreeSet<_>>().into_iter().collect();
    let total = streams.lens(&keys).await?.into_iter().sum();
    let (mut entries, mut reader) = (0, Reader { outbox, connection, lines: EntryLines::default(), read: Vec::new() });
    let begin = async |(number, key): (i32, String)| Ok::<_, VerifyError>((number, Beginning::read(streams, &key).await?, key));
    let mut beginnings = stream::iter((0..).zip(keys)).map(begin).buffered(AT_ONCE);
    while let Some(beginning) = beginnings.next().await {
        let (number, beginning, key) = beginning?;
        let told = |read| progress(Progress::Reading { entries: entries + read, total: u64::max(total, entries + read) });
        entries += reader.read(streams, number, key, beginning, told).await?;
    }
    let Reader { mut lines, read, .. } = reader;
    outbox.note_entries(connection, &mut lines).await?;
    progress(Progress::Comparing { entries });
    let compared = outbox.compare(connection, began, &prefix, &read, named).await?;
    if compared.missing.count == 0 {
        // A user that may only read may verify, too.
        if let Err(error) = outbox.forget_losses(connection, &prefix, began).await {
            tracing::debug!(%error, "streams are still said to have lost entries");
        }
    }
    Ok(Report {
        streams: read.len() as u64,
        entries,
        published: compared.published,
        pending: compared.pending,
        failed: compared.failed,
        open_batches: compared.open_batches,
        missing: compared.missing,
        duplicated: compared.duplicated,
        out_of_order: compared.out_of_order,
        unsettled: compared.unsettled,
        misplaced: compared.misplaced,
        trimmed: compared.trimmed,
        later: compared.later,
        unknown: compared.unknown,
        rowless: compared.rowless,
    })
}

/// Whether [`settle`] may be called: no relay is at work.
///
/// # Errors
/// [`OutboxError::NotPaused`] when one is; or PostgreSQL cannot be asked.
pub async fn may_settle(outbox: &OutboxRepository, connection: &mut PgConnection) -> Result<(), VerifyError> {
    Ok(outbox.check_paused(connection).await?)
}

/// Marks as published what the last [`run`] on this session found unsettled in the stream of its aggregate type, on behalf of `who`: after a
/// restore of PostgreSQL a relay would send it again. Relays must be paused or gone. Returns how many events that were.
///
/// # Errors
/// [`OutboxError::NotPaused`] when a relay is at work; or PostgreSQL cannot be asked. What was marked until then stays.
pub async fn settle(outbox: &OutboxRepository, connection: &mut PgConnection, who: &str) -> Result<u64, VerifyError> {
    Ok(outbox.settle_streamed(connection, who).await?)
}

/// What can be published again of what the audit before has found missing on this session.
///
/// # Errors
/// [`VerifyError::NotOurRedis`] and [`VerifyError::OtherPrefix`] where nothing should be published again; else a server cannot be asked.
pub async fn republishable(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    streams: &Streams,
) -> Result<u64, VerifyError> {
    let prefix = streams.stream_of("");
    let (events, elsewhere) = outbox.republishable(connection, &prefix).await?;
    if let Some(stream) = elsewhere {
        return Err(VerifyError::OtherPrefix { stream, prefix });
    }
    let owner = outbox.owner(connection).await?;
    if events > 0 && !streams.registered().await?.owners.contains_key(&owner.id) {
        return Err(VerifyError::NotOurRedis { prefix, key: streams.registry_key() });
    }
    Ok(events)
}

/// Makes what the audit before has found missing on this session unsent again: relays publish it, behind what came since. `who` is named in the
/// audit of deeds. Rows that were changed since the audit are left alone; what has no row any more cannot be published again. Returns how
/// many events that were.
///
/// # Errors
/// As [`republishable`]; what was made unsent by then stays so.
pub async fn republish(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    streams: &Streams,
    who: &str,
) -> Result<u64, VerifyError> {
    republishable(outbox, connection, streams).await?;
    let prefix = streams.stream_of("");
    let (now, _) = outbox.known_streams(connection, &prefix).await?;
    let events = outbox.republish(connection, who).await?;
    outbox.forget_losses(connection, &prefix, now).await?;
    Ok(events)
}

/// How a stream stood, and its first page. Most streams are over with that.
struct Beginning {
    before: Option<StreamInfo>,
    page: Vec<Entry>,
    /// How it stood after that, if that was all.
    after: Option<StreamInfo>,
}

impl Beginning {
    async fn read(streams: &Streams, key: &str) -> Result<Self, VerifyError> {
        let Some(before) = streams.state(key).await? else {
            return Ok(Self { before: None, page: Vec::new(), after: None });
        };
        let page = streams.between(key, "0", &before.last_id, FIRST_PAGE).await?;
        let after = if page.len() < FIRST_PAGE { streams.state(key).await? } else { None };
        Ok(Self { before: Some(before), page, after })
    }
}

/// Reads streams into the session's temporary tables.
struct Reader<'a> {
    outbox: &'a OutboxRepository,
    connection: &'a mut PgConnection,
    /// Of any number of streams: each COPY costs as much as some thousand entries.
    lines: EntryLines,
    read: Vec<ReadStream>,
}

impl Reader<'_> {
    /// Returns how many entries that were.
    async fn read(
        &mut self,
        streams: &Streams,
        number: i32,
        key: String,
        beginning: Beginning,
        mut told: impl FnMut(u64),
    ) -> Result<u64, VerifyError> {
        // A stream that is not there, or no more, has nothing that could be read.
        let Beginning { before: Some(before), mut page, after: mut now } = beginning else { return Ok(0) };
        let mut entries = 0;
        while let Some(last) = page.last() {
            let after = last.id.clone();
            for (position, entry) in (entries + 1..).zip(&page) {
                // An entry for one group is a dead letter delivered again: its event has, or had, another entry.
                if entry.field("group").is_none() {
                    self.lines.push(number, position, entry.field("id").and_then(|id| id.parse().ok()), &entry.id);
                }
            }
            if self.lines.bytes() >= PAGE_BYTES {
                self.outbox.note_entries(self.connection, &mut self.lines).await?;
            }
            entries += page.len() as u64;
            told(entries);
            if now.is_some() {
                break;
            }
            let size = next_page(page.len(), page.iter().map(Entry::bytes).sum());
            page = streams.between(&key, &after, &before.last_id, size).await?;
        }
        if now.is_none() {
            now = streams.state(&key).await?;
        }
        let trimmed = now.as_ref().is_some_and(StreamInfo::is_trimmed);
        self.read.push(ReadStream { number, key, trimmed, first: now.and_then(|now| now.first_id) });
        Ok(entries)
    }
}

/// How many entries to read after a page of `entries` with `bytes`: about [`PAGE_BYTES`], but at most twice as many as before.
fn next_page(entries: usize, bytes: usize) -> usize {
    let fitting = PAGE_BYTES * entries / bytes.max(1);
    fitting.min(entries * 2).clamp(1, LARGEST_PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_bounded_by_entries_and_aim_at_their_bytes() {
        for (entries, bytes, expected) in [
            (50, 10_000, 100),
            (1_000, 200_000, LARGEST_PAGE),
            (50, 50 << 20, 1),
            (1, 64 << 20, 1),
            (1, 1_000, 2),
            (100, 1 << 20, 100),
            (1_000, 0, LARGEST_PAGE),
        ] {
            assert_eq!(next_page(entries, bytes), expected, "{entries} entries, {bytes} bytes");
        }
    }
}
