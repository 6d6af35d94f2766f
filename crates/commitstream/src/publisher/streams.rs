use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt};
use sqlx::PgConnection;
use tokio::time::Instant;
use uuid::Uuid;

use super::breaker::Breaker;
use super::{DomainEventPublisher, PublishError, envelopes_of, ids_of};
use crate::config::Settings;
use crate::event::{DomainEvent, EventEnvelope};
use crate::metrics::{Events, Outcome};
use crate::streams::{NotPublished, Streams};

/// What is missing where there is no URL.
pub(super) const REDIS_URL: &str = "REDIS_URL (app.redis.url)";

/// Appends events straight to Redis Streams. Injected on its own, it forces streams even for a critical event.
///
/// There is no transaction: an event is in its stream when the call returns, whatever becomes of the caller's data. When
/// Redis does not answer, the call fails within `connectTimeout` + `responseTimeout`; nothing is sent twice by itself.
#[derive(Debug, Clone)]
pub struct RedisStreamsPublisher {
    streams: Streams,
    max_payload_bytes: usize,
    events: Arc<Events>,
    breaker: Arc<Breaker>,
}

impl RedisStreamsPublisher {
    /// A publisher for the Redis of the settings. Connects when it is first used.
    ///
    /// # Errors
    /// There is no Redis URL, or it is malformed.
    pub fn new(settings: &Settings) -> Result<Self, PublishError> {
        let url = settings.redis.url.as_deref().ok_or(PublishError::MissingUrl(REDIS_URL))?;
        Ok(Self {
            streams: Streams::new(url, &settings.redis)?,
            max_payload_bytes: settings.publishing.max_payload_bytes,
            events: Arc::new(Events::new("streams")),
            breaker: Arc::default(),
        })
    }

    /// Publishes one event; no database connection is needed. Returns its id.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub async fn publish(&self, event: &dyn DomainEvent) -> Result<Uuid, PublishError> {
        Ok(self.publish_all(&[event]).await?.into_iter().next().unwrap_or_default())
    }

    /// Publishes many events in one pipeline; returns their ids.
    ///
    /// # Errors
    /// See [`PublishError`]. If any event is not valid, none is published.
    pub async fn publish_all(&self, events: &[&dyn DomainEvent]) -> Result<Vec<Uuid>, PublishError> {
        let envelopes = envelopes_of(events, self.max_payload_bytes)?;
        self.send(&envelopes).await.map_err(|not_published| not_published.error)?;
        Ok(ids_of(&envelopes))
    }

    /// Sends envelopes that were checked already.
    pub(super) async fn send(&self, envelopes: &[EventEnvelope]) -> Result<(), NotPublished> {
        let sent = self.streams.publish(envelopes).await;
        self.count(envelopes, &sent);
        sent
    }

    /// The same while a transaction of the caller waits: soon after a call that got no answer, it fails at once.
    pub(super) async fn send_for_transaction(&self, envelopes: &[EventEnvelope]) -> Result<(), NotPublished> {
        let began = Instant::now();
        if let Err(error) = self.breaker.admit(began) {
            let not_tried = Err(NotPublished { error, unconfirmed: envelopes.to_vec() });
            self.count(envelopes, &not_tried);
            return not_tried;
        }
        let sent = self.send(envelopes).await;
        self.breaker.note(sent.as_ref().err().map(|not_published| &not_published.error), began, Instant::now());
        sent
    }

    fn count(&self, envelopes: &[EventEnvelope], sent: &Result<(), NotPublished>) {
        let failed: HashMap<Uuid, &str> = match sent {
            Ok(()) => HashMap::new(),
            Err(not_published) => {
                not_published.unconfirmed.iter().map(|failed| (failed.id, failed.event_type.as_str())).collect()
            }
        };
        let published = envelopes.iter().filter(|envelope| !failed.contains_key(&envelope.id));
        self.events.count(published.map(|envelope| envelope.event_type.as_str()), Outcome::Published);
        self.events.count(failed.into_values(), Outcome::Failed);
    }
}

impl DomainEventPublisher for RedisStreamsPublisher {
    fn publish_all<'a>(
        &'a self,
        _connection: &'a mut PgConnection,
        events: &'a [&'a dyn DomainEvent],
    ) -> BoxFuture<'a, Result<Vec<Uuid>, PublishError>> {
        async move {
            let envelopes = envelopes_of(events, self.max_payload_bytes)?;
            self.send_for_transaction(&envelopes).await.map_err(|not_published| not_published.error)?;
            Ok(ids_of(&envelopes))
        }
        .boxed()
    }
}
