//! Who may look, and who may act.

use anyhow::Result;

use crate::stage::{PAGES, PASSWORD, READ_ONLY, Stage};

#[test]
fn people_log_in_with_the_password_and_log_out() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    browser.open("/events")?;
    browser.until("the form", "location.pathname === '/console/login'")?;
    stage.log_in("open sesame")?;
    assert_eq!(browser.text("[data-test=problem]")?, "That is not the password.");
    stage.log_in(PASSWORD)?;
    browser.until("the overview", "document.querySelector('#verdict')")?;
    assert_eq!(browser.text("[data-test=viewer]")?, "Ada");
    assert_eq!(browser.script("return document.cookie;")?, "", "no script sees the cookie");
    browser.click("#logout")?;
    browser.until("the form", "location.pathname === '/console/login'")?;
    browser.open("/events")?;
    browser.until("the form again", "location.pathname === '/console/login'")
}

#[test]
fn who_may_only_look_finds_no_buttons_and_no_way_round_them() -> Result<()> {
    let Some(stage) = Stage::new()? else { return Ok(()) };
    let browser = &stage.browser;
    let ids = stage.fail_users(&["1", "2"])?;
    stage.enter(READ_ONLY)?;
    browser.says("(read-only)")?;
    let event = format!("/events/{}", ids[0]);
    for path in PAGES.into_iter().chain([event.as_str(), "/failures/confirm?remedy=discard"]) {
        browser.open(path)?;
        let buttons = browser.script("return [...document.querySelectorAll('button')].map((b) => b.textContent).join();")?;
        assert!(["Log out", "Log out,Search"].contains(&buttons.as_str().unwrap_or_default()), "{path}: {buttons}");
    }
    for (path, fields) in [
        ("failures/act", format!("remedy: 'discard', id: '{}'", ids[0])),
        ("failures/act", "remedy: 'retry'".to_owned()),
        ("relays/switch", "to: 'pause'".to_owned()),
        ("dead/act", "action: 'discard'".to_owned()),
    ] {
        let code = browser.promise(&format!(
            "const token = document.querySelector('[name=token]').value;
             const sent = await fetch('/console/{path}', {{ method: 'POST', body: new URLSearchParams({{ token, {fields} }}) }});
             return sent.status;"
        ))?;
        assert_eq!(code, 403, "{path} with {fields}");
    }
    assert_eq!(stage.world.stats()?["failed"], 2);
    Ok(())
}
