//! What operators see and do: search, failures by cause, blocked aggregates, the audit, the pause.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::outbox::{
    Deed, EventSearch, EventStatus, EventSummary, FailureFilter, FailurePlace, Remedy, SearchPlace, Snapshot,
};
use commitstream::relay::RelayState;
use commitstream::streams::Delivery;
use sqlx::Connection;
use uuid::Uuid;

use crate::explain::{
    CASES, FAILED, FAILED_AGGREGATE, KEY, PENDING, PUBLISHED, TABLE, WAITING, assert_indexes, assert_only_indexes, plans,
    populated,
};
use crate::support::{Form, World, eventually};

const DEED: Deed<'static> = Deed { who: "ada", about: "a test" };

/// 30 published, 20 pending and 3,000 failed events of two types and causes, in that order.
const STATES: &str = "
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, published_at)
SELECT 'Sent', 'user', n::text, '{}', 'PUBLISHED', now() FROM generate_series(1, 30) n;
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
SELECT 'Unsent', 'user', n::text, '{}' FROM generate_series(1, 20) n;
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
SELECT CASE WHEN n % 3 = 0 THEN 'Odd' ELSE 'Even' END, 'order', (n % 7)::text, '{}', 'FAILED', 'too large by ' || (n % 90 + 10) || ' bytes'
FROM generate_series(1, 3000) n;";

async fn world_of_states(form: Form) -> Result<World> {
    let world = World::of(form).await?;
    world.database.psql(STATES)?;
    Ok(world)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_finds_each_event_once_page_by_page() -> Result<()> {
    for form in Form::BOTH {
        let world = world_of_states(form).await?;
        let mut connection = world.connect().await?;
        for (status, expected) in [
            (None, 3_050),
            (Some(EventStatus::Published), 30),
            (Some(EventStatus::Pending), 20),
            (Some(EventStatus::Processing), 0),
            (Some(EventStatus::Failed), 3_000),
        ] {
            let search = EventSearch { status, ..EventSearch::default() };
            let (mut found, mut place, mut pages) = (Vec::new(), None::<SearchPlace>, 0);
            loop {
                let page = world.outbox.search(&mut connection, &search, place.as_ref(), 700).await?;
                found.extend(page.events);
                pages += 1;
                let Some(next) = page.next else { break };
                place = Some(next.to_string().parse().map_err(anyhow::Error::msg)?);
            }
            assert_eq!((found.len(), pages), (expected, expected / 700 + 1), "{form:?} {status:?}");
            assert_eq!(found.iter().map(|event| event.id).collect::<BTreeSet<_>>().len(), expected, "each once");
            assert!(found.iter().all(|event| status.is_none_or(|status| event.status == status)));
            // Ids of one millisecond are in no order.
            let is_by_id = matches!(status, None | Some(EventStatus::Published));
            let age = |event: &EventSummary| if is_by_id { Err(Reverse(event.id)) } else { Ok(Reverse(event.created_at)) };
            assert!(found.is_sorted_by_key(age), "newest first");
        }
        let one = EventSearch {
            event_type: Some("Unsent".into()),
            aggregate_type: Some("user".into()),
            aggregate_id: Some("7".into()),
            ..EventSearch::default()
        };
        assert_eq!(world.outbox.search(&mut connection, &one, None, 10).await?.events.len(), 1);
        let future = EventSearch { from: Some(chrono::Utc::now() + chrono::TimeDelta::hours(1)), ..EventSearch::default() };
        assert_eq!(world.outbox.search(&mut connection, &future, None, 10).await?.events.len(), 0);
        let past = EventSearch { until: future.from, from: Some(chrono::Utc::now() - chrono::TimeDelta::hours(1)), ..one };
        assert_eq!(world.outbox.search(&mut connection, &past, None, 10).await?.events.len(), 1);
    }
    Ok(())
}

/// A search for what is rare comes back after a bounded number of rows, and goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_for_what_is_rare_stops_and_goes_on() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    world.insert(1, 1).await?;
    world.database.psql("UPDATE event_outbox SET event_type = 'Rare';")?;
    world.insert(45_000, 10).await?;
    let rare = EventSearch { event_type: Some("Rare".into()), ..EventSearch::default() };
    let (mut place, mut found) = (None, Vec::new());
    for page in 0..3 {
        let answer = world.outbox.search(&mut connection, &rare, place.as_ref(), 50).await?;
        assert_eq!(answer.next.is_some(), page < 2, "page {page}");
        found.push(answer.events.len());
        place = answer.next;
    }
    assert_eq!(found, [0, 0, 1]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_grouped_and_retried_or_discarded_with_an_audit() -> Result<()> {
    for form in Form::BOTH {
        let world = world_of_states(form).await?;
        let mut connection = world.connect().await?;
        let found = world.outbox.failure_groups(&mut connection).await?;
        let shown: Vec<_> = found.groups.iter().map(|g| (g.event_type.as_str(), g.cause.as_str(), g.events)).collect();
        let cause = "too large by ## bytes";
        assert_eq!(shown, [("Even", cause, 2_000), ("Odd", cause, 1_000)]);
        assert_eq!((found.events.events, found.events.at_least, found.more), (3_000, false, 0));

        let odd = FailureFilter { event_type: Some("Odd".into()), cause: Some(cause.into()) };
        let asked = world.outbox.count_failed(&mut connection, &odd).await?;
        assert_eq!((asked.events.events, asked.events.at_least), (1_000, false));
        let failed = EventSearch { status: Some(EventStatus::Failed), ..EventSearch::default() };
        for (cause, events) in [(cause, 10), ("another", 0)] {
            let of_cause = EventSearch { cause: Some(cause.into()), ..failed.clone() };
            assert_eq!(world.outbox.search(&mut connection, &of_cause, None, 10).await?.events.len(), events, "{cause}");
        }
        let (mut place, mut changed, mut steps) = (FailurePlace::default(), 0, 0);
        loop {
            let step =
                world.outbox.remedy_step(&mut connection, DEED, Remedy::Retry, &odd, &place, Some(&asked.snapshot)).await?;
            changed += step.changed;
            steps += 1;
            let Some(next) = step.next else { break };
            place = next;
        }
        assert_eq!(changed, 1_000);
        assert!((3..=4).contains(&steps), "{steps}");
        let pending = "SELECT count(*) FROM event_outbox WHERE event_type = 'Odd' AND status = 'PENDING' AND retry_count = 0
                       AND last_error IS NULL AND next_retry_at IS NOT NULL;";
        assert_eq!(world.database.psql(pending)?, "1000\n");

        let one = world.outbox.search(&mut connection, &failed, None, 1).await?.events[0].id;
        let pending = world.database.psql("SELECT id FROM event_outbox WHERE event_type = 'Unsent' LIMIT 1;")?;
        let ids = [one, pending.trim().parse()?];
        assert_eq!(
            world.outbox.remedy_events(&mut connection, DEED, Remedy::Discard, &ids).await?.changed,
            1,
            "failed ones only"
        );
        assert!(world.outbox.event(&mut connection, one).await?.is_none());
        assert!(world.outbox.event(&mut connection, ids[1]).await?.is_some());

        let deeds = world.outbox.deeds(&mut connection, None, 100).await?;
        assert_eq!((deeds[0].action.as_str(), deeds[0].who.as_str(), &deeds[0].event_ids[..]), ("discard", "ada", &ids[..1]));
        assert_eq!(deeds.iter().filter(|d| d.action == "retry").map(|d| d.events).sum::<i64>(), 1_000);
        assert!(deeds.iter().all(|deed| usize::try_from(deed.events).is_ok_and(|events| events == deed.event_ids.len())));
    }
    Ok(())
}

/// Whatever number of them there is by then: others have failed, some were decided about, and one was retried and has failed again.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_shown_is_changed() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let mut connection = world.connect().await?;
        let outbox = &world.outbox;
        world.database.psql(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status)
             SELECT 'Shown', 'user', n::text, '{}', 'FAILED' FROM generate_series(1, 4) n;
             INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
             SELECT 'Later', 'user', n::text, '{}' FROM generate_series(1, 4) n;",
        )?;
        // One that fails in a transaction which is under way when the others are shown.
        let mut under_way = world.connect().await?;
        let mut tx = under_way.begin().await?;
        sqlx::query("UPDATE event_outbox SET status = 'FAILED' WHERE event_type = 'Later' AND aggregate_id = '1'")
            .execute(&mut *tx)
            .await?;
        let all = FailureFilter::default();
        let shown = outbox.count_failed(&mut connection, &all).await?;
        assert_eq!(shown.events.events, 4);
        let snapshot = shown.snapshot.to_string().parse().map_err(anyhow::Error::msg)?;
        assert_eq!(shown.snapshot, snapshot, "by a form");
        tx.commit().await?;
        world.database.psql(
            "UPDATE event_outbox SET status = 'FAILED' WHERE event_type = 'Later';
             UPDATE event_outbox SET status = 'PENDING' WHERE event_type = 'Shown' AND aggregate_id IN ('1', '2');
             UPDATE event_outbox SET status = 'FAILED' WHERE event_type = 'Shown' AND aggregate_id = '1';",
        )?;
        let from = FailurePlace::default();
        let step = outbox.remedy_step(&mut connection, DEED, Remedy::Discard, &all, &from, Some(&snapshot)).await?;
        assert_eq!(step.changed, 2, "those that are as they were");
        let left = "SELECT string_agg(event_type || ' ' || aggregate_id || ' ' || status, ',' ORDER BY seq) FROM event_outbox;";
        let expected = "Shown 1 FAILED,Shown 2 PENDING,Later 1 FAILED,Later 2 FAILED,Later 3 FAILED,Later 4 FAILED\n";
        assert_eq!(world.database.psql(left)?, expected);
        let again = outbox.remedy_step(&mut connection, DEED, Remedy::Discard, &all, &from, Some(&snapshot)).await?;
        assert_eq!(again.changed, 0);
    }
    for text in ["", "1", "1:2", "1:2:3", "0:1:", "3:2:", "1:5:4,3", "1:5:x", "1:5:2;"] {
        assert!(text.parse::<Snapshot>().is_err(), "{text}");
    }
    for text in ["1:1:", "1:5:2,3"] {
        assert!(text.parse::<Snapshot>().is_ok(), "{text}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn open_batches_are_counted_by_relay() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    assert!(world.outbox.batches_of_relays(&mut connection).await?.is_empty());
    let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
    world.database.psql(&format!(
        "INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids, claimed_at, settled_at)
         SELECT gen_random_uuid(), '{one}', 's', '{{}}', now() - n * interval '1 minute', CASE WHEN n > 3 THEN now() END FROM generate_series(1, 5) n;
         INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids, claimed_at)
         VALUES (gen_random_uuid(), '{other}', 's', '{{}}', now() - interval '1 hour');"
    ))?;
    let open = world.outbox.batches_of_relays(&mut connection).await?;
    let shown: Vec<_> = open.iter().map(|of| (of.relay_id, of.batches, of.at_least, of.oldest_ms / 60_000)).collect();
    assert_eq!(shown, [(other, 1, false, 60), (one, 3, false, 3)]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn blocked_aggregates_say_what_waits_behind_what() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let mut connection = world.connect().await?;
        assert!(world.outbox.blocked(&mut connection, ("", ""), 10).await?.is_empty());
        world.database.psql(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status)
             VALUES ('First', 'user', 'held', '{}', 'FAILED');
             INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, next_retry_at, retry_count, last_error)
             SELECT 'Later', 'user', CASE WHEN n < 4 THEN 'held' ELSE 'tried' END, '{}', now() + interval '1 hour', 1, 'WRONGTYPE'
             FROM generate_series(1, 8) n;",
        )?;
        let blocked = world.outbox.blocked(&mut connection, ("", ""), 10).await?;
        let shown: Vec<_> =
            blocked.iter().map(|b| (b.aggregate_id.as_str(), b.waiting, b.failed.is_some(), b.at_least)).collect();
        assert_eq!(shown, [("held", 3, true, false), ("tried", 5, false, false)]);
        assert_eq!(world.outbox.blocked(&mut connection, ("user", "held"), 10).await?.len(), 1, "the next page");
    }
    Ok(())
}

/// An operator parks an event with `infinity`, and may set times that no calendar has, or none.
#[tokio::test(flavor = "multi_thread")]
async fn times_that_are_no_dates_break_nothing() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let mut connection = world.connect().await?;
        let outbox = &world.outbox;
        world.database.psql(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, next_retry_at)
             SELECT 'Parked', 'user', at, '{}', at::timestamptz FROM unnest(ARRAY['infinity', '290000-01-01']) AS at;
             INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, published_at)
             SELECT 'Sent', 'user', 'any', '{}', 'PUBLISHED', at::timestamptz
             FROM unnest(ARRAY['infinity', '-infinity', '290000-01-01', '4713-01-01 BC', NULL]) AS at, generate_series(1, 210);
             INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, published_at)
             VALUES ('Sent', 'user', 'good', '{}', 'PUBLISHED', clock_timestamp());",
        )?;
        let page = outbox.search(&mut connection, &EventSearch::default(), None, 2_000).await?;
        assert_eq!(page.events.len(), 2 + 5 * 210 + 1);
        let one_of_each = "SELECT DISTINCT ON (event_type, next_retry_at, published_at) id FROM event_outbox;";
        for id in world.database.psql(one_of_each)?.lines() {
            let event = outbox.event(&mut connection, id.parse()?).await?.context("it is there")?;
            assert_eq!(event.is_parked, event.event_type == "Parked", "{event:?}");
            assert!(event.next_retry_at.is_none() && event.batch.is_none(), "{event:?}");
        }
        let blocked = outbox.blocked(&mut connection, ("", ""), 10).await?;
        assert!(blocked.len() == 2 && blocked.iter().all(|b| b.is_parked && b.next_retry_at.is_none()), "{blocked:?}");
        let glance = outbox.glance(&mut connection).await?;
        assert!(glance.latency_p50_ms.is_some_and(|ms| (0.0..60_000.0).contains(&ms)), "{glance:?}");
        let history = outbox.examine_by(&mut connection).await.outbox.context("an outbox")?.history?;
        assert!(history.last_write.is_some_and(|at| at <= history.now) && history.oldest_published.is_some(), "{history:?}");
        assert_eq!(outbox.stats(&mut connection).await?.pending, 2);
        assert_eq!(outbox.backlog(&mut connection, Uuid::nil()).await?.oldest_due, None);
        let day = Duration::from_secs(86_400);
        assert_eq!(outbox.delete_published(&mut connection, day, 10_000).await?, 420, "what is long ago");

        let relay = world.relay()?;
        world.insert(20, 5).await?;
        let sent = async || Ok(world.outbox.glance(&mut world.connect().await?).await?.unsent.events == 2);
        eventually("the others to be sent", sent).await?;
        world.database.psql("UPDATE event_outbox SET next_retry_at = now() WHERE event_type = 'Parked';")?;
        world.drained().await?;
        relay.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_an_event_is_known_to_each_group() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    world.insert(250, 10).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let stream = world.user_stream();
    let mut redis = world.redis().await?;
    redis::cmd("XGROUP").arg(&["CREATE", &stream, "mail", "0"]).query_async::<()>(&mut redis).await?;
    let ids = world.database.psql("SELECT id FROM event_outbox ORDER BY seq;")?;
    let ids: Vec<Uuid> = ids.lines().map(str::parse).collect::<Result<_, _>>()?;
    let mut entries = Vec::new();
    for id in [ids[0], ids[120], ids[249]] {
        let event = world.outbox.event(&mut connection, id).await?.context("the event is there")?;
        assert_eq!(event.status, EventStatus::Published);
        let batch = event.batch.context("its batch is found")?;
        assert!(batch.settled_at.is_some() && batch.stream == stream, "{batch:?}");
        let until = event.published_at.context("published")?.timestamp_millis() + 1_000;
        let entry = world.streams.entry_of(&stream, id, batch.last_entry.as_deref(), until).await?;
        assert!(batch.last_entry.is_some());
        assert_eq!(world.streams.entry_of(&stream, id, None, until).await?, entry, "without the journal, too");
        entries.push(entry.context("its entry is found")?);
    }
    assert_eq!(world.streams.entry_of(&stream, Uuid::nil(), None, i64::MAX).await?, None);
    let deliveries =
        async |entry: &str| Ok::<_, anyhow::Error>(world.streams.deliveries(&stream, entry).await?[0].delivery.clone());
    assert_eq!(deliveries(&entries[0]).await?, Delivery::NotDelivered);
    let mut read = redis::cmd("XREADGROUP");
    read.arg(&["GROUP", "mail", "m1", "COUNT", "1", "STREAMS", &stream, ">"]).query_async::<redis::Value>(&mut redis).await?;
    assert!(matches!(deliveries(&entries[0]).await?, Delivery::Pending { consumer, deliveries: 1, .. } if consumer == "m1"));
    redis::cmd("XACK").arg(&[&stream, "mail", &entries[0]]).query_async::<()>(&mut redis).await?;
    assert_eq!(deliveries(&entries[0]).await?, Delivery::Acknowledged);
    assert_eq!(deliveries(&entries[2]).await?, Delivery::NotDelivered);
    let mut letter = redis::cmd("XADD");
    letter.arg(&[&format!("{stream}:dead"), "9-0", "id", "x", "group", "mail", "entry", &entries[0]]);
    letter.query_async::<()>(&mut redis).await?;
    assert_eq!(deliveries(&entries[0]).await?, Delivery::Dead { dead_id: "9-0".into() });
    let figures = world.streams.figures(&stream).await?.context("the stream is there")?;
    assert_eq!(figures.entries, 250);
    assert!(figures.memory.is_some_and(|bytes| bytes > 1_000), "{figures:?}");

    // Behind 5 MiB of others it is too far away, unless the journal says where.
    for _ in 0..50 {
        redis::cmd("XADD").arg(&[&stream, "*", "id", "x", "payload", &"x".repeat(100_000)]).query_async::<()>(&mut redis).await?;
    }
    assert_eq!(world.streams.entry_of(&stream, ids[0], None, i64::MAX).await?, None);
    assert_eq!(world.streams.entry_of(&stream, ids[0], Some(&entries[2]), i64::MAX).await?.as_ref(), Some(&entries[0]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_stops_claims_until_relays_may_go_on() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    status.wait_for(|s| s.state == RelayState::Active).await?;
    assert!(world.outbox.pause(&mut connection, "ada").await?);
    assert!(!world.outbox.pause(&mut connection, "bob").await?, "once");
    status.wait_for(|s| s.state == RelayState::Paused).await?;
    assert_eq!(world.outbox.paused(&mut connection).await?.context("paused")?.who, "ada");
    world.insert(50, 5).await?;
    // A relay that claimed would do so within the poll interval.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let glance = world.outbox.glance(&mut connection).await?;
    assert!(glance.is_paused && glance.unsent.events == 50 && glance.open_batches == 0, "{glance:?}");
    let is_told = async || Ok(world.outbox.relays(&mut world.connect().await?).await?[0].state == "paused");
    eventually("the next heartbeat", is_told).await?;
    assert!(world.outbox.resume(&mut connection, "bob").await?);
    assert!(!world.outbox.resume(&mut connection, "bob").await?);
    world.drained().await?;
    eventually("the rate", async || Ok(world.outbox.glance(&mut connection).await?.latency_p50_ms.is_some())).await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 50);
    let deeds: Vec<_> = world.outbox.deeds(&mut connection, None, 10).await?.into_iter().map(|d| (d.who, d.action)).collect();
    assert_eq!(deeds, [("bob".to_owned(), "resume".to_owned()), ("ada".to_owned(), "pause".to_owned())]);
    Ok(())
}

/// On both forms of the table and with any statistics.
#[tokio::test(flavor = "multi_thread")]
async fn what_operators_ask_goes_by_index() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let (outbox, id) = (&world.outbox, Uuid::max());
        for (status, part, walk, by) in [
            (None, "'' AS by", (KEY, "id < "), Uuid::nil().to_string()),
            (Some(EventStatus::Pending), "e.seq::text AS by", (PENDING, "seq <= "), "9223372036854775807".into()),
            (Some(EventStatus::Failed), "to_char(e.created_at", (FAILED, "created_at <= "), "infinity".into()),
        ] {
            let search = EventSearch { status, ..EventSearch::default() };
            let page = outbox.search(&mut connection, &search, None, 10).await?;
            assert_eq!((page.events.len(), page.next.is_some()), (10, true), "{status:?}");
            let values = format!("'{by}', '{id}', NULL, NULL, NULL, NULL, NULL, NULL, NULL, 11");
            let read = plans(&mut connection, part, &values).await?;
            assert_indexes(&read, TABLE, &[walk]);
        }
        outbox.failure_groups(&mut connection).await?;
        outbox.count_failed(&mut connection, &FailureFilter::default()).await?;
        for (part, values) in [("(array_agg(example))[1]", ""), ("AS at_least, pg_current_snapshot", "'E', NULL, 10000")] {
            assert_indexes(&plans(&mut connection, part, values).await?, TABLE, &[(FAILED, "")]);
        }
        outbox.blocked(&mut connection, ("", ""), 10).await?;
        let blocked = plans(&mut connection, "AS failed\nFROM grouped", "'', '', 10").await?;
        assert_only_indexes(&blocked, TABLE, &[(WAITING, "aggregate_id"), (KEY, "id = "), (FAILED_AGGREGATE, "aggregate_id = ")]);
        outbox.glance(&mut connection).await?;
        let glance = plans(&mut connection, "AS is_paused", "").await?;
        assert_only_indexes(&glance, TABLE, &[(PENDING, ""), (FAILED, ""), (PUBLISHED, "published_at > ")]);
        let one = outbox.search(&mut connection, &EventSearch::default(), None, 1).await?.events[0].id;
        outbox.event(&mut connection, one).await?.context("it is there")?;
        assert_indexes(&plans(&mut connection, "AS payload_text", &format!("'{one}'")).await?, TABLE, &[(KEY, "id = ")]);

        let deed = Deed { who: "ada", about: "all" };
        let step = outbox
            .remedy_step(&mut connection, deed, Remedy::Discard, &FailureFilter::default(), &FailurePlace::default(), None)
            .await?;
        assert_eq!((step.changed, step.next), (28, None));
        let remedy = plans(&mut connection, "'discard'", "'a', 'b', '', '', 0, NULL, NULL, '1:9000000:'").await?;
        assert_indexes(&remedy, TABLE, &[(FAILED_AGGREGATE, "aggregate_id"), (KEY, "id = ANY")]);
    }
    Ok(())
}

/// An engine begins anew after each pause, and whenever partitions come or go.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_does_not_clean_up_each_time_it_begins_anew() -> Result<()> {
    let world = World::new().await?;
    let old = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, published_at)
               VALUES ('E', 'old', '1', '{}', 'PUBLISHED', now() - interval '30 days');";
    let left = "SELECT count(*) FROM event_outbox WHERE aggregate_type = 'old';";
    world.database.psql(old)?;
    let relay = world.relay()?;
    eventually("the first clean-up", async || Ok(world.database.psql(left)? == "0\n")).await?;
    // Within the same run, it is over when its session is.
    let cleaning = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'commitstream clean-up';";
    eventually("its end", async || Ok(world.database.psql(cleaning)? == "0\n")).await?;
    world.database.psql(old)?;
    let mut connection = world.connect().await?;
    let mut status = relay.watch();
    for n in 1..=3 {
        world.outbox.pause(&mut connection, "ada").await?;
        status.wait_for(|status| status.state == RelayState::Paused).await?;
        world.outbox.resume(&mut connection, "ada").await?;
        world.insert(1, 1).await?;
        status.wait_for(|status| status.published == n).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(world.database.psql(left)?, "1\n", "after {n} times");
    }
    relay.stop().await?;
    Ok(())
}
