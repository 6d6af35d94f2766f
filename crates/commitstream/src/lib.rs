//! Transactional events from PostgreSQL to Redis Streams: exactly once, in order, within milliseconds.
//!
//! ```text
//! application ─► publisher ─┬─► outbox (table) ─► relay ─┬─► Redis Streams ─► consumers
//!                           └───────── streams ──────────┘
//! ```
//!
//! * [`DomainEvent`] and its derive say what an event is; [`EventEnvelope`] is how it travels.
//! * [`publisher`]: an application publishes inside its own transaction.
//! * [`relay`]: [`OutboxProcessor`](relay::OutboxProcessor) moves committed events to Redis Streams, in the application or as the daemon
//!   `commitstream relay`.
//! * [`consumer`]: handlers of events, in order per aggregate, whose effect happens once.
//! * [`metrics`] says what is measured, through the facade of that name.
//! * [`verify`] audits the outbox against the streams.
//! * [`doctor`] examines both servers for known causes of trouble.
//! * [`outbox`] holds all SQL, [`streams`] all Redis commands, [`config`] all settings.
//!
//! The library opens no files and reads no environment but what it is handed in [`config`], and writes to no terminal; it logs
//! through `tracing`.
//!
//! ```no_run
//! use commitstream::config::Settings;
//! use commitstream::publisher::{DomainEventPublisher, HybridEventPublisher};
//! use commitstream::relay::OutboxProcessor;
//! use commitstream::DomainEvent;
//!
//! #[derive(serde::Serialize, DomainEvent)]
//! #[event(aggregate = "user")]
//! struct UserCreated {
//!     #[event(key)]
//!     user_id: uuid::Uuid,
//!     email: String,
//! }
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let settings = Settings::load(None, |name| std::env::var(name).ok(), &[])?.settings;
//! let pool = sqlx::PgPool::connect(settings.database.url.as_deref().unwrap_or_default()).await?;
//! let relay = OutboxProcessor::new(settings.clone())?.start();
//! let publisher = HybridEventPublisher::new(&settings)?.with_relay(relay.waker());
//!
//! let event = UserCreated { user_id: uuid::Uuid::now_v7(), email: "ada@example.org".into() };
//! let mut transaction = pool.begin().await?;
//! sqlx::query("INSERT INTO users (id) VALUES ($1)").bind(event.user_id).execute(&mut *transaction).await?;
//! publisher.publish(&mut transaction, &event).await?;
//! transaction.commit().await?;
//!
//! relay.stop().await?;
//! # Ok(()) }
//! ```

// Lets `#[derive(DomainEvent)]` name this crate by its own name inside it.
extern crate self as commitstream;

mod backoff;
mod chain;
pub mod config;
pub mod consumer;
pub mod doctor;
pub mod event;
pub mod metrics;
pub mod outbox;
pub mod publisher;
pub mod relay;
pub mod streams;
#[cfg(feature = "otel")]
mod trace;
pub mod verify;

pub use commitstream_macros::DomainEvent;
pub use event::{DecodeEvent, DomainEvent, EventEnvelope, EventError, Lane};
