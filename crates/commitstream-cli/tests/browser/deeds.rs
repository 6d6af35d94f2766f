//! What operators do, and what becomes of it.

use anyhow::Result;

use crate::stage::{PASSWORD, Stage};

const EVENT: &str = "01a206d6-f98b-7780-b3c6-d07e75fbc58f";

#[test]
fn a_failure_is_retried_and_published() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    stage.fail_users(&["1", "2", "3"])?;
    stage.enter(PASSWORD)?;
    browser.open("/failures")?;
    let group = browser.text("#groups tbody tr")?;
    assert!(group.contains("UserCreated") && group.contains("too large"), "{group}");

    // One of them, from its own page.
    browser.click("#groups tbody a")?;
    browser.click("#events tbody a")?;
    assert_eq!(browser.text("#status")?, "FAILED");
    browser.click("#retry")?;
    assert!(browser.text("#outcome")?.starts_with("1 event made PENDING again"));
    stage.until("published", 1)?;

    // The others, as a group.
    browser.open("/failures")?;
    browser.click("[data-test=retry-group]")?;
    assert_eq!(browser.text("#question")?, "Retry 2 events?");
    browser.click("#confirm")?;
    assert!(browser.text("#outcome")?.starts_with("2 events made PENDING again"));
    stage.until("published", 3)?;
    browser.open("/failures")?;
    assert!(browser.text("[data-test=nothing]")?.starts_with("No event has failed"));
    Ok(())
}

#[test]
fn a_discard_is_asked_about_first() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    let ids = stage.fail_users(&["1", "2", "3"])?;
    stage.enter(PASSWORD)?;
    browser.open("/failures")?;
    browser.click("[data-test=discard-group]")?;
    assert_eq!(browser.text("#question")?, "Delete 3 events for good?");
    browser.click("#back")?;
    browser.until("the failures", "document.querySelector('#groups')")?;
    assert_eq!(stage.world.stats()?["failed"], 3, "nothing was done");

    browser.click("[data-test=discard-group]")?;
    browser.click("#confirm")?;
    assert_eq!(browser.text("#outcome")?, "3 events deleted.");
    let requests =
        browser.script("return performance.getEntriesByType('navigation')[0].redirectCount + ' ' + location.pathname;")?;
    assert_eq!(requests, "1 /console/outcome/1", "it is a page of its own");
    stage.fail_users(&["4"])?;
    browser.script("location.reload();")?;
    browser.until("it to be loaded again", "performance.getEntriesByType('navigation')[0].type === 'reload'")?;
    assert_eq!(browser.text("#outcome")?, "3 events deleted.");
    assert_eq!(stage.world.stats()?["failed"], 1, "nothing is done again");
    stage.world.database.psql("DELETE FROM event_outbox WHERE status = 'FAILED';")?;
    assert_eq!(stage.world.stats()?["failed"], 0);
    browser.open("/audit")?;
    let deed = browser.text("#audit tbody tr")?;
    assert!(deed.contains("Ada") && deed.contains("discard") && deed.contains("UserCreated"), "{deed}");
    assert!(ids.iter().all(|id| deed.contains(id)), "{deed}");
    Ok(())
}

#[test]
fn relays_are_paused_and_resumed() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    stage.enter(PASSWORD)?;
    browser.open("/relays")?;
    browser.click("details summary")?;
    browser.click("#pause")?;
    assert!(browser.text("#paused")?.starts_with("Paused by Ada"));
    let paused = "document.querySelector('#relays').textContent.includes('paused')";
    browser.until("the relay to pause", &format!("{paused} || location.reload()"))?;
    stage.world.publish_user("1")?;
    browser.open("")?;
    browser
        .until("the overview to say so", "document.querySelector('#sentence').textContent.startsWith('Publishing is paused')")?;
    assert_eq!(stage.world.stats()?["pending"], 1);
    browser.open("/relays")?;
    browser.click("#resume")?;
    stage.until("published", 1)?;
    assert_eq!(browser.count("#paused")?, 0);
    Ok(())
}

#[test]
fn dead_letters_are_delivered_again_or_deleted() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let (browser, stream, redis) = (&stage.browser, stage.world.user_stream(), &mut stage.world.redis()?);
    // As a consumer leaves them: its group has acknowledged the entry.
    for (entry, reason) in [("1-0", "no such mailbox"), ("2-0", "the address is empty")] {
        let event = ["id", EVENT, "type", "UserCreated", "aggregate_type", "user", "aggregate_id", "7"];
        let event = [&event[..], &["occurred_at", "2026-01-31T12:00:00Z", "payload", "{}"]].concat();
        let own = [
            "group",
            "mail",
            "entry",
            entry,
            "reason",
            reason,
            "attempts",
            "5",
            "history",
            "[]",
            "dead_at",
            "2026-01-31T12:00:00Z",
        ];
        stage.world.note("user")?;
        redis::cmd("XADD").arg(&stream).arg(entry).arg(&event).exec(redis)?;
        redis::cmd("XADD").arg(format!("{stream}:dead")).arg(entry).arg(&event).arg(&own).exec(redis)?;
    }
    redis::cmd("XGROUP").arg(&["CREATE", &stream, "mail", "$"]).exec(redis)?;
    stage.enter(PASSWORD)?;
    browser.open("/dead")?;
    assert_eq!(browser.count("[data-test=dead] tbody tr")?, 2);
    browser.click("[data-test=retry-dead]")?;
    assert!(browser.text("#outcome")?.starts_with("Delivered again"));
    let pending: redis::streams::StreamPendingReply = redis::cmd("XPENDING").arg(&[&stream, "mail"]).query(redis)?;
    assert_eq!(pending.count(), 1);

    browser.open("/dead")?;
    let left = browser.text("[data-test=dead] tbody")?;
    assert!(left.contains("the address is empty") && !left.contains("no such mailbox"), "{left}");
    browser.click("[data-test=dead] .acts summary")?;
    browser.click("[data-test=discard-dead]")?;
    assert_eq!(browser.text("#outcome")?, "Deleted.");
    browser.open("/dead")?;
    assert!(browser.text("[data-test=nothing]")?.starts_with("No dead letters"));
    browser.open("/audit")?;
    for action in ["retry dead letter", "discard dead letter"] {
        browser.says(action)?;
    }
    Ok(())
}
