//! `publish` and `publish_all`: what publishing costs in a transaction, against the same statements written by hand.

use std::time::Instant;

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

/// Before what counts: statements are prepared, and what the last round has left to do is done.
const WARM_UP: u64 = 20;

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("publish").await?;
    let pool = stage.pool("publish", 1).await?;
    let (outbox, hybrid) = (PostgresOutboxPublisher::new(&stage.settings), HybridEventPublisher::new(&stage.settings)?);
    let (mut in_transaction, mut in_unit_of_work) = (Vec::new(), Vec::new());
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("publish, round {round}"));
        let mut rates = [0.0; 3];
        for (rate, way) in rates.iter_mut().zip([Way::Publisher(&outbox), Way::UnitOfWork(&hybrid), Way::ByHand]) {
            sqlx::raw_sql("TRUNCATE bench_order").execute(&mut connection).await?;
            stage.prepare(&mut connection, 0, "publish").await?;
            *rate = transactions(&pool, &way, stage.events(TRANSACTIONS)).await?;
        }
        in_transaction.push(Round::new(rates[0], rates[2]));
        in_unit_of_work.push(Round::new(rates[1], rates[2]));
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

/// Transactions a second, one after the other on one connection.
async fn transactions(pool: &PgPool, way: &Way<'_>, transactions: u64) -> anyhow::Result<f64> {
    let mut started = Instant::now();
    for number in 0..WARM_UP + transactions {
        if number == WARM_UP {
            started = Instant::now();
        }
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
    Ok(per_second(transactions, started.elapsed()))
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
    let mut rounds = Vec::new();
    for round in stage.rounds(ROUNDS) {
        stage.tell(|| format!("publish_all, round {round}"));
        let mut rates = [0.0; 2];
        for (rate, publisher) in rates.iter_mut().zip([Some(&publisher), None]) {
            stage.prepare(&mut connection, 0, "publish_all").await?;
            *rate = large_transactions(stage, publisher).await?;
        }
        rounds.push(Round::new(rates[0], rates[1]));
    }
    stage.clear(&mut connection).await?;
    Ok(Measured {
        name: "publish_all",
        figures: vec![Figure::new("publish_all", "events/s", Some(AIM), rounds)],
        notes: Vec::new(),
    })
}

/// Events a second, in transactions of many. By hand without a publisher.
async fn large_transactions(stage: &Stage, publisher: Option<&PostgresOutboxPublisher>) -> anyhow::Result<f64> {
    let mut connection = stage.connect("publish_all").await?;
    let events: Vec<OrderPlaced> = (0..EVENTS).map(OrderPlaced::new).collect();
    let borrowed: Vec<&dyn DomainEvent> = events.iter().map(|event| -> &dyn DomainEvent { event }).collect();
    let transactions = stage.events(LARGE_TRANSACTIONS * EVENTS).div_ceil(EVENTS);
    let mut started = Instant::now();
    for number in 0..=transactions {
        if number == 1 {
            started = Instant::now();
        }
        let mut transaction = connection.begin().await?;
        match publisher {
            Some(publisher) => drop(publisher.publish_all(&mut transaction, &borrowed).await?),
            None => insert_all_by_hand(&mut transaction, &events).await?,
        }
        transaction.commit().await?;
    }
    Ok(per_second(transactions * EVENTS, started.elapsed()))
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
