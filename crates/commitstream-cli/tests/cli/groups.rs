//! `groups`: who reads, what waits, what was given up.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::support::World;

fn redis(world: &World, command: &[&str]) -> Result<()> {
    Ok(redis::cmd(command[0]).arg(&command[1..]).exec(&mut world.redis()?)?)
}

/// Nobody reads in the group "audit"; in "mail" one consumer is alive and one is gone.
fn world_with_groups() -> Result<World> {
    let world = World::unmigrated()?;
    let stream = world.user_stream();
    world.note("user")?;
    for id in ["1-0", "2-0", "3-0", "4-0"] {
        redis(&world, &["XADD", &stream, id, "id", "x"])?;
    }
    for group in ["audit", "mail"] {
        redis(&world, &["XGROUP", "CREATE", &stream, group, "0"])?;
    }
    for (consumer, count) in [("c1", "2"), ("c2", "1")] {
        redis(&world, &["XREADGROUP", "GROUP", "mail", consumer, "COUNT", count, "STREAMS", &stream, ">"])?;
    }
    redis(&world, &["XCLAIM", &stream, "mail", "returned", "0", "2-0"])?;
    let members = format!("{{{stream}}}:group:mail:members");
    redis(&world, &["ZADD", &members, "99999999999999", "c1", "1", "c2"])?;
    let own = ["group", "mail", "entry", "1-0", "reason", "no", "attempts", "5", "history", "[]", "dead_at", ""];
    redis(&world, &[&["XADD", &format!("{stream}:dead"), "*"][..], &own].concat())?;
    Ok(world)
}

#[test]
fn where_nobody_reads_it_says_how_a_group_comes_to_be() -> Result<()> {
    let world = World::unmigrated()?;
    let text = world.ok(&["groups"])?;
    assert_eq!(
        text.replace(&world.prefix, "events:"),
        "no consumer group under events:*: a consumer makes its group when it starts\n"
    );
    assert_eq!(world.json(&["groups"])?, json!([]));
    assert!(world.ok(&["groups", "user"])?.starts_with("no consumer group user: "));
    Ok(())
}

#[test]
fn groups_as_people_read_them() -> Result<()> {
    let world = world_with_groups()?;
    insta::assert_snapshot!(world.lasting(&world.ok(&["groups"])?), @"
    STREAM GROUP CONSUMERS PENDING OLDEST BEHIND DEAD
    events:user audit 0 0 - 4 0
    events:user mail 1 of 2 alive 3 TIME ago 1 1
    audit of events:user has no living consumer: its events wait
    ");
    insta::assert_snapshot!(world.lasting(&world.ok(&["groups", "user", "--consumers"])?), @"
    STREAM GROUP CONSUMERS PENDING OLDEST BEHIND DEAD
    events:user audit 0 0 - 4 0
    events:user mail 1 of 2 alive 3 TIME ago 1 1

    STREAM GROUP CONSUMER STATE PENDING OLDEST IDLE
    events:user mail c1 alive 1 TIME ago TIME
    events:user mail c2 gone 1 TIME ago TIME
    events:user mail returned to be taken over 1 TIME ago TIME
    audit of events:user has no living consumer: its events wait
    ");
    Ok(())
}

#[test]
fn groups_as_programs_read_them() -> Result<()> {
    let world = world_with_groups()?;
    let groups = world.json(&["groups"])?;
    let [audit, mail] = groups.as_array().context("an array")?.as_slice() else { anyhow::bail!("{groups}") };
    assert_eq!([&audit["group"], &audit["behind"], &audit["pending"]], [&json!("audit"), &json!(4), &json!(0)]);
    assert_eq!((&audit["oldest_pending_age_ms"], &audit["consumers"]), (&Value::Null, &json!([])));
    assert_eq!([&mail["stream"], &mail["group"]], [&json!(world.user_stream()), &json!("mail")]);
    assert_eq!([&mail["behind"], &mail["pending"], &mail["dead"]], [&json!(1), &json!(3), &json!(1)]);
    assert_eq!(mail["last_delivered"], "3-0");
    let consumers = mail["consumers"].as_array().context("an array")?;
    let told: Vec<_> = consumers.iter().map(|c| (c["name"].as_str(), c["pending"].as_u64(), c["alive"].as_bool())).collect();
    let one = Some(1);
    assert_eq!(told, [(Some("c1"), one, Some(true)), (Some("c2"), one, Some(false)), (Some("returned"), one, None)]);
    assert!(consumers.iter().all(|c| c["idle_ms"].is_u64() && c["oldest_pending_age_ms"].is_u64()), "{mail}");
    Ok(())
}
