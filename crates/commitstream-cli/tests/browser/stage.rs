//! A relay daemon with its console, and a browser at its door.

use anyhow::{Context, Result};

use crate::browser::{Browser, patiently};
use crate::support::{Running, World};

pub const PASSWORD: &str = "correct horse";
pub const READ_ONLY: &str = "battery staple";

pub const PAGES: [&str; 9] = ["", "/doctor", "/events", "/failures", "/blocked", "/dead", "/streams", "/relays", "/audit"];

pub struct Stage {
    pub browser: Browser,
    pub world: World,
    pub relay: Running,
}

impl Stage {
    /// A relay that gives no event a second try; `None` where there is no browser.
    pub fn new() -> Result<Option<Self>> {
        Self::of(World::new()?, "0")
    }

    /// The same with a relay that tries events so often again.
    pub fn of(world: World, retries: &str) -> Result<Option<Self>> {
        let (relay, site) = relay(&world, retries)?;
        let browser = Browser::start(&site)?;
        Ok(browser.map(|browser| Self { browser, world, relay }))
    }

    pub fn enter(&self, password: &str) -> Result<()> {
        self.browser.open("/login")?;
        self.log_in(password)?;
        self.browser.until("the overview", "document.querySelector('#verdict')")
    }

    /// Fills in the form that is there.
    pub fn log_in(&self, password: &str) -> Result<()> {
        self.browser.fill("#name", "Ada")?;
        self.browser.fill("#password", password)?;
        self.browser.click("#login")
    }

    /// Waits until so many events have this status.
    pub fn until(&self, status: &str, events: u64) -> Result<()> {
        patiently(&format!("{events} {status}"), || Ok(self.world.stats()?[status] == events))
    }

    /// Users whose events fail, because they are too large, until somebody retries them.
    pub fn fail_users(&self, users: &[&str]) -> Result<Vec<String>> {
        let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                      VALUES ('UserCreated', 'user', '{}', jsonb_build_object('fill', repeat('x', 2000000))) RETURNING id;";
        let mut ids = Vec::new();
        for user in users {
            let answer = self.world.database.psql(&insert.replace("{}", user))?;
            ids.push(answer.lines().next().context("an id")?.trim().to_owned());
        }
        self.until("failed", users.len() as u64)?;
        self.world.database.psql("UPDATE event_outbox SET payload = '{}' WHERE status = 'FAILED';")?;
        Ok(ids)
    }
}

/// A relay, and the address of its console.
fn relay(world: &World, retries: &str) -> Result<(Running, String)> {
    let mut command = world.command(&["relay"]);
    command.env("HTTP_LISTEN", "127.0.0.1:0").env("OUTBOX_MAX_RETRIES", retries);
    command.env("CONSOLE_PASSWORD", PASSWORD).env("CONSOLE_READ_ONLY_PASSWORD", READ_ONLY);
    let mut relay = Running::new(command)?;
    let line = relay.says("console on http://")?;
    let (_, address) = line.split_once("http://").context("an address")?;
    let site = format!("http://{}/console", address.split('/').next().context("an address")?);
    relay.says("relay is active")?;
    Ok((relay, site))
}
