//! Notices that entries which were appended are gone: a stream was deleted, renamed or replaced behind the relay's back.
//!
//! What a failover of Redis loses, markers go with, and the relay publishes it again by itself (`repair`). Here the markers are still
//! there, so nothing is sent again by itself: it is said, in the log and by `doctor`, and `commitstream verify --republish` does it.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use sqlx::PgConnection;

use crate::config::Settings;
use crate::outbox::{self, KnownStream, OutboxError, OutboxRepository, StreamLook};
use crate::streams::{SharedStream, StreamInfo, Streams, StreamsError, position};

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(10);
/// A look takes one part in so many of the time at most, however many streams there are.
const SHARE: u32 = 50;
/// Questions to Redis at a time.
const AT_ONCE: usize = 32;

/// Why a look came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error(transparent)]
    Streams(#[from] StreamsError),
    #[error("it took longer than {0:?}")]
    Timeout(Duration),
}

/// Looks at the streams again and again, on a connection of its own. What fails is said once, and must not stop the relay.
pub(super) async fn run(outbox: &OutboxRepository, streams: &Streams, settings: &Settings, url: &str) -> Infallible {
    let mut connection = None;
    let mut told = BTreeSet::new();
    let mut is_failing = false;
    let limit = settings.database.timeout.max(PAUSE);
    loop {
        let looked = Instant::now();
        let look = async {
            let mut session = match connection.take() {
                Some(session) => session,
                None => outbox::connect(url, "commitstream relay: streams", settings.database.timeout).await?,
            };
            let shared = look(outbox, &mut session, streams).await?;
            connection = Some(session);
            Ok(shared)
        };
        match tokio::time::timeout(limit, look).await.unwrap_or(Err(LookError::Timeout(limit))) {
            Ok(shared) => {
                is_failing = false;
                tell_shared(shared, &mut told);
            }
            Err(error) if is_failing => tracing::debug!(%error, "cannot look at the streams"),
            Err(error) => {
                is_failing = true;
                tracing::warn!(%error, "cannot look at the streams, whether entries are gone; trying again");
            }
        }
        tokio::time::sleep(PAUSE.max(looked.elapsed() * SHARE)).await;
    }
}

/// One look at every stream of this outbox: notes them in Redis, and writes down how they stand. Answers which are another outbox's, too.
pub(super) async fn look(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    streams: &Streams,
) -> Result<Vec<SharedStream>, LookError> {
    // In this order: what the journal has by now is in the streams by then.
    let (now, known) = outbox.known_streams(connection, &streams.stream_of("")).await?;
    let names: Vec<String> = known.iter().map(|known| known.stream.clone()).collect();
    let shared = match streams.register(&names).await {
        Err(error) if !error.is_outage() => {
            tracing::debug!(%error, "cannot note the streams of this outbox");
            Vec::new()
        }
        shared => shared?,
    };
    let ask = async |known: KnownStream| (streams.state(&known.stream).await, known);
    let mut states = stream::iter(known).map(ask).buffer_unordered(AT_ONCE);
    let mut looks = Vec::new();
    while let Some((state, known)) = states.next().await {
        match state {
            Ok(state) => looks.extend(judge(&known, state.as_ref())),
            Err(error) if error.is_outage() => return Err(error.into()),
            // Another type of key stands there, or it may not be asked: appends say so.
            Err(error) => tracing::debug!(stream = known.stream, %error, "cannot look at a stream"),
        }
    }
    for StreamLook { stream, lost, .. } in &looks {
        if let Some(lost) = lost {
            tracing::error!(
                stream,
                "entries of published events are gone: {lost}; `commitstream verify --republish` shows and publishes what is missing"
            );
        }
    }
    if !looks.is_empty() {
        outbox.note_looks(connection, now, &looks).await?;
    }
    Ok(shared)
}

/// What has changed since the last look, to be written down; `None` if nothing has.
fn judge(known: &KnownStream, now: Option<&StreamInfo>) -> Option<StreamLook> {
    let lost = lost(known, now);
    // After a loss the new beginning is what counts.
    let last_entry = match (&lost, now) {
        (Some(_), None) => None,
        (Some(_), Some(now)) => Some(now.last_id.clone()),
        (None, _) => newest(known).map(plain),
    };
    // What was trimmed before a loss is not lost.
    let first_entry = match (&lost, now) {
        (None, Some(now)) => now.first_id.clone().filter(|_| now.is_trimmed()),
        _ => known.first_entry.clone(),
    };
    let entries_added = now.and_then(|now| now.entries_added);
    let grew = now.is_some() && entries_added != known.entries_added;
    let changed = lost.is_some() || grew || last_entry != known.last_entry || first_entry != known.first_entry;
    let is_new = known.last_entry.is_none() && known.entries_added.is_none() && known.since.is_some();
    (changed || is_new).then(|| StreamLook { stream: known.stream.clone(), first_entry, last_entry, entries_added, lost })
}

fn newest(known: &KnownStream) -> Option<&str> {
    let since = known.since.as_ref().map(|(_, newest)| newest.as_str());
    known.last_entry.as_deref().into_iter().chain(since).max_by_key(|id| position(id))
}

fn oldest(known: &KnownStream) -> Option<&str> {
    let since = known.since.as_ref().map(|(oldest, _)| oldest.as_str());
    known.last_entry.as_deref().into_iter().chain(since).min_by_key(|id| position(id))
}

/// An id without the zeros that make it sort as text.
fn plain(id: &str) -> String {
    let (millis, sequence) = position(id);
    format!("{millis}-{sequence}")
}

/// How it shows that entries are gone which nobody trimmed. Before Redis 7, a stream that was replaced by a newer one does not show it.
pub(crate) fn lost(known: &KnownStream, now: Option<&StreamInfo>) -> Option<String> {
    let Some(now) = now else {
        let last = newest(known).map(plain)?;
        return Some(format!("the stream is not there any more, and {last} was an entry of it"));
    };
    if let Some(last) = newest(known).filter(|last| position(last) > position(&now.last_id)) {
        return Some(format!("the stream ends at {}, and {} was appended", now.last_id, plain(last)));
    }
    if let Some((added, before)) = now.entries_added.zip(known.entries_added).filter(|(added, before)| added < before) {
        return Some(format!(
            "Redis counts {added} entries that were ever appended, and counted {before} before: the stream began anew"
        ));
    }
    let first = now.first_id.as_deref().filter(|_| !now.is_trimmed())?;
    let before = oldest(known).filter(|id| position(id) < position(first))?;
    Some(format!("nothing was trimmed, the stream begins at {first}, and {} was appended: it began anew", plain(before)))
}

/// Says once which streams others write to as well.
fn tell_shared(shared: Vec<SharedStream>, told: &mut BTreeSet<SharedStream>) {
    let shared: BTreeSet<_> = shared.into_iter().collect();
    for SharedStream { stream, with } in shared.difference(told) {
        tracing::warn!(
            stream,
            "another outbox writes to this stream, too: {with}; it is trimmed as that one says; give each a redis.streamPrefix of its own"
        );
    }
    *told = shared;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(last_entry: Option<&str>, entries_added: Option<u64>, since: Option<(&str, &str)>) -> KnownStream {
        let since = since.map(|(oldest, newest)| (oldest.to_owned(), newest.to_owned()));
        let last_entry = last_entry.map(str::to_owned);
        KnownStream { stream: "events:user".into(), first_entry: None, last_entry, entries_added, since, lost: None }
    }

    fn state(length: u64, entries_added: Option<u64>, first_id: &str, last_id: &str) -> StreamInfo {
        StreamInfo {
            length,
            entries_added,
            first_id: Some(first_id.into()).filter(|id: &String| !id.is_empty()),
            last_id: last_id.into(),
        }
    }

    #[test]
    fn what_is_gone_shows_and_what_was_trimmed_or_is_new_does_not() {
        let before = known(Some("70-1"), Some(100), Some(("0000080-0000000", "0000090-0000002")));
        for (now, is_lost) in [
            (None, true),
            // As it should be; trimmed; trimmed to nothing; deleted from by hand.
            (Some(state(110, Some(110), "1-0", "90-2")), false),
            (Some(state(5, Some(110), "80-0", "95-0")), false),
            (Some(state(0, Some(110), "", "90-2")), false),
            // A failover, or a key of the past in its place.
            (Some(state(90, Some(110), "1-0", "85-0")), true),
            // It began anew, with fewer entries than before, or with more.
            (Some(state(9, Some(9), "85-0", "99-0")), true),
            (Some(state(500, Some(500), "85-0", "99-0")), true),
            (Some(state(500, Some(600), "85-0", "99-0")), false),
            // Before Redis 7 nobody counts.
            (Some(state(9, None, "85-0", "99-0")), false),
        ] {
            assert_eq!(lost(&before, now.as_ref()).is_some(), is_lost, "{now:?}");
        }
        let new = known(None, None, None);
        assert_eq!(lost(&new, None), None);
        assert_eq!(lost(&new, Some(&state(9, Some(9), "85-0", "99-0"))), None);
    }

    #[test]
    fn a_look_is_written_down_where_it_says_something_new() {
        let before = known(Some("70-1"), Some(100), None);
        assert_eq!(judge(&before, Some(&state(100, Some(100), "1-0", "70-1"))), None);
        let grown =
            judge(&known(Some("70-1"), Some(100), Some(("0071-0", "0072-000"))), Some(&state(102, Some(102), "1-0", "72-0")));
        let expected = |last: Option<&str>, entries_added| (last.map(str::to_owned), entries_added, false);
        let said = |look: Option<StreamLook>| look.map(|look| (look.last_entry, look.entries_added, look.lost.is_some()));
        assert_eq!(said(grown), Some(expected(Some("72-0"), Some(102))));
        // A loss is said once: then the new beginning counts.
        let gone = judge(&before, None);
        assert_eq!(said(gone), Some((None, None, true)));
        assert_eq!(judge(&known(None, None, None), None), None);
        let anew = judge(&before, Some(&state(2, Some(2), "80-0", "81-0")));
        assert_eq!(said(anew), Some((Some("81-0".into()), Some(2), true)));
        assert_eq!(judge(&known(Some("81-0"), Some(2), None), Some(&state(2, Some(2), "80-0", "81-0"))), None);
    }
}
