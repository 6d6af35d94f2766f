//! Keyboards, and narrow screens.

use anyhow::Result;
use thirtyfour::Key;

use crate::stage::{PAGES, PASSWORD, Stage};

/// What has the focus, and the outline that shows it.
const FOCUS: &str = "const e = document.activeElement, s = getComputedStyle(e);
    return [e.textContent.trim(), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2, e.matches('main *')];";

#[test]
fn the_keyboard_reaches_pages_and_actions() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    stage.fail_users(&["1"])?;
    stage.enter(PASSWORD)?;
    browser.open("/failures")?;
    let mut seen = Vec::new();
    let tab = char::from(Key::Tab).to_string();
    for _ in 0..30 {
        browser.press(&tab)?;
        let focus = browser.script(FOCUS)?;
        assert_eq!(focus[1], true, "{focus}: the focus is seen");
        seen.push(focus[0].as_str().unwrap_or_default().to_owned());
        if focus[2] == true {
            break;
        }
    }
    assert_eq!(seen[..3], ["To the content", "Overview", "Doctor"], "{seen:?}");
    assert_eq!(seen.last().map(String::as_str), Some("Retry all …"), "{seen:?}");
    browser.press(&char::from(Key::Enter).to_string())?;
    browser.until("the question", "document.querySelector('#question')")
}

#[test]
fn no_page_is_wider_than_a_narrow_screen() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let (browser, world) = (&stage.browser, &stage.world);
    let long = "x".repeat(200);
    stage.fail_users(&["1"])?;
    let inserted = world.database.psql(&format!(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers, status, last_error)
         VALUES ('{long}', 'user', '{long}', '{{\"{long}\": \"{long}\"}}', '{{\"traceparent\": \"{long}\"}}', 'FAILED', '{long}') RETURNING id;
         INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, last_error, retry_count, next_retry_at)
         VALUES ('{long}', 'user', '{long}', '{{}}', '{long}', 1, now() + interval '1 hour');"
    ))?;
    let id = inserted.split_whitespace().next().unwrap_or_default().to_owned();
    let redis = &mut world.redis()?;
    let stream = world.user_stream();
    let letter = ["id", "?", "type", &long, "aggregate_type", "user", "aggregate_id", &long, "payload", "{}"];
    let letter = [&letter[..], &["group", &long, "entry", "1-0", "reason", &long, "attempts", "5"]].concat();
    world.note("user")?;
    redis::cmd("XADD").arg(&stream).arg("*").arg(&letter).exec(redis)?;
    redis::cmd("XADD").arg(format!("{stream}:dead")).arg("*").arg(&letter).exec(redis)?;
    redis::cmd("XGROUP").arg(&["CREATE", &stream, &long, "0"]).exec(redis)?;
    stage.enter(PASSWORD)?;
    browser.resize(390, 844)?;
    let event = format!("/events/{id}");
    let confirm = format!("/failures/confirm?remedy=discard&id={id}");
    for path in PAGES.into_iter().chain([event.as_str(), &confirm]) {
        browser.open(path)?;
        let widths = browser.script("const page = document.documentElement; return [page.scrollWidth, page.clientWidth];")?;
        assert_eq!(widths, serde_json::json!([390, 390]), "{path}");
    }
    Ok(())
}
