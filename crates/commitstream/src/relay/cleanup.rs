//! Removes what was published long ago.

use std::convert::Infallible;
use std::time::Duration;

use sqlx::PgConnection;

use crate::config::{CleanupSettings, Settings};
use crate::outbox::{self, OutboxError, OutboxRepository};

/// What one clean-up removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub events: u64,
    pub batches: u64,
}

/// Removes everything older than the retention, a small transaction at a time. `progress` is told the totals after each.
///
/// # Errors
/// PostgreSQL cannot be asked; what was removed until then stays removed.
pub async fn run_once(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    settings: &CleanupSettings,
    mut progress: impl FnMut(Cleaned),
) -> Result<Cleaned, OutboxError> {
    let retention = Duration::from_secs(u64::from(settings.retention_days) * 86_400);
    let limit = settings.batch_size;
    let mut cleaned = Cleaned::default();
    loop {
        let events = outbox.delete_published(connection, retention, limit).await?;
        let batches = outbox.delete_settled(connection, retention, limit).await?;
        cleaned.events += events;
        cleaned.batches += batches;
        progress(cleaned);
        if events.max(batches) < u64::from(limit) {
            return Ok(cleaned);
        }
    }
}

/// Cleans up now and then every interval. A failure is logged and tried again at the next interval: it must not stop the relay.
pub(super) async fn run(outbox: &OutboxRepository, settings: &Settings, url: &str) -> Infallible {
    let cleanup = &settings.outbox.cleanup;
    if !cleanup.enabled {
        return std::future::pending().await;
    }
    let mut interval = tokio::time::interval(cleanup.interval);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let once = async {
            let mut connection = outbox::connect(url, "commitstream clean-up", settings.database.timeout).await?;
            run_once(outbox, &mut connection, cleanup, |_| ()).await
        };
        match once.await {
            Ok(Cleaned { events: 0, batches: 0 }) => tracing::debug!("clean-up found nothing to remove"),
            Ok(Cleaned { events, batches }) => tracing::info!(events, batches, "clean-up removed old rows"),
            Err(error) => tracing::warn!(error = %error, "clean-up failed, and will be tried again at the next interval"),
        }
    }
}
