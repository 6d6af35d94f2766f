//! The other end: a consumer that writes a receipt for each payment, in a transaction of its own.

use std::time::Duration;

use anyhow::Context;
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, ConsumerHandle, Delivery, HandlerError, TransactionalHandler};
use serde::Serialize;
use sqlx::{PgConnection, PgPool, Row};

use super::events::PaymentProcessed;
use super::service::pool;

const GROUP: &str = "receipts";
/// Handlers at once, each with a session.
const CONCURRENCY: u32 = 8;

struct ReceiptConsumer;

impl TransactionalHandler<PaymentProcessed> for ReceiptConsumer {
    async fn handle(&self, event: PaymentProcessed, _: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        sqlx::query("INSERT INTO receipts (payment_id, user_id, sequence) VALUES ($1, $2, $3)")
            .bind(event.payment_id)
            .bind(event.user_id)
            .bind(event.sequence)
            .execute(transaction)
            .await?;
        Ok(())
    }
}

/// The receipts against the payments, in the end.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Receipts {
    pub payments: u64,
    pub receipts: u64,
    /// Payments without a receipt.
    pub missing: u64,
    /// Receipts beyond one for each payment.
    pub twice: u64,
    /// Receipts written before one of an earlier payment of the same user.
    pub out_of_order: u64,
}

impl Receipts {
    pub fn is_clean(&self) -> bool {
        self.missing + self.twice + self.out_of_order == 0
    }
}

/// The running consumer.
pub struct Receiver {
    consumer: ConsumerHandle,
    pool: PgPool,
}

impl Receiver {
    pub async fn start(settings: &Settings) -> anyhow::Result<Self> {
        let mut settings = settings.clone();
        settings.consumer.concurrency = CONCURRENCY;
        let pool = pool(&settings, CONCURRENCY + 1, "receipts").await?;
        let consumer = Consumer::new(GROUP, &settings)?.on_transaction(&pool, ReceiptConsumer).start()?;
        Ok(Self { consumer, pool })
    }

    /// Waits until every payment has its receipt, `patience` at most, stops, and compares both tables.
    pub async fn finish(self, patience: Duration) -> anyhow::Result<Receipts> {
        let deadline = tokio::time::Instant::now() + patience;
        while tokio::time::Instant::now() < deadline && compare(&self.pool).await?.missing > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.consumer.stop().await.context("the consumer of the example failed")?;
        let receipts = compare(&self.pool).await;
        self.pool.close().await;
        receipts
    }
}

async fn compare(pool: &PgPool) -> anyhow::Result<Receipts> {
    let sql = "
        WITH ordered AS (
            SELECT sequence < max(sequence) OVER (PARTITION BY user_id ORDER BY number) AS late FROM receipts)
        SELECT (SELECT count(*) FROM payments), (SELECT count(*) FROM receipts),
            (SELECT count(*) FROM payments WHERE id NOT IN (SELECT payment_id FROM receipts)),
            (SELECT count(*) - count(DISTINCT payment_id) FROM receipts),
            (SELECT count(*) FROM ordered WHERE late)";
    let row = sqlx::query(sql).fetch_one(pool).await.context("comparing receipts and payments")?;
    let number = |at: usize| row.try_get::<i64, _>(at).map(i64::unsigned_abs);
    Ok(Receipts { payments: number(0)?, receipts: number(1)?, missing: number(2)?, twice: number(3)?, out_of_order: number(4)? })
}
