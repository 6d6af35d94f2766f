//! Statistics, failed events, clean-up.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::support::{World, finish};

#[test]
fn stats_as_programs_read_them() -> Result<()> {
    let world = World::new()?;
    let mut empty = world.stats()?;
    assert_eq!(
        empty.take(),
        json!({ "pending": 0, "processing": 0, "published": 0, "failed": 0, "oldest_pending_age_ms": null, "recent_failures": [] })
    );

    let failed = world.fail_users()?;
    world.publish_user("4")?;
    let stats = world.stats()?;
    assert_eq!([&stats["pending"], &stats["failed"]], [&json!(1), &json!(3)]);
    assert!(stats["oldest_pending_age_ms"].as_i64().is_some_and(|age| age >= 0), "{stats}");
    let failures = stats["recent_failures"].as_array().context("an array")?;
    let newest = failures.first().context("three failures")?;
    assert_eq!(newest["id"], json!(failed[2]));
    assert_eq!(newest["event_type"], "UserCreated");
    assert_eq!(newest["aggregate_id"], "3");
    assert_eq!(newest["retry_count"], 0);
    assert!(newest["last_error"].as_str().is_some_and(|error| error.starts_with("too large")), "{newest}");
    Ok(())
}

#[test]
fn stats_as_people_read_them() -> Result<()> {
    let world = World::new()?;
    insta::assert_snapshot!(world.ok(&["stats"])?, @"
    pending     0
    processing  0
    published   0
    failed      0

    No relay is alive, and nothing waits.

    The outbox is empty. An INSERT INTO event_outbox, or `commitstream publish`, puts the first event in.
    ");
    world.fail_users()?;
    let stats = world.ok(&["stats"])?;
    assert!(
        stats.contains("failed      3\n\nFAILED: 3 events of 3 aggregates")
            && stats.contains("\n\nRecent failures\nID ")
            && stats.contains("  too large: "),
        "{stats}"
    );
    assert!(stats.contains("commitstream failed retry --all"), "{stats}");
    Ok(())
}

#[test]
fn failed_events_are_listed() -> Result<()> {
    let world = World::new()?;
    assert_eq!(world.ok(&["failed", "list"])?, "no failed events\n");
    assert_eq!(world.json(&["failed", "list"])?, json!([]));
    let ids = world.fail_users()?;
    let list = world.json(&["failed", "list"])?;
    let listed: Vec<_> = list.as_array().context("an array")?.iter().map(|event| event["id"].clone()).collect();
    assert_eq!(listed, [json!(ids[2]), json!(ids[1]), json!(ids[0])]);
    assert_eq!(world.json(&["failed", "list", "--type", "Other"])?, json!([]));
    let one = world.ok(&["failed", "list", "--limit", "1"])?;
    assert!(one.contains(&ids[2]) && !one.contains(&ids[1]) && one.contains("and more"), "{one}");
    // What Redis said of a script may fill pages.
    world.database.psql("UPDATE event_outbox SET last_error = repeat('x', 18000);")?;
    for args in [["stats"].as_slice(), &["failed", "list"]] {
        let text = world.ok(args)?;
        let longest = text.lines().map(str::len).max();
        assert!(text.matches("x…\n").count() == 3 && longest < Some(500), "{text}");
    }
    let whole = world.json(&["failed", "list", "--limit", "1"])?;
    assert_eq!(whole[0]["last_error"].as_str().map(str::len), Some(18_000));
    Ok(())
}

#[test]
fn failed_events_are_retried() -> Result<()> {
    let world = World::new()?;
    let ids = world.fail_users()?;
    let unknown = "0190b8a4-5c1e-7c3a-9c53-0d8f6a1f2b3c";

    let answer = world.run(&["failed", "retry", unknown])?;
    assert_eq!(answer.code, Some(1));
    assert!(answer.stderr.contains(unknown), "{answer:?}");

    let answer = world.run(&["failed", "retry", &ids[0], unknown, "--json"])?;
    assert_eq!((answer.code, answer.json()?), (Some(1), json!({ "changed": 1 })), "the other one is retried all the same");
    assert!(answer.stderr.contains(unknown) && !answer.stderr.contains(&ids[0]), "{answer:?}");

    // No terminal, no question: a retry can be repeated.
    assert_eq!(world.json(&["failed", "retry", "--all", "--type", "Other"])?, json!({ "changed": 0 }));
    assert_eq!(world.json(&["failed", "retry", "--all"])?, json!({ "changed": 2 }));

    assert_eq!(world.json(&["relay", "--until-empty"])?["published"], 3);
    let seen: Vec<Value> =
        world.ok(&["tail", "--no-follow", "--json"])?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(seen.len(), 3);
    Ok(())
}

#[test]
fn failed_events_are_discarded() -> Result<()> {
    let world = World::new()?;
    let ids = world.fail_users()?;
    assert_eq!(world.ok(&["failed", "discard", &ids[1], &ids[1]])?, "1 event deleted\n");

    let refused = world.run(&["failed", "discard", "--all"])?;
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("--yes"), "{refused:?}");
    assert_eq!(world.stats()?["failed"], 2);

    let partly = world.run(&["failed", "discard", &ids[1], &ids[2]])?;
    assert_eq!((partly.code, partly.stdout.as_str()), (Some(1), "1 event deleted\n"));
    assert_eq!(partly.stderr, format!("{}: there is no failed event with this id\n", ids[1]));
    assert_eq!(world.json(&["failed", "discard", "--all", "--yes"])?, json!({ "changed": 1 }));
    assert_eq!(world.stats()?["failed"], 0);
    assert_eq!(world.run(&["failed", "discard", &ids[0]])?.code, Some(1));
    Ok(())
}

#[test]
fn what_is_done_to_failed_events_is_written_down() -> Result<()> {
    let world = World::new()?;
    let ids = world.fail_users()?;
    world.ok(&["failed", "discard", &ids[1]])?;
    world.run(&["failed", "retry", &ids[1]])?;
    world.ok(&["failed", "retry", "--all", "--type", "UserCreated"])?;
    world.ok(&["failed", "retry", "--all"])?;
    let deeds = world.deeds()?;
    let [first, second] = deeds.as_slice() else { anyhow::bail!("nothing that changed nothing: {deeds:?}") };
    let (who, what) = first.split_once('|').context("columns")?;
    assert_eq!(what, "discard|one event|1|1");
    let (user, host) = who.strip_prefix("cli:").and_then(|who| who.split_once('@')).context("user and host")?;
    assert!(!user.is_empty() && !host.is_empty() && user != "unknown", "{who}");
    assert_eq!(*second, format!("{who}|retry|all failed UserCreated|2|2"));
    Ok(())
}

#[test]
fn many_failed_events_are_changed_in_steps() -> Result<()> {
    let world = World::new()?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
         SELECT 'T', 'user', n::text, '{}', 'FAILED', 'no' FROM generate_series(1, 2500) n;",
    )?;
    assert_eq!(world.json(&["failed", "discard", "--all", "--yes"])?, json!({ "changed": 2500 }));
    let events: Vec<_> = world.deeds()?.iter().filter_map(|deed| Some(deed.rsplit_once('|')?.1.to_owned())).collect();
    assert_eq!(events, ["1000", "1000", "500"]);
    Ok(())
}

#[test]
fn what_is_not_failed_is_left_alone() -> Result<()> {
    let world = World::new()?;
    let pending = world.publish_user("1")?;
    for action in ["retry", "discard"] {
        assert_eq!(world.run(&["failed", action, &pending])?.code, Some(1));
    }
    assert_eq!(world.stats()?["pending"], 1);
    Ok(())
}

#[test]
fn cleanup_deletes_what_is_old() -> Result<()> {
    let world = World::new()?;
    world.publish_user("1")?;
    world.publish_user("2")?;
    world.ok(&["relay", "--until-empty"])?;
    world.publish_user("3")?;
    let nothing = "nothing to delete: no event was published more than 7 days ago\nnothing to trim in the streams\n";
    assert_eq!(world.ok(&["cleanup"])?, nothing);
    world.database.psql("UPDATE event_outbox SET published_at = now() - interval '8 days' WHERE aggregate_id = '1'")?;
    let untouched = json!({ "acknowledged": 0, "unread": 0 });
    assert_eq!(
        world.json(&["cleanup", "--retention-days", "9"])?,
        json!({ "events": 0, "batches": 0, "inbox": 0, "streams": untouched })
    );
    let text = world.ok(&["cleanup"])?;
    let deleted = "deleted 1 event that was published more than 7 days ago, 0 journal rows and 0 inbox rows, in ";
    assert!(text.starts_with(deleted), "{text}");
    world.database.psql("INSERT INTO event_inbox VALUES ('mailer', gen_random_uuid(), now() - interval '31 days')")?;
    assert_eq!(
        world.json(&["cleanup", "--retention-days", "0"])?,
        json!({ "events": 1, "batches": 0, "inbox": 1, "streams": untouched })
    );
    assert_eq!(world.stats()?["pending"], 1);
    Ok(())
}

#[test]
fn cleanup_drops_and_makes_days() -> Result<()> {
    let world = World::new()?;
    world.ok(&["migrate", "--partitioned"])?;
    world.publish_user("1")?;
    world.publish_user("2")?;
    world.ok(&["relay", "--until-empty"])?;
    world.publish_user("3")?;
    // As if all that had been nine days ago: the first partition, and what is in it.
    let name = world.database.psql(
        "UPDATE event_outbox SET published_at = now() - interval '8 days' WHERE aggregate_id = '1';
         SELECT min(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'event_outbox'::regclass",
    )?;
    let name = name.trim();
    world.database.psql(&format!(
        "ALTER TABLE event_outbox DETACH PARTITION {name};
         UPDATE {name} SET id = overlay(id::text PLACING '0190' FROM 1)::uuid;
         ALTER TABLE {name} RENAME TO event_outbox_p20240601;
         ALTER TABLE event_outbox ATTACH PARTITION event_outbox_p20240601
             FOR VALUES FROM (MINVALUE) TO ('0190ffff-ffff-7000-8000-000000000000')"
    ))?;
    let answer = world.run(&["cleanup"])?;
    let lines: Vec<_> = answer.stdout.lines().collect();
    assert_eq!(lines[0], "nothing to delete but partitions: no event of event_outbox_rest was published more than 7 days ago");
    assert!(lines[1].starts_with("dropped 1 partition, ") && lines[1].contains("KiB: event_outbox_p20240601; "), "{lines:?}");
    assert!(lines[1].ends_with("; 2 events of them not published, or only lately, moved to event_outbox_rest"), "{lines:?}");
    assert_eq!((lines.len(), answer.code), (3, Some(0)), "{answer:?}");

    world.database.psql("UPDATE event_outbox SET published_at = now() - interval '8 days' WHERE aggregate_id = '2'")?;
    let answer = world.json(&["cleanup"])?;
    assert_eq!(answer["events"], 1);
    assert_eq!(
        answer["partitions"],
        json!({ "made": [], "dropped": [], "bytes": 0, "moved": 0, "kept": [], "postponed": false })
    );
    assert_eq!(world.json(&["relay", "--until-empty"])?["published"], 1);
    Ok(())
}

#[test]
fn cleanup_trims_the_streams_where_there_is_a_redis() -> Result<()> {
    let world = World::new()?;
    let mut redis = world.redis()?;
    world.note("user")?;
    for id in ["1-1", "1-2", "1-3", "1-4"] {
        redis::cmd("XADD").arg(world.user_stream()).arg(id).arg("n").arg(id).exec(&mut redis)?;
    }
    redis::cmd("XGROUP").arg("CREATE").arg(world.user_stream()).arg("mailer").arg("1-2").exec(&mut redis)?;

    let mut command = world.command(&["cleanup"]);
    command.env_remove("REDIS_URL");
    assert_eq!(finish(command)?.stdout, "nothing to delete: no event was published more than 7 days ago\n");
    let mut command = world.command(&["cleanup"]);
    command.env("REDIS_URL", "redis://127.0.0.1:1");
    let answer = finish(command)?;
    assert_eq!((answer.code, answer.stdout.lines().count()), (Some(1), 1), "{answer:?}");

    let answer = world.run(&["cleanup"])?;
    assert_eq!(answer.stdout.lines().nth(1), Some("trimmed 2 stream entries that every consumer group had acknowledged"));
    assert_eq!((answer.code, answer.stderr.as_str()), (Some(0), ""));

    let settings = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.conf", world.database.name()));
    std::fs::write(&settings, "app.streams.maxEntries = 1")?;
    let answer = world.run(&["cleanup", "--json", "--config", &settings.to_string_lossy()])?;
    std::fs::remove_file(&settings)?;
    assert_eq!(answer.json()?["streams"], json!({ "acknowledged": 0, "unread": 1 }));
    for part in ["\"group\":\"mailer\"", "\"entries\":1", &world.user_stream(), "app.streams.maxEntries"] {
        assert!(answer.stderr.contains(part), "{part}: {answer:?}");
    }
    Ok(())
}
