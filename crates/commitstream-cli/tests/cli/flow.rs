//! The way of an event, command by command.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::support::{World, finish, finish_with_input};

#[test]
fn migrate_twice() -> Result<()> {
    let world = World::unmigrated()?;
    assert_eq!(world.ok(&["migrate"])?, "created the outbox tables in schema public, version 9\n");
    assert_eq!(world.ok(&["migrate"])?, "nothing to do: version 9 is in force in schema public\n");
    assert_eq!(world.json(&["migrate"])?, json!({ "from": 9, "to": 9 }));
    let another = World::unmigrated()?;
    assert_eq!(another.json(&["migrate"])?, json!({ "from": null, "to": 9 }));
    Ok(())
}

#[test]
fn migrate_partitions_by_day_and_keeps_that() -> Result<()> {
    let world = World::new()?;
    world.publish_user("1")?;
    world.database.psql("INSERT INTO event_outbox (id, event_type, aggregate_type, aggregate_id, payload) VALUES (gen_random_uuid(), 'E', 'user', '2', '{}')")?;
    // Ids of that kind are hardly ever before those of today.
    world.database.psql("UPDATE event_outbox SET id = overlay(id::text PLACING 'f' FROM 1)::uuid WHERE aggregate_id = '2'")?;
    let answer = world.run(&["migrate", "--partitioned"])?;
    assert_eq!((answer.code, answer.stderr.as_str()), (Some(0), "partitioning event_outbox; producers wait until it is done\n"));
    let lines: Vec<_> = answer.stdout.lines().collect();
    assert!(lines[0].starts_with("nothing to do: version "), "{lines:?}");
    assert_eq!(
        lines[1],
        "partitioned event_outbox by day (UTC); 1 event with ids of other days or kinds went to event_outbox_rest"
    );
    assert!(lines[2].starts_with("made 3 partitions: event_outbox_p20"), "{lines:?}");
    assert_eq!(lines.len(), 3);

    for args in [&["migrate", "--partitioned"] as &[_], &["migrate"]] {
        let again = world.run(args)?;
        assert!(again.stdout.starts_with("nothing to do") && again.stdout.lines().count() == 1 && again.stderr.is_empty());
        let again = world.json(args)?;
        assert_eq!(again["partitioned"], false);
        assert_eq!(again["partitions"]["made"], json!([]));
    }
    assert_eq!(world.json(&["relay", "--until-empty"])?["published"], 2);

    let fresh = World::unmigrated()?;
    let fresh = fresh.json(&["migrate", "--partitioned"])?;
    assert_eq!((&fresh["partitioned"], fresh["partitions"]["made"].as_array().map(Vec::len)), (&json!(true), Some(3)));
    Ok(())
}

#[test]
fn migrate_says_what_stands_in_the_way_of_partitions() -> Result<()> {
    let world = World::new()?;
    world.database.psql("CREATE VIEW report AS SELECT id FROM event_outbox")?;
    let refused = world.run(&["migrate", "--partitioned"])?;
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("view report"), "{refused:?}");
    world.database.psql("DROP VIEW report")?;
    world.ok(&["migrate", "--partitioned"])?;
    Ok(())
}

#[test]
fn from_publish_over_the_relay_to_tail() -> Result<()> {
    let world = World::new()?;
    let published = world.json(&[
        "publish",
        "--type",
        "UserCreated",
        "--aggregate-type",
        "user",
        "--aggregate-id",
        "-42",
        "--payload",
        r#"{"name": "Ada", "balance": 1.10000000000000000000001}"#,
        "--header",
        "traceparent=00-ab=c",
        "--occurred-at",
        "2026-01-31T12:00:00.123456+02:00",
    ])?;
    assert_eq!(published["route"], "outbox");

    let drained = world.json(&["relay", "--until-empty"])?;
    assert_eq!(drained, json!({ "published": 1, "refused": 0, "failed": 0 }));

    let line = world.ok(&["tail", "user", "--no-follow", "--json"])?;
    // The payload's digits are as they were sent, so it is compared as text.
    assert!(line.contains(r#""balance": 1.10000000000000000000001"#), "{line}");
    let mut event: Value = serde_json::from_str(&line)?;
    let fields = event.as_object_mut().context("an object")?;
    assert!(fields.remove("entry_id").is_some_and(|id| id.as_str().is_some_and(|id| id.contains('-'))));
    assert_eq!(fields.remove("payload").map(|payload| payload["name"].clone()), Some(json!("Ada")));
    assert_eq!(
        event,
        json!({
            "stream": world.user_stream(),
            "id": published["id"],
            "type": "UserCreated",
            "aggregate_type": "user",
            "aggregate_id": "-42",
            "occurred_at": "2026-01-31T10:00:00.123456Z",
            "headers": { "traceparent": "00-ab=c" },
        })
    );
    Ok(())
}

#[test]
fn the_relay_says_what_it_drained() -> Result<()> {
    let world = World::new()?;
    for user in ["1", "2"] {
        world.publish_user(user)?;
    }
    let drained = world.run(&["relay", "--until-empty"])?;
    assert!(
        drained.stdout.starts_with("published 2 events in ") && drained.stdout.ends_with("; nothing is pending\n"),
        "{drained:?}"
    );
    assert!(world.ok(&["relay", "--until-empty"])?.starts_with("published 0 events"));
    Ok(())
}

#[test]
fn the_way_follows_lane_and_settings() -> Result<()> {
    let world = World::new()?;
    let args = ["publish", "--type", "ValueRead", "--aggregate-type", "metric", "--aggregate-id", "m", "--json"];
    let fast = [args.as_slice(), &["--lane", "high-frequency"]].concat();

    assert_eq!(world.json(&args[..7])?["route"], "outbox");
    let sent = world.run(&fast)?.json()?;
    assert_eq!(sent["route"], "streams");
    let seen: Value = serde_json::from_str(&world.ok(&["tail", "metric", "--no-follow", "--json"])?)?;
    assert_eq!(seen["id"], sent["id"]);

    for (event_type, lane, route) in [
        ("SessionStarted", None, "streams"),
        ("MetricUpdated", None, "streams"),
        ("UserCreated", None, "outbox"),
        ("MetricUpdated", Some("critical"), "outbox"),
        ("UserCreated", Some("high-frequency"), "streams"),
    ] {
        let mut args = vec!["publish", "--type", event_type, "--aggregate-type", "any", "--aggregate-id", "1"];
        args.extend(lane.into_iter().flat_map(|lane| ["--lane", lane]));
        assert_eq!(world.json(&args)?["route"], route, "{event_type} {lane:?}");
    }
    let settings = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.conf", world.database.name()));
    std::fs::write(&settings, "app.eventPublishing.overrides { MetricUpdated = outbox }")?;
    let metric = ["publish", "--type", "MetricUpdated", "--aggregate-type", "any", "--aggregate-id", "1"];
    let overridden = world.json(&[metric.as_slice(), &["--config", &settings.to_string_lossy()]].concat())?;
    assert_eq!(overridden["route"], "outbox", "an override");
    std::fs::remove_file(&settings)?;
    assert_eq!(world.stats()?["pending"], 4);

    for (variable, value, args, route) in [
        ("EVENT_PUBLISHING_STRATEGY", "outbox", fast.as_slice(), "outbox"),
        ("EVENT_PUBLISHING_STRATEGY", "streams", &args, "streams"),
        ("OUTBOX_ENABLED", "false", &args, "streams"),
    ] {
        let mut command = world.command(args);
        command.env(variable, value);
        assert_eq!(finish(command)?.json()?["route"], route, "{variable}={value}");
    }
    assert_eq!(world.stats()?["pending"], 5);
    Ok(())
}

#[test]
fn the_outbox_needs_no_redis_and_streams_need_no_postgres() -> Result<()> {
    let world = World::new()?;
    let args = ["publish", "--type", "A", "--aggregate-type", "a", "--aggregate-id", "1"];
    let mut command = world.command(&args);
    command.env_remove("REDIS_URL");
    assert_eq!(finish(command)?.code, Some(0));

    let mut command = world.command(&[args.as_slice(), &["--lane", "high-frequency"]].concat());
    command.env_remove("DATABASE_URL");
    assert_eq!(finish(command)?.code, Some(0));
    Ok(())
}

#[test]
fn a_payload_from_standard_input_or_a_file() -> Result<()> {
    let world = World::new()?;
    let args = ["publish", "--type", "A", "--aggregate-type", "a", "--aggregate-id", "1"];
    let input = b"{\n  \"from\": \"stdin\"\n}\n";
    for option in ["--payload", "--payload-file"] {
        let answer = finish_with_input(world.command(&[args.as_slice(), &[option, "-"]].concat()), input)?;
        assert_eq!(answer.code, Some(0), "{answer:?}");
    }
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.json", world.database.name()));
    std::fs::write(&file, r#"{"from": "file"}"#)?;
    let answer = finish(world.command(&[args.as_slice(), &["--payload-file", &file.to_string_lossy()]].concat()))?;
    std::fs::remove_file(&file)?;
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert_eq!(world.database.psql("SELECT payload->>'from' FROM event_outbox ORDER BY seq")?, "stdin\nstdin\nfile\n");
    Ok(())
}
