use futures_util::future::{BoxFuture, FutureExt};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::routing::leads_to_streams;
use super::streams::REDIS_URL;
use super::{
    DomainEventPublisher, PostgresOutboxPublisher, PublishError, RedisStreamsPublisher, UnitOfWork, envelopes_of, ids_of, route,
};
use crate::config::{Route, Settings};
use crate::event::{DomainEvent, EventEnvelope};
use crate::relay::RelayWaker;
use crate::streams::NotPublished;

/// Routes each event: critical ones into the outbox, high-frequency ones straight to streams, unless the settings say otherwise.
///
/// A high-frequency event published on a transaction is sent at once, even if that transaction rolls back later. To hold
/// it back until the commit, use a [unit of work](Self::begin).
#[derive(Debug, Clone)]
pub struct HybridEventPublisher {
    settings: Settings,
    pub(super) outbox: PostgresOutboxPublisher,
    /// `None` where the settings send nothing to streams.
    streams: Option<RedisStreamsPublisher>,
    pub(super) waker: Option<RelayWaker>,
}

impl HybridEventPublisher {
    /// A publisher after the settings. Connects to Redis when it first needs it. Where strategy and overrides leave everything to the
    /// outbox, no Redis URL is needed.
    ///
    /// # Errors
    /// Some event may go to streams, and there is no Redis URL, or it is malformed.
    pub fn new(settings: &Settings) -> Result<Self, PublishError> {
        Ok(Self {
            outbox: PostgresOutboxPublisher::new(settings),
            streams: leads_to_streams(settings).then(|| RedisStreamsPublisher::new(settings)).transpose()?,
            settings: settings.clone(),
            waker: None,
        })
    }

    /// Wakes a relay of this process after the commit of a unit of work.
    #[must_use]
    pub fn with_relay(mut self, waker: RelayWaker) -> Self {
        self.waker = Some(waker);
        self
    }

    /// Begins a unit of work: a transaction that also holds back high-frequency events until it commits.
    ///
    /// # Errors
    /// PostgreSQL cannot be reached.
    pub async fn begin(&self, pool: &PgPool) -> Result<UnitOfWork<'_>, sqlx::Error> {
        Ok(UnitOfWork::new(self, pool.begin().await?, pool.clone()))
    }

    /// The way of one event.
    #[must_use]
    pub fn route(&self, event: &dyn DomainEvent) -> Route {
        route(&self.settings, event.event_type(), event.lane())
    }

    /// The checked envelopes of all events, and of them those for the outbox and those for streams.
    pub(super) fn sort(&self, events: &[&dyn DomainEvent]) -> Result<Sorted, PublishError> {
        let envelopes = envelopes_of(events, self.settings.publishing.max_payload_bytes)?;
        let ids = ids_of(&envelopes);
        let mut sorted = Sorted { ids, outbox: Vec::new(), streams: Vec::new() };
        for (event, envelope) in events.iter().zip(envelopes) {
            match self.route(*event) {
                Route::Outbox => sorted.outbox.push(envelope),
                Route::Streams => sorted.streams.push(envelope),
            }
        }
        Ok(sorted)
    }

    pub(super) fn streams(&self) -> Result<&RedisStreamsPublisher, PublishError> {
        self.streams.as_ref().ok_or(PublishError::MissingUrl(REDIS_URL))
    }

    /// Publishes to streams, while the caller's transaction waits; on an outage, into the outbox if the settings say so.
    async fn stream_or_fall_back(&self, connection: &mut PgConnection, envelopes: &[EventEnvelope]) -> Result<(), PublishError> {
        match self.streams()?.send_for_transaction(envelopes).await {
            Err(outage) if self.falls_back(&outage) => self.outbox.insert(connection, &outage.unconfirmed).await,
            sent => Ok(sent.map_err(|not_published| not_published.error)?),
        }
    }

    /// Whether what was not published goes to the outbox instead.
    pub(super) fn falls_back(&self, not_published: &NotPublished) -> bool {
        let NotPublished { error, unconfirmed } = not_published;
        let falls_back = self.settings.publishing.fallback_to_outbox && self.settings.outbox.enabled && error.is_outage();
        if falls_back {
            tracing::warn!(events = unconfirmed.len(), %error, "streams lane is down: events go to the outbox instead");
        }
        falls_back
    }
}

/// Events by their way.
pub(super) struct Sorted {
    /// Of all events, in the caller's order.
    pub ids: Vec<Uuid>,
    pub outbox: Vec<EventEnvelope>,
    pub streams: Vec<EventEnvelope>,
}

impl DomainEventPublisher for HybridEventPublisher {
    /// The outbox comes first: if it fails, nothing has left the transaction.
    fn publish_all<'a>(
        &'a self,
        connection: &'a mut PgConnection,
        events: &'a [&'a dyn DomainEvent],
    ) -> BoxFuture<'a, Result<Vec<Uuid>, PublishError>> {
        async move {
            let sorted = self.sort(events)?;
            if !sorted.outbox.is_empty() {
                self.outbox.insert(connection, &sorted.outbox).await?;
            }
            if !sorted.streams.is_empty() {
                self.stream_or_fall_back(connection, &sorted.streams).await?;
            }
            Ok(sorted.ids)
        }
        .boxed()
    }
}
