//! The test kit: publish and handle in memory, with the handlers and settings of the real consumer.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::effects::{Effects, Known};
use super::handler::AnyHandler;
use super::outage::is_outage;
use super::session::{Routes, no_handler};
use super::{Consumer, Delivery, HandlerError};
use crate::chain::chain;
use crate::config::{Settings, UnknownEvents};
use crate::event::{DomainEvent, EventEnvelope, EventError};
use crate::streams::EntryId;

/// A consumer without servers and without waiting, for tests of handlers: made by [`Consumer::in_memory`].
///
/// Events go through the wire form, in order, one at a time; a batch handler gets one at a time too. A failed event is tried again at once until it succeeds or is a dead letter.
/// One whose handler said "retry later", or could not reach a server, is left for the next [`run`](Self::run), and its aggregate waits for it. A handler with a transaction uses its own pool.
///
/// ```
/// # use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError};
/// # use commitstream::config::Settings;
/// # #[derive(serde::Serialize, serde::Deserialize, commitstream::DomainEvent)]
/// # #[event(aggregate = "user")]
/// # struct UserCreated { #[event(key)] user_id: u64, email: String }
/// # struct Greeter;
/// # impl Handler<UserCreated> for Greeter {
/// #     async fn handle(&self, _: UserCreated, _: &Delivery) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut consumer = Consumer::new("greetings", &Settings::default())?.on(Greeter).in_memory()?;
/// let id = consumer.publish(&UserCreated { user_id: 1, email: "ada@example.org".into() })?;
/// consumer.run().await;
/// assert_eq!(consumer.handled(), [id]);
///
/// consumer.deliver_again(id); // as after a crash
/// consumer.run().await;
/// # Ok(()) }
/// ```
pub struct InMemory {
    group: Arc<str>,
    settings: Settings,
    handlers: Vec<Arc<dyn AnyHandler>>,
    routes: BTreeMap<String, Routes>,
    effects: Effects,
    published: Vec<EventEnvelope>,
    queue: VecDeque<Waiting>,
    handled: Vec<Uuid>,
    dead: Vec<InMemoryDeadLetter>,
}

#[derive(Debug)]
struct Waiting {
    envelope: Arc<EventEnvelope>,
    failures: u32,
}

/// An event that was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InMemoryDeadLetter {
    pub event_id: Uuid,
    pub event_type: String,
    pub reason: String,
    /// Failed deliveries.
    pub attempts: u32,
}

impl std::fmt::Debug for InMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InMemory").field("group", &self.group).field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl InMemory {
    pub(super) fn new(consumer: Consumer) -> Self {
        Self {
            group: consumer.group.into(),
            settings: consumer.settings,
            handlers: consumer.handlers.all,
            routes: consumer.handlers.routes,
            effects: Effects::Memory(Arc::new(Mutex::new(HashMap::<(Uuid, String), Known>::new()))),
            published: Vec::new(),
            queue: VecDeque::new(),
            handled: Vec::new(),
            dead: Vec::new(),
        }
    }

    /// Puts an event into its stream; returns its id.
    ///
    /// # Errors
    /// As a real publisher: the event is not valid.
    pub fn publish(&mut self, event: &dyn DomainEvent) -> Result<Uuid, EventError> {
        let envelope = event.envelope()?;
        envelope.validate(self.settings.publishing.max_payload_bytes)?;
        let id = envelope.id;
        self.queue.push_back(Waiting { envelope: Arc::new(as_read(&envelope)?), failures: 0 });
        self.published.push(envelope);
        Ok(id)
    }

    /// Delivers an event once more, as happens when a process dies between handling and acknowledging. Unknown ids do nothing.
    pub fn deliver_again(&mut self, event_id: Uuid) {
        let event = self.published.iter().find(|envelope| envelope.id == event_id);
        self.queue.extend(event.map(|envelope| Waiting { envelope: Arc::new(envelope.clone()), failures: 0 }));
    }

    /// Handles what was published, until nothing is left but what is to be tried later.
    pub async fn run(&mut self) {
        let (mut later, mut blocked) = (VecDeque::new(), HashSet::new());
        while let Some(mut event) = self.queue.pop_front() {
            let aggregate = (event.envelope.aggregate_type.clone(), event.envelope.aggregate_id.clone());
            if blocked.contains(&aggregate) || !self.handle(&mut event).await {
                blocked.insert(aggregate);
                later.push_back(event);
            }
        }
        self.queue = later;
    }

    /// Ids of the events whose handler returned `Ok`, in order; one that was delivered again stands here again.
    #[must_use]
    pub fn handled(&self) -> &[Uuid] {
        &self.handled
    }

    #[must_use]
    pub fn dead_letters(&self) -> &[InMemoryDeadLetter] {
        &self.dead
    }

    /// Events that wait for the next [`run`](Self::run).
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Returns whether it is over with this event.
    async fn handle(&mut self, event: &mut Waiting) -> bool {
        loop {
            let (reason, failures) = match self.call(event).await {
                None => return true,
                Some(Ok(())) => {
                    self.handled.push(event.envelope.id);
                    return true;
                }
                Some(Err(HandlerError::RetryLater { .. } | HandlerError::OutcomeUnknown { .. })) => return false,
                Some(Err(HandlerError::Failed(error))) if is_outage(error.as_ref()) => return false,
                Some(Err(HandlerError::GiveUp { reason })) => (reason, u32::MAX),
                Some(Err(HandlerError::Failed(error))) => (chain(error.as_ref()), event.failures + 1),
            };
            event.failures += 1;
            if failures >= self.settings.consumer.max_deliveries {
                let EventEnvelope { id: event_id, event_type, .. } = event.envelope.as_ref().clone();
                self.dead.push(InMemoryDeadLetter { event_id, event_type, reason, attempts: event.failures });
                return true;
            }
        }
    }

    /// `None`: nobody wants it.
    async fn call(&self, event: &Waiting) -> Option<Result<(), HandlerError>> {
        let envelope = &event.envelope;
        let routes = self.routes.get(&envelope.aggregate_type)?;
        let Some(handler) = routes.by_type.get(&envelope.event_type).copied().or(routes.raw) else {
            return match self.settings.consumer.unknown_events {
                UnknownEvents::Skip => None,
                UnknownEvents::Park => Some(Err(HandlerError::give_up(no_handler(&envelope.event_type)))),
                UnknownEvents::Error => Some(Err(no_handler(&envelope.event_type).into())),
            };
        };
        let at = self.published.iter().position(|published| published.id == envelope.id).unwrap_or(0);
        let delivery = Delivery {
            envelope: Arc::clone(envelope),
            stream: format!("{}{}", self.settings.redis.stream_prefix, envelope.aggregate_type).into(),
            group: Arc::clone(&self.group),
            entry: EntryId { millis: at as u64 + 1, sequence: 0 },
            failures: event.failures,
            effects: self.effects.clone(),
        };
        Some(self.handlers.get(handler)?.handle(&[delivery]).await)
    }
}

/// The event as a reader of the stream has it.
fn as_read(envelope: &EventEnvelope) -> Result<EventEnvelope, EventError> {
    let (id, occurred_at, headers) = (envelope.id.to_string(), envelope.occurred_at_text(), envelope.headers_json());
    EventEnvelope::from_fields("in memory", |field| match field {
        "id" => Some(&id),
        "type" => Some(&envelope.event_type),
        "aggregate_type" => Some(&envelope.aggregate_type),
        "aggregate_id" => Some(&envelope.aggregate_id),
        "occurred_at" => Some(&occurred_at),
        "payload" => Some(envelope.payload.get()),
        "headers" => headers.as_deref(),
        _ => None,
    })
}
