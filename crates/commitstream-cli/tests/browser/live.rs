//! The overview, which follows what happens.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::stage::{PASSWORD, Stage};

/// Keeps what the page has shown, in the page itself: a reload would lose it.
const WATCH: &str = "window.rates = []; new MutationObserver(() => rates.push(document.getElementById('rate').textContent))
    .observe(document.getElementById('rate'), { childList: true });";

/// How far the contents of a page have moved since its beginning, as browsers measure it.
const SHIFTED: &str =
    "window.shifted = 0; new PerformanceObserver((list) => list.getEntries().forEach((shift) => shifted += shift.value))
    .observe({ type: 'layout-shift', buffered: true });";

const PLACES: &str = "return JSON.stringify([...document.querySelectorAll('.verdict, .card, .chart, #doctor, main > p')].map((e) => e.getBoundingClientRect()));";

#[test]
fn numbers_move_and_nothing_else_does() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    browser.devtools("Page.addScriptToEvaluateOnNewDocument", json!({ "source": SHIFTED }))?;
    stage.enter(PASSWORD)?;
    let places = browser.script(PLACES)?;
    browser.script(WATCH)?;
    browser.says("Events per second")?;
    // Some thousand events at once, in the time of a few pictures.
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
        SELECT 'UserCreated', 'user', n::text, '{}' FROM generate_series(1, 2000) n;";
    browser.until("the first numbers", "rates.length >= 1")?;
    stage.world.database.psql(insert)?;
    browser.until("a rate above zero", "rates.some((rate) => /[1-9]/.test(rate))")?;
    browser.until("all is well", "document.querySelector('#verdict').className === 'verdict good'")?;
    browser.until("a median", "/ ms$/.test(document.getElementById('p50').textContent)")?;
    browser.until("points in both charts", "charts.every((chart) => chart.data[0].length >= 3)")?;
    let legend = browser.text("#chart-rates .u-legend")?;
    assert!(legend.contains("outbox"), "{legend}");
    assert_eq!(browser.script(PLACES)?, places, "no card, chart or line has moved");
    let shifted = browser.script("return window.shifted;")?.as_f64().context("a sum")?;
    assert!(shifted < 0.01, "layout shifts add up to {shifted}");
    Ok(())
}

#[test]
fn the_overview_says_what_doctor_found() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    stage.fail_users(&["1"])?;
    stage.enter(PASSWORD)?;
    browser.until("the findings", "/\\d (error|warning|note)/.test(document.querySelector('#doctor').textContent)")?;
    let line = browser.text("#doctor")?;
    browser.click("#doctor a")?;
    browser.until("the findings themselves", "document.querySelector('.finding')")?;
    let found = browser.script("return document.querySelectorAll('.finding').length;")?;
    let told: u64 = line.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse::<u64>().ok()).sum();
    assert_eq!(found, Value::from(told), "{line}");
    Ok(())
}

#[test]
fn a_lost_connection_is_no_sign_that_all_is_well() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    stage.enter(PASSWORD)?;
    browser.until("all is well", "document.querySelector('#sign').textContent === '✓' && charts[0].data[0].length >= 1")?;
    stage.relay.signal("KILL")?;
    browser.until("that to be told", "document.querySelector('#sentence').textContent.includes('is lost')")?;
    assert_eq!(browser.text("#sign")?, "!");
    Ok(())
}
