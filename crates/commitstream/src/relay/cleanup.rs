//! Removes what was published or handled long ago.

use std::convert::Infallible;
use std::time::Duration;

use sqlx::PgConnection;

use crate::config::Settings;
use crate::outbox::{self, OutboxError, OutboxRepository};

/// What one clean-up removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub events: u64,
    pub batches: u64,
    /// Rows of the inbox.
    pub inbox: u64,
}

/// Removes everything older than the retention, a small transaction at a time. `progress` is told the totals after each.
///
/// # Errors
/// PostgreSQL cannot be asked; what was removed until then stays removed.
pub async fn run_once(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    settings: &Settings,
    mut progress: impl FnMut(Cleaned),
) -> Result<Cleaned, OutboxError> {
    let retention = days(settings.outbox.cleanup.retention_days);
    let inbox_retention = days(settings.consumer.inbox_retention_days);
    let limit = settings.outbox.cleanup.batch_size;
    let mut cleaned = Cleaned::default();
    loop {
        let events = outbox.delete_published(connection, retention, limit).await?;
        let batches = outbox.delete_settled(connection, retention, limit).await?;
        let inbox = outbox.forget(connection, inbox_retention, limit).await?;
        cleaned.events += events;
        cleaned.batches += batches;
        cleaned.inbox += inbox;
        progress(cleaned);
        if events.max(batches).max(inbox) < u64::from(limit) {
            return Ok(cleaned);
        }
    }
}

fn days(days: u32) -> Duration {
    Duration::from_secs(u64::from(days) * 86_400)
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
            run_once(outbox, &mut connection, settings, |_| ()).await
        };
        match once.await {
            Ok(Cleaned { events: 0, batches: 0, inbox: 0 }) => tracing::debug!("clean-up found nothing to remove"),
            Ok(Cleaned { events, batches, inbox }) => tracing::info!(events, batches, inbox, "clean-up removed old rows"),
            Err(error) => tracing::warn!(error = %error, "clean-up failed, and will be tried again at the next interval"),
        }
    }
}
