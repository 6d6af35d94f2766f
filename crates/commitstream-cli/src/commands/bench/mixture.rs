//! What a busy system has after a week: an outbox in which most was sent, some waits and some failed, with its journal, its streams, their
//! consumer groups and dead letters, its relays and what operators did.

use std::time::Duration;

use anyhow::Context;
use commitstream::outbox::OutboxRepository;
use redis::AsyncCommands;
use sqlx::{AssertSqlSafe, PgConnection};

use super::process::RelayProcess;
use super::stage::Stage;
use crate::output::count;

/// Rows of one INSERT.
const CHUNK: u64 = 50_000;
/// Of each so many events of the past, [`FAILED`] have failed.
const OF: u64 = 91;
const FAILED: u64 = 10;

/// Entries that one group has in hand, and dead letters of each stream.
const IN_HAND: u64 = 5_000;
const DEAD: u64 = 12_000;

/// Between two looks at what a relay has left.
const PAUSE: Duration = Duration::from_millis(20);

pub const AGGREGATE_TYPES: [&str; 4] = ["order", "user", "payment", "parcel"];

/// 10 types of events, of 100,000 aggregates in 4 streams, and 20 causes of failure. `{state}` makes of number, time and dice: status,
/// retries, next retry, error, and time of publication. `$3` is when the first one was inserted, and `$4` is milliseconds between two.
const FILL: &str = r#"
    INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload, created_at, status, retry_count, next_retry_at,
                              last_error, published_at)
    SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || left(dice, 3) || '8' || substr(dice, 4, 15))::uuid,
           (ARRAY['OrderPlaced', 'UserCreated', 'PaymentTaken', 'ParcelSent', 'OrderPaid', 'UserRenamed', 'PaymentRefused', 'ParcelReceived',
                  'OrderShipped', 'UserGone'])[kind + 1],
           (ARRAY['order', 'user', 'payment', 'parcel'])[kind % 4 + 1], aggregate,
           format('{"of":"%s","number":%s,"email":"customer-%s@example.org","amount_cents":%s,"currency":"EUR",'
               '"items":[{"sku":"SKU-%s","quantity":%s}],"note":"leave at the door"}',
               aggregate, n, aggregate, 100 + n % 9900, lpad((n % 1000)::text, 4, '0'), 1 + n % 3)::jsonb,
           at, {state}
    FROM (SELECT n, $3::timestamptz + n * $4::float8 * interval '1 millisecond' AS at, md5(n::text) AS dice,
                 abs(hashint8(n) % 10) AS kind, lpad(abs(hashint8(-n) % 25000)::text, 5, '0') AS aggregate,
                 abs(hashint8(n + 77) % 20) AS cause
          FROM generate_series($1::bigint, $2::bigint) AS n) AS numbers
    ORDER BY n"#;

const ERROR: &str = "format((ARRAY['OOM command not allowed when used memory > maxmemory: %s bytes', 'NOPERM this user has no permissions to run xadd on %s',
    'WRONGTYPE Operation against a key holding the wrong kind of value', 'payload of %s bytes is larger than maxPayloadBytes',
    'ERR string exceeds maximum allowed size (proto-max-bulk-len), %s bytes', 'the payload is not JSON: expected value at line 1 column %s',
    'ERR The ID specified in XADD is equal or smaller than the target stream top item, %s', 'NOREPLICAS Not enough good replicas to write: %s',
    'the schema registry knows no version %s of it', 'the header traceparent of %s bytes is malformed', 'READONLY script of %s ms was undone',
    'ERR Error running script: too many results to unpack: %s', 'MISCONF Errors writing to the AOF file: No space left on device, %s',
    'the currency of item %s is unknown', 'an amount of -%s cents cannot be', 'the customer %s is locked', 'the sku %s is no longer sold',
    'the zone %s has no offset at that time', 'the address has %s lines, and at most 5 can be', 'refused by the filter with rule %s'
    ])[cause + 1], n)";

/// Who looks after the partitions: relays that live as long as this session does.
const RELAYS: &str = "
WITH relays AS (
    INSERT INTO outbox_relay (relay_id, host, pid, version, expires_at, session_pid, session_start, shares, state, published, events_per_second)
    SELECT gen_random_uuid(), 'relay-' || n, 100 + n, '0', now() + interval '1 day', pg_backend_pid(),
           (SELECT backend_start FROM pg_stat_get_activity(pg_backend_pid())), true, 'active', 2000000, 1200
    FROM generate_series(1, 4) AS n RETURNING relay_id
), numbered AS (SELECT relay_id, row_number() OVER () - 1 AS n FROM relays)
UPDATE outbox_lease SET relay_id = numbered.relay_id FROM numbered WHERE partition_no % 4 = n";

/// Batches that are on their way, of 100 events each, and what operators did: small deeds and the steps of large ones.
const DEEDS: &str = "
INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids)
SELECT gen_random_uuid(), gen_random_uuid(), 'order', array_agg(id)
FROM (SELECT id, row_number() OVER () AS n FROM event_outbox WHERE status = 'PENDING' AND next_retry_at IS NULL ORDER BY seq LIMIT 1000) AS first
GROUP BY n / 100;
INSERT INTO outbox_audit (who, action, about, events, event_ids)
SELECT 'ada', 'retry', 'one event', 1, ARRAY[gen_random_uuid()] FROM generate_series(1, 20000);
INSERT INTO outbox_audit (who, action, about, events, event_ids)
SELECT 'ada', 'discard', 'all failed events', 1000, ids FROM (SELECT array_agg(gen_random_uuid()) AS ids FROM generate_series(1, 1000)) AS made,
       generate_series(1, 1000);
VACUUM ANALYZE outbox_audit, outbox_batch";

/// Makes it all. One event in ten has failed and one in twenty waits; the last ones that were sent went by a relay.
pub async fn make(stage: &Stage, connection: &mut PgConnection, events: u64) -> anyhow::Result<()> {
    stage.clear(connection).await?;
    clear(connection).await?;
    let (past, sent) = (events / 100 * 91, events / 25);
    let week = f64::from(6 * 24 * 60 * 60 * 1_000) / past as f64;
    let has_failed = format!("n % {OF} < {FAILED}");
    let state = format!(
        "CASE WHEN {has_failed} THEN 'FAILED' ELSE 'PUBLISHED' END, CASE WHEN {has_failed} THEN 10 ELSE 0 END, NULL,
         CASE WHEN {has_failed} THEN {ERROR} END, CASE WHEN {has_failed} THEN NULL ELSE at + interval '8 ms' END"
    );
    fill(stage, connection, (0, past), ("6 days", week), &state).await?;
    fill(stage, connection, (past, past + sent), ("5 minutes", 0.0), "'PENDING', 0, NULL, NULL, NULL").await?;
    stage.settle(connection).await?;
    publish(stage, connection).await?;
    // In every fiftieth aggregate one was refused, and the others wait for it.
    let waits = "aggregate LIKE '%00' OR aggregate LIKE '%50'";
    let state = format!(
        "'PENDING', CASE WHEN {waits} THEN 3 ELSE 0 END, CASE WHEN {waits} THEN now() + interval '1 hour' END,
         CASE WHEN {waits} THEN {ERROR} END, NULL"
    );
    fill(stage, connection, (past + sent, events), ("1 minute", 0.0), &state).await?;
    sqlx::raw_sql(RELAYS).execute(&mut *connection).await?;
    for statement in DEEDS.split(';') {
        sqlx::raw_sql(statement).execute(&mut *connection).await?;
    }
    stage.tell(|| "console: vacuum".to_owned());
    stage.settle(connection).await
}

/// Removes what no other benchmark knows of.
pub async fn clear(connection: &mut PgConnection) -> anyhow::Result<()> {
    let sql = "TRUNCATE outbox_audit; DELETE FROM outbox_relay; UPDATE outbox_lease SET relay_id = NULL";
    sqlx::raw_sql(sql).execute(connection).await?;
    Ok(())
}

async fn fill(
    stage: &Stage,
    connection: &mut PgConnection,
    (mut filled, end): (u64, u64),
    (ago, apart): (&str, f64),
    state: &str,
) -> anyhow::Result<()> {
    let sql = FILL.replace("{state}", state);
    let sql_of_first = AssertSqlSafe(format!("SELECT now() - interval '{ago}' - $1::float8 * interval '1 millisecond'"));
    let first: chrono::DateTime<chrono::Utc> =
        sqlx::query_scalar(sql_of_first).bind(filled as f64 * apart).fetch_one(&mut *connection).await?;
    while filled < end {
        let until = end.min(filled + CHUNK);
        let insert = sqlx::query(AssertSqlSafe(sql.clone()));
        let insert = insert.bind((filled + 1).cast_signed()).bind(until.cast_signed()).bind(first).bind(apart);
        insert.execute(&mut *connection).await?;
        filled = until;
        stage.tell(|| format!("console: filling, {} of {}", count(filled), count(end)));
    }
    Ok(())
}

/// A relay sends what waits: so journal, streams and markers are as they are.
async fn publish(stage: &Stage, connection: &mut PgConnection) -> anyhow::Result<()> {
    stage.tell(|| "console: a relay publishes".to_owned());
    let outbox = OutboxRepository::new(&stage.settings.database.schema);
    let relay = RelayProcess::start(stage).await?;
    while outbox.has_unsent(connection).await? {
        tokio::time::sleep(PAUSE).await;
    }
    relay.stop().await?;
    clear(connection).await
}

/// Consumer groups: one that has not begun, one with entries in hand, and one of which Redis does not know how far behind it is; and
/// dead letters. A note where this cannot be made.
pub async fn consumers(stage: &Stage, events: u64) -> anyhow::Result<Option<String>> {
    let url = stage.settings.redis.url.as_deref().context("benchmarks have a Redis")?;
    if !url.starts_with("redis://") && !url.starts_with("rediss://") {
        return Ok(Some("consumer groups and dead letters are left out: there are several Redis servers".to_owned()));
    }
    let mut redis = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    for aggregate_type in AGGREGATE_TYPES {
        stage.tell(|| format!("console: consumers of {aggregate_type}"));
        let stream = stage.streams.stream_of(aggregate_type);
        let _: () = redis.xgroup_create_mkstream(&stream, "mail", "0").await?;
        let _: () = redis.xgroup_create_mkstream(&stream, "billing", "0").await?;
        let in_hand = events.min(IN_HAND);
        let mut read = redis::cmd("XREADGROUP");
        read.arg("GROUP").arg("billing").arg("billing-1").arg("COUNT").arg(in_hand).arg("STREAMS").arg(&stream).arg(">");
        let read: redis::streams::StreamReadReply = read.query_async(&mut redis).await?;
        let entries = read.keys.into_iter().next().map(|key| key.ids).unwrap_or_default();
        let Some(middle) = entries.get(entries.len() / 2) else { continue };
        let _: () = redis.xgroup_create_mkstream(&stream, "search", &middle.id).await?;
        let dead = format!("{stream}:dead");
        for numbers in (0..events.min(DEAD)).collect::<Vec<_>>().chunks(1_000) {
            let mut pipeline = redis::pipe();
            for number in numbers {
                let entry = &entries[usize::try_from(*number)? % entries.len()];
                let add = pipeline.cmd("XADD").arg(&dead).arg("*");
                for name in ["id", "type", "aggregate_type", "aggregate_id", "occurred_at", "payload"] {
                    add.arg(name).arg(entry.get::<String>(name).unwrap_or_default());
                }
                let letter = [
                    ("group", "mail"),
                    ("entry", &entry.id),
                    ("reason", "the mail server refuses the address"),
                    ("attempts", "16"),
                    ("history", "[]"),
                    ("dead_at", "2026-01-01T00:00:00Z"),
                ];
                letter.iter().for_each(|(name, value)| {
                    add.arg(*name).arg(*value);
                });
                add.ignore();
            }
            let _: () = pipeline.query_async(&mut redis).await?;
        }
    }
    Ok(None)
}
