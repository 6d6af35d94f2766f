//! Calls handlers and decides what becomes of each event.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use futures_util::FutureExt;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::brake::Verdict;
use super::lanes::{Item, Outcome, What, Work, sizes};
use super::outage::is_outage;
use super::session::{Session, no_handler};
use super::status::Part;
use super::{Delivery, HandlerError};
use crate::backoff::{Backoff, delay};
use crate::chain::chain;
use crate::event::rfc3339;
use crate::streams::{Burial, Member, TakenOver};

/// Events that a worker handles before it lets others run.
const TURN: u32 = 32;
/// Longest wait that a handler can ask for.
const LONGEST_LATER: Duration = Duration::from_secs(24 * 60 * 60);
/// Longest reason that is kept, in bytes.
const LONGEST_REASON: usize = 1_000;

impl Session {
    /// Handles what is ready, until told to stop.
    pub(super) async fn work(self: Arc<Self>) {
        let mut turns = 0_u32;
        let mut stop = self.stop.clone();
        loop {
            if *stop.borrow() {
                return;
            }
            let work = {
                let mut lanes = self.lanes();
                lanes.take(|handler| self.most(handler))
            };
            let Some(work) = work else {
                tokio::select! {
                    () = self.ready.notified() => {}
                    _ = stop.wait_for(|stop| *stop) => return,
                }
                continue;
            };
            // There may be more than this one can do.
            self.ready.notify_one();
            self.handle(work).await;
            self.settled.notify_one();
            turns += 1;
            if turns.is_multiple_of(TURN) {
                tokio::task::yield_now().await;
            }
        }
    }

    fn most(&self, handler: usize) -> usize {
        let takes_batches = self.handlers.get(handler).is_some_and(|handler| handler.takes_batches());
        if takes_batches { self.settings.batch_size as usize } else { 1 }
    }

    async fn handle(&self, work: Work) {
        let deliveries: Vec<Delivery> =
            work.parts.iter().flat_map(|(_, items)| items).filter_map(|item| self.delivery(item)).collect();
        let result = match work.parts.first().and_then(|(_, items)| items.first()) {
            Some(Item { what: What::Handle(handler, _), .. }) => self.call(*handler, &work, &deliveries).await,
            Some(Item { what: What::Unknown(envelope), .. }) => Err(HandlerError::from(no_handler(&envelope.event_type))),
            Some(Item { what: What::Bury(reason), .. }) => Err(HandlerError::give_up(reason)),
            _ => Ok(()),
        };
        if result.is_ok() && !deliveries.is_empty() {
            self.reporter.handled(deliveries.len());
            self.brake.release();
        }
        let several = work.parts.iter().map(|(_, items)| items.len()).sum::<usize>() > 1;
        for (aggregate, items) in work.parts {
            let taken = sizes(&items);
            let outcome = match &result {
                Ok(()) => Outcome { done: items.iter().map(|item| item.id).collect(), ..Outcome::default() },
                Err(HandlerError::RetryLater { after, .. } | HandlerError::OutcomeUnknown { after, .. }) if several => {
                    Outcome { back: items, wait: Some(Instant::now() + (*after).min(LONGEST_LATER)), ..Outcome::default() }
                }
                Err(_) if several => {
                    let back = items.into_iter().map(|item| Item { alone: true, ..item }).collect();
                    Outcome { back, ..Outcome::default() }
                }
                Err(error) => match items.into_iter().next() {
                    Some(item) => self.failed(item, error).await,
                    None => Outcome::default(),
                },
            };
            self.lanes().settle(&aggregate, &taken, outcome);
        }
    }

    fn delivery(&self, item: &Item) -> Option<Delivery> {
        let What::Handle(_, envelope) = &item.what else { return None };
        Some(Delivery {
            envelope: Arc::clone(envelope),
            stream: Arc::clone(&self.stream),
            group: Arc::clone(&self.group),
            entry: item.id,
            failures: item.failures,
            effects: self.effects.clone(),
        })
    }

    /// A panic of the handler is a failure of this event, and ends nothing else.
    async fn call(&self, handler: usize, work: &Work, deliveries: &[Delivery]) -> Result<(), HandlerError> {
        let Some(handler) = self.handlers.get(handler) else { return Ok(()) };
        if let [(_, items)] = work.parts.as_slice()
            && let [item] = items.as_slice()
            && item.suspect
        {
            // If it ends this process as well, that counts.
            if item.failures >= self.settings.max_deliveries {
                return Err(HandlerError::give_up("its consumers died while they handled it"));
            }
            let history = self.history(item, "its consumer died while it handled this, or just before");
            if self.note(item, item.failures + 1, &history).await.is_err() {
                return Err(HandlerError::retry_later(LONGEST_LATER, "others have taken over"));
            }
        }
        let call = handler.handle(deliveries);
        #[cfg(feature = "otel")]
        let (spans, call) = crate::trace::Processing::around(deliveries, call);
        let result = AssertUnwindSafe(call).catch_unwind().await.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(HandlerError::from(format!("the handler panicked: {}", text.unwrap_or("without a message"))))
        });
        #[cfg(feature = "otel")]
        spans.end(&result);
        result
    }

    async fn failed(&self, item: Item, error: &HandlerError) -> Outcome {
        let back =
            |item: Item, after: Duration| Outcome { back: vec![item], wait: Some(Instant::now() + after), ..Outcome::default() };
        let error = match error {
            HandlerError::RetryLater { after, reason } | HandlerError::OutcomeUnknown { after, reason } => {
                tracing::debug!(stream = %self.stream, entry = %item.id, reason, "a handler wants to try again later");
                let item = self.cleared(item).await;
                return back(item, (*after).min(LONGEST_LATER));
            }
            HandlerError::GiveUp { reason } => {
                let history = self.history(&item, reason);
                return self.bury(item, reason, &history).await;
            }
            HandlerError::Failed(error) => error,
        };
        let reason = chain(error.as_ref());
        if is_outage(error.as_ref()) {
            self.reporter.trouble(Part::Handlers, &reason);
            let item = self.cleared(item).await;
            return back(item, delay(0, Duration::from_secs(1), Duration::from_secs(1)));
        }
        self.reporter.failed();
        let history = self.history(&item, &reason);
        if item.failures + 1 >= self.settings.max_deliveries {
            return self.bury(item, &reason, &history).await;
        }
        let wait = delay(item.failures, self.settings.retry_base_delay, self.settings.retry_max_delay);
        let aggregate = item.what.aggregate();
        tracing::info!(stream = %self.stream, entry = %item.id, aggregate, attempt = item.failures + 1, reason, ?wait, "a handler failed");
        match self.note(&item, item.failures + 1, &history).await {
            Ok(true) => {}
            Ok(false) => return Outcome { gone: vec![item.id], ..Outcome::default() },
            Err(TakenOver) => return left(item),
        }
        back(Item { failures: item.failures + 1, history, suspect: false, ..item }, wait)
    }

    /// A suspect whose handler came back has killed nobody: the note that was made in advance is taken back.
    async fn cleared(&self, item: Item) -> Item {
        if item.suspect {
            let history = if item.history.is_empty() { "[]" } else { &item.history };
            if self.note(&item, item.failures, history).await.is_err() {
                tracing::debug!(stream = %self.stream, entry = %item.id, "others took over, and count one failure more");
            }
        }
        Item { suspect: false, ..item }
    }

    /// Notes a failure in Redis, so that whoever takes over knows of it. `false`: somebody has acknowledged it.
    async fn note(&self, item: &Item, failures: u32, history: &str) -> Result<bool, TakenOver> {
        let mut backoff = Backoff::default();
        loop {
            match self.streams.note_failure(&self.member, item.id, failures, history).await {
                Ok(noted) => return noted,
                Err(error) if error.is_outage() => tokio::time::sleep(backoff.next()).await,
                Err(error) => {
                    tracing::warn!(stream = %self.stream, entry = %item.id, %error, "could not note a failure; it counts in this process only");
                    return Ok(true);
                }
            }
        }
    }

    /// Makes a dead letter, and acknowledges with it. An outage is waited for.
    async fn bury(&self, item: Item, reason: &str, history: &str) -> Outcome {
        if let Verdict::Wait { in_row, until } = self.brake.judge(reason, Instant::now()) {
            let why = format!(
                "{in_row} events in a row became dead letters for one reason, so the next ones wait \
                 (app.consumer.maxDeadLettersInRow): {}",
                cut(reason)
            );
            self.reporter.trouble(Part::DeadLetters, &why);
            return Outcome { back: vec![item], wait: Some(until), ..Outcome::default() };
        }
        let mut backoff = Backoff::default();
        let Member { stream, group, name, .. } = &self.member;
        let (entry, reason) = (item.id.to_string(), cut(reason));
        let (consumer, attempts) = (name.as_str(), item.failures + 1);
        let burial = Burial { stream, group, consumer, entry: &entry, reason, attempts, history };
        let mut when_full = false;
        loop {
            let written = if when_full { self.streams.bury_when_full(&burial).await } else { self.streams.bury(&burial).await };
            match written {
                Ok(buried) => {
                    if buried {
                        self.reporter.dead();
                        let aggregate = item.what.aggregate();
                        tracing::warn!(stream, group, entry = %item.id, aggregate, reason, "an event is a dead letter; see `commitstream dead list`");
                    } else if self.note(&item, item.failures, history).await.is_err() {
                        return left(item);
                    }
                    return Outcome { gone: vec![item.id], ..Outcome::default() };
                }
                // This worker is needed for what makes room.
                Err(error) if error.is_out_of_memory() => match self.brake.without_memory(Instant::now()) {
                    Ok(()) => when_full = true,
                    Err(next) => return Outcome { back: vec![item], wait: Some(next), ..Outcome::default() },
                },
                Err(error) if error.is_outage() => tokio::time::sleep(backoff.next()).await,
                Err(error) => {
                    tracing::error!(stream, entry = %item.id, error = chain(&error), "could not write a dead letter; it will be tried again");
                    return Outcome {
                        back: vec![item],
                        wait: Some(Instant::now() + self.settings.retry_max_delay),
                        ..Outcome::default()
                    };
                }
            }
        }
    }

    /// The attempts so far and this one.
    fn history(&self, item: &Item, reason: &str) -> String {
        let mut attempts: Vec<Value> = serde_json::from_str(&item.history).unwrap_or_default();
        attempts.push(json!({ "at": rfc3339(Utc::now()), "consumer": self.member.name, "reason": cut(reason) }));
        Value::Array(attempts).to_string()
    }
}

/// Others have it: what stands behind it in this process is theirs as well, and must not overtake it here. The session ends soon.
fn left(item: Item) -> Outcome {
    Outcome { back: vec![item], wait: Some(Instant::now() + LONGEST_LATER), ..Outcome::default() }
}

fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(LONGEST_REASON)]
}
