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
use super::pulse::Call;
use super::session::{Session, no_handler};
use super::status::Part;
use super::suspects::{self, AtWork};
use super::{Delivery, HandlerError};
use crate::backoff::{Backoff, delay};
use crate::chain::chain;
use crate::event::rfc3339;
use crate::streams::{Burial, EntryId, Member, TakenOver};

/// Events that a worker handles before it lets others run.
const TURN: u32 = 32;
/// After a handler that took so long they run at once: it may have held its thread.
const LONG: Duration = Duration::from_millis(5);
/// Longest wait that a handler can ask for.
const LONGEST_LATER: Duration = Duration::from_secs(24 * 60 * 60);
/// Longest reason that is kept, in bytes.
const LONGEST_REASON: usize = 1_000;

impl Session {
    /// Handles what is ready, until told to stop.
    pub(super) async fn work(self: Arc<Self>, number: usize) {
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
            let begun = Instant::now();
            self.handle(number, work).await;
            self.settled.notify_one();
            turns += 1;
            if turns.is_multiple_of(TURN) || begun.elapsed() > LONG {
                tokio::task::yield_now().await;
            }
        }
    }

    fn most(&self, handler: usize) -> usize {
        let takes_batches = self.handlers.get(handler).is_some_and(|handler| handler.takes_batches());
        if takes_batches { self.settings.batch_size as usize } else { 1 }
    }

    async fn handle(&self, number: usize, work: Work) {
        let is_suspect = work.items().any(|item| item.suspect);
        let _leave = suspects::leave(is_suspect).await;
        let deliveries: Vec<Delivery> = work.items().filter_map(|item| self.delivery(item)).collect();
        let result = match work.items().next() {
            Some(Item { what: What::Handle(handler, _), .. }) => self.call(number, *handler, &work, &deliveries).await,
            Some(Item { what: What::Unknown(envelope), .. }) => Some(Err(HandlerError::from(no_handler(&envelope.event_type)))),
            Some(Item { what: What::Bury(reason), .. }) => Some(Err(HandlerError::give_up(reason))),
            _ => Some(Ok(())),
        };
        if result.as_ref().is_some_and(Result::is_ok) && !deliveries.is_empty() {
            self.reporter.handled(deliveries.len());
            self.brake.release();
        }
        let several = work.items().count() > 1;
        let failed = result.as_ref().and_then(|result| result.as_ref().err()).filter(|_| several);
        let as_a_batch = failed.and_then(|error| self.next_as_a_batch(error));
        for (aggregate, items) in work.parts {
            let taken = sizes(&items);
            let outcome = match &result {
                None => left(items),
                Some(Ok(())) if is_suspect => self.acquitted(items).await,
                Some(Ok(())) => Outcome { done: items.iter().map(|item| item.id).collect(), ..Outcome::default() },
                Some(Err(_)) if several => match as_a_batch {
                    Some(at) => Outcome { back: items, wait: Some(at), ..Outcome::default() },
                    None => alone(items),
                },
                Some(Err(error)) => match items.into_iter().next() {
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

    /// A panic of the handler is a failure of this event, and ends nothing else. `None`: others may have taken over.
    async fn call(
        &self,
        number: usize,
        handler: usize,
        work: &Work,
        deliveries: &[Delivery],
    ) -> Option<Result<(), HandlerError>> {
        let (Some(handler), Some(first)) = (self.handlers.get(handler), work.items().next()) else { return Some(Ok(())) };
        let _at_work = if first.suspect {
            // If it ends this process as well, that counts.
            if first.failures >= self.settings.max_deliveries {
                return Some(Err(HandlerError::give_up("its consumers died while they handled it")));
            }
            let history = self.history(first, "its consumer died while it handled this");
            self.note(first, first.deliveries + 1, &history).await.ok()?;
            None
        } else if first.careful {
            Some(self.say(work).await.ok()?)
        } else {
            None
        };
        let call = handler.handle(deliveries);
        #[cfg(feature = "otel")]
        let (spans, call) = crate::trace::Processing::around(deliveries, call);
        let call = AssertUnwindSafe(call).catch_unwind();
        let (event, events) = (Arc::clone(&deliveries.first()?.envelope), deliveries.len());
        let result = self.pulse.watch(number, Call { handler: handler.name(), event, events }, call).await?;
        let result = result.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(HandlerError::from(format!("the handler panicked: {}", text.unwrap_or("without a message"))))
        });
        #[cfg(feature = "otel")]
        spans.end(&result);
        Some(result)
    }

    /// Says in Redis what is at work, before a handler begins with entries that were in hand when a consumer died.
    async fn say(&self, work: &Work) -> Result<AtWork<'_>, TakenOver> {
        let at_work = self.started.begin(work.items());
        let mut backoff = Backoff::default();
        let _one = self.started.call.lock().await;
        while let Some(unsaid) = self.started.unsaid(&at_work) {
            let ids: Vec<EntryId> = unsaid.keys().copied().collect();
            match self.streams.note_started(&self.member, &ids).await {
                Ok(noted) => {
                    noted?;
                    self.started.was_said(unsaid);
                }
                Err(error) if error.is_outage() => tokio::time::sleep(backoff.next()).await,
                Err(error) => {
                    tracing::warn!(stream = %self.stream, %error, "could not note what is at work: if it ends this process, that does not count");
                    break;
                }
            }
        }
        Ok(at_work)
    }

    /// A suspect that was handled is acknowledged before anything else begins: what ends the process then is another.
    async fn acquitted(&self, items: Vec<Item>) -> Outcome {
        let mut backoff = Backoff::default();
        let mut outcome = Outcome::default();
        for item in items {
            loop {
                match self.streams.acknowledge(&self.member, item.id).await {
                    Ok(Ok(_)) => {
                        outcome.gone.push(item.id);
                        break;
                    }
                    Ok(Err(TakenOver)) => return left(vec![item]),
                    Err(error) if error.is_outage() => tokio::time::sleep(backoff.next()).await,
                    Err(error) => {
                        tracing::warn!(stream = %self.stream, entry = %item.id, %error, "could not acknowledge at once; it is done with others");
                        outcome.done.push(item.id);
                        break;
                    }
                }
            }
        }
        outcome
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
            return back(item, outage_delay());
        }
        self.reporter.works(Part::Handlers);
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
            Err(TakenOver) => return left(vec![item]),
        }
        let failures = item.failures + 1;
        back(Item { failures, deliveries: failures, history, suspect: false, ..item }, wait)
    }

    /// When a batch that failed is to be tried again as it was, because that says nothing about its events: at one time for all of them,
    /// or it would fall apart. `None`: each is tried again alone.
    fn next_as_a_batch(&self, error: &HandlerError) -> Option<Instant> {
        let wait = match error {
            HandlerError::RetryLater { after, .. } | HandlerError::OutcomeUnknown { after, .. } => (*after).min(LONGEST_LATER),
            HandlerError::Failed(error) if is_outage(error.as_ref()) => {
                self.reporter.trouble(Part::Handlers, &chain(error.as_ref()));
                outage_delay()
            }
            HandlerError::Failed(_) | HandlerError::GiveUp { .. } => return None,
        };
        Some(Instant::now() + wait)
    }

    /// A suspect whose handler came back has killed nobody: the note that was made in advance is taken back.
    async fn cleared(&self, item: Item) -> Item {
        if item.suspect {
            let history = if item.history.is_empty() { "[]" } else { &item.history };
            if self.note(&item, item.failures, history).await.is_err() {
                tracing::debug!(stream = %self.stream, entry = %item.id, "others took over, and count one failure more");
            }
        }
        Item { suspect: false, deliveries: item.failures.max(1), ..item }
    }

    /// Notes a failure in Redis, so that whoever takes over knows of it. `deliveries` is what it counts from there: as many as failures,
    /// of one whose handler came back. `false`: somebody has acknowledged it.
    async fn note(&self, item: &Item, deliveries: u32, history: &str) -> Result<bool, TakenOver> {
        let mut backoff = Backoff::default();
        loop {
            match self.streams.note_failure(&self.member, item.id, deliveries.max(1), history).await {
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
                        return left(vec![item]);
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
fn left(items: Vec<Item>) -> Outcome {
    Outcome { back: items, wait: Some(Instant::now() + LONGEST_LATER), ..Outcome::default() }
}

/// Each entry of a batch that failed.
fn alone(items: Vec<Item>) -> Outcome {
    let back = items.into_iter().map(|item| Item { alone: true, ..item }).collect();
    Outcome { back, ..Outcome::default() }
}

/// Until a server that was away is tried again.
fn outage_delay() -> Duration {
    delay(0, Duration::from_secs(1), Duration::from_secs(1))
}

fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(LONGEST_REASON)]
}
