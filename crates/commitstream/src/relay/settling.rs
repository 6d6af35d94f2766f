//! Step 3 of the protocol, whatever stands in its way: all that has ended at once, and where PostgreSQL refuses that, batch by batch and row
//! by row.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::session::bounded;
use crate::chain::chain;
use crate::outbox::{AfterPublishing, OutboxError, OutboxRepository, Settlement, StuckBatch, StuckRow};

const DOING: &str = "settling batches";

/// What a settle came to.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// Another relay has resolved some of the batches, or their rows of the journal are gone.
    pub is_taken_over: bool,
    /// Set aside by this settle, or tried again in vain.
    pub stuck: Vec<StuckBatch>,
    pub unwritten: Vec<StuckRow>,
    /// Why it did not go all at once.
    pub refused: Option<String>,
}

/// Settles what has ended, and tries again what was stuck. Each call to PostgreSQL has its own `limit`.
pub(super) async fn settle(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    settlements: &[Settlement],
    stuck: &[Uuid],
    after: AfterPublishing,
    limit: Duration,
) -> Result<Settled, OutboxError> {
    let mut done = Settled::default();
    if !settlements.is_empty() {
        match bounded(DOING, limit, outbox.settle(connection, settlements, after)).await {
            Ok(settled) if usize::try_from(settled).is_ok_and(|settled| settled == settlements.len()) => {}
            Ok(_) => {
                done.is_taken_over = true;
                // A journal that does not change would look like this, too.
                batch_by_batch(outbox, connection, settlements, limit, &mut done).await?;
            }
            Err(error) if error.is_about_rows() => {
                tracing::debug!(error = chain(&error), "settling batch by batch");
                done.refused = Some(chain(&error));
                batch_by_batch(outbox, connection, settlements, limit, &mut done).await?;
            }
            Err(error) => return Err(error),
        }
    }
    for batch in stuck {
        done.stuck.extend(bounded(DOING, limit, outbox.settle_stuck(connection, *batch)).await?);
    }
    Ok(done)
}

async fn batch_by_batch(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    settlements: &[Settlement],
    limit: Duration,
    done: &mut Settled,
) -> Result<(), OutboxError> {
    for settlement in settlements {
        let rows = bounded(DOING, limit, outbox.settle_rows(connection, settlement)).await?;
        done.is_taken_over |= !rows.settled;
        done.stuck.extend(rows.stuck);
        done.unwritten.extend(rows.unwritten);
    }
    Ok(())
}
