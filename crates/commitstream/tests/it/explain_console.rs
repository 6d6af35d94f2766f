//! What the console asks PostgreSQL, each statement as it runs, on a table of either form with many rows of each status: a page reads so
//! many rows as it shows or says that it looks at, sorts no more, and reads no large table in full.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream::outbox::{self, Deed, EventSearch, EventStatus, FailureFilter, FailurePlace, Remedy};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use crate::explain::{CASES, Statistics, TABLE, populated};
use crate::support::World;

const BATCHES: &str = "outbox_batch";
const AUDIT: &str = "outbox_audit";

/// What a page may look at: waiting events, events that are counted, those of a search or of failures.
const WAITING: u64 = 10_000;
const COUNTED: u64 = 10_000;
const LOOKED_AT: u64 = 20_000;
/// An incremental sort takes 32 rows at once, and each partition has a row at hand for each part of a statement.
const AT_HAND: u64 = 64;
/// Failed events of one step of a deed.
const STEP: u64 = 1_000;
/// Batches that are open, and their events.
const OPEN: u64 = 11;
const IN_FLIGHT: u64 = 500;

/// More of each kind than a page looks at: 30,000 that wait, of which 15,000 were refused or are behind such a one, and 30,000 that
/// failed. Batches that are open, and deeds of operators.
const CROWD: &str = "
ALTER TABLE outbox_audit SET (autovacuum_enabled = off);
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, next_retry_at, retry_count)
SELECT 'E' || n % 10, 'user', (n % 5000)::text, jsonb_build_object('n', n), CASE WHEN n % 2 = 0 THEN now() + interval '1 hour' END, 1
FROM generate_series(1, 30000) n;
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
SELECT 'E' || n % 10, 'user', (n % 5000)::text, jsonb_build_object('n', n), 'FAILED', 'refused for the ' || n || 'th time'
FROM generate_series(1, 30000) n;
INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids)
SELECT gen_random_uuid(), gen_random_uuid(), 'events:user', array_agg(id)
FROM (SELECT id, row_number() OVER () AS n FROM event_outbox WHERE status = 'PENDING' ORDER BY seq LIMIT 500) AS first GROUP BY n / 50;
INSERT INTO outbox_audit (who, action, about, events, event_ids)
SELECT 'ada', 'retry', 'one event', 1, ARRAY[gen_random_uuid()] FROM generate_series(1, 20000);";

/// What a statement did.
#[derive(Debug, Default)]
struct Work {
    /// Rows that were read of each table, with those that were left out.
    rows: BTreeMap<String, u64>,
    /// Tables that were read in full.
    whole: Vec<String>,
    /// The most that one step sorted.
    sorted: u64,
}

async fn crowded(case: (crate::support::Form, Statistics)) -> Result<(World, PgConnection)> {
    let (world, mut connection) = populated(case).await?;
    outbox::for_people(&mut connection, Duration::from_secs(10)).await?;
    world.database.psql(CROWD)?;
    if case.1 == Statistics::Current {
        world.database.psql("VACUUM ANALYZE event_outbox, outbox_batch, outbox_audit;")?;
    }
    Ok((world, connection))
}

/// What the prepared statement that has these parts, one after the other, does with these values, by either plan. What it changes is undone.
async fn work(connection: &mut PgConnection, parts: &[&str], values: &str) -> Result<Vec<Work>> {
    println!("{parts:?} ({values})");
    let pattern = format!("%{}%", parts.join("%"));
    let find = "SELECT name FROM pg_prepared_statements WHERE statement LIKE $1";
    let names: Vec<String> = sqlx::query_scalar(find).bind(&pattern).fetch_all(&mut *connection).await?;
    ensure!(names.len() == 1, "statements like {pattern:?}: {names:?}");
    let parents = "SELECT c.relname::text, p.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                   JOIN pg_class p ON p.oid = i.inhparent";
    let parents: HashMap<String, String> = sqlx::query_as(parents).fetch_all(&mut *connection).await?.into_iter().collect();
    let call = if values.is_empty() { names[0].clone() } else { format!("{}({values})", names[0]) };
    let mut all = Vec::new();
    for mode in ["force_generic_plan", "force_custom_plan"] {
        let explain = format!(
            "BEGIN; SET LOCAL plan_cache_mode = {mode}; EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE {call}; ROLLBACK"
        );
        let rows = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_all(&mut *connection).await?;
        let plan: Value = sqlx::Row::try_get(rows.first().context("a plan")?, 0)?;
        let mut work = Work::default();
        collect(&plan, &parents, &mut work);
        all.push(work);
    }
    Ok(all)
}

fn collect(plan: &Value, parents: &HashMap<String, String>, work: &mut Work) {
    match plan {
        Value::Array(parts) => parts.iter().for_each(|part| collect(part, parents, work)),
        Value::Object(node) => {
            let text = |name: &str| node.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let number = |name: &str| node.get(name).and_then(Value::as_f64).unwrap_or_default();
            let loops = number("Actual Loops");
            let (kind, relation) = (text("Node Type"), text("Relation Name"));
            if kind.contains("Scan") && !relation.is_empty() {
                let rows = number("Actual Rows") + number("Rows Removed by Filter") + number("Rows Removed by Index Recheck");
                let table = parents.get(&relation).cloned().unwrap_or(relation);
                if kind.contains("Seq") && loops > 0.0 {
                    work.whole.push(table.clone());
                }
                *work.rows.entry(table).or_default() += (rows * loops) as u64;
            } else if kind.contains("Sort") {
                work.sorted = work.sorted.max((number("Actual Rows") * loops) as u64);
                let parts = node.get("Plans").and_then(Value::as_array).into_iter().flatten();
                let inputs =
                    parts.filter_map(|part| Some(part.get("Actual Rows")?.as_f64()? * part.get("Actual Loops")?.as_f64()?));
                work.sorted = inputs.fold(work.sorted, |most, rows| most.max(rows as u64));
            }
            node.values().for_each(|part| collect(part, parents, work));
        }
        _ => {}
    }
}

/// Of the tables that grow, these are read up to so many rows, and no others; nothing of them is read in full, and no more is sorted.
#[track_caller]
fn assert_bounded(all: &[Work], bounds: &[(&str, u64)]) {
    let most = bounds.iter().map(|(_, bound)| *bound).max().unwrap_or_default();
    for work in all {
        for table in [TABLE, BATCHES, AUDIT] {
            let bound = bounds.iter().find(|(name, _)| *name == table).map_or(0, |(_, bound)| bound + AT_HAND);
            let rows = work.rows.get(table).copied().unwrap_or_default();
            assert!(rows <= bound, "{rows} rows of {table} are read, and {bound} may be: {work:?}");
            assert!(bound < 500 || !work.whole.iter().any(|name| name == table), "{table} is read in full: {work:?}");
        }
        assert!(work.sorted <= most + AT_HAND, "{} rows are sorted, and {most} may be: {work:?}", work.sorted);
    }
}

/// A page that finds what it shows reads no more; one that finds nothing looks at 20,000 rows, once more to learn where they end.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_reads_a_page_or_what_it_says() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = crowded(case).await?;
        let (ids, latest) = (Uuid::nil().to_string(), Uuid::max());
        for (status, walk, first) in [
            (None, "e.id >= $1::text::uuid ORDER", ids.clone()),
            (Some(EventStatus::Processing), "settled_at IS NULL)) ORDER", ids.clone()),
            (Some(EventStatus::Pending), "e.seq::text AS by", i64::MAX.to_string()),
            (Some(EventStatus::Failed), "to_char(e.created_at", "infinity".to_owned()),
        ] {
            let search = EventSearch { status, event_type: Some("Nothing".to_owned()), ..EventSearch::default() };
            let page = world.outbox.search(&mut connection, &search, None, 10).await?;
            let is_long = status != Some(EventStatus::Processing);
            assert_eq!((page.events.len(), page.next.is_some()), (0, is_long), "{status:?}");

            // Which are on their way is looked up by the journal.
            let open = if status == Some(EventStatus::Processing) { 2 * OPEN } else { OPEN };
            let most = if is_long { LOOKED_AT } else { IN_FLIGHT };
            let place = format!("'{first}', '{latest}'");
            let any = work(
                &mut connection,
                &["SELECT looked.*", walk],
                &format!("{place}, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 11"),
            )
            .await?;
            assert_bounded(&any, &[(TABLE, if is_long { 11 } else { IN_FLIGHT }), (BATCHES, open)]);
            let none = format!("{place}, NULL, NULL, 'Nothing', NULL, NULL, NULL, NULL, 11");
            assert_bounded(&work(&mut connection, &["SELECT looked.*", walk], &none).await?, &[(TABLE, most), (BATCHES, open)]);
            let next = work(&mut connection, &["SELECT id, by FROM", walk, "OFFSET"], &format!("{place}, NULL, NULL")).await?;
            assert_bounded(&next, &[(TABLE, most), (BATCHES, open)]);
        }
    }
    Ok(())
}

/// A time, and the place of an event deep down, are found by index, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_begins_where_it_is_told_to() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = crowded(case).await?;
        let (hour, any) = (chrono::TimeDelta::hours(1), EventSearch::default());
        let until = Some(chrono::Utc::now() - hour * 24 * 8);
        for status in [None, Some(EventStatus::Published), Some(EventStatus::Failed), Some(EventStatus::Pending)] {
            let search = EventSearch { status, until, ..any.clone() };
            world.outbox.search(&mut connection, &search, None, 10).await?;
        }
        let id = "'01000000-0000-7000-8000-000000000000'";
        for (walk, by) in [
            ("e.id >= $1::text::uuid ORDER", "00000000-0000-0000-0000-000000000000"),
            ("e.seq::text AS by", "60000"),
            ("to_char(e.created_at", "2026-01-01"),
        ] {
            let values = format!("'{by}', {id}, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 11");
            assert_bounded(&work(&mut connection, &["SELECT looked.*", walk], &values).await?, &[(TABLE, 11), (BATCHES, OPEN)]);
        }
    }
    Ok(())
}

/// Of an aggregate, the failed ones have an index.
#[tokio::test(flavor = "multi_thread")]
async fn what_failed_of_an_aggregate_is_read_alone() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = crowded(case).await?;
        let text = |text: &str| Some(text.to_owned());
        let search = EventSearch {
            status: Some(EventStatus::Failed),
            aggregate_type: text("user"),
            aggregate_id: text("2500"),
            ..EventSearch::default()
        };
        let page = world.outbox.search(&mut connection, &search, None, 10).await?;
        assert_eq!((page.events.len(), page.next.is_some()), (6, false));
        let values = format!("'{}', '{}', 'user', '2500'", i64::MAX, Uuid::max());
        let first = format!("{values}, NULL, NULL, NULL, NULL, NULL, 11");
        assert_bounded(
            &work(&mut connection, &["SELECT looked.*", "aggregate_id = $4 AND"], &first).await?,
            &[(TABLE, 6), (BATCHES, OPEN)],
        );
        let next = work(&mut connection, &["SELECT id, by FROM", "aggregate_id = $4 AND"], &values).await?;
        assert_bounded(&next, &[(TABLE, 6)]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_and_what_is_done_about_them_are_read_by_the_step() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = crowded(case).await?;
        let (outbox, deed) = (&world.outbox, Deed { who: "ada", about: "all" });
        outbox.failure_groups(&mut connection).await?;
        let counted = outbox.count_failed(&mut connection, &FailureFilter::default()).await?;
        assert!(counted.events.at_least, "{counted:?}");
        assert_bounded(&work(&mut connection, &["(array_agg(example))[1]"], "").await?, &[(TABLE, COUNTED)]);
        for values in ["NULL, NULL, 10000", "'E1', 'refused for the ####th time', 10000", "'Nothing', NULL, 10000"] {
            assert_bounded(&work(&mut connection, &["AS at_least, pg_current_snapshot"], values).await?, &[(TABLE, COUNTED)]);
        }
        let one = Uuid::now_v7();
        for (remedy, name) in [(Remedy::Retry, "'retry'"), (Remedy::Discard, "'discard'")] {
            let none = FailureFilter { event_type: Some("Nothing".to_owned()), cause: None };
            outbox.remedy_step(&mut connection, deed, remedy, &none, &FailurePlace::default(), None).await?;
            outbox.remedy_events(&mut connection, deed, remedy, &[one]).await?;
            // The failed ones that it looks at, and again those that it changes.
            for place in ["'', '', 0", "'user', '2500', 0"] {
                let values = format!("'ada', 'all', {place}, NULL, NULL, '{}'", counted.snapshot);
                let step = work(&mut connection, &["seq) > ($3, $4, $5)", name], &values).await?;
                assert_bounded(&step, &[(TABLE, 2 * STEP)]);
            }
            let named = work(&mut connection, &["id = ANY ($3::uuid[])", name], &format!("'ada', 'all', '{{{one}}}'")).await?;
            assert_bounded(&named, &[(TABLE, 2)]);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_pages_read_what_they_show() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = crowded(case).await?;
        let outbox = &world.outbox;
        outbox.blocked(&mut connection, ("", ""), 51).await?;
        for place in ["'', ''", "'user', '2500'"] {
            let blocked = work(&mut connection, &["AS failed\nFROM grouped"], &format!("{place}, 51")).await?;
            // Of each aggregate that is shown, the first event and a failed one before it.
            assert_bounded(&blocked, &[(TABLE, WAITING + 2 * 51)]);
        }
        outbox.glance(&mut connection).await?;
        // Unsent and failed ones are counted, and 200 have a latency.
        assert_bounded(&work(&mut connection, &["AS is_paused"], "").await?, &[(TABLE, 2 * COUNTED + 2 * 200), (BATCHES, OPEN)]);

        let page = outbox.search(&mut connection, &EventSearch::default(), None, 1).await?;
        let id = page.events[0].id;
        outbox.event(&mut connection, id).await?.context("it is there")?;
        assert_bounded(&work(&mut connection, &["AS payload_text"], &format!("'{id}'")).await?, &[(TABLE, 1)]);
        let sent = world.database.psql(
            "SELECT id || ',' || partition_no FROM event_outbox WHERE status = 'PUBLISHED' ORDER BY published_at LIMIT 1;",
        )?;
        let (sent, partition) = sent.trim().split_once(',').context("one that was sent")?;
        let of_old = format!("'{sent}', now() - interval '30 days', {partition}");
        assert_bounded(&work(&mut connection, &["array_position(event_ids, $1)"], &of_old).await?, &[(BATCHES, OPEN)]);
        let of_new = format!("'{sent}', now(), {partition}");
        assert_bounded(&work(&mut connection, &["array_position(event_ids, $1)"], &of_new).await?, &[(BATCHES, OPEN + 10_000)]);

        outbox.deeds(&mut connection, None, 51).await?;
        for before in ["9223372036854775807", "5000"] {
            assert_bounded(&work(&mut connection, &["audit_id DESC LIMIT"], &format!("{before}, 51")).await?, &[(AUDIT, 51)]);
        }
        outbox.relays(&mut connection).await?;
        outbox.paused(&mut connection).await?;
        for part in ["heartbeat_age_ms", "SELECT since, who"] {
            assert_bounded(&work(&mut connection, &[part], "").await?, &[]);
        }
        assert_eq!(outbox.batches_of_relays(&mut connection).await?.len() as u64, OPEN);
        assert_bounded(&work(&mut connection, &["relay_id, count(*) AS batches"], "").await?, &[(BATCHES, OPEN)]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_reads_up_to_its_bound() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = crowded(case).await?;
        let facts = world.outbox.examine_by(&mut connection).await.outbox.context("an outbox")?;
        ensure!(facts.backlog?.events == 10_001 && facts.failed?.events == 10_001);
        for part in ["WITH backlog AS", "WITH newest_failed AS"] {
            assert_bounded(&work(&mut connection, &[part], "10001").await?, &[(TABLE, COUNTED + 1)]);
        }
        let history = work(&mut connection, &["AS ever_written"], "'public.event_outbox'").await?;
        assert_bounded(&history, &[(TABLE, 3), (BATCHES, 1)]);
        assert_bounded(&work(&mut connection, &["AS orphaned"], "10000").await?, &[(BATCHES, OPEN)]);
    }
    Ok(())
}
