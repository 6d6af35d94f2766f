//! `dead`: what consumers gave up, as people and programs see it, and what becomes of it.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::support::{World, finish};

const EVENT: &str = "01a206d6-f98b-7780-b3c6-d07e75fbc58f";
const HISTORY: &str = r#"[{"at":"2026-01-31T12:00:00Z","consumer":"c1","reason":"no"}]"#;

/// Gives up event `n` of the stream of users in a group, as a consumer does: the entry is acknowledged, and `n-0` in the dead letters.
fn bury(world: &World, group: &str, event_type: &str, n: u32) -> Result<()> {
    let (stream, redis) = (world.user_stream(), &mut world.redis()?);
    let (id, user) = (format!("{n}-0"), n.to_string());
    let event = ["id", EVENT, "type", event_type, "aggregate_type", "user", "aggregate_id", &user];
    let event = [&event[..], &["occurred_at", "2026-01-31T12:00:00Z", "payload", r#"{"a": 1}"#]].concat();
    let (consumer, dead) = (["XREADGROUP", "GROUP", group, "c1", "STREAMS", &stream, ">"], format!("{stream}:dead"));
    world.note("user")?;
    redis::cmd("XADD").arg(&stream).arg(&id).arg(&event).exec(redis)?;
    // It may be there already.
    redis::cmd("XGROUP").arg(&["CREATE", &stream, group, "0"]).exec(redis).ok();
    redis::cmd(consumer[0]).arg(&consumer[1..]).exec(redis)?;
    redis::cmd("XACK").arg(&[&stream, group, &id]).exec(redis)?;
    let own = ["group", group, "entry", &id, "reason", "no such user", "attempts", "5", "history", HISTORY];
    let own = [&own[..], &["dead_at", "2021-01-31T12:00:05Z"]].concat();
    Ok(redis::cmd("XADD").arg(dead).arg(&id).arg(event).arg(own).exec(redis)?)
}

fn pending(world: &World, group: &str) -> Result<Vec<(String, String)>> {
    let mut command = redis::cmd("XPENDING");
    command.arg(world.user_stream()).arg(group).arg(&["-", "+", "100"]);
    let pending: Vec<(String, String, u64, u64)> = command.query(&mut world.redis()?)?;
    Ok(pending.into_iter().map(|(id, consumer, ..)| (id, consumer)).collect())
}

#[test]
fn dead_letters_are_listed() -> Result<()> {
    let world = World::new()?;
    assert_eq!(world.ok(&["dead", "list"])?, "no dead letters: no consumer has given up an event\n");
    assert_eq!(world.json(&["dead", "list"])?, json!([]));
    bury(&world, "mail", "UserCreated", 1)?;
    bury(&world, "audit", "UserRenamed", 2)?;
    let text = world.ok(&["dead", "list"])?;
    insta::assert_snapshot!(world.lasting(&text), @"
    ID GROUP TYPE AGGREGATE ATTEMPTS AGE REASON
    user/1-0 mail UserCreated user 1 5 TIME no such user
    user/2-0 audit UserRenamed user 2 5 TIME no such user

    When the cause is mended: `commitstream dead retry --all`.
    ");

    let list = world.json(&["dead", "list", "--group", "mail"])?;
    let [letter] = list.as_array().context("an array")?.as_slice() else { anyhow::bail!("{list}") };
    assert_eq!(letter["stream"], world.user_stream());
    assert_eq!([&letter["dead_id"], &letter["entry"], &letter["event_id"]], [&json!("1-0"), &json!("1-0"), &json!(EVENT)]);
    assert_eq!((&letter["history"], &letter["payload"]), (&serde_json::from_str(HISTORY)?, &json!({ "a": 1 })));
    assert_eq!([&letter["attempts"], &letter["headers"]], [&json!(5), &Value::Null]);

    let one = world.ok(&["dead", "list", "--limit", "1"])?;
    assert!(one.contains("user/1-0") && !one.contains("user/2-0") && one.contains("and more"), "{one}");
    assert_eq!(world.ok(&["dead", "list", "--type", "Other"])?, "no dead letters: none matches\n");
    assert_eq!(world.ok(&["tail", "--no-follow", "--json"])?.lines().count(), 2, "dead letters are no events");
    Ok(())
}

#[test]
fn dead_letters_are_retried_in_their_group_only() -> Result<()> {
    let world = World::new()?;
    bury(&world, "mail", "UserCreated", 1)?;
    bury(&world, "mail", "UserRenamed", 2)?;
    bury(&world, "mail", "UserRenamed", 3)?;
    bury(&world, "audit", "UserCreated", 4)?;
    let text = world.ok(&["dead", "retry", "user/1-0"])?;
    insta::assert_snapshot!(text, @"1 dead letter delivered again, to the same group only: a running consumer takes over within about a second");
    assert_eq!(pending(&world, "mail")?, [("1-0".to_owned(), "returned".to_owned())]);
    let again = world.run(&["dead", "retry", "user/1-0", "--json"])?;
    assert_eq!((again.code, again.json()?), (Some(1), json!({ "changed": 0 })));
    assert!(again.stderr.contains("user/1-0: there is no dead letter with this id"), "{again:?}");

    let partly = world.run(&["dead", "retry", "user/1-0", "user/2-0", "--json"])?;
    assert_eq!((partly.code, partly.json()?), (Some(1), json!({ "changed": 1 })), "the other one is delivered all the same");

    // By the event, which another group has given up, too; and no question without a terminal.
    assert_eq!(world.json(&["dead", "retry", EVENT, "--group", "mail"])?, json!({ "changed": 1 }));
    assert_eq!(pending(&world, "mail")?.len(), 3);
    assert!(pending(&world, "audit")?.iter().all(|(_, consumer)| consumer != "returned"));
    assert_eq!(world.json(&["dead", "retry", "--all", "--type", "Other"])?, json!({ "changed": 0 }));
    assert_eq!(world.json(&["dead", "retry", "--all"])?, json!({ "changed": 1 }));
    assert_eq!(world.json(&["dead", "list"])?, json!([]));
    Ok(())
}

#[test]
fn a_retry_that_cannot_be_done_says_why() -> Result<()> {
    let world = World::new()?;
    bury(&world, "mail", "UserCreated", 1)?;
    bury(&world, "audit", "UserCreated", 2)?;
    redis::cmd("XGROUP").arg(&["DESTROY", &world.user_stream(), "mail"]).exec(&mut world.redis()?)?;
    let answer = world.run(&["dead", "retry", "--all"])?;
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.stdout.starts_with("1 dead letter delivered again"), "{answer:?}");
    insta::assert_snapshot!(
        answer.stderr.replace(&world.prefix, "events:"),
        @"user/1-0: the stream events:user has no consumer group mail: start its consumer, which makes the group, and retry then"
    );
    assert_eq!(world.json(&["dead", "list"])?.as_array().map(Vec::len), Some(1));
    let wrong = world.run(&["dead", "retry", "1-0"])?;
    assert!(wrong.code == Some(2) && wrong.stderr.contains("such as user/1769860800000-0"), "{wrong:?}");
    Ok(())
}

#[test]
fn dead_letters_are_discarded() -> Result<()> {
    let world = World::new()?;
    for n in 1..=3 {
        bury(&world, "mail", "UserCreated", n)?;
    }
    let full = format!("{}/2-0", world.user_stream());
    assert_eq!(world.ok(&["dead", "discard", &full])?, "1 dead letter deleted\n");
    let partly = world.run(&["dead", "discard", &full, "user/3-0"])?;
    assert_eq!((partly.code, partly.stdout.as_str()), (Some(1), "1 dead letter deleted\n"));
    assert!(partly.stderr.contains("there is no dead letter with this id"), "{partly:?}");
    let refused = world.run(&["dead", "discard", "--all"])?;
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("--yes"), "{refused:?}");
    assert_eq!(world.json(&["dead", "discard", "--all", "--yes"])?, json!({ "changed": 1 }));
    assert_eq!(world.run(&["dead", "discard", &full])?.code, Some(1));
    assert!(pending(&world, "mail")?.is_empty());
    Ok(())
}

#[test]
fn what_is_done_to_dead_letters_is_written_down() -> Result<()> {
    let world = World::new()?;
    for n in 1..=4 {
        bury(&world, if n == 4 { "audit" } else { "mail" }, "UserCreated", n)?;
    }
    redis::cmd("XGROUP").arg(&["DESTROY", &world.user_stream(), "audit"]).exec(&mut world.redis()?)?;
    world.ok(&["dead", "discard", "user/1-0"])?;
    assert_eq!(world.run(&["dead", "retry", "user/4-0"])?.code, Some(1));
    assert_eq!(world.run(&["dead", "retry", "--all"])?.code, Some(1));
    world.run(&["dead", "retry", "--all", "--group", "mail"])?;
    let text = world.deeds()?.join("\n").replace(&world.prefix, "events:");
    let who = text.split('|').next().unwrap_or_default().to_owned();
    assert!(who.starts_with("cli:") && who.contains('@'), "{who}");
    insta::assert_snapshot!(text.replace(&who, "WHO"), @"
    WHO|discard dead letter|events:user/1-0 of the group mail|1|1
    WHO|retry dead letter|events:user/4-0 of the group audit: left as it was: the stream events:user has no consumer group audit: start its consumer, which makes the group, and retry then|0|0
    WHO|retry dead letter|3 dead letters of the groups audit, mail: 1 left alone|2|2
    ");
    Ok(())
}

#[test]
fn without_a_database_dead_letters_are_retried_and_it_says_that_nothing_is_written_down() -> Result<()> {
    let world = World::unmigrated()?;
    bury(&world, "mail", "UserCreated", 1)?;
    let mut retry = world.command(&["dead", "retry", "user/1-0"]);
    retry.env_remove("DATABASE_URL");
    let answer = finish(retry)?;
    assert!(answer.code == Some(0) && answer.stderr.contains("no DATABASE_URL is set"), "{answer:?}");

    bury(&world, "mail", "UserCreated", 2)?;
    let refused = world.run(&["dead", "retry", "user/2-0"])?;
    assert!(refused.code == Some(1) && refused.stderr.contains("commitstream migrate"), "{refused:?}");
    assert_eq!(pending(&world, "mail")?.len(), 1, "what cannot be written down is not done");
    Ok(())
}
