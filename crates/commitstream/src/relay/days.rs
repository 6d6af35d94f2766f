//! The partitions of a table that is partitioned by day: made ahead, and dropped when they are old.

use std::time::Duration;

use chrono::NaiveDate;
use sqlx::PgConnection;

use crate::outbox::{self, Fate, OutboxError, OutboxRepository, Overdue};

/// What was done to the partitions, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DaysChanged {
    /// Made, for today and the next days.
    pub made: Vec<String>,
    pub dropped: Vec<String>,
    /// Of those, on disk.
    pub bytes: u64,
    /// Events of those that were not published, or only lately, and are in `event_outbox_rest` now.
    pub moved: u64,
    /// Old enough to be dropped, but with too many events that are not published, or only lately.
    pub kept: Vec<String>,
    /// Something is left for the next time, because others had the table locked.
    pub postponed: bool,
}

impl DaysChanged {
    pub(super) fn log(&self) {
        let Self { made, dropped, bytes, moved, kept, postponed } = self;
        if made.len() + dropped.len() > 0 {
            tracing::info!(?made, ?dropped, bytes, moved, "clean-up made and dropped partitions");
        }
        if !kept.is_empty() {
            tracing::warn!(?kept, "old partitions are kept: too many of their events are not published, or only lately");
        }
        if *postponed {
            tracing::warn!("partitions are left as they are until the next interval: a long transaction has event_outbox locked");
        }
    }
}

/// Makes the partitions that are missing of today and the next days. `None` where the table is not partitioned by day.
///
/// # Errors
/// PostgreSQL cannot be asked, or the table belongs to another role.
pub async fn make_ahead(outbox: &OutboxRepository, connection: &mut PgConnection) -> Result<Option<DaysChanged>, OutboxError> {
    let mut transaction = outbox::begin_reading(connection).await?;
    let missing = outbox.missing_days(&mut transaction).await?;
    transaction.commit().await.map_err(outbox.error("looking for partitions"))?;
    match missing {
        Some(missing) => change(outbox, connection, &missing, &[], Duration::ZERO).await.map(Some),
        None => Ok(None),
    }
}

/// Makes the `missing` partitions and drops the `overdue` ones.
pub(super) async fn change(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    missing: &[NaiveDate],
    overdue: &[Overdue],
    retention: Duration,
) -> Result<DaysChanged, OutboxError> {
    let mut done = DaysChanged::default();
    match try_to_change(outbox, connection, missing, overdue, retention, &mut done).await {
        Err(OutboxError::Busy { .. }) => done.postponed = true,
        changed => changed?,
    }
    Ok(done)
}

async fn try_to_change(
    outbox: &OutboxRepository,
    connection: &mut PgConnection,
    missing: &[NaiveDate],
    overdue: &[Overdue],
    retention: Duration,
    done: &mut DaysChanged,
) -> Result<(), OutboxError> {
    for day in missing {
        done.made.extend(outbox.make_day(connection, *day).await?);
    }
    for day in overdue {
        if day.fate != Fate::Drop {
            done.kept.push(day.name.clone());
        } else if let Some(moved) = outbox.drop_day(connection, day, retention).await? {
            done.dropped.push(day.name.clone());
            done.bytes += day.bytes;
            done.moved += moved;
        }
    }
    Ok(())
}
