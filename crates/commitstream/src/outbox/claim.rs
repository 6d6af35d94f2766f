use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::text::text;
use super::{Lease, OutboxError, OutboxRepository, Partitions};

/// What to claim, and its bounds.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    pub lease: Lease,
    /// Of what `snapshot` sees, everything up to this `seq` has been looked at. 0 is a look at everything.
    pub after: i64,
    /// The snapshot of the claim before, as its answer had it. What has become visible since is found at whatever `seq`.
    pub snapshot: Option<String>,
    /// Events that the claim before passed over, to be looked at again.
    pub skipped: Vec<i64>,
    /// The relay's batches that are not settled: what they name is on its way.
    pub open: Vec<Uuid>,
    /// Partitions of the lease in which nothing is to be claimed.
    pub stopped: Partitions,
    /// Aggregates of which nothing is to be claimed, by type and id; about a hundred at most.
    pub kept_back: Vec<(String, String)>,
    /// `after` is below what was claimed before, so that events on their way stand behind it.
    pub looks_back: bool,
    /// A `FAILED` event holds back the later events of its aggregate.
    pub hold: bool,
    /// Most events of the claim, at least 1.
    pub max_events: i64,
    /// Most bytes of payload and headers of the claim; the first event is taken whatever its size.
    pub max_bytes: i64,
    /// Most events of one batch.
    pub batch_size: i64,
    /// An event with more bytes than this comes without payload: it is to be refused, not sent.
    pub max_payload_bytes: i64,
    /// Stream keys are this and the aggregate type.
    pub stream_prefix: String,
    /// Events of these aggregate types are left where they are.
    pub left_out: Vec<String>,
    /// Behind `after`, no event with a higher `seq` is looked at.
    pub up_to: i64,
}

/// What a claim found.
#[derive(Debug, Clone, Default)]
pub struct Claim {
    /// False when there was something to claim, but the relay no longer owns all its partitions under this epoch.
    pub held: bool,
    /// In the order of their first events.
    pub batches: Vec<Batch>,
    /// Events that were made waiting ones behind an earlier one of their aggregate.
    pub waiting: usize,
    /// Events that should have become waiting ones, but somebody else has locked their rows. Ascending.
    pub skipped: Vec<i64>,
    /// What the claim could see.
    pub snapshot: Option<String>,
    /// The last `seq` that was looked at; `None` when the claim came to its end before its bounds.
    pub cut_at: Option<i64>,
}

impl Claim {
    /// The highest `seq` that was claimed.
    #[must_use]
    pub fn last_seq(&self) -> Option<i64> {
        self.batches.iter().filter_map(|batch| batch.events.last()).map(|event| event.seq).max()
    }
}

/// A claimed batch: events of one aggregate type, in `seq` order, and the row of the journal that names them.
#[derive(Debug, Clone)]
pub struct Batch {
    pub id: Uuid,
    pub stream: String,
    pub aggregate_type: String,
    pub events: Vec<OutboxEvent>,
    /// Age of its oldest event when it was claimed, by the database's clock.
    pub age: Duration,
    /// When its claim began, which is a little before that age was taken.
    pub claimed: Instant,
}

/// The outbox row as a model: one claimed event.
#[derive(Debug, Clone)]
pub struct OutboxEvent {
    pub seq: i64,
    pub id: Uuid,
    pub event_type: String,
    pub aggregate_id: String,
    /// 0 to 63.
    pub partition: i64,
    pub occurred_at: DateTime<Utc>,
    /// JSON text, passed on as it came; `None` when it is over the limit or unreadable.
    pub payload: Option<String>,
    /// JSON text; empty when there are none.
    pub headers: String,
    /// Bytes of payload and headers, also when the payload was left out.
    pub bytes: i64,
    pub retry_count: i32,
    /// Its columns that are not UTF-8, in a database that takes any bytes (SQL_ASCII): it comes without payload, and can never be sent.
    pub unreadable: Vec<&'static str>,
    /// It was refused before, or waited behind such an event: others of its aggregate may be waiting for it.
    pub was_waiting: bool,
}

/// One statement, so that the claim is one round trip and one commit:
///
/// * `lease` locks the relay's lease rows: a takeover either sees this claim or makes it claim nothing. The epoch shuts out a claim
///   of an earlier takeover of the same relay that arrives late. Only a takeover waits for
///   a `KEY SHARE`; heartbeats and what is given back do not. Where there is nothing to claim nothing is locked, so that such a look
///   writes nothing, and its commit need not wait for the disk.
/// * `candidates` come, lowest `seq` first and without their payloads, from three places, each by index: behind the cursor; from
///   transactions that the snapshot before did not see and this one does, at whatever `seq`; and what the claim before passed over.
///   `seq + 0` keeps the planner from walking up the index by `seq` from its low end, where the dead entries are.
/// * `status || ''` is the status to PostgreSQL and nothing to its planner. Each part of the statement has the condition of one index in
///   the planner's words, and so goes by that index, whatever the statistics say: when they are of an idle time, all indexes of unsent
///   events look empty and alike.
/// * A waiting event (`next_retry_at` set) counts when it is due and nothing of its aggregate before it is still undue or in flight:
///   what is due before it is in this very claim. Both sides of that compare with one instant: with a running clock, an event
///   could become due between the two.
/// * A fresh event behind a waiting one is `blocked`: it is not claimed, but made a waiting one itself. Then it holds back in
///   turn what comes after it, whatever happens to the first, and order per aggregate needs no memory of the relay's. A row that
///   somebody else has locked cannot be made one; it is passed over and looked at again by every claim.
/// * `now` is read once. The function builds a copy of the snapshot at every call, and for each transaction that was open before, that would be
///   the square of their number.
/// * Each batch must be in the journal, and each blocked row that could be locked must wait: a trigger that returns NULL would prevent
///   either without an error. The cast at the end fails then, and nothing is claimed; it has the text that PostgreSQL's log shows.
/// * `open` goes by `batch_id`: the index of open batches is full of dead entries while a long transaction holds back vacuum.
/// * `n` and `running` number the events and add their bytes up, in the one pass in which they are read in order: sorting rows with
///   payloads, and joining them with their batches, cost more than reading them. The claim is cut off by bytes, and into batches by
///   number: one journal row for each stream in each `batch_size` events.
/// * What is left out is looked at and passed over, so a claim that leaves something out is bounded by `seq` as well: up to `$19`. The first
///   unsent `seq` behind that comes with the answer, and is where the next claim goes on.
/// * The rows of the answer are what the claim saw (`H`), the batches (`B`), and events: claimed (`E`), made waiting (`W`) or passed
///   over (`S`).
const CLAIM: &str = "
WITH open AS MATERIALIZED (
    SELECT unnest(event_ids) AS id FROM {s}.outbox_batch
    WHERE cardinality($8::uuid[]) > 0 AND batch_id = ANY ($8) AND COALESCE(settled_at, 'infinity') = 'infinity'
), now AS MATERIALIZED (
    SELECT pg_current_snapshot() AS visible
), candidates AS MATERIALIZED (
    SELECT c.*, count(*) FILTER (WHERE NOT blocked) OVER w AS n,
           sum(LEAST(payload_bytes, $13::int)) FILTER (WHERE NOT blocked) OVER w AS running
    FROM (
        (SELECT {event} WHERE e.status IN ('PENDING', 'PROCESSING') AND e.seq > $5 AND e.seq <= $19 AND (NOT $15 OR {settled}) AND {claimable}
         ORDER BY e.seq LIMIT $10)
        UNION ALL
        (SELECT late.* FROM (
             SELECT xid, xid AS last FROM pg_snapshot_xip($6::text::pg_snapshot) AS xid
             WHERE pg_visible_in_snapshot(xid, (SELECT visible FROM now))
             UNION ALL SELECT pg_snapshot_xmax($6::text::pg_snapshot), (SELECT pg_snapshot_xmax(visible) FROM now)) AS t
         CROSS JOIN LATERAL (
             SELECT {event} WHERE e.published_at IS NULL AND e.status || '' IN ('PENDING', 'PROCESSING')
               AND e.txid >= t.xid AND e.txid <= t.last AND e.seq + 0 <= $5 AND {settled} AND {claimable}
             ORDER BY e.seq + 0 LIMIT $10) AS late)
        UNION ALL
        (SELECT {event} WHERE cardinality($7::bigint[]) > 0 AND e.status IN ('PENDING', 'PROCESSING') AND e.seq = ANY ($7) AND e.seq <= $5
           AND {settled} AND {claimable})
    ) AS c
    WINDOW w AS (ORDER BY c.seq ROWS UNBOUNDED PRECEDING)
    ORDER BY c.seq LIMIT $10
), lease AS MATERIALIZED (
    SELECT count(*) = $1 AS held
    FROM (SELECT 1 FROM {s}.outbox_lease
          WHERE relay_id = $2 AND epoch = $3 AND EXISTS (SELECT 1 FROM candidates) FOR KEY SHARE) AS l
), batches AS MATERIALIZED (
    SELECT gen_random_uuid() AS batch_id, aggregate_type, (n - 1) / $12 AS chunk, array_agg(id ORDER BY seq) AS event_ids,
           min(seq) AS first_seq, min(created_at) AS oldest, bit_or(1::bigint << partition_no::int) AS partitions
    FROM candidates WHERE {claimed} GROUP BY chunk, aggregate_type
), journal AS (
    INSERT INTO {s}.outbox_batch (batch_id, relay_id, epoch, stream, event_ids, partitions)
    SELECT batch_id, $2, $3, $14 || aggregate_type, event_ids, partitions FROM batches ORDER BY first_seq
    RETURNING 1
), lockable AS MATERIALIZED (
    SELECT id FROM {s}.event_outbox
    WHERE id = ANY (ARRAY(SELECT id FROM candidates WHERE blocked AND (SELECT held FROM lease)))
      AND status || '' IN ('PENDING', 'PROCESSING') AND next_retry_at IS NULL
    FOR UPDATE SKIP LOCKED
), waiting AS (
    UPDATE {s}.event_outbox SET next_retry_at = statement_timestamp()
    WHERE id = ANY (ARRAY(SELECT id FROM lockable))
    RETURNING id
), rows AS (
    SELECT (SELECT count(*) FROM journal) + (SELECT count(*) FROM waiting) AS changed,
           (SELECT count(*) FROM batches) + (SELECT count(*) FROM lockable) AS meant
)
SELECT 'H' AS kind, count(*) = 0 OR (SELECT held FROM lease) AS held,
       (SELECT CASE WHEN changed = meant THEN visible::text
                    ELSE ('commitstream: ' || changed || ' of ' || meant || ' rows changed')::bigint::text END FROM rows, now) AS snapshot, count(*) AS looked_at, max(n) AS n,
       max(seq) AS seq, NULL::uuid AS id, NULL AS event_type, NULL AS aggregate_type, NULL AS aggregate_id,
       NULL::timestamptz AS occurred_at, NULL::int AS retry_count, NULL::int AS payload_bytes, NULL::boolean AS was_waiting,
       (SELECT e.seq::text FROM {s}.event_outbox e WHERE e.status IN ('PENDING', 'PROCESSING') AND e.seq > $19 ORDER BY e.seq LIMIT 1) AS payload,
       '' AS headers
FROM candidates
UNION ALL
SELECT 'B', NULL, NULL, NULL, chunk, (extract(epoch FROM clock_timestamp() - oldest) * 1000000)::bigint, batch_id, NULL, aggregate_type, NULL, NULL, NULL, NULL, NULL, NULL, '' FROM batches
UNION ALL
SELECT 'E', NULL, NULL, partition_no, (n - 1) / $12, seq, id, event_type, aggregate_type, aggregate_id, occurred_at, retry_count,
       payload_bytes, was_waiting,
       CASE WHEN payload_bytes <= $13 THEN payload::text END,
       CASE WHEN payload_bytes <= $13 AND headers <> '{}' THEN headers::text ELSE '' END
FROM candidates WHERE {claimed}
UNION ALL
SELECT CASE WHEN id IN (SELECT id FROM waiting) THEN 'W' ELSE 'S' END, NULL, NULL, NULL, NULL, seq, NULL, NULL, NULL, NULL, NULL,
       NULL, NULL, NULL, NULL, ''
FROM candidates WHERE blocked AND (SELECT held FROM lease)";

/// Of `candidates`, what the bounds allow.
const CLAIMED: &str = "NOT blocked AND (running <= $11 OR n = 1) AND (SELECT held FROM lease)";

/// A row of `candidates`, of the relay's own partitions.
const EVENT: &str =
    "e.seq, e.id, e.event_type, e.aggregate_type, e.aggregate_id, e.partition_no, e.retry_count, e.payload, e.headers,
    e.payload_bytes, e.created_at, COALESCE(e.occurred_at, e.created_at) AS occurred_at, e.next_retry_at IS NOT NULL AS was_waiting,
    e.next_retry_at IS NULL AND (EXISTS (
        SELECT 1 FROM {s}.event_outbox b
        WHERE b.aggregate_type = e.aggregate_type AND b.aggregate_id = e.aggregate_id AND b.seq < e.seq
          AND b.next_retry_at IS NOT NULL AND b.status || '' IN ('PENDING', 'PROCESSING'))
      OR ({held})) AS blocked
    FROM {s}.event_outbox e";

const CLAIMABLE: &str = "($4::bigint >> e.partition_no::int) & 1 = 1 AND e.aggregate_type NOT IN (SELECT unnest($18::text[]))
    AND (cardinality($16::text[]) = 0 OR NOT EXISTS (
        SELECT FROM unnest($16, $17::text[]) AS back(type, id) WHERE back.type = e.aggregate_type AND back.id = e.aggregate_id))
    AND (e.next_retry_at IS NULL OR (e.next_retry_at <= statement_timestamp() AND NOT ({held}) AND NOT EXISTS (
        SELECT 1 FROM {s}.event_outbox b
        WHERE b.aggregate_type = e.aggregate_type AND b.aggregate_id = e.aggregate_id AND b.seq < e.seq
          AND b.next_retry_at IS NOT NULL AND b.status || '' IN ('PENDING', 'PROCESSING')
          AND (b.next_retry_at > statement_timestamp() OR b.seq <= $5 OR b.id IN (SELECT id FROM open)))))";

/// Not on its way.
const SETTLED: &str = "e.id NOT IN (SELECT id FROM open)";

/// An earlier event of the aggregate is `FAILED`, and that holds.
const HELD: &str = "$9 AND EXISTS (
        SELECT 1 FROM {s}.event_outbox b
        WHERE b.aggregate_type = e.aggregate_type AND b.aggregate_id = e.aggregate_id AND b.seq < e.seq AND b.status || '' = 'FAILED')";

impl OutboxRepository {
    /// Step 1 of the protocol: journals up to `max_events` unsent events in open batches and returns them in `seq` order.
    ///
    /// # Errors
    /// When the answer was lost the claim may have been committed: the caller then resolves the open batches.
    pub async fn claim(&self, connection: &mut PgConnection, request: &ClaimRequest) -> Result<Claim, OutboxError> {
        let sql = CLAIM.replace("{event}", EVENT).replace("{claimable}", CLAIMABLE).replace("{claimed}", CLAIMED);
        let sql = sql.replace("{held}", HELD).replace("{settled}", SETTLED);
        let mut rows = sqlx::query(self.sql(&sql))
            .bind(i64::from(request.lease.partitions.len()))
            .bind(request.lease.relay_id)
            .bind(request.lease.epoch)
            .bind(request.lease.partitions.without(request.stopped).bits())
            .bind(request.after)
            .bind(&request.snapshot)
            .bind(&request.skipped)
            .bind(&request.open)
            .bind(request.hold)
            .bind(request.max_events)
            .bind(request.max_bytes)
            .bind(request.batch_size)
            .bind(request.max_payload_bytes)
            .bind(&request.stream_prefix)
            .bind(request.looks_back)
            .bind(request.kept_back.iter().map(|(aggregate_type, _)| aggregate_type.as_str()).collect::<Vec<_>>())
            .bind(request.kept_back.iter().map(|(_, aggregate_id)| aggregate_id.as_str()).collect::<Vec<_>>())
            .bind(&request.left_out)
            .bind(request.up_to)
            .fetch(connection);
        let mut answer = Answer::default();
        let begun = Instant::now();
        while let Some(row) = rows.try_next().await.map_err(self.error("claiming events"))? {
            answer.take_in(&row, &request.stream_prefix, begun).map_err(self.error("reading claimed events"))?;
        }
        Ok(answer.into_claim(request.max_events))
    }
}

/// The rows of an answer, as they come.
#[derive(Default)]
struct Answer {
    claim: Claim,
    /// Where each batch is, by its aggregate type and the number that its events have.
    batches: HashMap<String, HashMap<i64, usize>>,
    looked_at: i64,
    /// Of these, how many might have been claimed but for the bounds.
    claimable: i64,
    last_looked_at: Option<i64>,
    /// The first unsent `seq` behind the bound.
    beyond: Option<i64>,
    claimed: i64,
}

impl Answer {
    fn take_in(&mut self, row: &PgRow, stream_prefix: &str, begun: Instant) -> Result<(), sqlx::Error> {
        match row.try_get(column::KIND)? {
            "H" => {
                self.claim.held = row.try_get(column::HELD)?;
                self.claim.snapshot = row.try_get(column::SNAPSHOT)?;
                self.looked_at = row.try_get(column::LOOKED_AT)?;
                self.claimable = row.try_get::<Option<i64>, _>(column::N)?.unwrap_or(0);
                self.last_looked_at = row.try_get(column::SEQ)?;
                let beyond: Option<&str> = row.try_get(column::PAYLOAD)?;
                self.beyond = beyond.and_then(|seq| seq.parse().ok());
            }
            "B" => {
                let batch = batch_of(row, stream_prefix, begun)?;
                let chunks = self.batches.entry(batch.aggregate_type.clone()).or_default();
                chunks.entry(row.try_get(column::N)?).or_insert(self.claim.batches.len());
                self.claim.batches.push(batch);
            }
            "E" => {
                let (number, of): (i64, _) = (row.try_get(column::N)?, readable_type(row)?);
                // PostgreSQL answers a UNION ALL branch by branch, so an event comes after its batch.
                let at = self.batches.get(&of).and_then(|chunks| chunks.get(&number)).ok_or(sqlx::Error::RowNotFound)?;
                let batch = self.claim.batches.get_mut(*at).ok_or(sqlx::Error::RowNotFound)?;
                batch.events.push(event_of(row)?);
                self.claimed += 1;
            }
            "W" => self.claim.waiting += 1,
            _ => self.claim.skipped.push(row.try_get(column::SEQ)?),
        }
        Ok(())
    }

    fn into_claim(self, max_events: i64) -> Claim {
        let mut claim = self.claim;
        claim.batches.iter_mut().for_each(|batch| batch.events.sort_unstable_by_key(|event| event.seq));
        claim.batches.sort_unstable_by_key(|batch| batch.events.first().map(|event| event.seq));
        claim.skipped.sort_unstable();
        claim.cut_at = if self.claimable > self.claimed {
            claim.last_seq()
        } else {
            let cut = self.last_looked_at.filter(|_| self.looked_at >= max_events);
            cut.or(self.beyond.map(|next| next - 1))
        };
        claim
    }
}

/// The columns of the answer, by position: looking them up by name for each row would take as long as reading them.
mod column {
    pub const KIND: usize = 0;
    pub const HELD: usize = 1;
    pub const SNAPSHOT: usize = 2;
    pub const LOOKED_AT: usize = 3;
    /// Of an event, in place of `LOOKED_AT`.
    pub const PARTITION: usize = 3;
    pub const N: usize = 4;
    /// Of a batch, its age in microseconds.
    pub const SEQ: usize = 5;
    pub const ID: usize = 6;
    pub const EVENT_TYPE: usize = 7;
    pub const AGGREGATE_TYPE: usize = 8;
    pub const AGGREGATE_ID: usize = 9;
    pub const OCCURRED_AT: usize = 10;
    pub const RETRY_COUNT: usize = 11;
    pub const PAYLOAD_BYTES: usize = 12;
    pub const WAS_WAITING: usize = 13;
    pub const PAYLOAD: usize = 14;
    pub const HEADERS: usize = 15;
}

fn batch_of(row: &PgRow, stream_prefix: &str, claimed: Instant) -> Result<Batch, sqlx::Error> {
    let aggregate_type = readable_type(row)?;
    let stream = format!("{stream_prefix}{aggregate_type}");
    // `created_at` may be set by whoever inserts, and be in the future.
    let age = Duration::from_micros(u64::try_from(row.try_get::<i64, _>(column::SEQ)?).unwrap_or(0));
    Ok(Batch { id: row.try_get(column::ID)?, stream, aggregate_type, events: Vec::new(), age, claimed })
}

/// The batch of a type that is not UTF-8 is settled and never sent.
fn readable_type(row: &PgRow) -> Result<String, sqlx::Error> {
    Ok(text(row, column::AGGREGATE_TYPE)?.map_or_else(String::new, |text| text.unwrap_or_else(|lossy| lossy)))
}

fn event_of(row: &PgRow) -> Result<OutboxEvent, sqlx::Error> {
    let mut unreadable = Vec::new();
    let mut read = |column: usize, name: &'static str| {
        Ok::<_, sqlx::Error>(text(row, column)?.map(|text| {
            text.unwrap_or_else(|lossy| {
                unreadable.push(name);
                lossy
            })
        }))
    };
    read(column::AGGREGATE_TYPE, "aggregate_type")?;
    let event_type = read(column::EVENT_TYPE, "event_type")?.unwrap_or_default();
    let aggregate_id = read(column::AGGREGATE_ID, "aggregate_id")?.unwrap_or_default();
    let payload = read(column::PAYLOAD, "payload")?;
    let headers = read(column::HEADERS, "headers")?.unwrap_or_default();
    Ok(OutboxEvent {
        seq: row.try_get(column::SEQ)?,
        id: row.try_get(column::ID)?,
        event_type,
        aggregate_id,
        partition: row.try_get(column::PARTITION)?,
        occurred_at: row.try_get(column::OCCURRED_AT)?,
        payload: payload.filter(|_| unreadable.is_empty()),
        headers,
        bytes: i64::from(row.try_get::<i32, _>(column::PAYLOAD_BYTES)?),
        retry_count: row.try_get(column::RETRY_COUNT)?,
        unreadable,
        was_waiting: row.try_get(column::WAS_WAITING)?,
    })
}
