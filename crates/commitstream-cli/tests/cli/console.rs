//! The web console over HTTP: who may look, who may act, and what the pages say.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::Redis;

use crate::support::{PATIENCE, Running, World, eventually, finish};

const PASSWORD: &str = "correct horse";
const READ_ONLY: &str = "battery staple";

const EVENT: &str = "01a206d6-f98b-7780-b3c6-d07e75fbc58f";

const PAGES: [&str; 9] = ["", "/doctor", "/events", "/failures", "/blocked", "/dead", "/streams", "/relays", "/audit"];

struct Site {
    server: Running,
    address: String,
}

struct Page {
    code: u16,
    head: String,
    body: String,
}

impl Page {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|line| line.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v)
    }

    /// The value of the hidden field that every form has.
    fn token(&self) -> Result<String> {
        self.field("token")
    }

    /// The value of a hidden field.
    fn field(&self, name: &str) -> Result<String> {
        let (_, rest) =
            self.body.split_once(&format!("name=\"{name}\" value=\"")).with_context(|| format!("a form with a {name}"))?;
        Ok(rest.split('"').next().unwrap_or_default().to_owned())
    }
}

impl Site {
    /// The live numbers, as they come.
    fn live(&self, cookie: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET /console/live HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nCookie: {cookie}\r\n\r\n", self.address)?;
        Ok(stream)
    }

    fn start(world: &World) -> Result<Self> {
        Self::with(world, &[])
    }

    fn with(world: &World, args: &[&str]) -> Result<Self> {
        let mut command = world.command(&[&["console", "--listen", "127.0.0.1:0"], args].concat());
        command.env("CONSOLE_PASSWORD", PASSWORD).env("CONSOLE_READ_ONLY_PASSWORD", READ_ONLY);
        let mut server = Running::new(command)?;
        let line = server.prints("console on http://")?;
        let address = line.trim_start_matches("console on http://").trim_end_matches("/console").to_owned();
        Ok(Self { server, address })
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Page> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("{method} /console{path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            request += &format!("Host: {}\r\n", self.address);
        }
        headers.iter().for_each(|(name, value)| request += &format!("{name}: {value}\r\n"));
        if method == "POST" {
            request += &format!("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n", body.len());
        }
        stream.write_all(format!("{request}\r\n{body}").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer")?;
        let code = head.split(' ').nth(1).context("a code")?.parse()?;
        Ok(Page { code, head: head.to_owned(), body: body.to_owned() })
    }

    fn login(&self, password: &str) -> Result<Page> {
        self.send("POST", "/login", &[], &form(&[("name", "Ada"), ("password", password)]))
    }

    /// The cookie of a session.
    fn enter(&self, password: &str) -> Result<String> {
        let page = self.login(password)?;
        ensure!(page.code == 303, "{}", page.body);
        Ok(page.header("set-cookie").context("a cookie")?.split(';').next().unwrap_or_default().to_owned())
    }

    fn get(&self, cookie: &str, path: &str) -> Result<Page> {
        self.send("GET", path, &[("Cookie", cookie)], "")
    }

    fn post(&self, cookie: &str, path: &str, fields: &[(&str, &str)]) -> Result<Page> {
        let origin = format!("http://{}", self.address);
        self.send("POST", path, &[("Cookie", cookie), ("Origin", &origin)], &form(fields))
    }
}

impl Site {
    /// An act and where it leads: the page of its outcome.
    fn act(&self, cookie: &str, path: &str, fields: &[(&str, &str)]) -> Result<Page> {
        let led = self.post(cookie, path, fields)?;
        ensure!(led.code == 303, "{}", led.body);
        let outcome = led.header("location").context("a place")?.strip_prefix("/console").context("here")?;
        let page = self.get(cookie, outcome)?;
        ensure!(page.code == 200, "{}", page.body);
        Ok(page)
    }
}

fn first_figures(live: &mut TcpStream) -> Result<String> {
    let mut seen = String::new();
    while !(seen.contains("event: figures") && seen.contains("\"rate\"")) {
        let mut bytes = [0; 4096];
        let read = live.read(&mut bytes)?;
        ensure!(read > 0, "it ended: {seen}");
        seen += &String::from_utf8_lossy(&bytes[..read]);
    }
    Ok(seen)
}

fn form(fields: &[(&str, &str)]) -> String {
    let escaped = |text: &str| -> String {
        text.bytes().map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
    };
    let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{}={}", escaped(name), escaped(value))).collect();
    fields.join("&")
}

#[test]
fn nobody_looks_without_a_password_and_wrong_ones_are_limited() -> Result<()> {
    let world = World::new()?;
    let mut site = Site::start(&world)?;
    for path in PAGES.into_iter().chain(["/live"]) {
        let page = site.get("", path)?;
        assert_eq!((page.code, page.header("location")), (303, Some("/console/login")), "{path}");
    }
    let page = site.send("GET", "/login", &[], "")?;
    assert_eq!(page.code, 200);
    let policy = page.header("content-security-policy").context("a policy")?;
    assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'") && !policy.contains("unsafe"));
    assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(page.header("referrer-policy"), Some("same-origin"));
    assert_eq!(page.header("cache-control"), Some("no-store"));
    assert!(!page.body.contains("style=") && !page.body.contains("onclick"), "nothing is inline");

    let entered = site.login(PASSWORD)?;
    let cookie = entered.header("set-cookie").context("a cookie")?;
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict") && !cookie.contains("Secure"), "{cookie}");
    let id = cookie.split(['=', ';']).nth(1).context("an id")?;
    assert_eq!(id.len(), 64, "256 bits");

    for _ in 0..10 {
        assert_eq!(site.login("wrong")?.code, 401);
    }
    let page = site.login(PASSWORD)?;
    assert_eq!(page.code, 429, "{}", page.body);
    assert!(page.header("retry-after").is_some_and(|seconds| seconds.parse().is_ok_and(|s: u64| (1..=61).contains(&s))));
    assert_eq!(site.get(cookie.split(';').next().unwrap_or_default(), "")?.code, 200, "sessions go on");
    site.server.says("Ada has logged in to the console from 127.0.0.1, role operator")?;
    site.server.says("a wrong password for the console from 127.0.0.1")?;
    Ok(())
}

/// A page of another site whose name was made to lead here, or that sends a form here.
#[test]
fn it_answers_by_its_own_name_and_takes_its_own_forms_only() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    assert_eq!(site.send("GET", "", &[("Cookie", &cookie), ("Host", "evil.example")], "")?.code, 403);
    let page = site.get(&cookie, "/relays")?;
    assert_eq!(page.header("referrer-policy"), Some("same-origin"), "without, browsers send `Origin: null` with each form");
    let fields = form(&[("token", &page.token()?), ("pause", "true")]);
    for (name, value) in [("Origin", "null"), ("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site")] {
        let answer = site.send("POST", "/relays/switch", &[("Cookie", &cookie), (name, value)], &fields)?;
        assert_eq!(answer.code, 403, "{name}: {value}: {}", answer.body);
    }
    Ok(())
}

#[test]
fn a_login_without_cookies_says_what_is_missing() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let page = site.get("", "/entered")?;
    assert!(page.code == 401 && page.body.contains("ask for it by https"), "{}", page.body);
    Ok(())
}

#[test]
fn logging_out_ends_the_session() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    assert_eq!(site.get(&cookie, "/entered")?.header("location"), Some("/console"));
    assert_eq!(site.post(&cookie, "/logout", &[])?.code, 403, "not without the token");
    let token = site.get(&cookie, "/audit")?.token()?;
    assert_eq!(site.post(&cookie, "/logout", &[("token", &token)])?.code, 303);
    assert_eq!(site.get(&cookie, "/audit")?.code, 303);
    Ok(())
}

#[test]
fn each_page_is_there_with_data_and_without() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    for path in PAGES {
        let page = site.get(&cookie, path)?;
        assert_eq!(page.code, 200, "{path}: {}", page.body);
        let always_says_something = ["", "/doctor"].contains(&path);
        assert!(
            always_says_something || page.body.contains("data-test=\"nothing\""),
            "{path} says why it is empty: {}",
            page.body
        );
    }
    world.fail_users()?;
    world.publish_user("4")?;
    world.ok(&["relay", "--until-empty"])?;
    redis::cmd("XGROUP").arg(&["CREATE", &world.user_stream(), "mail", "0"]).exec(&mut world.redis()?)?;
    for (path, text) in [
        ("", "Events flow".to_owned()),
        ("/events", "UserCreated".to_owned()),
        ("/events?status=PUBLISHED&type=UserCreated", "user 4".to_owned()),
        ("/failures", "WRONGTYPE".to_owned()),
        ("/streams", world.user_stream()),
        ("/streams", "mail".to_owned()),
    ] {
        let page = site.get(&cookie, path)?;
        assert_eq!(page.code, 200, "{path}");
        let is_there = page.body.contains(&text) || (path.is_empty() && page.body.contains("No relay is alive"));
        assert!(is_there, "{path} has {text}: {}", page.body);
    }
    for asset in ["console.js", "console.css", "uplot.min.js", "uplot.min.css"] {
        assert_eq!(site.get("", &format!("/assets/{asset}"))?.code, 200, "{asset}");
    }
    assert_eq!(site.get(&cookie, "/events/no-id")?.code, 400);
    for end in ["%2B262142-12-31T23:59:59Z", "-262143-01-01T00:00:00Z"] {
        assert_eq!(site.get(&cookie, &format!("/events?until={end}"))?.code, 400, "{end}");
    }
    assert_eq!(site.get(&cookie, "/events/00000000-0000-7000-8000-000000000000")?.code, 404);
    Ok(())
}

/// An operator parks an event with `infinity`; without a date, it is published nobody knows when.
#[test]
fn a_parked_event_is_shown_as_such_on_pages_that_work() -> Result<()> {
    let world = World::new()?;
    let parked = world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, next_retry_at)
         VALUES ('Parked', 'user', '1', '{}', 'infinity') RETURNING id;",
    )?;
    let sent = world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, published_at)
         VALUES ('Sent', 'user', '2', '{}', 'PUBLISHED', 'infinity') RETURNING id;",
    )?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    for path in PAGES {
        assert_eq!(site.get(&cookie, path)?.code, 200, "{path}");
    }
    let event = |inserted: &str| {
        let id = inserted.split_whitespace().next().context("an id")?;
        Ok::<_, anyhow::Error>(site.get(&cookie, &format!("/events/{id}"))?.body)
    };
    assert!(event(&parked)?.contains("none: parked"), "{}", event(&parked)?);
    assert!(event(&sent)?.contains("unknown when"), "{}", event(&sent)?);
    let blocked = site.get(&cookie, "/blocked")?.body;
    assert!(blocked.contains("itself: parked"), "{blocked}");
    let doctor = world.run(&["doctor"])?;
    assert!(matches!(doctor.code, Some(0 | 3 | 4)), "{doctor:?}");
    Ok(())
}

/// With the default, `afterFailure = release`, a failed event holds nothing back.
#[test]
fn what_a_failed_event_holds_back_is_told_by_the_setting() -> Result<()> {
    let world = World::new()?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status) VALUES ('First', 'user', '1', '{}', 'FAILED');
         INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, next_retry_at, retry_count)
         VALUES ('Later', 'user', '1', '{}', now() + interval '1 hour', 1);",
    )?;
    let settings = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.conf", world.database.name()));
    for (after_failure, says, says_not) in
        [("release", "itself, refused 1 time", "decide"), ("hold", "a failed event before it", "itself, refused")]
    {
        std::fs::write(&settings, format!("app.outbox.processor.afterFailure = {after_failure}"))?;
        let site = Site::with(&world, &["--config", &settings.to_string_lossy()])?;
        let page = site.get(&site.enter(READ_ONLY)?, "/blocked")?.body;
        assert!(page.contains(says) && !page.contains(says_not), "{after_failure}: {page}");
    }
    Ok(std::fs::remove_file(&settings)?)
}

#[test]
fn an_event_shows_its_life_and_what_is_in_it_stays_text() -> Result<()> {
    let world = World::new()?;
    world.database.psql(
        r#"INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
           VALUES ('<b>T</b>', 'user', '"><script>alert(1)</script>', '{"x": "<script>alert(2)</script>"}', '{"traceparent": "00-abc-def-01"}');
           INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
           VALUES ('F', 'user', '1', '{}', 'FAILED', '<img src=x onerror=alert(3)>');"#,
    )?;
    world.ok(&["relay", "--until-empty"])?;
    redis::cmd("XGROUP").arg(&["CREATE", &world.user_stream(), "mail", "0"]).exec(&mut world.redis()?)?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let id = world.database.psql("SELECT id FROM event_outbox WHERE status = 'PUBLISHED';")?;
    let event = site.get(&cookie, &format!("/events/{}", id.trim()))?;
    assert_eq!(event.code, 200, "{}", event.body);
    for text in ["PUBLISHED", "00-abc-def-01", "as 1 of 1", "Group mail", "not delivered yet", "&lt;script&gt;alert(2)"] {
        assert!(event.body.contains(text), "{text}: {}", event.body);
    }
    let pages = [event, site.get(&cookie, "/events")?, site.get(&cookie, "/failures")?];
    for page in pages {
        assert!(
            !page.body.contains("<script>alert") && !page.body.contains("<img") && !page.body.contains("<b>T"),
            "{}",
            page.body
        );
    }
    Ok(())
}

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

/// In words, and with the way to the other pages.
#[test]
fn what_cannot_be_shown_is_refused_on_a_page() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(&redis)?;
    let site = Site::start(&world)?;
    let cookie = site.enter(PASSWORD)?;
    let token = site.get(&cookie, "/failures")?.token()?;
    let posted =
        site.post(&cookie, "/failures/act", &[("remedy", "retry"), ("type", "\0"), ("snapshot", "1:1:"), ("token", &token)])?;
    drop(redis);
    let mut pages = vec![("a zero byte", posted, 400, "zero byte")];
    for (path, code, says) in [
        ("/nopage", 404, "there is no such page"),
        ("/events/a/b", 404, "there is no such page"),
        ("/audit?before=x", 400, "come here by its links"),
        ("/events?type=%00", 400, "zero byte"),
        ("/streams", 503, "Redis"),
    ] {
        pages.push((path, site.get(&cookie, path)?, code, says));
    }
    for (what, page, code, says) in pages {
        assert_eq!(page.code, code, "{what}: {}", page.body);
        for text in [says, "data-test=\"problem\"", "<nav", "id=\"logout\""] {
            assert!(page.body.contains(text), "{what} has {text}: {}", page.body);
        }
        assert!(
            page.header("content-security-policy").is_some() && page.header("content-type").is_some_and(|t| t.contains("html"))
        );
    }
    assert_eq!(site.get("", "/nopage")?.code, 303, "nobody is told which pages there are");
    let foreign = site.send("GET", "", &[("Cookie", &cookie), ("Host", "evil.example")], "")?;
    assert!(foreign.code == 403 && foreign.body.contains("ask for 127.0.0.1"), "{}", foreign.body);
    Ok(())
}

/// A group without an error leads to its own events, not to all of its type.
#[test]
fn events_that_failed_without_an_error_are_found_by_that() -> Result<()> {
    let world = World::new()?;
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, last_error)
         VALUES ('T', 'user', 'silent', '{}', 'FAILED', NULL), ('T', 'user', 'told', '{}', 'FAILED', 'too large');",
    )?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    let groups = site.get(&cookie, "/failures")?.body;
    let links: Vec<_> = groups.split("href=\"/console/events?").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(links, ["type=T&amp;status=FAILED&amp;cause=", "type=T&amp;status=FAILED&amp;cause=too+large"]);
    for (cause, found, not) in [("", "user silent", "user told"), ("too+large", "user told", "user silent")] {
        let page = site.get(&cookie, &format!("/events?type=T&status=FAILED&cause={cause}"))?.body;
        assert!(page.contains(found) && !page.contains(not) && page.contains("id=\"search-cause\""), "{page}");
    }
    let all = site.get(&cookie, "/events?type=T&status=FAILED")?.body;
    assert!(all.contains("user silent") && all.contains("user told") && !all.contains("search-cause"), "{all}");
    Ok(())
}

#[test]
fn a_long_payload_is_cut_and_the_page_says_so() -> Result<()> {
    let world = World::new()?;
    let inserted = world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
         SELECT 'T', 'user', '1', to_jsonb(repeat('x', size - 2)), jsonb_build_object('h', repeat('y', size)) FROM unnest(ARRAY[100000, 100001]) size
         RETURNING id;",
    )?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    let ids: Vec<_> = inserted.lines().filter(|line| line.len() == 36).collect();
    for (id, cut) in ids.iter().zip([1, 2]) {
        let page = site.get(&cookie, &format!("/events/{id}"))?.body;
        assert_eq!(page.matches("The first 100,000 characters.").count(), cut, "{} bytes", page.len());
        assert!(page.len() < 210_000, "{} bytes", page.len());
    }
    assert_eq!(ids.len(), 2, "{inserted}");
    Ok(())
}

#[test]
fn open_batches_are_shown_by_relay() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    assert!(site.get(&cookie, "/relays")?.body.contains("No batch is open"));
    world.database.psql(
        "INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids, claimed_at)
         VALUES (gen_random_uuid(), '00000000-0000-0000-0000-000000000007', 's', '{}', now() - interval '2 hours');",
    )?;
    let page = site.get(&cookie, "/relays")?.body;
    for text in ["00000000-0000-0000-0000-000000000007", "claimed 2 h", "gone", "takes its partitions over"] {
        assert!(page.contains(text), "{text}: {page}");
    }
    Ok(())
}

#[test]
fn a_page_of_dead_letters_is_bounded() -> Result<()> {
    let world = World::new()?;
    let mut redis = world.redis()?;
    let user = world.user_stream();
    let other = user.replace("user", "visitor");
    let payload = format!("\"{}\"", "x".repeat(10_000));
    for (stream, letters) in [(&user, 25), (&other, 3)] {
        for n in 1..=letters {
            let mut letter = redis::cmd("XADD");
            letter
                .arg(format!("{stream}:dead"))
                .arg(format!("{n}-0"))
                .arg(&["payload", &payload, "group", "mail", "entry", "1-0"]);
            letter.exec(&mut redis)?;
        }
    }
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    let page = site.get(&cookie, "/dead")?.body;
    assert!(page.contains("The first 4,000 characters") && page.len() < 25 * 5_000, "{} bytes", page.len());
    assert_eq!(page.matches(">mail</td>").count(), 25, "{page}");
    assert!(page.contains(&format!("More of {other}")) && !page.contains(&format!("More of {user}")), "{page}");
    Ok(())
}

#[test]
fn what_became_of_a_dead_letter_is_said_and_written_down() -> Result<()> {
    let world = World::new()?;
    let (stream, redis) = (world.user_stream(), &mut world.redis()?);
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
fn live_numbers_end_with_the_session_and_are_for_few() -> Result<()> {
    let world = World::new()?;
    let site = Site::start(&world)?;
    let cookie = site.enter(READ_ONLY)?;
    let token = site.get(&cookie, "/audit")?.token()?;
    let mut viewers = (0..16).map(|_| site.live(&cookie)).collect::<Result<Vec<_>>>()?;
    for viewer in &mut viewers {
        first_figures(viewer)?;
    }
    assert_eq!(site.get(&cookie, "/live")?.code, 503);
    assert_eq!(site.post(&cookie, "/logout", &[("token", &token)])?.code, 303);
    for mut viewer in viewers {
        let mut rest = Vec::new();
        viewer.read_to_end(&mut rest)?;
    }
    first_figures(&mut site.live(&site.enter(READ_ONLY)?)?)?;
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

#[test]
fn it_does_not_listen_to_others_without_a_password() -> Result<()> {
    let world = World::new()?;
    let answer = finish(world.command(&["console", "--listen", "0.0.0.0:0"]))?;
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.contains("CONSOLE_PASSWORD is not set"), "{answer:?}");
    let mut open = Running::new(world.command(&["console", "--listen", "127.0.0.1:0"]))?;
    open.prints("password: ")?;
    open.prints("console on http://127.0.0.1:")?;
    Ok(())
}

#[test]
fn the_daemon_serves_it_and_is_not_open_to_others() -> Result<()> {
    let world = World::new()?;
    let mut command = world.command(&["relay"]);
    command.env("HTTP_LISTEN", "0.0.0.0:0");
    let answer = finish(command)?;
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(
        answer.stderr.contains("CONSOLE_PASSWORD is not set") && answer.stderr.contains("CONSOLE_ENABLED=false"),
        "{answer:?}"
    );

    let mut command = world.command(&["relay"]);
    command.env("HTTP_LISTEN", "127.0.0.1:0");
    let mut relay = Running::new(command)?;
    let line = relay.says("console on http://")?;
    let (_, rest) = line.split_once("http://").context("an address")?;
    let address = rest.split('/').next().context("an address")?.to_owned();
    let line = relay.says("password of the console for this run: ")?;
    let password = line.split("this run: ").nth(1).and_then(|rest| rest.split(';').next()).context("a password")?.to_owned();
    assert_eq!(password.len(), 24);
    let site = Site { server: relay, address };
    let cookie = site.enter(&password)?;
    eventually("the first heartbeat", || Ok(site.get(&cookie, "/relays")?.body.contains("id=\"relays\"")))?;

    // The live numbers come as an event of JSON.
    let seen = first_figures(&mut site.live(&cookie)?)?;
    assert!(seen.contains("x-accel-buffering: no"), "{seen}");
    assert!(seen.contains("text/event-stream") && seen.contains("\"sentence\""), "{seen}");
    Ok(())
}
