//! Producers: transactions that count up aggregates and publish an event for each step.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use chrono::Utc;
use commitstream::config::Settings;
use commitstream::publisher::{DomainEventPublisher, HybridEventPublisher, PostgresOutboxPublisher};
use commitstream::{DomainEvent, EventEnvelope};
use rand::Rng;
use rand::rngs::StdRng;
use sqlx::{Connection, PgConnection};
use tokio::time::sleep;
use uuid::Uuid;

use crate::history::Ledger;
use crate::world::{AGGREGATES, Phase, TYPES, World};

/// Of the first producer.
const ACTOR: u64 = 100;

/// Producers wait while more events than this are to be published.
const MOST_WAITING: u64 = 20_000;

/// Between transactions.
const PAUSE_MILLIS: std::ops::Range<u64> = 0..80;

/// What one transaction shall do.
struct Plan {
    /// Aggregates in the order in which everybody locks them, and how many events each gets.
    shares: Vec<(&'static str, usize, i64)>,
    /// How long it stays open.
    hold: Duration,
    rolls_back: bool,
    way: Way,
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Sql,
    Outbox,
    Hybrid,
}

impl Plan {
    fn draw(dice: &mut StdRng) -> Self {
        let mut aggregates: Vec<_> = (0..dice.random_range(1..=3))
            .map(|_| (TYPES[dice.random_range(0..TYPES.len())], dice.random_range(1..=AGGREGATES)))
            .collect();
        aggregates.sort_unstable();
        aggregates.dedup();
        let most = 50 / i64::try_from(aggregates.len()).unwrap_or(50);
        Self {
            shares: aggregates.into_iter().map(|(kind, id)| (kind, id, dice.random_range(1..=most))).collect(),
            hold: Duration::from_millis(if dice.random_bool(0.05) { dice.random_range(0..1_500) } else { 0 }),
            rolls_back: dice.random_bool(0.05),
            way: [Way::Sql, Way::Outbox, Way::Hybrid][dice.random_range(0..3)],
        }
    }
}

struct Publishers {
    outbox: PostgresOutboxPublisher,
    hybrid: HybridEventPublisher,
}

/// Produces until the storm has passed. The servers may be down at any time; only what a server refuses is an error.
pub async fn produce(world: Arc<World>, number: usize) -> Result<Ledger> {
    let mut dice = world.dice(ACTOR + number as u64);
    let mut settings = Settings::default();
    settings.redis.url = Some(world.redis.master().url());
    let publishers =
        Publishers { outbox: PostgresOutboxPublisher::new(&settings), hybrid: HybridEventPublisher::new(&settings)? };
    let mut ledger = Ledger::default();
    let mut connection = None;
    while world.is_before(Phase::Drain) {
        sleep(Duration::from_millis(dice.random_range(PAUSE_MILLIS))).await;
        if world.backlog.load(Ordering::Relaxed) > MOST_WAITING {
            continue;
        }
        if connection.is_none() {
            connection = world.connect().await.ok();
        }
        let Some(mut open) = connection.take() else { continue };
        match transact(&mut open, &Plan::draw(&mut dice), &publishers, &mut ledger).await {
            Ok(()) => connection = Some(open),
            Err(error) if is_outage(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ledger)
}

async fn transact(connection: &mut PgConnection, plan: &Plan, publishers: &Publishers, ledger: &mut Ledger) -> Result<()> {
    let mut transaction = connection.begin().await?;
    let mut events = Vec::new();
    for &(kind, id, count) in &plan.shares {
        let id = id.to_string();
        let sql = "SELECT events FROM aggregate WHERE type = $1 AND id = $2 FOR UPDATE";
        let before: i64 = sqlx::query_scalar(sql).bind(kind).bind(&id).fetch_one(&mut *transaction).await?;
        let numbers = before + 1..=before + count;
        events.extend(match plan.way {
            Way::Sql => insert(&mut transaction, kind, &id, numbers).await?,
            Way::Outbox => publish(&publishers.outbox, &mut transaction, kind, &id, numbers).await?,
            Way::Hybrid => publish(&publishers.hybrid, &mut transaction, kind, &id, numbers).await?,
        });
        let sql = "UPDATE aggregate SET events = events + $3 WHERE type = $1 AND id = $2";
        sqlx::query(sql).bind(kind).bind(&id).bind(count).execute(&mut *transaction).await?;
    }
    sleep(plan.hold).await;
    if plan.rolls_back {
        // Whatever comes of the rollback, there is no commit.
        ledger.rolled_back.push(events);
        return Ok(transaction.rollback().await?);
    }
    let committed = transaction.commit().await;
    let column = if committed.is_ok() { &mut ledger.committed } else { &mut ledger.in_doubt };
    column.push(events);
    Ok(committed?)
}

/// As a program in any language does.
async fn insert(
    connection: &mut PgConnection,
    kind: &str,
    id: &str,
    numbers: std::ops::RangeInclusive<i64>,
) -> Result<Vec<Uuid>> {
    let sql = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
               SELECT 'Happened', $1, $2, jsonb_build_object('number', number) FROM generate_series($3, $4) number ORDER BY number
               RETURNING id";
    let query = sqlx::query_scalar(sql).bind(kind).bind(id).bind(numbers.start()).bind(numbers.end());
    Ok(query.fetch_all(connection).await?)
}

async fn publish(
    publisher: &impl DomainEventPublisher,
    connection: &mut PgConnection,
    kind: &str,
    id: &str,
    numbers: std::ops::RangeInclusive<i64>,
) -> Result<Vec<Uuid>> {
    let envelope = |number| -> Result<EventEnvelope> {
        Ok(EventEnvelope {
            id: Uuid::now_v7(),
            event_type: "Happened".to_owned(),
            aggregate_type: kind.to_owned(),
            aggregate_id: id.to_owned(),
            occurred_at: Utc::now(),
            payload: serde_json::value::to_raw_value(&serde_json::json!({ "number": number }))?,
            headers: serde_json::Map::new(),
        })
    };
    let envelopes = numbers.map(envelope).collect::<Result<Vec<_>>>()?;
    let events: Vec<_> = envelopes.iter().map(|envelope| envelope as &dyn DomainEvent).collect();
    Ok(publisher.publish_all(connection, &events).await?)
}

/// The server was stopped or killed, or is starting; anything else that it says is meant for us.
fn is_outage(error: &anyhow::Error) -> bool {
    let refused = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref() {
        Some(sqlx::Error::Database(error)) => !error.code().is_some_and(|code| code.starts_with("57P")),
        _ => false,
    };
    !error.chain().any(refused)
}
