//! Events are found, and what is in them is shown and stays text.

use anyhow::{Context, Result};

use crate::stage::{PAGES, PASSWORD, Stage};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn an_event_is_found_by_its_aggregate_and_by_its_id() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let (browser, world) = (&stage.browser, &stage.world);
    for user in ["1", "3"] {
        world.publish_user(user)?;
    }
    let inserted = world.database.psql(&format!(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
         VALUES ('UserRenamed', 'user', '2', '{{\"name\": \"Grace\"}}', '{{\"traceparent\": \"{TRACE}\"}}') RETURNING id;"
    ))?;
    let id = inserted.split_whitespace().next().context("an id")?;
    stage.until("published", 3)?;
    redis::cmd("XGROUP").arg(&["CREATE", &world.user_stream(), "mail", "0"]).exec(&mut world.redis()?)?;
    stage.enter(PASSWORD)?;

    browser.open("/events")?;
    assert_eq!(browser.count("#events tbody tr")?, 3);
    browser.fill("#search-aggregate_type", "user")?;
    browser.fill("#search-aggregate_id", "2")?;
    browser.click("#search button")?;
    browser.until("one event", "document.querySelectorAll('#events tbody tr').length === 1")?;
    browser.click("#events tbody a")?;
    assert_eq!(browser.text("#status")?, "PUBLISHED");
    assert!(browser.text("#payload")?.contains("\"name\": \"Grace\""));
    assert!(browser.text("#headers")?.contains(TRACE));
    assert_eq!(browser.text("#trace")?, TRACE);
    let way = browser.text("#way")?;
    for step in ["Inserted", "Claimed", "Settled", "Published", "Entry", "Group mail"] {
        assert!(way.contains(step), "{step}: {way}");
    }

    browser.open("/events")?;
    browser.fill("#search-id", id)?;
    browser.click("#search button")?;
    browser.until("the event", "document.querySelector('#payload')")?;
    browser.says(id)?;
    browser.open("/events?aggregate_type=user&aggregate_id=4")?;
    assert!(browser.text("[data-test=nothing]")?.starts_with("No event matches"));
    Ok(())
}

#[test]
fn what_others_wrote_stays_text() -> Result<()> {
    const EVIL: &str = r#"<script>window.ran = 1</script><img src=x onerror="window.ran = 2"><b>bold</b>"#;
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let (browser, world) = (&stage.browser, &stage.world);
    let json = serde_json::to_string(EVIL)?;
    let key_in_the_way = format!("{}{EVIL}", world.prefix);
    let redis = &mut world.redis()?;
    world.database.psql(&format!(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers, status, last_error)
         VALUES ('{EVIL}', '{EVIL}', '{EVIL}', '{{\"x\": {json}}}', '{{\"h\": {json}}}', 'FAILED', 'no');
         INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers, status, last_error, retry_count, next_retry_at)
         VALUES ('{EVIL}', 'user', '{EVIL}', '{{\"x\": {json}}}', '{{\"h\": {json}}}', 'FAILED', '{EVIL}', 1, NULL),
                ('{EVIL}', 'blocked', '{EVIL}', '{{}}', '{{}}', 'PENDING', '{EVIL}', 1, now() + interval '1 hour');"
    ))?;
    stage.until("failed", 2)?;
    let entry = ["id", "?", "type", EVIL, "aggregate_type", EVIL, "aggregate_id", EVIL, "payload", &json, "headers", &json];
    let grave = [&entry[..], &["group", EVIL, "entry", "1-0", "reason", EVIL, "attempts", "5"]].concat();
    world.note(EVIL)?;
    redis::cmd("XADD").arg(&key_in_the_way).arg("*").arg(&entry).exec(redis)?;
    redis::cmd("XADD").arg(format!("{key_in_the_way}:dead")).arg("*").arg(&grave).exec(redis)?;
    redis::cmd("XGROUP").arg(&["CREATE", &key_in_the_way, EVIL, "0"]).exec(redis)?;
    browser.open("/login")?;
    browser.fill("#name", &EVIL[..100.min(EVIL.len())])?;
    browser.fill("#password", PASSWORD)?;
    browser.click("#login")?;
    browser.until("the overview", "document.querySelector('#verdict')")?;

    browser.open("/failures")?;
    browser.click("[data-test=retry-group]")?;
    browser.click("#confirm")?;
    let ids = world.database.psql("SELECT id FROM event_outbox;")?;
    let events = ids.split_whitespace().map(|id| format!("/events/{id}"));
    let confirm = ["/failures/confirm?remedy=discard&type=%3Cimg%20src%3Dx%20onerror%3D%22window.ran%3D3%22%3E".to_owned()];
    let mut shown = 0;
    for path in PAGES.into_iter().map(str::to_owned).chain(events).chain(confirm) {
        browser.open(&path)?;
        let found = browser.script(
            "return [window.ran === undefined, document.querySelectorAll('img, b:not(.card b):not(main > p > b), script:not([src]), [onerror]').length,
                     document.body.innerText.includes('onerror')];",
        )?;
        assert_eq!((&found[0], &found[1]), (&true.into(), &0.into()), "{path}: {}", browser.page()?);
        shown += usize::from(found[2] == true);
    }
    assert!(shown >= 9, "only {shown} pages show it");
    Ok(())
}

#[test]
fn times_are_those_of_the_viewers_zone() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let (browser, world) = (&stage.browser, &stage.world);
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, created_at, published_at)
         VALUES ('UserCreated', 'user', '1', '{}', 'PUBLISHED', '2026-01-31T23:45:06Z', '2026-01-31T23:45:06Z');",
    )?;
    browser.devtools("Emulation.setTimezoneOverride", serde_json::json!({ "timezoneId": "Asia/Kathmandu" }))?;
    stage.enter(PASSWORD)?;
    browser.open("/events")?;
    browser.until("the time in Kathmandu", "/2026-02-01.05:30:06/.test(document.querySelector('#events time').textContent)")?;
    let title = browser.script("return document.querySelector('#events time').title;")?;
    assert_eq!(title, "2026-01-31T23:45:06.000Z");
    Ok(())
}
