use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::postgres::PgQueryResult;
use uuid::Uuid;

use super::{OutboxError, OutboxRepository};
use crate::event::EventEnvelope;

/// Bounds of one INSERT.
const ROWS_PER_STATEMENT: usize = 5_000;
const BYTES_PER_STATEMENT: usize = 8 << 20;

impl OutboxRepository {
    /// Inserts the envelopes, in order, in whatever transaction `connection` is in. Unless `prepared`, the statement has no name,
    /// which costs a round trip and works through any pooler.
    ///
    /// # Errors
    /// PostgreSQL refuses the insert; the transaction is then aborted, as after any failed statement. Or it accepts the statement and inserts
    /// nothing, because of a trigger; the transaction is to be rolled back then.
    pub async fn insert(
        &self,
        connection: &mut PgConnection,
        envelopes: &[EventEnvelope],
        prepared: bool,
    ) -> Result<(), OutboxError> {
        for chunk in EventEnvelope::chunks(envelopes, ROWS_PER_STATEMENT, BYTES_PER_STATEMENT) {
            match chunk {
                [one] => self.insert_one(connection, one, prepared).await?,
                many => self.insert_many(connection, many, prepared).await?,
            }
        }
        Ok(())
    }

    async fn insert_one(
        &self,
        connection: &mut PgConnection,
        envelope: &EventEnvelope,
        prepared: bool,
    ) -> Result<(), OutboxError> {
        let sql = self.sql(
            "INSERT INTO {s}.event_outbox (id, event_type, aggregate_type, aggregate_id, occurred_at, payload, headers)
             VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, COALESCE($7::text::jsonb, '{}'))",
        );
        let done = sqlx::query(sql)
            .persistent(prepared)
            .bind(envelope.id)
            .bind(&envelope.event_type)
            .bind(&envelope.aggregate_type)
            .bind(&envelope.aggregate_id)
            .bind(envelope.occurred_at)
            .bind(envelope.payload.get())
            .bind(envelope.headers_json())
            .execute(connection)
            .await;
        self.inserted(done, 1)
    }

    /// One statement for many rows. `WITH ORDINALITY` keeps the caller's order in `seq`.
    async fn insert_many(
        &self,
        connection: &mut PgConnection,
        envelopes: &[EventEnvelope],
        prepared: bool,
    ) -> Result<(), OutboxError> {
        let sql = self.sql(
            "INSERT INTO {s}.event_outbox (id, event_type, aggregate_type, aggregate_id, occurred_at, payload, headers)
             SELECT id, event_type, aggregate_type, aggregate_id, occurred_at, payload::jsonb, COALESCE(headers::jsonb, '{}')
             FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::text[], $7::text[])
                  WITH ORDINALITY AS e(id, event_type, aggregate_type, aggregate_id, occurred_at, payload, headers, n)
             ORDER BY n",
        );
        let headers: Vec<_> = envelopes.iter().map(EventEnvelope::headers_json).collect();
        let column = |of: fn(&EventEnvelope) -> &str| envelopes.iter().map(of).collect::<Vec<_>>();
        let done = sqlx::query(sql)
            .persistent(prepared)
            .bind(envelopes.iter().map(|e| e.id).collect::<Vec<Uuid>>())
            .bind(column(|e| &e.event_type))
            .bind(column(|e| &e.aggregate_type))
            .bind(column(|e| &e.aggregate_id))
            .bind(envelopes.iter().map(|e| e.occurred_at).collect::<Vec<DateTime<Utc>>>())
            .bind(column(|e| e.payload.get()))
            .bind(headers)
            .execute(connection)
            .await;
        self.inserted(done, envelopes.len())
    }

    fn inserted(&self, done: Result<PgQueryResult, sqlx::Error>, rows: usize) -> Result<(), OutboxError> {
        let doing = "inserting events into the outbox";
        OutboxError::unless_changed(doing, done.map_err(self.error(doing))?.rows_affected(), rows)
    }
}
