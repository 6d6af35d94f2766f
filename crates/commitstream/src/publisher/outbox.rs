use futures_util::future::{BoxFuture, FutureExt};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{DomainEventPublisher, PublishError, envelopes_of, ids_of};
use crate::config::Settings;
use crate::event::{DomainEvent, EventEnvelope};
use crate::outbox::OutboxRepository;

/// Writes events into the outbox, inside the caller's transaction. Injected on its own, it forces the outbox for any event.
///
/// Through a pooler in transaction mode that does not know prepared statements (PgBouncer before 1.21), set
/// `app.database.preparedStatements = false`.
#[derive(Debug, Clone)]
pub struct PostgresOutboxPublisher {
    outbox: OutboxRepository,
    max_payload_bytes: usize,
    prepared_statements: bool,
}

impl PostgresOutboxPublisher {
    /// A publisher for the outbox in the schema of the settings. Needs no connection of its own.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self {
            outbox: OutboxRepository::new(&settings.database.schema),
            max_payload_bytes: settings.publishing.max_payload_bytes,
            prepared_statements: settings.database.prepared_statements,
        }
    }

    /// Inserts envelopes that were checked already.
    pub(super) async fn insert(&self, connection: &mut PgConnection, envelopes: &[EventEnvelope]) -> Result<(), PublishError> {
        Ok(self.outbox.insert(connection, envelopes, self.prepared_statements).await?)
    }

    /// The same, in a transaction of its own.
    pub(super) async fn insert_alone(&self, pool: &PgPool, envelopes: &[EventEnvelope]) -> Result<(), PublishError> {
        let doing = "writing held events to the outbox";
        let mut transaction = pool.begin().await.map_err(self.outbox.error(doing))?;
        self.insert(&mut transaction, envelopes).await?;
        Ok(transaction.commit().await.map_err(self.outbox.error(doing))?)
    }
}

impl DomainEventPublisher for PostgresOutboxPublisher {
    fn publish_all<'a>(
        &'a self,
        connection: &'a mut PgConnection,
        events: &'a [&'a dyn DomainEvent],
    ) -> BoxFuture<'a, Result<Vec<Uuid>, PublishError>> {
        async move {
            let envelopes = envelopes_of(events, self.max_payload_bytes)?;
            self.insert(connection, &envelopes).await?;
            Ok(ids_of(&envelopes))
        }
        .boxed()
    }
}
