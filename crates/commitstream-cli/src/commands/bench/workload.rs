//! The events of the benchmarks: about 200 bytes of JSON each, of 10,000 aggregates, in one stream.

use chrono::Utc;
use commitstream::DomainEvent;
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

/// The stream is this behind the prefix.
pub const AGGREGATE_TYPE: &str = "order";
const AGGREGATES: u64 = 10_000;

/// Rows of one INSERT.
const CHUNK: u64 = 50_000;

/// What [`fill`] writes, as an application publishes it.
#[derive(Debug, Clone, Serialize, DomainEvent)]
#[event(name = "OrderPlaced", aggregate = "order")]
pub struct OrderPlaced {
    #[event(key)]
    pub order: String,
    pub number: u64,
    pub customer: String,
    pub email: String,
    pub amount_cents: u64,
    pub currency: &'static str,
    pub items: Vec<Item>,
    pub note: &'static str,
}

#[derive(Debug, Clone, Serialize)]
pub struct Item {
    pub sku: String,
    pub quantity: u64,
}

impl OrderPlaced {
    pub fn new(number: u64) -> Self {
        // Neighbours are of different aggregates.
        let customer = number * 7_919 % AGGREGATES;
        Self {
            order: format!("order-{customer:05}"),
            number,
            customer: format!("customer-{customer:05}"),
            email: format!("customer-{customer:05}@example.org"),
            amount_cents: 100 + number % 9_900,
            currency: "EUR",
            items: vec![Item { sku: format!("SKU-{:04}", number % 1_000), quantity: 1 + number % 3 }],
            note: "leave at the door",
        }
    }
}

/// Rows as [`OrderPlaced::new`] makes them, with id, status and time of publication as `state` says.
const FILL: &str = r#"
    INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload, status, created_at, published_at, headers)
    SELECT {id}, 'OrderPlaced', 'order', 'order-' || c,
           format('{"order":"order-%s","number":%s,"customer":"customer-%s","email":"customer-%s@example.org","amount_cents":%s,'
               '"currency":"EUR","items":[{"sku":"SKU-%s","quantity":%s}],"note":"leave at the door"}',
               c, n, c, c, 100 + n % 9900, lpad((n % 1000)::text, 4, '0'), 1 + n % 3)::jsonb,
           {state}
    FROM (SELECT n, lpad((n * 7919 % 10000)::text, 5, '0') AS c FROM generate_series($1::bigint, $2::bigint) AS n) AS numbers
    ORDER BY n"#;

/// As the table makes it by itself.
const NEW_ID: &str = "outbox_uuid_v7()";

/// A UUIDv7 from noon (UTC) of the day on which old rows were published.
const OLD_ID: &str = "
    (lpad(to_hex((extract(epoch FROM (now() AT TIME ZONE 'UTC')::date - {age} + time '12:00') * 1000)::bigint + n / 50),
          12, '0') || '7' || left(md5(n::text), 3) || '8' || right(md5(n::text), 15))::uuid";

/// How long ago old rows were published, in days.
pub const AGE_DAYS: u64 = 6;

/// What state the rows of [`fill`] are in.
#[derive(Debug, Clone, Copy)]
pub enum State {
    Waiting,
    /// Published [`AGE_DAYS`] ago.
    Old,
    /// Waiting, and each of a trace of its own; of so many, one is sampled.
    Traced {
        of: u32,
    },
}

/// Inserts this many rows. `told` is given the number of rows after each chunk.
pub async fn fill(connection: &mut PgConnection, events: u64, state: State, told: impl Fn(u64)) -> Result<(), sqlx::Error> {
    let (id, state) = match state {
        State::Waiting => (NEW_ID, "'PENDING', clock_timestamp(), NULL, '{}'".to_owned()),
        State::Old => (OLD_ID, "'PUBLISHED', now() - interval '{age} days', now() - interval '{age} days', '{}'".to_owned()),
        State::Traced { of } => (
            NEW_ID,
            format!(
                "'PENDING', clock_timestamp(), NULL, jsonb_build_object('traceparent', '00-' || md5(n::text) || '-'
                     || left(md5(c), 16) || CASE n % {of} WHEN 0 THEN '-01' ELSE '-00' END)"
            ),
        ),
    };
    let sql = FILL.replace("{id}", id).replace("{state}", &state).replace("{age}", &AGE_DAYS.to_string());
    let mut filled = 0;
    while filled < events {
        let until = events.min(filled + CHUNK);
        let insert = sqlx::query(sqlx::AssertSqlSafe(sql.clone()));
        insert.bind((filled + 1).cast_signed()).bind(until.cast_signed()).execute(&mut *connection).await?;
        filled = until;
        told(filled);
    }
    Ok(())
}

/// What an application without this library writes: one event into the outbox, with its parameters in a prepared statement.
pub async fn insert_by_hand(connection: &mut PgConnection, event: &OrderPlaced) -> anyhow::Result<()> {
    let sql = "INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, occurred_at, payload)
               VALUES ($1, 'OrderPlaced', 'order', $2, $3, $4::text::jsonb)";
    let insert = sqlx::query(sql).bind(Uuid::now_v7()).bind(&event.order).bind(Utc::now()).bind(serde_json::to_string(event)?);
    insert.execute(connection).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_about_200_bytes() {
        for number in [1, 5_000_000] {
            let bytes = serde_json::to_string(&OrderPlaced::new(number)).unwrap().len();
            assert!((180..=220).contains(&bytes), "{bytes}");
        }
    }
}
