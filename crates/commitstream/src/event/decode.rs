use super::{EventEnvelope, EventError};

/// An aggregate type and an event type: what a handler is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EventKind {
    pub aggregate_type: &'static str,
    pub event_type: &'static str,
}

/// An event that consumers can read back from its envelope. `#[derive(DomainEvent)]` implements it for types that also are
/// `serde::Deserialize`.
pub trait DecodeEvent: Sized + Send + 'static {
    /// What it decodes: one kind for a struct, one for each variant of an enum.
    const KINDS: &'static [EventKind];

    /// The event in the envelope.
    ///
    /// # Errors
    /// [`EventError::Payload`] if the payload is not that of this type.
    fn decode(envelope: &EventEnvelope) -> Result<Self, EventError>;
}
