//! One verdict for the console, `stats`, `doctor` and `/readyz`, consumers counted in; and what stands on every page.

use anyhow::{Context, Result, ensure};

use crate::console_site::{PASSWORD, READ_ONLY, Site};
use crate::http::Daemon;
use crate::support::{Running, World, eventually};

/// The fields of a dead letter behind those of its event, each with a reason of its own.
fn dead_letter(world: &World, n: u32, reason: &str) -> Result<()> {
    let event = format!("0190c5b5-7c1e-7c61-8b6e-{n:012}");
    let event = ["id", &event, "type", "UserCreated", "aggregate_type", "user", "aggregate_id", "1", "payload", "{}"];
    let event = [&event[..], &["occurred_at", "2026-01-31T12:00:00Z"]].concat();
    let entry = format!("{n}-0");
    let own = ["group", "mail", "entry", &entry, "reason", reason, "attempts", "5", "history", "[]"];
    let own = [&own[..], &["dead_at", "2026-01-31T12:00:05Z"]].concat();
    let mut redis = world.redis()?;
    for key in [world.user_stream(), format!("{}:dead", world.user_stream())] {
        let own = if key.ends_with(":dead") { &own[..] } else { &[] };
        redis::cmd("XADD").arg(&key).arg(&entry).arg(&event).arg(own).exec(&mut redis)?;
    }
    Ok(())
}

/// A stream whose group has handled everything but what it gave up.
fn give_up(world: &World, letters: u32, reason: impl Fn(u32) -> String) -> Result<()> {
    // The outbox has written to the stream, so it is one of those that are looked at.
    world.publish_user("1")?;
    world.ok(&["relay", "--until-empty"])?;
    let mut redis = world.redis()?;
    redis::cmd("DEL").arg(world.user_stream()).exec(&mut redis)?;
    (1..=letters).try_for_each(|n| dead_letter(world, n, &reason(n)))?;
    redis::cmd("XGROUP").arg(&["CREATE", &world.user_stream(), "mail", "$"]).exec(&mut redis)?;
    Ok(())
}

#[test]
fn dead_letters_are_no_sign_that_all_is_well() -> Result<()> {
    let world = World::new()?;
    give_up(&world, 3, |n| format!("HTTP {n}00 of the mail server"))?;
    let daemon = Daemon::start(&world)?;
    let told = "gave 3 events up: they are dead letters";
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let overview = site.get(&cookie, "")?.body;
    ensure!(overview.contains("class=\"verdict warn\"") && overview.contains(told), "{overview}");
    ensure!(overview.contains("href=\"/console/dead\"") && !overview.contains("All is well"), "{overview}");
    let stats = world.ok(&["stats"])?;
    ensure!(stats.contains(told), "{stats}");
    let verdict = &world.run(&["doctor", "--json"])?.json()?["verdict"];
    ensure!(verdict["check"] == "dead-letters" && verdict["severity"] == "warning", "{verdict}");
    ensure!(stats.contains(verdict["sentence"].as_str().unwrap_or("none")), "{stats}");
    eventually("the verdict of /readyz", || {
        let ready = daemon.get("/readyz")?;
        Ok(ready.0 == 200 && ready.1.contains(told))
    })?;
    daemon.end()
}

#[test]
fn findings_lead_to_their_pages_and_the_menu_counts_what_waits_for_a_decision() -> Result<()> {
    let world = World::new()?;
    give_up(&world, 3, |n| format!("HTTP {n}00 of the mail server"))?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
         VALUES ('T', 'user', '1', '{}', 'FAILED', 'too large');",
    )?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    let overview = site.get(&cookie, "")?.body;
    ensure!(overview.contains("FAILED: 1 event of 1 aggregate"), "{overview}");
    for page in ["/failures", "/dead", "/relays"] {
        ensure!(overview.contains(&format!("href=\"/console{page}\">Look</a>")), "{page}: {overview}");
    }
    let doctor = site.get(&cookie, "/doctor")?.body;
    ensure!(doctor.contains("href=\"/console/dead\">Look at it here</a>"), "{doctor}");
    for (name, number) in [("Failures", 1), ("Dead letters", 3)] {
        ensure!(doctor.contains(&format!("data-test=\"count-{name}\">{number}<")), "{name}: {doctor}");
    }
    Ok(())
}

#[test]
fn every_page_names_its_servers_and_its_environment() -> Result<()> {
    let world = World::new()?;
    let mut command = world.command(&["console", "--listen", "127.0.0.1:0"]);
    command.env("CONSOLE_PASSWORD", PASSWORD);
    command.env("CONSOLE_ENVIRONMENT", "production <1>").env("CONSOLE_ENVIRONMENT_COLOR", "red");
    let site = Site::of(Running::new(command)?)?;
    let cookie = site.enter(PASSWORD)?;
    let password = world.database.url().split(['@', ':']).nth(2).context("a password")?;
    for path in ["", "/doctor", "/events", "/failures", "/blocked", "/dead", "/streams", "/relays", "/audit", "/nowhere"] {
        let page = site.get(&cookie, path)?.body;
        ensure!(page.contains("class=\"environment red\"") && page.contains(">production &lt;1&gt;</span>"), "{path}: {page}");
        let (_, place) = page.split_once("id=\"place\">").context("a place")?;
        for part in [
            "PostgreSQL 127.0.0.1:",
            "schema public",
            "Redis 127.0.0.1:",
            &format!("prefix {}", world.prefix),
            env!("CARGO_PKG_VERSION"),
        ] {
            ensure!(place.contains(part), "{path}, {part}: {place}");
        }
        ensure!(!page.contains(password) && !place.contains('@'), "{path} shows the login");
    }
    Ok(())
}

#[test]
fn dead_letters_are_grouped_by_cause_and_retried_together() -> Result<()> {
    let world = World::new()?;
    give_up(&world, 30, |n| if n <= 28 { format!("HTTP {n} of\nthe mail server") } else { "no such user".to_owned() })?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let page = site.get(&cookie, "/dead")?.body;
    let (_, groups) = page.split_once("id=\"groups\"").context("groups")?;
    ensure!(groups.matches("Retry …").count() == 2 && groups.contains(">28<") && groups.contains(">2<"), "{page}");
    // What is not shown any more stands below no heading of its own.
    ensure!(page.contains("More of ") && !page.contains("<h2></h2>"), "{page}");
    // A letter leads to its event.
    ensure!(page.contains("href=\"/console/events/0190c5b5-7c1e-7c61-8b6e-"), "{page}");

    let stream = world.user_stream();
    let query = [("stream", stream.as_str()), ("group", "mail"), ("type", "UserCreated"), ("cause", "HTTP # of the mail server")];
    let encoded = serde_urlencoded::to_string(query)?;
    let shown = site.get(&cookie, &format!("/dead?{encoded}"))?.body;
    ensure!(shown.contains("HTTP 1 of") && !shown.contains("no such user"), "{shown}");
    let asked = site.get(&cookie, &format!("/dead/confirm?{encoded}&action=retry"))?;
    ensure!(asked.body.contains("Deliver 28 dead letters again?"), "{}", asked.body);
    let (token, until) = (asked.token()?, asked.field("until")?);
    // One that comes later with the same cause was not shown.
    dead_letter(&world, 31, "HTTP 31 of\nthe mail server")?;
    let fields = [&query[..], &[("action", "retry"), ("token", &token), ("until", &until)]].concat();
    // A letter without a type is not one of any type.
    let untyped: Vec<_> = fields.iter().map(|(name, value)| (*name, if *name == "type" { "" } else { *value })).collect();
    let none = site.act(&cookie, "/dead/act", &untyped)?;
    ensure!(none.body.contains("0 dead letters delivered again"), "{}", none.body);
    let done = site.act(&cookie, "/dead/act", &fields)?;
    ensure!(done.body.contains("28 dead letters delivered again"), "{}", done.body);
    let left = world.json(&["dead", "list"])?;
    ensure!(left.as_array().map(Vec::len) == Some(3), "{left}");
    let pending: (u64, redis::Value, redis::Value, redis::Value) =
        redis::cmd("XPENDING").arg(&[&stream, "mail"]).query(&mut world.redis()?)?;
    ensure!(pending.0 == 28, "{pending:?}");
    ensure!(world.deeds()?.iter().any(|deed| deed.starts_with("Ada|retry dead letter|28 dead letters of the group mail|28")));
    Ok(())
}

/// A proxy that takes the prefix off, and one that passes it on.
#[test]
fn the_console_works_below_a_path() -> Result<()> {
    let world = World::new()?;
    let mut command = world.command(&["console", "--listen", "127.0.0.1:0"]);
    command.env("CONSOLE_PASSWORD", PASSWORD).env("CONSOLE_PATH_PREFIX", "/ops/events/");
    let site = Site::of(Running::new(command)?)?;
    let form = site.get("", "/login")?.body;
    ensure!(form.contains("action=\"/ops/events/console/login\""), "{form}");
    let login = site.post("", "/login", &[("name", "Ada"), ("password", PASSWORD)])?;
    ensure!(login.header("location") == Some("/ops/events/console/entered"), "{}", login.head);
    let cookie = login.header("set-cookie").context("a cookie")?;
    ensure!(cookie.contains("; Path=/ops/events/console;"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap_or_default();
    for below in ["", "/ops/events"] {
        let answer = site.raw("GET", &format!("{below}/console/events"), &[("Cookie", cookie)])?;
        ensure!(answer.code == 200, "{below}: {}", answer.head);
        let links = answer.body.split("href=\"").skip(1).chain(answer.body.split("src=\"").skip(1));
        for link in links.filter(|link| link.starts_with('/')) {
            ensure!(link.starts_with("/ops/events/console"), "{link}");
        }
        ensure!(site.raw("GET", &format!("{below}/console/assets/console.js"), &[])?.code == 200, "{below}");
    }
    Ok(())
}
