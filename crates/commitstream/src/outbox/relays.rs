use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::settle::storable;
use super::{OutboxError, OutboxRepository, millis};

/// What a relay writes down of itself with each heartbeat.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    pub relay_id: Uuid,
    pub host: String,
    pub pid: i32,
    pub version: &'static str,
    /// Without another heartbeat the relay counts as dead after this.
    pub life: Duration,
    /// It takes a share of the partitions.
    pub shares: bool,
    pub state: &'static str,
    /// Why it cannot work.
    pub reason: Option<String>,
    pub published: i64,
    pub failed: i64,
    pub republished: i64,
    pub events_per_second: f32,
}

/// Who is there, and who owns what, by the database's clock.
#[derive(Debug, Clone, Default)]
pub struct Members {
    /// Living relays that share the partitions, but the one that asked.
    pub others: Vec<Uuid>,
    /// One of them can work.
    pub others_able: bool,
    /// The owner of each partition, alive or not.
    pub owners: Vec<Option<Uuid>>,
    /// An operator wants nothing to be claimed.
    pub is_paused: bool,
    /// The number of `event_outbox`, if it is there.
    pub table: Option<i64>,
}

/// One relay, for people.
#[derive(Debug, Clone, Serialize)]
pub struct RelayRow {
    pub relay_id: Uuid,
    pub host: String,
    pub pid: i32,
    pub version: String,
    pub started_at: DateTime<Utc>,
    pub alive: bool,
    /// `gone` when it is not alive.
    pub state: String,
    pub reason: Option<String>,
    pub partitions: i64,
    pub heartbeat_age_ms: i64,
    /// Since its start.
    pub age_ms: i64,
    pub published: i64,
    pub failed: i64,
    pub republished: i64,
    pub events_per_second: f32,
}

/// Open batches of one relay: claimed, and not settled yet.
#[derive(Debug, Clone, Serialize)]
pub struct RelayBatches {
    /// It may have been forgotten since.
    pub relay_id: Uuid,
    pub batches: i64,
    /// `batches` is the least that it can be.
    pub at_least: bool,
    /// Since the claim of the oldest.
    pub oldest_ms: i64,
}

/// The oldest open batches, of all relays, that are looked at for people; and relays that they are of.
const OPEN: i64 = 10_000;
const MOST_RELAYS: i64 = 100;

/// A relay `r` is alive: it was heard of in time, and its session is there. The start of the session tells it from a later one with
/// the same process id; it cannot be seen by other users than the session's own.
pub(super) const ALIVE: &str = "r.expires_at > clock_timestamp() AND EXISTS (
    SELECT 1 FROM pg_stat_get_activity(r.session_pid) a
    WHERE a.backend_start IS NULL OR r.session_start IS NULL OR a.backend_start = r.session_start)";

/// Rows of dead relays are kept this long, for people.
const FORGET_AFTER: &str = "1 hour";

impl OutboxRepository {
    /// Writes down that the relay is alive, with this connection as the sign of it, and looks who else is.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn beat(&self, connection: &mut PgConnection, beat: &Heartbeat) -> Result<Members, OutboxError> {
        let doing = "sending a heartbeat";
        let sql = format!(
            "WITH beat AS (
                 INSERT INTO {{s}}.outbox_relay
                     (relay_id, host, pid, version, expires_at, session_pid, session_start, shares, state, reason,
                      published, failed, republished, events_per_second)
                 SELECT $1, $2, $3, $4, clock_timestamp() + $5 * interval '1 millisecond', pg_backend_pid(), a.backend_start, $6, $7, $8,
                        $9, $10, $11, $12
                 FROM pg_stat_get_activity(pg_backend_pid()) a
                 ON CONFLICT (relay_id) DO UPDATE SET
                     heartbeat_at = clock_timestamp(), expires_at = EXCLUDED.expires_at, session_pid = EXCLUDED.session_pid,
                     session_start = EXCLUDED.session_start, shares = EXCLUDED.shares, state = EXCLUDED.state,
                     reason = EXCLUDED.reason, published = EXCLUDED.published, failed = EXCLUDED.failed,
                     republished = EXCLUDED.republished, events_per_second = EXCLUDED.events_per_second
                 RETURNING 1
             ), others AS MATERIALIZED (
                 SELECT relay_id, state FROM {{s}}.outbox_relay r WHERE relay_id <> $1 AND shares AND {ALIVE}
             )
             SELECT (SELECT count(*) FROM beat) AS beats, ARRAY(SELECT relay_id FROM others) AS others,
                    EXISTS (SELECT 1 FROM others WHERE state <> 'unable') AS others_able,
                    ARRAY(SELECT relay_id FROM {{s}}.outbox_lease ORDER BY partition_no) AS owners,
                    EXISTS (SELECT FROM {{s}}.outbox_pause) AS is_paused,
                    to_regclass($13)::oid::bigint AS event_table"
        );
        let row = self
            .query(self.sql(&sql))
            .bind(beat.relay_id)
            .bind(&beat.host)
            .bind(beat.pid)
            .bind(beat.version)
            .bind(millis(beat.life))
            .bind(beat.shares)
            .bind(beat.state)
            .bind(beat.reason.as_deref().map(storable))
            .bind(beat.published)
            .bind(beat.failed)
            .bind(beat.republished)
            .bind(beat.events_per_second)
            .bind(format!("{}.event_outbox", self.quoted))
            .fetch_one(connection)
            .await
            .map_err(self.error(doing))?;
        // The others would take over from a relay that is not on the list.
        OutboxError::unless_changed(doing, row.try_get::<i64, _>("beats").map_err(self.error(doing))?.unsigned_abs(), 1)?;
        let read = || {
            Ok(Members {
                others: row.try_get("others")?,
                others_able: row.try_get("others_able")?,
                owners: row.try_get("owners")?,
                is_paused: row.try_get("is_paused")?,
                table: row.try_get("event_table")?,
            })
        };
        read().map_err(self.error(doing))
    }

    /// Takes the relay off the list and gives all its partitions back, so that others can go on at once.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked; the others then find out by themselves that it is gone.
    pub async fn leave(&self, connection: &mut PgConnection, relay_id: Uuid) -> Result<(), OutboxError> {
        let sql = self.sql(
            "WITH gone AS (DELETE FROM {s}.outbox_relay WHERE relay_id = $1)
             UPDATE {s}.outbox_lease SET relay_id = NULL WHERE relay_id = $1",
        );
        self.query(sql).bind(relay_id).execute(connection).await.map_err(self.error("leaving the list of relays"))?;
        Ok(())
    }

    /// Forgets relays that have been dead for an hour.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn forget_relays(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        let sql = format!("DELETE FROM {{s}}.outbox_relay WHERE expires_at < clock_timestamp() - interval '{FORGET_AFTER}'");
        self.query(self.sql(&sql)).execute(connection).await.map_err(self.error("forgetting dead relays"))?;
        Ok(())
    }

    /// The relays, the oldest first, and those that died within the last hour.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn relays(&self, connection: &mut PgConnection) -> Result<Vec<RelayRow>, OutboxError> {
        let sql = format!(
            "SELECT r.*,
                    (SELECT count(*) FROM {{s}}.outbox_lease l WHERE l.relay_id = r.relay_id) AS partitions,
                    GREATEST(0, extract(epoch FROM clock_timestamp() - r.heartbeat_at) * 1000)::bigint AS heartbeat_age_ms,
                    GREATEST(0, extract(epoch FROM clock_timestamp() - r.started_at) * 1000)::bigint AS age_ms
             FROM (SELECT r.*, {ALIVE} AS alive FROM {{s}}.outbox_relay r
                   WHERE expires_at > clock_timestamp() - interval '{FORGET_AFTER}') AS r
             ORDER BY started_at, relay_id"
        );
        let doing = "listing relays";
        let rows = self.query(self.sql(&sql)).fetch_all(connection).await.map_err(self.error(doing))?;
        rows.iter().map(relay_row).collect::<Result<_, _>>().map_err(self.error(doing))
    }

    /// Of the 10,000 oldest open batches, how many are whose, and since when; the oldest first.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn batches_of_relays(&self, connection: &mut PgConnection) -> Result<Vec<RelayBatches>, OutboxError> {
        let doing = "listing open batches";
        let sql = format!(
            "SELECT relay_id, count(*) AS batches, (sum(count(*)) OVER ()) >= {OPEN} AS at_least,
                    GREATEST(0, extract(epoch FROM clock_timestamp() - min(claimed_at)) * 1000)::bigint AS oldest_ms
             FROM (SELECT relay_id, claimed_at FROM {{s}}.outbox_batch WHERE settled_at IS NULL ORDER BY claimed_at LIMIT {OPEN}) AS open
             GROUP BY relay_id ORDER BY min(claimed_at), relay_id LIMIT {MOST_RELAYS}"
        );
        let rows = self.query(self.sql(&sql)).fetch_all(connection).await.map_err(self.error(doing))?;
        rows.iter().map(relay_batches).collect::<Result<_, _>>().map_err(self.error(doing))
    }
}

fn relay_batches(row: &PgRow) -> Result<RelayBatches, sqlx::Error> {
    Ok(RelayBatches {
        relay_id: row.try_get("relay_id")?,
        batches: row.try_get("batches")?,
        at_least: row.try_get("at_least")?,
        oldest_ms: row.try_get("oldest_ms")?,
    })
}

fn relay_row(row: &PgRow) -> Result<RelayRow, sqlx::Error> {
    let alive: bool = row.try_get("alive")?;
    Ok(RelayRow {
        relay_id: row.try_get("relay_id")?,
        host: row.try_get("host")?,
        pid: row.try_get("pid")?,
        version: row.try_get("version")?,
        started_at: row.try_get("started_at")?,
        alive,
        state: if alive { row.try_get("state")? } else { "gone".to_owned() },
        reason: row.try_get("reason")?,
        partitions: row.try_get("partitions")?,
        heartbeat_age_ms: row.try_get("heartbeat_age_ms")?,
        age_ms: row.try_get("age_ms")?,
        published: row.try_get("published")?,
        failed: row.try_get("failed")?,
        republished: row.try_get("republished")?,
        events_per_second: if alive { row.try_get("events_per_second")? } else { 0.0 },
    })
}
