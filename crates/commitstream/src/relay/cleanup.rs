//! Removes what was published or handled long ago, from the tables and from the streams.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tokio::sync::Mutex;

use super::days::DaysChanged;
use crate::config::{CleanupSettings, Settings, StreamsSettings};
use crate::outbox::{self, AfterPublishing, Fate, OutboxError, OutboxRepository, Overdue};
use crate::streams::{Streams, StreamsError, Trimmed};

/// So many times as long as one transaction took is the pause before the next.
const REST: u32 = 3;

/// When a clean-up that was broken off is tried again.
const BROKEN_OFF: Duration = Duration::from_secs(60);

/// What one clean-up removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Deleted one by one.
    pub events: u64,
    pub batches: u64,
    /// Rows of the inbox.
    pub inbox: u64,
    /// `None` where the table is not partitioned by day.
    pub days: Option<DaysChanged>,
}

/// Removes everything older than the retention: day partitions as a whole, all else in small transactions that
/// take a quarter of the time, so that events flow on. `progress` is told the totals after each.
///
/// # Errors
/// PostgreSQL cannot be asked, or the tables belong to another role; what was removed until then stays removed.
pub async fn run_once(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    settings: &Settings,
    mut progress: impl FnMut(&Cleaned),
) -> Result<Cleaned, OutboxError> {
    let retention = days(settings.outbox.cleanup.retention_days);
    let inbox_retention = days(settings.consumer.inbox_retention_days);
    let limit = settings.outbox.cleanup.batch_size;
    let mut transaction = outbox::begin_reading(connection).await?;
    let missing = outbox.missing_days(&mut transaction).await?;
    let overdue = if missing.is_some() { outbox.overdue(&mut transaction, retention).await? } else { Vec::new() };
    transaction.commit().await.map_err(outbox.error("looking for old partitions"))?;
    let mut cleaned = Cleaned::default();
    for table in row_by_row(missing.is_some(), &overdue) {
        loop {
            let started = Instant::now();
            let events = outbox.delete_published_from(connection, table, retention, limit).await?;
            let batches = outbox.delete_settled(connection, retention, limit).await?;
            let inbox = outbox.forget(connection, inbox_retention, limit).await?;
            cleaned.events += events;
            cleaned.batches += batches;
            cleaned.inbox += inbox;
            progress(&cleaned);
            if events.max(batches).max(inbox) < u64::from(limit) {
                break;
            }
            // Nobody waits for this, and somebody may wait for an event.
            tokio::time::sleep(started.elapsed() * REST).await;
        }
    }
    if let Some(missing) = missing {
        cleaned.days = Some(super::days::change(outbox, connection, &missing, &overdue, retention).await?);
    }
    Ok(cleaned)
}

/// Where old events are deleted one by one: not in partitions that will be dropped as a whole.
fn row_by_row(is_partitioned: bool, overdue: &[Overdue]) -> Vec<&str> {
    if !is_partitioned {
        return vec!["{s}.event_outbox"];
    }
    let crowded = overdue.iter().filter(|day| day.fate == Fate::RowByRow).map(|day| day.table.as_str());
    std::iter::once("{s}.event_outbox_rest").chain(crowded).collect()
}

/// A retention of nothing needs no clean-up: the settle deletes what it would have marked.
pub(super) fn after_publishing(settings: &CleanupSettings) -> AfterPublishing {
    if settings.enabled && settings.retention_days == 0 { AfterPublishing::Delete } else { AfterPublishing::Keep }
}

fn days(days: u32) -> Duration {
    Duration::from_secs(u64::from(days) * 86_400)
}

/// Trims every stream that this outbox looks after, as the settings say, and tells `report` what came of each. A stream that fails stops
/// no other. Those are what its relays and, while no other outbox has the same prefix, what direct publishers have written to.
///
/// # Errors
/// PostgreSQL or Redis cannot be asked for the streams.
pub async fn trim(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    streams: &Streams,
    settings: &StreamsSettings,
    mut report: impl FnMut(&str, Result<Trimmed, StreamsError>),
) -> Result<(), TrimError> {
    if !settings.trim && settings.max_entries == 0 {
        return Ok(());
    }
    // No entry is as old as that.
    let retention = if settings.trim { days(settings.retention_days) } else { Duration::MAX };
    let mut transaction = outbox::begin_reading(connection).await?;
    let streams = streams.owned_by(outbox.owner(&mut transaction).await?);
    let (_, known) = outbox.known_streams(&mut transaction, &streams.stream_of("")).await?;
    transaction.commit().await.map_err(outbox.error("reading which streams there are"))?;
    let known: Vec<String> = known.into_iter().map(|known| known.stream).collect();
    streams.register(&known).await?;
    for stream in streams.own().await? {
        let trimmed = streams.trim(&stream, retention, settings.max_entries.into()).await;
        report(&stream, trimmed);
    }
    Ok(())
}

/// Why nothing could be trimmed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrimError {
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error(transparent)]
    Streams(#[from] StreamsError),
}

/// Cleans up when it is `due` and then every interval, first the tables and then the streams. A failure is logged and tried again at the next
/// interval: it must not stop the relay, nor what else there is to clean up. `due` outlives this, since partitions come and go often.
pub(super) async fn run(
    outbox: &OutboxRepository,
    streams: &Streams,
    settings: &Settings,
    url: &str,
    due: &Mutex<tokio::time::Instant>,
) -> Infallible {
    if !settings.outbox.cleanup.enabled {
        return std::future::pending().await;
    }
    let mut due = due.lock().await;
    loop {
        tokio::time::sleep_until(*due).await;
        // One that is broken off is tried again soon, but not at once: partitions may come and go all the time.
        *due = tokio::time::Instant::now() + settings.outbox.cleanup.interval.min(BROKEN_OFF);
        let mut connection = match outbox::connect(url, "commitstream clean-up", settings.database.timeout).await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, "clean-up failed, and will be tried again at the next interval");
                continue;
            }
        };
        match run_once(outbox, &mut connection, settings, |_| ()).await {
            Ok(Cleaned { events, batches, inbox, days }) => {
                if events + batches + inbox > 0 {
                    tracing::info!(events, batches, inbox, "clean-up removed old rows");
                } else {
                    tracing::debug!("clean-up found no old rows to remove");
                }
                days.iter().for_each(DaysChanged::log);
            }
            Err(error) => tracing::warn!(error = %error, "clean-up failed, and will be tried again at the next interval"),
        }
        if let Err(error) = trim(outbox, &mut connection, streams, &settings.streams, log_trimmed).await {
            tracing::warn!(%error, "trimming failed, and will be tried again at the next interval");
        }
        *due = tokio::time::Instant::now() + settings.outbox.cleanup.interval;
    }
}

fn log_trimmed(stream: &str, trimmed: Result<Trimmed, StreamsError>) {
    match trimmed {
        Ok(Trimmed { acknowledged: 0, unread: 0 }) => tracing::debug!(stream, "nothing to trim"),
        Ok(Trimmed { acknowledged, unread }) => tracing::info!(stream, acknowledged, unread, "trimmed a stream"),
        Err(error) => tracing::warn!(stream, %error, "trimming failed, and will be tried again at the next interval"),
    }
}
