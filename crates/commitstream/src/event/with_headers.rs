use chrono::{DateTime, Utc};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{DomainEvent, EventEnvelope, EventError, Lane};

/// An event with headers, which keeps its lane: see [`DomainEvent::with_header`].
#[derive(Debug, Clone)]
pub struct WithHeaders<'a, E> {
    event: &'a E,
    headers: Map<String, Value>,
}

impl<'a, E> WithHeaders<'a, E> {
    pub(super) fn new(event: &'a E) -> Self {
        Self { event, headers: Map::new() }
    }

    /// Adds another header; replaces one of the same name.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }
}

impl<E: DomainEvent> DomainEvent for WithHeaders<'_, E> {
    fn event_type(&self) -> &str {
        self.event.event_type()
    }
    fn aggregate_type(&self) -> &str {
        self.event.aggregate_type()
    }
    fn aggregate_id(&self) -> String {
        self.event.aggregate_id()
    }
    fn lane(&self) -> Lane {
        self.event.lane()
    }
    fn occurred_at(&self) -> DateTime<Utc> {
        self.event.occurred_at()
    }
    fn payload(&self) -> Result<Box<RawValue>, serde_json::Error> {
        self.event.payload()
    }
    fn envelope(&self) -> Result<EventEnvelope, EventError> {
        let mut envelope = self.event.envelope()?;
        envelope.headers.extend(self.headers.clone());
        Ok(envelope)
    }
}
