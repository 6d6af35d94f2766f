//! Step 2 of the protocol for one batch: append, and find out what came of it, however long that takes.

use std::sync::Arc;

use tokio::time::Instant;

use super::chain::Behind;
use super::retry;
use super::status::Reporter;
use crate::backoff::Backoff;
use crate::config::Settings;
use crate::event::EventError;
use crate::outbox::{Batch, OutboxEvent, Refusal};
use crate::streams::{Appended, DEAD, Marker, Streams, StreamsError};

/// How an append ended.
pub enum Ended {
    Known {
        batch: Batch,
        appended: usize,
        last_entry: Option<String>,
        refusals: Vec<Refusal>,
    },
    /// Redis has lost a batch that went before this one.
    Lost(StreamsError),
    /// The marker says aborted: another relay has taken over and will send these events.
    TakenOver,
}

/// Appends one batch behind what must stand before it. During an outage it keeps trying the same batch; no attempt is counted.
pub async fn append(streams: Streams, settings: Arc<Settings>, reporter: Reporter, batch: Batch, behind: Behind) -> Ended {
    #[cfg(feature = "otel")]
    let spans = crate::trace::Sending::start(&batch);
    let ended = run(streams, settings, reporter, batch, behind).await;
    #[cfg(feature = "otel")]
    if let Ended::Known { batch, appended, refusals, .. } = &ended {
        spans.end(batch, *appended, refusals);
    }
    ended
}

async fn run(streams: Streams, settings: Arc<Settings>, reporter: Reporter, batch: Batch, behind: Behind) -> Ended {
    if batch.aggregate_type.ends_with(DEAD) {
        let refusals = never_to_be_sent(&batch);
        return Ended::Known { batch, appended: 0, last_entry: None, refusals };
    }
    // What cannot be sent ends the batch there, so that what the marker counts stays a prefix.
    let sendable = batch.events.iter().take_while(|e| e.payload.is_some()).count();
    let outcome = if sendable == 0 {
        Ok(Appended { marker: Marker::Appended(0), last_entry: None, refusal: None })
    } else {
        until_known(&streams, &settings, &reporter, &batch, &behind, sendable).await
    };
    let appended = match outcome {
        Ok(appended) => appended,
        Err(lost @ StreamsError::Lost { .. }) => return Ended::Lost(lost),
        Err(refused) => {
            let error = refused.to_string();
            let refusals = refusals(&batch.events, |_| error.clone(), &settings);
            return Ended::Known { batch, appended: 0, last_entry: None, refusals };
        }
    };
    let Marker::Appended(count) = appended.marker else { return Ended::TakenOver };
    let count = count.min(sendable);
    let refused = match appended.refusal {
        Some(refusal) if refusal.outage => Vec::new(),
        Some(refusal) if refusal.whole_stream => refusals(&batch.events[count..], |_| refusal.error.clone(), &settings),
        Some(refusal) => refusals(batch.events.get(count..=count).unwrap_or_default(), |_| refusal.error.clone(), &settings),
        None if count == sendable && sendable < batch.events.len() => unsendable(&batch.events[count..], &settings),
        None => Vec::new(),
    };
    Ended::Known { batch, appended: count, last_entry: appended.last_entry, refusals: refused }
}

/// Repeats the append until Redis says what became of the batch. An error means that the call itself was refused, and that
/// no earlier call can have written anything.
async fn until_known(
    streams: &Streams,
    settings: &Settings,
    reporter: &Reporter,
    batch: &Batch,
    behind: &Behind,
    sendable: usize,
) -> Result<Appended, StreamsError> {
    let life = settings.outbox.processor.marker_life;
    let mut backoff = Backoff::default();
    let mut unknown = false;
    let mut in_outage = None;
    loop {
        crash_window!("before-append");
        let began = Instant::now();
        let answer = streams.append(batch, behind.at(began), sendable, life).await;
        reporter.metrics.append.record(began.elapsed());
        let outage = match answer {
            Ok(appended) => {
                if unknown && appended.last_entry.is_none() {
                    prevented(reporter, &appended.marker);
                }
                crash_window!("after-append");
                drop(in_outage);
                reporter.able();
                return Ok(appended);
            }
            Err(outage) if outage.is_outage() => outage,
            // The script looks for the batch's own marker first, so an earlier call has written nothing either.
            Err(lost @ StreamsError::Lost { .. }) => return Err(lost),
            Err(refused) if !unknown => return Err(refused),
            // An earlier call may have been carried out before this one was refused: only the marker knows.
            Err(_) => match streams.resolve(&batch.stream, batch.id, life).await {
                Ok(Marker::Aborted) => {
                    return Ok(Appended { marker: Marker::Appended(0), last_entry: None, refusal: None });
                }
                Ok(marker) => {
                    prevented(reporter, &marker);
                    return Ok(Appended { marker, last_entry: None, refusal: None });
                }
                Err(error) => error,
            },
        };
        unknown |= matches!(outage, StreamsError::OutcomeUnknown { .. } | StreamsError::NotReplicated { .. });
        in_outage.get_or_insert_with(|| reporter.outage());
        crate::metrics::redis_failed(&outage);
        reporter.unable(&outage);
        tokio::time::sleep(backoff.next()).await;
    }
}

/// An earlier call whose answer was lost had been carried out; the marker kept this one from appending again.
fn prevented(reporter: &Reporter, marker: &Marker) {
    if let Marker::Appended(events) = marker {
        reporter.metrics.prevented.increment(*events as u64);
    }
}

fn refusals(events: &[OutboxEvent], error: impl Fn(&OutboxEvent) -> String, settings: &Settings) -> Vec<Refusal> {
    let refusal = |e: &OutboxEvent| Refusal {
        event_id: e.id,
        error: error(e),
        retry_after: retry::after_refusal(e.retry_count, &settings.outbox.processor),
    };
    events.iter().map(refusal).collect()
}

/// Of rows that were there before the table refused them (migration V8): in their stream they would pass for dead letters of another type.
fn never_to_be_sent(batch: &Batch) -> Vec<Refusal> {
    let error = format!(
        "{}; UPDATE its row in event_outbox with another aggregate_type, then retry it, or discard it",
        EventError::Dead(batch.aggregate_type.clone())
    );
    batch.events.iter().map(|e| Refusal { event_id: e.id, error: error.clone(), retry_after: None }).collect()
}

/// Refusals of what cannot be sent, of which the first event is one: all that are unreadable for good, or one that is too large.
fn unsendable(events: &[OutboxEvent], settings: &Settings) -> Vec<Refusal> {
    let max = settings.publishing.max_payload_bytes;
    if events.first().is_none_or(|first| first.unreadable.is_empty()) {
        return refusals(events.get(..1).unwrap_or_default(), |e| too_large(e, max), settings);
    }
    let unreadable = events.iter().filter(|event| !event.unreadable.is_empty());
    let refusal = |event: &OutboxEvent| Refusal {
        event_id: event.id,
        error: format!(
            "not UTF-8: {}; UPDATE the row with convert_from(...::bytea, its encoding) and retry it, or discard it (the database has the encoding SQL_ASCII, which takes any bytes)",
            event.unreadable.join(", ")
        ),
        retry_after: None,
    };
    unreadable.map(refusal).collect()
}

fn too_large(event: &OutboxEvent, max: usize) -> String {
    format!(
        "too large: {} bytes of payload and headers, at most {max} are allowed (setting app.eventPublishing.maxPayloadBytes)",
        event.bytes
    )
}
