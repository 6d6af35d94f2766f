//! Transactional events from PostgreSQL to Redis Streams: exactly once, in order, within milliseconds.

// Lets `#[derive(DomainEvent)]` name this crate by its own name inside it.
extern crate self as commitstream;

pub mod config;
pub mod event;
pub mod outbox;
pub mod publisher;
pub mod relay;
pub mod streams;

pub use commitstream_macros::DomainEvent;
pub use event::{DomainEvent, EventEnvelope, EventError, Lane};
