//! What every test needs: a migrated database, a key prefix, settings for both, and an audit of the streams.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use commitstream::config::Settings;
use commitstream::outbox::{ClaimRequest, Lease, OutboxRepository, OutboxStats, Partitions};
use commitstream::publisher::HybridEventPublisher;
use commitstream::relay::{OutboxProcessor, RelayHandle, days};
use commitstream::streams::{Entry, Streams};
use commitstream_sandbox::{Sandbox, TestDatabase};
use redis::AsyncConnectionConfig;
use sqlx::{Connection, PgConnection, PgPool, Row};
use uuid::Uuid;

/// Longest that any condition is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// V3 and those after it.
pub const MIGRATIONS: [&str; 7] = [
    include_str!("../../../../migrations/V3__create_outbox_table.sql"),
    include_str!("../../../../migrations/V4__share_outbox_among_relays.sql"),
    include_str!("../../../../migrations/V5__create_event_inbox.sql"),
    include_str!("../../../../migrations/V6__keep_the_claim_on_its_indexes.sql"),
    include_str!("../../../../migrations/V7__audit_operators_and_pause_relays.sql"),
    include_str!("../../../../migrations/V8__refuse_types_that_name_dead_letters.sql"),
    include_str!("../../../../migrations/V9__hold_under_faults.sql"),
];

/// The two forms that `event_outbox` may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    Whole,
    /// Partitioned by day ten days ago.
    ByDay,
}

impl Form {
    pub const BOTH: [Self; 2] = [Self::Whole, Self::ByDay];
}

pub struct World {
    pub database: TestDatabase,
    pub settings: Settings,
    pub outbox: OutboxRepository,
    pub streams: Streams,
}

impl World {
    /// A migrated database and a prefix of their own, on the servers of the run. With COMMITSTREAM_TEST_BY_DAY set, any test runs on
    /// a table that is partitioned by day.
    pub async fn new() -> Result<Self> {
        Self::of(if std::env::var_os("COMMITSTREAM_TEST_BY_DAY").is_some() { Form::ByDay } else { Form::Whole }).await
    }

    pub async fn of(form: Form) -> Result<Self> {
        let world = Self::unmigrated()?;
        world.outbox.migrate(&mut world.connect().await?).await?;
        println!("event_outbox: {form:?}");
        if form == Form::ByDay {
            world.partition_days_ago(10).await?;
        }
        Ok(world)
    }

    /// Partitions the table as if that had been done so many days ago, and clean-up had made the partitions of each day since.
    pub async fn partition_days_ago(&self, days: i32) -> Result<()> {
        let mut connection = self.connect().await?;
        self.outbox.partition_by_day(&mut connection).await?;
        self.database.psql(FUNCTIONS)?;
        self.database.psql(&PARTITIONED_DAYS_AGO.replace("{days}", &days.to_string()))?;
        days::make_ahead(&self.outbox, &mut connection).await?;
        Ok(())
    }

    pub fn unmigrated() -> Result<Self> {
        let sandbox = Sandbox::shared();
        Self::on(sandbox.database()?, &sandbox.redis_url(), sandbox.key_prefix()?)
    }

    /// The same, with a Redis of the test's own.
    pub fn on(database: TestDatabase, redis_url: &str, prefix: String) -> Result<Self> {
        let mut settings = Settings::default();
        settings.database.url = Some(database.url().to_owned());
        settings.redis.url = Some(redis_url.to_owned());
        settings.redis.stream_prefix = prefix;
        settings.redis.connect_timeout = Duration::from_millis(500);
        let streams = Streams::new(redis_url, &settings.redis)?;
        Ok(Self { outbox: OutboxRepository::new(&settings.database.schema), database, settings, streams })
    }

    pub async fn connect(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(self.database.url()).await?)
    }

    pub fn relay(&self) -> Result<RelayHandle> {
        Ok(OutboxProcessor::new(self.settings.clone())?.start())
    }

    /// A plain connection to Redis, for what users do behind the relay's back.
    pub async fn redis(&self) -> Result<redis::aio::MultiplexedConnection> {
        let url = self.settings.redis.url.as_deref().context("the world has a Redis")?;
        // A whole stream is more than the usual half second has room for on a busy machine.
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        Ok(redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await?)
    }

    pub async fn stats(&self) -> Result<OutboxStats> {
        Ok(self.outbox.stats(&mut self.connect().await?).await?)
    }

    /// Inserts `events` rows by plain SQL, spread over `aggregates` of type `user`.
    pub async fn insert(&self, events: u32, aggregates: u32) -> Result<()> {
        let sql = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                   SELECT 'UserCreated', 'user', (n % $2)::text, jsonb_build_object('n', n) FROM generate_series(1, $1) n";
        sqlx::query(sql)
            .bind(i32::try_from(events)?)
            .bind(i32::try_from(aggregates)?)
            .execute(&mut self.connect().await?)
            .await?;
        Ok(())
    }

    pub fn publisher(&self) -> Result<HybridEventPublisher> {
        Ok(HybridEventPublisher::new(&self.settings)?)
    }

    pub async fn pool(&self) -> Result<PgPool> {
        Ok(PgPool::connect(self.database.url()).await?)
    }

    /// The events in the outbox, as `type aggregate_type/aggregate_id`, in `seq` order.
    pub async fn rows(&self) -> Result<Vec<String>> {
        let sql = "SELECT event_type || ' ' || aggregate_type || '/' || aggregate_id FROM event_outbox ORDER BY seq";
        Ok(sqlx::query_scalar(sql).fetch_all(&mut self.connect().await?).await?)
    }

    /// The entries of all streams, written in the same way, stream by stream.
    pub async fn streamed(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for stream in self.streams.list().await? {
            for entry in self.entries(&stream).await? {
                let e = entry.envelope()?;
                all.push(format!("{} {}/{}", e.event_type, e.aggregate_type, e.aggregate_id));
            }
        }
        Ok(all)
    }

    /// The fields of each entry of a stream exactly as Redis has them, in their order.
    pub async fn raw_entries(&self, aggregate_type: &str) -> Result<Vec<Vec<(String, String)>>> {
        let mut command = redis::cmd("XRANGE");
        command.arg(self.streams.stream_of(aggregate_type)).arg("-").arg("+");
        let entries: Vec<(String, Vec<(String, String)>)> = command.query_async(&mut self.redis().await?).await?;
        Ok(entries.into_iter().map(|(_, fields)| fields).collect())
    }

    /// Makes streams known that a test writes to by itself, as a publisher does.
    pub async fn note(&self, types: &[&str]) -> Result<()> {
        let mut note = redis::cmd("HSET");
        note.arg(self.streams.stream_of("{streams}"));
        for of in types {
            note.arg(of).arg("");
        }
        Ok(note.exec_async(&mut self.redis().await?).await?)
    }

    pub fn user_stream(&self) -> String {
        self.streams.stream_of("user")
    }

    /// All entries of a stream.
    pub async fn entries(&self, stream: &str) -> Result<Vec<Entry>> {
        let (mut all, mut after) = (Vec::new(), "0".to_owned());
        loop {
            let page = self.streams.range(stream, &after, 5_000).await?;
            let Some(last) = page.last() else { return Ok(all) };
            after.clone_from(&last.id);
            all.extend(page);
        }
    }

    /// A look at all that is there, by a relay that takes every partition from whoever has it.
    pub async fn everything(&self, connection: &mut PgConnection, relay_id: Uuid) -> Result<ClaimRequest> {
        Ok(ClaimRequest {
            lease: self.take_all(connection, relay_id).await?,
            after: 0,
            snapshot: None,
            skipped: Vec::new(),
            open: Vec::new(),
            stopped: Partitions::default(),
            kept_back: Vec::new(),
            looks_back: false,
            hold: false,
            max_events: 10_000,
            max_bytes: 1 << 30,
            batch_size: 10_000,
            max_payload_bytes: 1 << 20,
            stream_prefix: "events:".into(),
            left_out: Vec::new(),
            up_to: i64::MAX,
        })
    }

    /// Takes every partition from whoever has it.
    pub async fn take_all(&self, connection: &mut PgConnection, relay_id: Uuid) -> Result<Lease> {
        let owners: Vec<Option<Uuid>> =
            sqlx::query_scalar("SELECT relay_id FROM outbox_lease ORDER BY partition_no").fetch_all(&mut *connection).await?;
        let wanted: Vec<_> = owners.into_iter().enumerate().collect();
        let lease = self.outbox.take_partitions(connection, relay_id, &wanted).await?;
        ensure!(lease.partitions == Partitions::ALL, "{lease:?}");
        Ok(lease)
    }

    /// Waits until no event is left to be sent.
    pub async fn drained(&self) -> Result<()> {
        let mut connection = self.connect().await?;
        let unsent = "SELECT count(*) FROM event_outbox WHERE status IN ('PENDING', 'PROCESSING')";
        eventually("the outbox to be drained", async || {
            let left: i64 = sqlx::query_scalar(unsent).fetch_one(&mut connection).await?;
            Ok(left == 0)
        })
        .await
    }

    /// Every published row stands in its stream exactly once, nothing else does, and each aggregate's entries are in `seq`
    /// order. Returns how many there are.
    pub async fn audit(&self) -> Result<usize> {
        let rows = sqlx::query("SELECT id::text AS id, seq, aggregate_type, aggregate_id, status FROM event_outbox ORDER BY seq")
            .fetch_all(&mut self.connect().await?)
            .await?;
        let mut seq_of = HashMap::new();
        let mut expected = HashSet::new();
        for row in &rows {
            let id: String = row.try_get("id")?;
            seq_of.insert(id.clone(), row.try_get::<i64, _>("seq")?);
            if row.try_get::<&str, _>("status")? == "PUBLISHED" {
                expected.insert(id);
            }
        }
        let mut seen = HashSet::new();
        let mut last: BTreeMap<(String, String), i64> = BTreeMap::new();
        for stream in self.streams.list().await? {
            for entry in self.entries(&stream).await? {
                let id = entry.field("id").context("entry without id")?.to_owned();
                let seq = *seq_of.get(&id).with_context(|| format!("{id} in {stream} is not in the outbox"))?;
                ensure!(seen.insert(id.clone()), "{id} stands twice in {stream}");
                let aggregate = (stream.clone(), entry.field("aggregate_id").unwrap_or_default().to_owned());
                let before = last.insert(aggregate.clone(), seq);
                ensure!(before.is_none_or(|before| before < seq), "{aggregate:?}: {seq} after {before:?}");
            }
        }
        let lost: Vec<_> = expected.difference(&seen).take(5).collect();
        ensure!(lost.is_empty(), "published but not in a stream: {lost:?}");
        let invented: Vec<_> = seen.difference(&expected).take(5).collect();
        ensure!(invented.is_empty(), "in a stream but not published: {invented:?}");
        Ok(seen.len())
    }
}

/// `outbox_test_id(day, n)` is the `n`th id of the day so many days from now, `outbox_test_name` its partition.
pub const FUNCTIONS: &str = "
CREATE FUNCTION outbox_test_id(day int, n bigint DEFAULT 0) RETURNS uuid LANGUAGE sql AS $$
    SELECT (lpad(to_hex((extract(epoch FROM (now() AT TIME ZONE 'UTC')::date + day) * 1000)::bigint), 12, '0')
            || '70008' || lpad(to_hex(n), 15, '0'))::uuid
$$;
CREATE FUNCTION outbox_test_name(day int) RETURNS text LANGUAGE sql AS $$
    SELECT to_char((now() AT TIME ZONE 'UTC')::date + day, '\"event_outbox_p\"YYYYMMDD')
$$;";

/// The first partition is made one of the past, and followed by those of the days up to today.
const PARTITIONED_DAYS_AGO: &str = "
DO $$
DECLARE
    first text := (SELECT inhrelid::regclass FROM pg_inherits JOIN pg_class ON oid = inhrelid
                   WHERE inhparent = 'event_outbox'::regclass AND pg_get_expr(relpartbound, oid) LIKE '%MINVALUE%');
BEGIN
    IF first <> outbox_test_name(-{days}) THEN
        EXECUTE format('ALTER TABLE event_outbox DETACH PARTITION %s', first);
        EXECUTE format('ALTER TABLE %s RENAME TO %s', first, outbox_test_name(-{days}));
        EXECUTE format('ALTER TABLE event_outbox ATTACH PARTITION %s FOR VALUES FROM (MINVALUE) TO (%L)',
                       outbox_test_name(-{days}), outbox_test_id(-{days} + 1));
        FOR day IN -{days} + 1 .. 0 LOOP
            EXECUTE format('CREATE TABLE %s PARTITION OF event_outbox FOR VALUES FROM (%L) TO (%L)',
                           outbox_test_name(day), outbox_test_id(day), outbox_test_id(day + 1));
        END LOOP;
    END IF;
END $$;";

/// Waits until `condition` holds, and says what was waited for when it does not come.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition().await? {
        if tokio::time::Instant::now() > deadline {
            bail!("waited {PATIENCE:?} for {what}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Waits until a statement that contains `part` waits for a lock.
pub async fn eventually_waits(connection: &mut PgConnection, part: &str) -> Result<()> {
    let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
               AND wait_event_type = 'Lock' AND position($1 IN query) > 0)";
    eventually(part, async || Ok(sqlx::query_scalar(sql).bind(part).fetch_one(&mut *connection).await?)).await
}
