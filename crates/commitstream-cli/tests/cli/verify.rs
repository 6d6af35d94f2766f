//! The audit, as people and as programs read it.

use anyhow::{Context, Result};
use serde_json::json;

use crate::support::World;

/// Ten events of two users, in their stream.
fn published() -> Result<World> {
    let world = World::new()?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'UserCreated', 'user', (n % 2)::text, '{}' FROM generate_series(1, 10) n",
    )?;
    world.ok(&["relay", "--until-empty"])?;
    Ok(world)
}

/// The entry ids of the user stream.
fn entries(world: &World) -> Result<Vec<String>> {
    let entries: Vec<(String, Vec<String>)> =
        redis::cmd("XRANGE").arg(world.user_stream()).arg("-").arg("+").query(&mut world.redis()?)?;
    Ok(entries.into_iter().map(|(id, _)| id).collect())
}

/// The text without what differs from run to run.
fn without_time(text: &str) -> String {
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    format!("{}\n{rest}", first.split(" compared in ").next().unwrap_or(first))
}

#[test]
fn an_empty_outbox_is_nothing_to_verify() -> Result<()> {
    let world = World::new()?;
    let text = world.ok(&["verify"])?;
    let expected = format!("There is nothing to verify: the outbox is empty, and so are the streams {}*.\n", world.prefix);
    assert_eq!(text, expected);
    Ok(())
}

#[test]
fn a_clean_audit_as_people_and_programs_read_it() -> Result<()> {
    let world = published()?;
    world.publish_user("3")?;
    let answer = world.run(&["verify"])?;
    assert_eq!((answer.code, answer.stderr.as_str()), (Some(0), ""));
    insta::assert_snapshot!(without_time(&answer.stdout), @r"
    10 entries in 1 stream and 11 rows

    missing       0
    duplicated    0
    out of order  0
    unsettled     0
    misplaced     0

    1 row still to be published

    Nothing is missing, duplicated, out of order, unsettled or misplaced.
    ");
    let report = world.json(&["verify"])?;
    let none = json!({ "count": 0, "first": [] });
    assert_eq!(
        report,
        json!({
            "ok": true, "streams": 1, "entries": 10, "published": 10, "pending": 1, "failed": 0, "open_batches": 0,
            "missing": none, "duplicated": none, "out_of_order": none, "unsettled": none, "misplaced": none,
            "trimmed": 0, "later": 0, "unknown": 0
        })
    );
    Ok(())
}

#[test]
fn faults_are_counted_and_named_and_the_exit_code_says_so() -> Result<()> {
    let world = published()?;
    let ids = entries(&world)?;
    redis::cmd("XDEL").arg(world.user_stream()).arg(&ids[3..7]).exec(&mut world.redis()?)?;
    let row = world.database.psql("SELECT id FROM event_outbox ORDER BY seq LIMIT 1")?;
    let again =
        redis::cmd("XADD").arg(world.user_stream()).arg("*").arg("id").arg(row.trim()).query::<String>(&mut world.redis()?)?;

    let answer = world.run(&["verify", "--limit", "2"])?;
    assert_eq!((answer.code, answer.stderr.as_str()), (Some(1), ""));
    let missing = world.database.psql("SELECT id FROM event_outbox WHERE seq IN (4, 5) ORDER BY seq")?;
    let mut text =
        without_time(&answer.stdout).replace(&world.prefix, "PREFIX:").replace(row.trim(), "THE FIRST").replace(&again, "AGAIN");
    for (id, name) in missing.lines().zip(["THE FOURTH", "THE FIFTH"]) {
        text = text.replace(id, name);
    }
    let text: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    7 entries in 1 stream and 10 rows

    missing 4
    duplicated 1
    out of order 0
    unsettled 0
    misplaced 0

    The streams are not what the outbox says: 4 missing, 1 duplicated.

    FAULT EVENT STREAM ENTRY AGGREGATE
    missing THE FOURTH PREFIX:user - 0
    missing THE FIFTH PREFIX:user - 1
    duplicated THE FIRST PREFIX:user AGAIN 1
    and more: see --limit
    ");

    let answer = world.run(&["verify", "--json"])?;
    assert_eq!(answer.code, Some(1));
    let report = answer.json()?;
    assert_eq!(
        (&report["ok"], &report["missing"]["count"], &report["duplicated"]["count"]),
        (&json!(false), &json!(4), &json!(1))
    );
    let named = report["missing"]["first"].as_array().context("an array")?;
    assert_eq!(named.len(), 4);
    let first = json!({
        "event_id": missing.lines().next(), "stream": world.user_stream(), "entry_id": null, "aggregate_type": "user", "aggregate_id": "0"
    });
    assert_eq!(named[0], first);
    Ok(())
}

#[test]
fn what_is_missing_is_shown_and_then_published_again() -> Result<()> {
    let world = published()?;
    assert!(world.ok(&["verify", "--republish"])?.ends_with("nothing is missing, so nothing has to be published again\n"));
    let ids = entries(&world)?;
    redis::cmd("XDEL").arg(world.user_stream()).arg(&ids[3..7]).exec(&mut world.redis()?)?;
    let answer = world.run(&["verify", "--republish"])?;
    let would =
        "4 events would be published again, behind newer ones of their aggregates: `commitstream verify --republish --yes`";
    assert_eq!((answer.code, answer.stdout.lines().last()), (Some(1), Some(would)), "{answer:?}");
    assert_eq!(world.stats()?["pending"], 0, "nothing was done");
    // One cannot come back: its row was cleaned up.
    world.database.psql("DELETE FROM event_outbox WHERE seq = (SELECT min(seq) + 3 FROM event_outbox)")?;
    let answer = world.run(&["verify", "--republish", "--yes"])?;
    let lines: Vec<_> = answer.stdout.lines().rev().take(2).collect();
    assert_eq!(lines[1], "3 events unsent again: a running relay publishes what is missing");
    assert!(lines[0].starts_with("1 event cannot be published again: "), "{answer:?}");
    assert_eq!((answer.code, &world.stats()?["pending"]), (Some(1), &json!(3)));
    world.ok(&["relay", "--until-empty"])?;
    assert_eq!(entries(&world)?.len(), 9);
    let report = world.run(&["verify", "--republish", "--yes", "--json"])?.json()?;
    assert_eq!((&report["missing"]["count"], &report["republished"]), (&json!(1), &json!(0)));
    assert_eq!(world.run(&["verify", "--yes"])?.code, Some(2));
    Ok(())
}

#[test]
fn another_redis_or_prefix_is_suspected_when_there_is_no_stream() -> Result<()> {
    let world = published()?;
    let mut command = world.command(&["verify"]);
    command.env("STREAM_PREFIX", "elsewhere:");
    let answer = crate::support::finish(command)?;
    assert_eq!(answer.code, Some(1));
    assert!(answer.stdout.contains("There is no stream elsewhere:* at all: are REDIS_URL and STREAM_PREFIX"), "{answer:?}");
    Ok(())
}

#[test]
fn wrong_use_of_verify_is_told_apart_from_faults() -> Result<()> {
    let world = World::new()?;
    let mut command = world.command(&["verify"]);
    command.env_remove("REDIS_URL");
    let answer = crate::support::finish(command)?;
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert_eq!(world.run(&["verify", "--limit", "many"])?.code, Some(2));
    let answer = World::unmigrated()?.run(&["verify"])?;
    assert_eq!(answer.code, Some(1));
    assert!(answer.stderr.contains("commitstream migrate"), "{answer:?}");
    Ok(())
}

/// As after a restore: rows are unsent again that are in their stream.
#[test]
fn what_is_in_the_streams_is_settled_while_relays_are_paused() -> Result<()> {
    let world = published()?;
    world.database.psql("UPDATE event_outbox SET status = 'PENDING', published_at = NULL WHERE seq > 6;")?;
    let answer = world.run(&["verify"])?;
    assert_eq!(answer.code, Some(1));
    world.ok(&["relays", "pause"])?;
    let answer = world.run(&["verify", "--settle"])?;
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(answer.stdout.contains("\nmarked as published, because they are in their streams: 4 events\n"), "{answer:?}");
    let report = world.json(&["verify", "--settle"])?;
    assert_eq!((&report["ok"], &report["settled"], &report["published"]), (&json!(true), &json!(0), &json!(10)));
    world.ok(&["relays", "resume"])?;
    let alive = "INSERT INTO outbox_relay (relay_id, host, pid, version, expires_at, session_pid, shares, state)
                 SELECT gen_random_uuid(), 'h', 1, 'v', now() + interval '1 hour', pid, true, 'active'
                 FROM pg_stat_activity WHERE backend_type = 'checkpointer';";
    world.database.psql(alive)?;
    let answer = world.run(&["verify", "--settle"])?;
    assert_eq!(answer.code, Some(1));
    assert!(answer.stderr.contains("a relay is at work") && answer.stderr.contains("commitstream relays pause"), "{answer:?}");
    Ok(())
}
