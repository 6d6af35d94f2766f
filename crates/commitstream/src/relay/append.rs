//! Step 2 of the protocol for one batch: one attempt to append it. When to try again is the pipeline's decision.

use std::sync::Arc;

use tokio::time::Instant;

use super::chain::Behind;
use super::retry;
use super::status::Reporter;
use crate::chain::chain;
use crate::config::Settings;
use crate::event::EventError;
use crate::outbox::{Batch, OutboxEvent, Refusal};
use crate::streams::{Appended, DEAD, Marker, StreamRefusal, Streams, StreamsError};

/// A batch on its way to its stream.
pub struct Attempt {
    pub batch: Batch,
    /// An earlier attempt may have been carried out.
    pub unknown: bool,
    #[cfg(feature = "otel")]
    spans: Option<crate::trace::Sending>,
}

impl Attempt {
    pub fn first(batch: Batch) -> Self {
        #[cfg(feature = "otel")]
        let spans = Some(crate::trace::Sending::start(&batch));
        Self {
            batch,
            unknown: false,
            #[cfg(feature = "otel")]
            spans,
        }
    }
}

/// Why a stream cannot get on. It is nobody's event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub reason: String,
    /// A server is at fault, not this stream.
    pub of_server: bool,
}

impl From<&StreamsError> for Trouble {
    fn from(error: &StreamsError) -> Self {
        Self { reason: chain(error), of_server: error.is_of_server() }
    }
}

impl From<&StreamRefusal> for Trouble {
    fn from(refusal: &StreamRefusal) -> Self {
        Self { reason: refusal.error.clone(), of_server: refusal.outage }
    }
}

/// How a batch ended.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub appended: usize,
    pub last_entry: Option<String>,
    pub refusals: Vec<Refusal>,
    /// What stopped it after the events that were appended.
    pub trouble: Option<Trouble>,
}

/// How an attempt ended.
pub enum Ended {
    Known(Batch, Outcome),
    /// The same batch is to be tried again: nothing of it was written, or nobody knows.
    Waits(Attempt, Trouble),
    /// Redis has lost a batch that went before this one.
    Lost(StreamsError),
    /// The marker says aborted: another relay has taken over and will send these events.
    TakenOver,
}

/// Tries once to append a batch behind what must stand before it.
pub async fn append(
    streams: Streams,
    settings: Arc<Settings>,
    reporter: Reporter,
    mut attempt: Attempt,
    behind: Behind,
) -> Ended {
    let batch = &attempt.batch;
    if batch.aggregate_type.ends_with(DEAD) {
        let refusals = never_to_be_sent(batch);
        return known(attempt, Outcome { refusals, ..Outcome::default() });
    }
    // What cannot be sent ends the batch there, so that what the marker counts stays a prefix.
    let sendable = batch.events.iter().take_while(|e| e.payload.is_some()).count();
    let answer = if sendable == 0 {
        Ok(Appended { marker: Marker::Appended(0), last_entry: None, refusal: None })
    } else {
        once(&streams, &settings, &reporter, &attempt, &behind, sendable).await
    };
    let appended = match answer {
        Ok(appended) => appended,
        // The script looks for the batch's own marker first, so an earlier call has written nothing either.
        Err(lost @ StreamsError::Lost { .. }) => return Ended::Lost(lost),
        Err(error) => {
            crate::metrics::redis_failed(&error);
            attempt.unknown |= matches!(error, StreamsError::OutcomeUnknown { .. } | StreamsError::NotReplicated { .. });
            return Ended::Waits(attempt, Trouble::from(&error));
        }
    };
    let Marker::Appended(count) = appended.marker else { return Ended::TakenOver };
    let outcome = outcome(batch, count.min(sendable), sendable, appended, &settings);
    known(attempt, outcome)
}

async fn once(
    streams: &Streams,
    settings: &Settings,
    reporter: &Reporter,
    attempt: &Attempt,
    behind: &Behind,
    sendable: usize,
) -> Result<Appended, StreamsError> {
    crash_window!("before-append");
    let began = Instant::now();
    let life = settings.outbox.processor.marker_life;
    let answer = streams.append(&attempt.batch, behind.at(began), sendable, life).await;
    reporter.metrics.append.record(began.elapsed());
    let appended = answer?;
    if let (true, None, Marker::Appended(events)) = (attempt.unknown, &appended.last_entry, appended.marker) {
        // The marker kept this call from appending again.
        reporter.metrics.prevented.increment(events as u64);
    }
    crash_window!("after-append");
    Ok(appended)
}

fn outcome(batch: &Batch, count: usize, sendable: usize, answer: Appended, settings: &Settings) -> Outcome {
    let next = || batch.events.get(count..=count).unwrap_or_default();
    let trouble = answer.refusal.as_ref().filter(|refusal| !refusal.of_event).map(Trouble::from);
    let refusals = match answer.refusal {
        Some(refusal) if refusal.of_event => refusals(next(), |_| refusal.error.clone(), settings),
        Some(_) => Vec::new(),
        None if count == sendable && sendable < batch.events.len() => unsendable(&batch.events[count..], settings),
        None => Vec::new(),
    };
    Outcome { appended: count, last_entry: answer.last_entry, refusals, trouble }
}

fn known(attempt: Attempt, outcome: Outcome) -> Ended {
    #[cfg(feature = "otel")]
    if let Some(spans) = attempt.spans {
        spans.end(&attempt.batch, outcome.appended, &outcome.refusals);
    }
    Ended::Known(attempt.batch, outcome)
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
