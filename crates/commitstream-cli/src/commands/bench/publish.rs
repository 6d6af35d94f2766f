//! `publish` and `publish_all`: what publishing costs in a transaction, against the same statements written by hand.

use std::time::{Duration, Instant};

use chrono::Utc;
use commitstream::DomainEvent;
use commitstream::publisher::{DomainEventPublisher, HybridEventPublisher, PostgresOutboxPublisher};
use sqlx::{Connection, PgConnection, PgPool};
use uuid::Uuid;

use super::figure::{Aim, Figure, Measured, Round};
use super::stage::{Stage, per_second};
use super::workload::{self, OrderPlaced};

const ROUNDS: u32 = 5;
const AIM: Aim = Aim::RatioAtLeast(0.95);

/// Transactions of one side.
const TRANSACTIONS: u64 = 1_000;
/// The same of `publish_all`, and the events of each.
const LARGE_TRANSACTIONS: u64 = 60;
const EVENTS: u64 = 500;

/// The ways take turns after so many transactions: how long a disk takes for a commit changes from one moment to the next.
const SLICE: u64 = 20;

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("publish").await?;
    let pool = stage.pool("publish", 1).await?;
    let (outbox, hybrid) = (PostgresOutboxPublisher::new(&stage.settings), HybridEventPublisher::new(&stage.settings)?);
    let (mut in_transaction, mut in_unit_of_work) = (Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("publish, round {round}"));
        sqlx::raw_sql("TRUNCATE bench_order").execute(&mut connection).await?;
        stage.prepare(&mut connection, 0, "publish").await?;
        let mut numbers = 0..;
        let mut took = [Duration::ZERO; 3];
        for slice in 0..=stage.events(TRANSACTIONS).div_ceil(SLICE) {
            for (took, way) in took.iter_mut().zip([Way::Publisher(&outbox), Way::UnitOfWork(&hybrid), Way::ByHand]) {
                let spent = transactions(&pool, &way, numbers.by_ref().take(SLICE as usize)).await?;
                // The first slice prepares the statements.
                *took += if slice == 0 { Duration::ZERO } else { spent };
            }
        }
        let [by_publisher, in_a_unit, by_hand] =
            took.map(|took| per_second(stage.events(TRANSACTIONS).div_ceil(SLICE) * SLICE, took));
        in_transaction.push(Round::new(by_publisher, by_hand));
        in_unit_of_work.push(Round::new(in_a_unit, by_hand));
    }
    pool.close().await;
    stage.clear(&mut connection).await?;
    let figures = vec![
        Figure::new("publish", "transactions/s", Some(AIM), in_transaction),
        Figure::new("publish, in a unit of work", "transactions/s", Some(AIM), in_unit_of_work),
    ];
    Ok(Measured { name: "publish", figures, notes: Vec::new() })
}

/// How a transaction publishes.
enum Way<'a> {
    Publisher(&'a PostgresOutboxPublisher),
    UnitOfWork(&'a HybridEventPublisher),
    ByHand,
}

/// How long transactions take, one after the other on one connection.
async fn transactions(pool: &PgPool, way: &Way<'_>, numbers: impl Iterator<Item = u64>) -> anyhow::Result<Duration> {
    let started = Instant::now();
    for number in numbers {
        let order = OrderPlaced::new(number);
        match way {
            Way::Publisher(publisher) => {
                let mut transaction = pool.begin().await?;
                insert_order(&mut transaction, &order).await?;
                publisher.publish(&mut transaction, &order).await?;
                transaction.commit().await?;
            }
            Way::UnitOfWork(publisher) => {
                let mut work = publisher.begin(pool).await?;
                insert_order(work.connection(), &order).await?;
                work.publish(&order).await?;
                work.commit().await?;
            }
            Way::ByHand => {
                let mut transaction = pool.begin().await?;
                insert_order(&mut transaction, &order).await?;
                workload::insert_by_hand(&mut transaction, &order).await?;
                transaction.commit().await?;
            }
        }
    }
    Ok(started.elapsed())
}

/// What the business writes.
async fn insert_order(connection: &mut PgConnection, order: &OrderPlaced) -> Result<(), sqlx::Error> {
    let sql = "INSERT INTO bench_order (number, customer, amount_cents) VALUES ($1, $2, $3)";
    let insert = sqlx::query(sql).bind(order.number.cast_signed()).bind(&order.customer);
    insert.bind(order.amount_cents.cast_signed()).execute(connection).await.map(drop)
}

pub async fn measure_all(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("publish_all").await?;
    let publisher = PostgresOutboxPublisher::new(&stage.settings);
    let events: Vec<OrderPlaced> = (0..EVENTS).map(OrderPlaced::new).collect();
    let transactions = stage.events(LARGE_TRANSACTIONS * EVENTS).div_ceil(EVENTS);
    let mut rounds = Vec::new();
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("publish_all, round {round}"));
        stage.prepare(&mut connection, 0, "publish_all").await?;
        let mut took = [Duration::ZERO; 2];
        for turn in 0..=transactions {
            for (took, publisher) in took.iter_mut().zip([Some(&publisher), None]) {
                let spent = large_transaction(&mut connection, &events, publisher).await?;
                *took += if turn == 0 { Duration::ZERO } else { spent };
            }
        }
        let [by_publisher, by_hand] = took.map(|took| per_second(transactions * EVENTS, took));
        rounds.push(Round::new(by_publisher, by_hand));
    }
    stage.clear(&mut connection).await?;
    Ok(Measured {
        name: "publish_all",
        figures: vec![Figure::new("publish_all", "events/s", Some(AIM), rounds)],
        notes: Vec::new(),
    })
}

/// How long one transaction of many events takes. By hand without a publisher.
async fn large_transaction(
    connection: &mut PgConnection,
    events: &[OrderPlaced],
    publisher: Option<&PostgresOutboxPublisher>,
) -> anyhow::Result<Duration> {
    let borrowed: Vec<&dyn DomainEvent> = events.iter().map(|event| -> &dyn DomainEvent { event }).collect();
    let started = Instant::now();
    let mut transaction = connection.begin().await?;
    match publisher {
        Some(publisher) => drop(publisher.publish_all(&mut transaction, &borrowed).await?),
        None => insert_all_by_hand(&mut transaction, events).await?,
    }
    transaction.commit().await?;
    Ok(started.elapsed())
}

/// One INSERT of all rows, which PostgreSQL is handed as arrays: quicker than a VALUES with thousands of parameters.
async fn insert_all_by_hand(connection: &mut PgConnection, events: &[OrderPlaced]) -> anyhow::Result<()> {
    let sql = "INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, occurred_at, payload)
               SELECT id, event_type, 'order', aggregate_id, occurred_at, payload::jsonb
               FROM unnest($1::uuid[], $2::text[], $3::text[], $4::timestamptz[], $5::text[])
                    AS e(id, event_type, aggregate_id, occurred_at, payload)";
    let payloads = events.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    sqlx::query(sql)
        .bind(events.iter().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
        .bind(events.iter().map(|_| "OrderPlaced").collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.order.as_str()).collect::<Vec<_>>())
        .bind(events.iter().map(|_| Utc::now()).collect::<Vec<_>>())
        .bind(payloads)
        .execute(connection)
        .await?;
    Ok(())
}
