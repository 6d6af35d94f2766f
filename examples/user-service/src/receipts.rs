//! A receipt for every payment: an effect in PostgreSQL, which happens exactly once.

use commitstream::consumer::{Delivery, HandlerError, TransactionalHandler};
use sqlx::PgConnection;

use crate::events::PaymentProcessed;

/// Writes one receipt for each payment. The runtime commits it together with a row of the inbox, so an event that comes again
/// does not even come here.
pub struct ReceiptConsumer;

impl TransactionalHandler<PaymentProcessed> for ReceiptConsumer {
    async fn handle(
        &self,
        event: PaymentProcessed,
        _delivery: &Delivery,
        transaction: &mut PgConnection,
    ) -> Result<(), HandlerError> {
        sqlx::query("INSERT INTO receipts (payment_id, amount_cents) VALUES ($1, $2)")
            .bind(event.payment_id)
            .bind(event.amount_cents)
            .execute(transaction)
            .await?;
        tracing::info!(payment = %event.payment_id, "receipt written");
        Ok(())
    }
}
