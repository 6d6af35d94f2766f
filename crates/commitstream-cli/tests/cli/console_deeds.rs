//! The web console over HTTP: who may act, on what, and what becomes of it.

use anyhow::Result;

use crate::console_site::{PASSWORD, READ_ONLY, Site, form};
use crate::support::{Running, World, eventually};

const EVENT: &str = "01a206d6-f98b-7780-b3c6-d07e75fbc58f";

#[test]
fn only_an_operator_with_a_form_of_the_session_acts() -> Result<()> {
    let world = World::new()?;
    let ids = world.fail_users()?;
    let site = Site::start(&world)?;
    let (operator, reader) = (site.enter(PASSWORD)?, site.enter(READ_ONLY)?);
    let token = site.get(&operator, "/failures")?.token()?;
    let act = [("remedy", "discard"), ("id", ids[0].as_str())];

    assert!(!site.get(&reader, "/failures")?.body.contains("data-test=\"discard-"), "no buttons");
    let own = site.get(&reader, "/failures")?.token()?;
    assert_eq!(site.post(&reader, "/failures/act", &[&act[..], &[("token", &own)]].concat())?.code, 403, "read-only");
    assert_eq!(site.post(&operator, "/failures/act", &act)?.code, 403, "no token");
    assert_eq!(site.post(&operator, "/failures/act", &[&act[..], &[("token", &own)]].concat())?.code, 403, "another session's");
    let elsewhere = [("Cookie", operator.as_str()), ("Origin", "https://evil.example")];
    let stolen = form(&[&act[..], &[("token", &token)]].concat());
    assert_eq!(site.send("POST", "/failures/act", &elsewhere, &stolen)?.code, 403, "another site");
    assert_eq!(world.stats()?["failed"], 3);

    let asked = site.get(&operator, "/failures/confirm?remedy=discard")?;
    assert!(asked.body.contains("Delete 3 events for good?"), "{}", asked.body);
    let done = site.act(&operator, "/failures/act", &[&act[..], &[("token", &token)]].concat())?;
    assert!(done.body.contains("1 event deleted"), "{}", done.body);
    assert_eq!(world.stats()?["failed"], 2);
    let audit = site.get(&operator, "/audit")?.body;
    assert!(audit.contains("Ada") && audit.contains("discard") && audit.contains(&ids[0]), "{audit}");
    Ok(())
}

#[test]
fn a_discard_is_of_no_more_than_was_shown() -> Result<()> {
    let world = World::new()?;
    let fail = |kind: &str, error: &str, events: u32| {
        world.database.psql(&format!(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
             SELECT {kind}, 'user', n::text, '{{}}', 'FAILED', E'{error}' FROM generate_series(1, {events}) n;"
        ))
    };
    fail("'Lines'", "one\\r\\n\\ttwo", 3)?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let asked = site.get(&cookie, "/failures/confirm?remedy=discard&type=Lines&cause=one+++two")?;
    assert!(asked.body.contains("Delete 3 events for good?"), "{}", asked.body);
    let (token, snapshot) = (asked.token()?, asked.field("snapshot")?);
    let discard = [("remedy", "discard"), ("type", "Lines"), ("cause", "one   two"), ("shown", "3"), ("token", &token)];
    for snapshot in ["", "now", "5:1:"] {
        let refused = site.post(&cookie, "/failures/act", &[&discard[..], &[("snapshot", snapshot)]].concat())?;
        assert!(refused.code == 400 && refused.body.contains("this does not say what was shown"), "{}", refused.body);
    }
    // As many as were shown, of which only one was.
    world.database.psql("UPDATE event_outbox SET status = 'PENDING' WHERE aggregate_id <> '1';")?;
    fail("'Lines'", "one\\r\\n\\ttwo", 2)?;
    assert_eq!(world.stats()?["failed"], 3);
    let discard = [&discard[..], &[("snapshot", &snapshot)]].concat();
    let done = site.act(&cookie, "/failures/act", &discard)?;
    assert!(done.body.contains("1 event deleted") && done.body.contains("2 events of those that were shown"), "{}", done.body);
    assert_eq!(world.stats()?["failed"], 2);
    let again = site.act(&cookie, "/failures/act", &discard)?;
    assert!(again.body.contains("Nothing was done"), "{}", again.body);
    assert_eq!(world.stats()?["failed"], 2, "what was not shown");
    world.database.psql("DELETE FROM event_outbox;")?;

    fail("'T' || n", "other", 205)?;
    let failures = site.get(&cookie, "/failures")?.body;
    assert!(failures.contains("205</b> failed") && failures.contains("And 5 more groups"), "{failures}");
    fail("'Many'", "other", 20_000)?;
    let asked = site.get(&cookie, "/failures/confirm?remedy=discard")?;
    assert!(asked.body.contains("commitstream failed discard") && !asked.body.contains("id=\"confirm\""), "{}", asked.body);
    assert!(asked.body.contains("at least 10,000") && asked.body.contains("id=\"count-all\""), "{}", asked.body);
    let asked = site.get(&cookie, "/failures/confirm?remedy=discard&count_all=true")?;
    assert!(asked.body.contains("Delete 20,205 events for good?"), "{}", asked.body);
    fail("'Many'", "other", 1)?;
    let snapshot = asked.field("snapshot")?;
    let all = [("remedy", "discard"), ("shown", "20205"), ("snapshot", &snapshot), ("token", &token)];
    let done = site.act(&cookie, "/failures/act", &all)?;
    assert!(done.body.contains("20,205 events deleted") && !done.body.contains("id=\"left\""), "{}", done.body);
    assert_eq!(world.stats()?["failed"], 1, "one more has failed since they were counted");
    Ok(())
}

/// Each outcome is a page of its own, for as long as it is kept, and for its session only.
#[test]
fn an_act_leads_to_its_outcome() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let (cookie, other) = (site.enter(PASSWORD)?, site.enter(PASSWORD)?);
    let token = site.get(&cookie, "/failures")?.token()?;
    for n in 1..=21 {
        let fields = [("remedy", "retry"), ("id", EVENT), ("token", token.as_str())];
        let led = site.post(&cookie, "/failures/act", &fields)?;
        assert_eq!((led.code, led.header("location")), (303, Some(format!("/console/outcome/{n}").as_str())));
    }
    assert!(site.get(&cookie, "/outcome/21")?.body.contains("Nothing was done"));
    for (cookie, number) in [(&cookie, "1"), (&cookie, "22"), (&cookie, "x"), (&other, "21")] {
        let page = site.get(cookie, &format!("/outcome/{number}"))?;
        assert!(page.code == 404 && page.body.contains("not kept any more"), "{number}: {}", page.body);
    }
    Ok(())
}

#[test]
fn what_became_of_a_dead_letter_is_said_and_written_down() -> Result<()> {
    let world = World::new()?;
    let (stream, redis) = (world.user_stream(), &mut world.redis()?);
    world.note("user")?;
    for (n, group) in [("1-0", "mail"), ("2-0", "gone")] {
        let event = ["id", EVENT, "type", "T", "aggregate_type", "user", "aggregate_id", "1", "payload", "{}"];
        let event = [&event[..], &["occurred_at", "2026-01-31T12:00:00Z"]].concat();
        redis::cmd("XADD").arg(&[&stream, n]).arg(&event).exec(redis)?;
        let own =
            ["group", group, "entry", n, "reason", "no", "attempts", "5", "history", "[]", "dead_at", "2026-01-31T12:00:05Z"];
        redis::cmd("XADD").arg(&[&format!("{stream}:dead"), n]).arg(&event).arg(&own).exec(redis)?;
    }
    redis::cmd("XGROUP").arg(&["CREATE", &stream, "mail", "$"]).exec(redis)?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let token = site.get(&cookie, "/dead")?.token()?;
    let retry = |dead_id| {
        let fields = [("stream", stream.as_str()), ("dead_id", dead_id), ("action", "retry"), ("token", &token)];
        site.act(&cookie, "/dead/act", &fields)
    };
    let done = retry("1-0")?;
    assert!(done.body.contains("Delivered again"), "{}", done.body);
    let left = retry("2-0")?;
    assert!(left.body.contains("Left as it was: "), "{}", left.body);
    let deeds = world.deeds()?.join("\n");
    let expected = format!("Ada|retry dead letter|{stream}/1-0 of the group mail|1|1\n");
    assert!(deeds.starts_with(&expected), "{deeds}");
    assert!(deeds.contains("2-0 of the group gone: left as it was: ") && deeds.ends_with("|0|0"), "{deeds}");
    Ok(())
}

#[test]
fn a_retried_failure_is_published() -> Result<()> {
    let world = World::new()?;
    world.fail_users()?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let mut relay = Running::new(world.command(&["relay"]))?;
    relay.says("relay is active")?;
    let asked = site.get(&cookie, "/failures/confirm?remedy=retry&type=UserCreated")?;
    let (token, snapshot) = (asked.token()?, asked.field("snapshot")?);
    let retry = [("remedy", "retry"), ("type", "UserCreated"), ("snapshot", &snapshot), ("token", &token)];
    let done = site.act(&cookie, "/failures/act", &retry)?;
    assert!(done.body.contains("3 events made PENDING again"), "{}", done.body);
    eventually("them to be published", || Ok(world.stats()?["published"] == 3))?;
    let overview = site.get(&cookie, "")?;
    assert!(overview.body.contains("All is well"), "{}", overview.body);

    let token = site.get(&cookie, "/relays")?.token()?;
    assert_eq!(site.post(&cookie, "/relays/switch", &[("to", "pause"), ("token", &token)])?.code, 303);
    relay.says("relay is paused by an operator")?;
    eventually("a newer picture", || Ok(site.get(&cookie, "")?.body.contains("Publishing is paused")))?;
    assert_eq!(site.post(&cookie, "/relays/switch", &[("to", "resume"), ("token", &token)])?.code, 303);
    relay.says("relay is active")?;
    let audit = site.get(&cookie, "/audit")?.body;
    for action in ["retry", "pause", "resume"] {
        assert!(audit.contains(action), "{audit}");
    }
    Ok(())
}
