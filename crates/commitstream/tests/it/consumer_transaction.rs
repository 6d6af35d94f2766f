//! Handlers with a transaction: an effect without its event, or an event without its effect, there never is.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use commitstream::consumer::{Consumer, ConsumerHandle, Delivery, HandlerError, TransactionalHandler};
use commitstream::streams::dead_stream;
use commitstream::{DomainEvent, EventEnvelope};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};

use crate::support::World;

#[derive(Debug, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
struct Paid {
    #[event(key)]
    user: u32,
}

const RECEIPT: &str = "INSERT INTO receipt (event_id) VALUES ($1)";
/// There is an account already.
const ACCOUNT: &str = "INSERT INTO account (name) VALUES ('ada')";

async fn world(events: u32) -> Result<World> {
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 1;
    world.database.psql(
        "CREATE TABLE receipt (event_id uuid); CREATE TABLE account (name text PRIMARY KEY); INSERT INTO account VALUES ('ada');",
    )?;
    let events = (0..events).map(|user| Paid { user }.envelope()).collect::<Result<Vec<EventEnvelope>, _>>()?;
    world.streams.publish(&events).await.map_err(|unsent| unsent.error)?;
    Ok(world)
}

async fn start(world: &World, handler: impl TransactionalHandler<Paid>) -> Result<ConsumerHandle> {
    Ok(Consumer::new("receipts", &world.settings)?.on_transaction(&world.pool().await?, handler).start()?)
}

fn counts(world: &World) -> Result<String> {
    let counts = world.database.psql("SELECT (SELECT count(*) FROM receipt), (SELECT count(*) FROM event_inbox);")?;
    Ok(counts.trim().to_owned())
}

/// Takes an error for "it is there already", and goes on: in a savepoint, or without.
struct PassesOver {
    savepoint: bool,
}

impl TransactionalHandler<Paid> for PassesOver {
    async fn handle(&self, _event: Paid, delivery: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        sqlx::query(RECEIPT).bind(delivery.event_id()).execute(&mut *transaction).await?;
        if self.savepoint {
            let mut savepoint = transaction.begin().await?;
            if sqlx::query(ACCOUNT).execute(&mut *savepoint).await.is_ok() {
                savepoint.commit().await?;
            }
        } else {
            drop(sqlx::query(ACCOUNT).execute(transaction).await);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_passes_over_an_error_of_postgresql_has_failed() -> Result<()> {
    let world = world(3).await?;
    let consumer = start(&world, PassesOver { savepoint: false }).await?;
    consumer.wait_for(|status| status.dead == 3).await.context("ended")?;
    assert_eq!(consumer.stop().await?.handled, 0);
    assert_eq!(counts(&world)?, "0|0");
    let letters: redis::Value = redis::cmd("XRANGE")
        .arg(dead_stream(&world.user_stream()))
        .arg("-")
        .arg("+")
        .query_async(&mut world.redis().await?)
        .await?;
    assert!(format!("{letters:?}").contains("passed over the error of a statement"), "{letters:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_in_a_savepoint_may_be_passed_over() -> Result<()> {
    let world = world(3).await?;
    let consumer = start(&world, PassesOver { savepoint: true }).await?;
    consumer.wait_for(|status| status.handled == 3).await.context("ended")?;
    assert_eq!(consumer.stop().await?.dead, 0);
    assert_eq!(counts(&world)?, "3|3");
    Ok(())
}

/// Loses its connection at the first event, as in a restart of PostgreSQL.
struct CutOff(AtomicBool);

impl CutOff {
    async fn write(&self, delivery: &Delivery, transaction: &mut PgConnection) -> Result<()> {
        if !self.0.swap(true, Ordering::Relaxed) {
            sqlx::query("SELECT pg_terminate_backend(pg_backend_pid())").execute(&mut *transaction).await?;
        }
        sqlx::query(RECEIPT).bind(delivery.event_id()).execute(transaction).await?;
        Ok(())
    }
}

impl TransactionalHandler<Paid> for CutOff {
    async fn handle(&self, _event: Paid, delivery: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        Ok(self.write(delivery, transaction).await?)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_postgresql_counts_no_delivery_also_through_anyhow() -> Result<()> {
    let world = world(3).await?;
    let consumer = start(&world, CutOff(AtomicBool::new(false))).await?;
    consumer.wait_for(|status| status.handled + status.dead == 3).await.context("ended")?;
    let status = consumer.stop().await?;
    assert_eq!((status.failed, status.dead), (0, 0));
    assert_eq!(counts(&world)?, "3|3");
    Ok(())
}
