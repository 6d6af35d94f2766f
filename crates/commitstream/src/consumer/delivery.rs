use std::sync::Arc;

use uuid::Uuid;

use super::effects::Effects;
use crate::event::EventEnvelope;
use crate::streams::EntryId;

/// One delivery of one event to a handler.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub(super) envelope: Arc<EventEnvelope>,
    pub(super) stream: Arc<str>,
    pub(super) group: Arc<str>,
    pub(super) entry: EntryId,
    /// Failed deliveries before this one.
    pub(super) failures: u32,
    pub(super) effects: Effects,
}

impl Delivery {
    /// Id of the event: the same in the outbox, in the stream and in every delivery.
    #[must_use]
    pub fn event_id(&self) -> Uuid {
        self.envelope.id
    }

    /// The whole event as it travelled, with its time and headers.
    #[must_use]
    pub fn envelope(&self) -> &EventEnvelope {
        &self.envelope
    }

    /// The stream that it came from.
    #[must_use]
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// The group that it was delivered to.
    #[must_use]
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Its entry in the stream.
    #[must_use]
    pub fn entry_id(&self) -> EntryId {
        self.entry
    }

    /// Counts deliveries, from 1. Only failures count: an event that comes again after a crash has the same number.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.failures.saturating_add(1)
    }
}
