//! The relay's statements on a populated table of either form: the index that each is made for is used, and the table is never
//! read in full. Partitions and their indexes go by the names of the table and its indexes; indexes without entries, as those of
//! coming days, may be read in any way.
//!
//! The statements are captured as they run: sqlx prepares each under a name on its session, and `EXPLAIN EXECUTE` on the same
//! session shows both plans that PostgreSQL may choose, the generic one and the one for the values.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream::outbox::{
    self, AfterPublishing, ClaimRequest, Heartbeat, JournalBatch, Lease, Partitions, Refusal, Settlement,
};
use commitstream_sandbox::{Sandbox, TestDatabase};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::support::{FUNCTIONS, Form, World};

pub const TABLE: &str = "event_outbox";
pub const PENDING: &str = "idx_outbox_pending_for_processing";
const TXID: &str = "idx_outbox_txid";
pub const WAITING: &str = "idx_outbox_waiting";
pub const FAILED_AGGREGATE: &str = "idx_outbox_failed_aggregate";
pub const FAILED: &str = "idx_outbox_failed";
pub const PUBLISHED: &str = "idx_outbox_published";
pub const KEY: &str = "event_outbox_pkey";
const INBOX: &str = "event_inbox";

/// 50,000 published rows of the last month, and an inbox of 50,000 rows. Autovacuum is off, so that the test decides what the
/// statistics say.
const SENT: &str = "
DO $$ DECLARE leaf regclass; BEGIN
    FOR leaf IN SELECT oid FROM pg_class
                WHERE relkind = 'r' AND (relname LIKE 'event_outbox%' OR relname IN ('outbox_batch', 'event_inbox')) LOOP
        EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off)', leaf);
    END LOOP;
END $$;
INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload, status, published_at)
SELECT outbox_test_id(-n / 1440, n), 'E', 'user', (n % 500)::text, jsonb_build_object('n', n),
       'PUBLISHED', now() - n * interval '1 minute'
FROM generate_series(1, 50000) n;
INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids, settled_at, appended)
SELECT gen_random_uuid(), gen_random_uuid(), 'events:user', array_agg(id), now(), count(*)
FROM event_outbox WHERE status = 'PUBLISHED' GROUP BY seq / 50;
INSERT INTO event_inbox (consumer, event_id, handled_at)
SELECT 'mailer', gen_random_uuid(), now() - n * interval '1 minute' FROM generate_series(1, 50000) n;";

/// 2,000 rows, most of them pending, of which some wait, and 28 failed.
const UNSENT: &str = "
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, retry_count, next_retry_at)
SELECT 'E', 'user', (n % 500)::text, jsonb_build_object('n', n), CASE WHEN n % 70 = 0 THEN 'FAILED' ELSE 'PENDING' END,
       CASE WHEN n % 50 = 0 THEN 1 ELSE 0 END,
       CASE WHEN n % 50 = 0 THEN now() + interval '1 minute' * (n % 3 - 1) END
FROM generate_series(50001, 52000) n;";

const ANALYZE: &str = "VACUUM ANALYZE event_outbox, outbox_batch, outbox_lease, outbox_relay, event_inbox;";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Statistics {
    None,
    /// Of a table in which everything was sent, as it is most of the time.
    Idle,
    Current,
}

pub const CASES: [(Form, Statistics); 6] = [
    (Form::Whole, Statistics::None),
    (Form::Whole, Statistics::Idle),
    (Form::Whole, Statistics::Current),
    (Form::ByDay, Statistics::None),
    (Form::ByDay, Statistics::Idle),
    (Form::ByDay, Statistics::Current),
];

/// A session of the relay's kind on a populated table.
pub async fn populated(case: (Form, Statistics)) -> Result<(World, PgConnection)> {
    println!("{case:?}");
    let sandbox = Sandbox::shared();
    let world = World::on(filled(case).await?, &sandbox.redis_url(), sandbox.key_prefix()?)?;
    let connection = outbox::connect(world.database.url(), "explain", Duration::from_secs(10)).await?;
    Ok((world, connection))
}

/// A copy of the database of this case, which the first test that wants one fills for all.
async fn filled(case: (Form, Statistics)) -> Result<TestDatabase> {
    static FILLED: Mutex<BTreeMap<(Form, Statistics), TestDatabase>> = Mutex::const_new(BTreeMap::new());
    let mut filled = FILLED.lock().await;
    if let Some(database) = filled.get(&case) {
        return Ok(database.copy()?);
    }
    let (form, statistics) = case;
    let database = World::of(form).await?.database;
    if form == Form::Whole {
        database.psql(FUNCTIONS)?;
    }
    let statements = match statistics {
        Statistics::None => vec![SENT, UNSENT],
        Statistics::Idle => vec![SENT, ANALYZE, UNSENT],
        Statistics::Current => vec![SENT, UNSENT, ANALYZE],
    };
    database.psql(&statements.join("\n"))?;
    Ok(filled.entry(case).or_insert(database).copy()?)
}

/// One read of a table in a plan.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scan {
    table: String,
    node: String,
    index: String,
    /// What the index is searched by; empty when it is read in full.
    condition: String,
}

/// The reads in both plans of the prepared statement that contains `part`, with these values.
pub async fn plans(connection: &mut PgConnection, part: &str, values: &str) -> Result<Vec<(&'static str, BTreeSet<Scan>)>> {
    let find = "SELECT name FROM pg_prepared_statements WHERE position($1 IN statement) > 0";
    let names: Vec<String> = sqlx::query_scalar(find).bind(part).fetch_all(&mut *connection).await?;
    ensure!(names.len() == 1, "statements with {part:?}: {names:?}");
    let parents =
        "SELECT c.relname::text, CASE WHEN c.relkind = 'r' OR pg_relation_size(c.oid) > 8192 THEN p.relname::text ELSE '' END
                   FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent";
    let parents: HashMap<String, String> = sqlx::query_as(parents).fetch_all(&mut *connection).await?.into_iter().collect();
    let call = if values.is_empty() { names[0].clone() } else { format!("{}({values})", names[0]) };
    let mut plans = Vec::new();
    for mode in ["force_generic_plan", "force_custom_plan"] {
        let explain = format!("SET plan_cache_mode = {mode}; EXPLAIN (FORMAT JSON) EXECUTE {call}; RESET plan_cache_mode");
        let rows = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_all(&mut *connection).await?;
        let plan: Value = sqlx::Row::try_get(rows.first().context("a plan")?, 0)?;
        let mut scans = BTreeSet::new();
        collect(&plan, &parents, &mut scans);
        plans.push((mode, scans));
    }
    Ok(plans)
}

fn collect(plan: &Value, parents: &HashMap<String, String>, scans: &mut BTreeSet<Scan>) {
    match plan {
        Value::Array(parts) => parts.iter().for_each(|part| collect(part, parents, scans)),
        Value::Object(node) => {
            let text = |name: &str| node.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let whole = |name: String| parents.get(&name).cloned().unwrap_or(name);
            let is_empty = parents.get(&text("Index Name")).is_some_and(String::is_empty);
            if text("Node Type").contains("Scan") && !text("Relation Name").is_empty() && !is_empty {
                scans.insert(Scan {
                    table: whole(text("Relation Name")),
                    node: text("Node Type"),
                    index: whole(text("Index Name")),
                    condition: text("Index Cond"),
                });
            }
            node.values().for_each(|part| collect(part, parents, scans));
        }
        _ => {}
    }
}

fn is_by(scan: &Scan, (index, column): (&str, &str)) -> bool {
    scan.index == index
        && scan.node.starts_with("Index")
        && scan.condition.contains(column)
        && scan.condition.is_empty() == column.is_empty()
}

/// Every read of `table`, in each plan, is by one of these indexes, searched by the named column, or read in full where that is
/// empty.
#[track_caller]
pub fn assert_only_indexes(plans: &[(&str, BTreeSet<Scan>)], table: &str, expected: &[(&str, &str)]) {
    for (mode, scans) in plans {
        let stray: Vec<_> = scans.iter().filter(|s| s.table == table && !expected.iter().any(|e| is_by(s, *e))).collect();
        assert!(stray.is_empty(), "{mode}: expected {expected:?}, but {table} is read by {stray:#?}");
    }
}

/// The same, and each of the indexes is used.
#[track_caller]
pub fn assert_indexes(plans: &[(&str, BTreeSet<Scan>)], table: &str, expected: &[(&str, &str)]) {
    assert_only_indexes(plans, table, expected);
    for (mode, scans) in plans {
        let unused: Vec<_> = expected.iter().filter(|e| !scans.iter().any(|s| s.table == table && is_by(s, **e))).collect();
        assert!(unused.is_empty(), "{mode}: {unused:?} of {table} is not used: {scans:#?}");
    }
}

/// A claim in batches, from some place on, by a relay that has just taken every partition.
async fn request(world: &World, connection: &mut PgConnection, after: i64) -> Result<ClaimRequest> {
    let everything = world.everything(connection, Uuid::now_v7()).await?;
    Ok(ClaimRequest { after, max_events: 1_000, max_bytes: 8 << 20, batch_size: 100, ..everything })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_claim_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let mut claim = request(&world, &mut connection, 50_500).await?;
        let claimed = world.outbox.claim(&mut connection, &claim).await?;
        let events: usize = claimed.batches.iter().map(|batch| batch.events.len()).sum();
        assert!(events > 500, "the statement did its work: {events}");
        claim.open.extend(claimed.batches.first().map(|batch| batch.id));
        claim.snapshot = claimed.snapshot;
        world.outbox.claim(&mut connection, &claim).await?;

        let open = claim.open.iter().map(Uuid::to_string).collect::<Vec<_>>().join(",");
        let Lease { relay_id, epoch, .. } = claim.lease;
        let with = |place: &str, open: &str, hold: bool, back: bool, rest: &str| {
            format!(
                "64, '{relay_id}', {epoch}, -1, {place}, '{{{open}}}', {hold}, 1000, 8388608, 100, 1048576, 'events:', {back}, '{{}}', '{{}}', {rest}"
            )
        };
        let of = |place: &str, open: &str, hold: bool, back: bool| with(place, open, hold, back, "'{}', 9223372036854775807");
        let without = "'{user,bulk}', 100500";
        for (what, hold, values) in [
            ("without stuck streams", false, with("50500, '700:720:705,710', '{}'", &open, false, true, without)),
            ("cursor", false, of("50500, '700:720:705,710', '{}'", &open, false, false)),
            ("cursor with events passed over", false, of("50500, '700:720:705,710', '{50100,50200}'", &open, false, true)),
            ("at the end, failed events hold", true, of("9223372036854775807, '700:700:', '{}'", &open, true, false)),
            ("sweep", false, of("0, NULL, '{}'", &open, false, true)),
        ] {
            println!("{what}");
            let plans = plans(&mut connection, "candidates AS MATERIALIZED", &values).await?;
            let by_aggregate = [(WAITING, "aggregate_id = "), (FAILED_AGGREGATE, "aggregate_id = ")];
            let expected = [(PENDING, "seq > "), (PENDING, "seq = ANY"), (TXID, "txid >= "), (KEY, "id = ANY")];
            let allowed: Vec<_> = expected.into_iter().chain(by_aggregate).collect();
            assert_only_indexes(&plans, TABLE, &allowed);
            // The plan for the values leaves out what the values exclude; the generic one has everything.
            assert_indexes(&plans[..1], TABLE, &allowed);
            assert_eq!(hold, plans[1].1.iter().any(|scan| scan.index == FAILED_AGGREGATE), "{what}");
            assert_indexes(&plans, "outbox_batch", &[("outbox_batch_pkey", "batch_id = ANY")]);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_settle_goes_by_index() -> Result<()> {
    use AfterPublishing::{Delete, Keep};
    for (case, after) in CASES.into_iter().flat_map(|case| [(case, Keep), (case, Delete)]) {
        let (world, mut connection) = populated(case).await?;
        let claim = request(&world, &mut connection, 0).await?;
        let claimed = world.outbox.claim(&mut connection, &claim).await?.batches;
        let first = claimed.first().context("a claimed batch")?;
        let batch_id = first.id;
        let settlement = Settlement { batch_id, appended: 3, last_entry: Some("1-2".into()), refusals: Vec::new() };
        assert_eq!(world.outbox.settle(&mut connection, std::slice::from_ref(&settlement), after).await?, 1);
        assert_eq!(world.outbox.settle(&mut connection, &[settlement], after).await?, 0);

        let many: Vec<_> = claimed.iter().map(|batch| batch.id.to_string()).collect();
        let counts = vec!["100"; many.len()].join(",");
        let entries = vec!["1-2"; many.len()].join(",");
        let batches = many.join(",");
        let event = first.events[0].id;
        for values in [
            format!("'{{{batch_id}}}', '{{3}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{NULL}}'"),
            format!("'{{{batches}}}', '{{{counts}}}', '{{{batch_id}}}', '{{{event}}}', '{{why}}', '{{1000}}', '{{{entries}}}'"),
        ] {
            let plans = plans(&mut connection, "WITH settled AS", &values).await?;
            assert_indexes(&plans, TABLE, &[(KEY, "id = ANY")]);
            assert!(plans.iter().all(|(_, scans)| scans.iter().all(|s| s.node.starts_with("Index"))), "{plans:#?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_settle_row_by_row_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        world.database.psql(
            "CREATE FUNCTION object() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
             CREATE TRIGGER object BEFORE UPDATE ON event_outbox FOR EACH ROW WHEN (OLD.aggregate_id = '7') EXECUTE FUNCTION object();",
        )?;
        let claim = request(&world, &mut connection, 0).await?;
        let claimed = world.outbox.claim(&mut connection, &claim).await?.batches;
        let first = claimed.iter().find(|batch| batch.events.iter().any(|event| event.aggregate_id == "7"));
        let first = first.context("a batch of that aggregate")?;
        let last = first.events.last().context("an event")?.id;
        let refusals = vec![Refusal { event_id: last, error: "why".into(), retry_after: None }];
        let appended = i32::try_from(first.events.len())? - 1;
        let settlement = Settlement { batch_id: first.id, appended, last_entry: None, refusals };
        let settled = world.outbox.settle_rows(&mut connection, &settlement).await?;
        let stuck = settled.stuck.context("a stuck row")?;
        assert!(world.outbox.settle_stuck(&mut connection, stuck.batch_id).await?.is_some());
        let id = first.events[0].id;
        let rows = format!("'{{{id}}}', '{id}', '{id}'");
        for (part, values) in [
            ("'PUBLISHED', published_at = clock_timestamp(), next_retry_at = NULL WHERE", rows.as_str()),
            ("SELECT id, aggregate_type, aggregate_id, partition_no FROM", rows.as_str()),
            ("SET status = CASE WHEN $3::bigint IS NULL", &format!("'{id}', 'why', 1000")),
        ] {
            assert_indexes(&plans(&mut connection, part, values).await?, TABLE, &[(KEY, "id = ")]);
        }
        for (part, values) in [
            ("appended IS NULL\nRETURNING", format!("'{id}', 1, NULL")),
            ("appended IS NOT NULL FOR NO KEY UPDATE", format!("'{id}'")),
            ("cardinality($2::uuid[])", format!("'{id}', '{{{id}}}', 1")),
        ] {
            assert_indexes(
                &plans(&mut connection, part, &values).await?,
                "outbox_batch",
                &[("outbox_batch_pkey", "batch_id = ")],
            );
        }
    }
    Ok(())
}

/// Entries of settled batches stay in the index of open ones for as long as any long transaction holds vacuum back, so whatever
/// reads that index in full gets slower with each batch.
#[tokio::test(flavor = "multi_thread")]
async fn the_settle_finds_its_batches_by_key() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let settlement = Settlement { batch_id: Uuid::nil(), appended: 1, last_entry: None, refusals: Vec::new() };
        world.outbox.settle(&mut connection, &[settlement], AfterPublishing::Keep).await?;
        let values = format!("'{{{}}}', '{{1}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{NULL}}'", Uuid::nil());
        let plans = plans(&mut connection, "WITH settled AS", &values).await?;
        assert_indexes(&plans, "outbox_batch", &[("outbox_batch_pkey", "batch_id = ANY")]);
    }
    Ok(())
}

/// A relay that starts with the first event keeps the plans it makes then, which are generic ones, until the statistics are read anew.
/// To them an empty table read in full is as good as one that is searched.
#[tokio::test(flavor = "multi_thread")]
async fn plans_made_for_an_empty_outbox_search_it_all_the_same() -> Result<()> {
    for statistics in ["", ANALYZE] {
        let world = World::of(Form::Whole).await?;
        world.database.psql(statistics)?;
        let mut connection = outbox::connect(world.database.url(), "explain", Duration::from_secs(10)).await?;
        let claim = request(&world, &mut connection, 0).await?;
        assert!(world.outbox.claim(&mut connection, &claim).await?.batches.is_empty());
        let settlement = Settlement { batch_id: Uuid::nil(), appended: 1, last_entry: None, refusals: Vec::new() };
        world.outbox.settle(&mut connection, &[settlement], AfterPublishing::Keep).await?;
        for (part, parameters) in [("candidates AS MATERIALIZED", 19), ("WITH settled AS", 7)] {
            let plans = plans(&mut connection, part, &vec!["NULL"; parameters].join(", ")).await?;
            let (mode, scans) = &plans[0];
            let grows = |scan: &&Scan| scan.table == TABLE || scan.table == "outbox_batch";
            let whole: Vec<_> = scans.iter().filter(grows).filter(|scan| scan.condition.is_empty()).collect();
            assert!(whole.is_empty(), "{mode} of {part:?} reads {whole:#?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_statistics_and_the_list_of_failed_events_go_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let stats = world.outbox.stats(&mut connection).await?;
        assert_eq!((stats.pending, stats.published, stats.failed), (1_972, 50_000, 28));
        let plan = plans(&mut connection, "unsent AS", "").await?;
        // Counting the published rows may read their index in full, but not the table.
        let whole = [PENDING, TXID, PUBLISHED, FAILED, FAILED_AGGREGATE].map(|index| (index, ""));
        assert_only_indexes(&plan, TABLE, &whole);
        assert_indexes(&plan, "outbox_batch", &[("idx_outbox_batch_open", "")]);

        let listed = plans(&mut connection, "ORDER BY created_at DESC LIMIT", "NULL, NULL, 10").await?;
        assert_indexes(&listed, TABLE, &[(FAILED, "")]);
        let listed = plans(&mut connection, "ORDER BY created_at DESC LIMIT", "NULL, 'E', 10").await?;
        assert_indexes(&listed, TABLE, &[(FAILED, "")]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clean_up_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let days = |days: u64| Duration::from_secs(days * 86_400);
        assert_eq!(world.outbox.delete_published(&mut connection, days(34), 100).await?, 100);
        assert_eq!(world.outbox.delete_settled(&mut connection, days(1), 100).await?, 0);
        for values in ["604800.0, 1000", "3.0e6, 1", "0.0, 100000"] {
            let events = plans(&mut connection, "DELETE FROM \"public\".event_outbox", values).await?;
            assert_indexes(&events, TABLE, &[(PUBLISHED, "published_at < "), (KEY, "id = ANY")]);
            let batches = plans(&mut connection, "DELETE FROM \"public\".outbox_batch", values).await?;
            assert_indexes(
                &batches,
                "outbox_batch",
                &[("idx_outbox_batch_settled", "settled_at < "), ("outbox_batch_pkey", "batch_id = ANY")],
            );
        }
    }
    Ok(())
}

/// Before a day is dropped, and again while everybody waits for it, what outlives it is looked for.
#[tokio::test(flavor = "multi_thread")]
async fn what_outlives_a_day_is_found_by_index() -> Result<()> {
    for case in CASES.into_iter().filter(|(form, _)| *form == Form::ByDay) {
        let (world, mut connection) = populated(case).await?;
        let overdue = world.outbox.overdue(&mut connection, Duration::from_secs(7 * 86_400)).await?;
        assert_eq!(overdue.len(), 3);
        let part = format!("(SELECT FROM public.{} WHERE status IN", overdue[1].name);
        let plans = plans(&mut connection, &part, "604800.0, 10001").await?;
        let published = [(PUBLISHED, "published_at IS NULL"), (PUBLISHED, "published_at >= ")];
        assert_indexes(&plans, TABLE, &published);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        assert!(world.outbox.remember(&mut connection, "mailer", Uuid::now_v7()).await?);
        assert_eq!(world.outbox.forget(&mut connection, Duration::from_secs(34 * 86_400), 100).await?, 100);
        let id = Uuid::nil();
        let remember = plans(&mut connection, "INSERT INTO \"public\".event_inbox", &format!("'mailer', '{id}'")).await?;
        assert_indexes(&remember, INBOX, &[]);
        for values in ["2592000.0, 1000", "3.0e6, 1", "0.0, 100000"] {
            let forget = plans(&mut connection, "DELETE FROM \"public\".event_inbox", values).await?;
            for (mode, scans) in forget {
                let (place, by_index): (Vec<_>, Vec<_>) = scans.into_iter().partition(|scan| scan.node == "Tid Scan");
                assert_eq!(place.len(), 1, "{mode}: {by_index:#?}");
                assert_indexes(&[(mode, by_index.into_iter().collect())], INBOX, &[("idx_inbox_handled", "handled_at < ")]);
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_and_leases_go_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let lease = request(&world, &mut connection, 0).await?.lease;
        world.outbox.beat(&mut connection, &heartbeat(lease.relay_id)).await?;
        assert!(world.outbox.open_batches(&mut connection, Partitions::ALL).await?.is_empty());
        let open = plans(&mut connection, "cardinality(event_ids)::bigint", "-1").await?;
        assert_indexes(&open, "outbox_batch", &[("idx_outbox_batch_open", "")]);
        for (part, values) in [
            ("WITH free AS", format!("'{}', '{{1}}', '{{NULL}}'", lease.relay_id)),
            ("WITH beat AS", format!("'{}', 'h', 1, 'v', 10000, true, 's', NULL, 1, 2, 3, 4, 'event_outbox'", lease.relay_id)),
        ] {
            let statement = plans(&mut connection, part, &values).await?;
            assert_indexes(&statement, TABLE, &[]);
            assert_indexes(&statement, "outbox_batch", &[]);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_comparison_of_sequences_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let all = world.outbox.sequences(&mut connection).await?;
        let highest: Vec<_> = all.iter().map(|facts| (facts.column.as_str(), facts.highest)).collect();
        assert_eq!(highest, [("event_outbox.seq", 52_000), ("outbox_batch.batch_no", 1_001), ("outbox_audit.audit_id", 0)]);
        assert!(all.iter().all(|facts| facts.next == Some(facts.highest + 1) && !facts.is_behind()), "{all:?}");
        let events = plans(&mut connection, "SELECT max(seq)", "").await?;
        assert_indexes(&events, TABLE, &[(PENDING, ""), (PUBLISHED, ""), (FAILED, ""), (KEY, "")]);
        let batches = plans(&mut connection, "SELECT max(batch_no)", "").await?;
        assert_indexes(&batches, "outbox_batch", &[("idx_outbox_batch_open", ""), ("idx_outbox_batch_settled", "")]);
    }
    Ok(())
}

/// What a daemon reads every few seconds.
#[tokio::test(flavor = "multi_thread")]
async fn the_backlog_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let backlog = world.outbox.backlog(&mut connection, Uuid::nil()).await?;
        assert_eq!((backlog.events, backlog.failed, backlog.open_batches), (1_972, 28, 0));
        assert!(backlog.oldest.is_some() && backlog.oldest_due.is_none(), "{backlog:?}");
        let plans = plans(&mut connection, "own AS MATERIALIZED", &format!("100000, '{}'", Uuid::nil())).await?;
        assert_indexes(&plans, TABLE, &[(PENDING, ""), (FAILED, "")]);
        assert_indexes(&plans, "outbox_batch", &[("idx_outbox_batch_open", "")]);
    }
    Ok(())
}

/// The look-up after a failover of Redis.
#[tokio::test(flavor = "multi_thread")]
async fn the_look_up_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let window = Duration::from_secs(150);
        let last = world.outbox.last_batches(&mut connection, Partitions::ALL, window).await?;
        assert_eq!(last.len(), 1_001, "one relay for each batch");
        let than = JournalBatch { batch_no: 10_000, ..last[0].clone() };
        assert_eq!(world.outbox.batches_before(&mut connection, &than, Partitions::ALL, window, 10).await?.len(), 1);
        let requeued = world.outbox.requeue_lost(&mut connection, &[than.batch_id], Partitions::ALL).await?;
        assert!(requeued.unsent > 0 && requeued.gone == 0, "{requeued:?}");
        let requeued = world.outbox.requeue_lost(&mut connection, &[than.batch_id], Partitions::ALL).await?;
        assert_eq!((requeued.unsent, requeued.gone), (0, 0), "once only");

        let before = format!("-1, 150000, '{}', 0, 'events:user', 100, 500", than.relay_id);
        for (part, values) in [("SELECT DISTINCT ON", "-1, 150000".to_owned()), ("AND batch_no <", before)] {
            let read = plans(&mut connection, part, &values).await?;
            assert_indexes(&read, "outbox_batch", &[("idx_outbox_batch_settled", "settled_at > ")]);
            assert_indexes(&read, TABLE, &[]);
        }
        let requeue = plans(&mut connection, "WITH found AS", &format!("'{{{}}}', -1", than.batch_id)).await?;
        let by_key =
            [("outbox_batch_pkey", "batch_id = ANY"), ("outbox_batch_pkey", "batch_id = found."), ("idx_outbox_batch_open", "")];
        assert_indexes(&requeue, "outbox_batch", &by_key);
        assert_only_indexes(&requeue, TABLE, &[(KEY, "id = ")]);
    }
    Ok(())
}

fn heartbeat(relay_id: Uuid) -> Heartbeat {
    Heartbeat {
        relay_id,
        host: "here".into(),
        pid: 1,
        version: "0",
        life: Duration::from_secs(10),
        shares: true,
        state: "active",
        reason: None,
        published: 0,
        failed: 0,
        republished: 0,
        events_per_second: 0.0,
    }
}
