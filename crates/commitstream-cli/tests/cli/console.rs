//! The web console over HTTP: who may look, and what the pages say.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use commitstream_sandbox::Redis;

use crate::console_site::{PASSWORD, READ_ONLY, Site, first_figures, form};
use crate::support::{Running, World, eventually, finish};

const PAGES: [&str; 9] = ["", "/doctor", "/events", "/failures", "/blocked", "/dead", "/streams", "/relays", "/audit"];

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
        ("/events", "UserCreated".to_owned()),
        ("/events?status=PUBLISHED&type=UserCreated", "user 4".to_owned()),
        ("/failures", "too large".to_owned()),
        ("/streams", world.user_stream()),
        ("/streams", "mail".to_owned()),
    ] {
        let page = site.get(&cookie, path)?;
        assert_eq!(page.code, 200, "{path}");
        assert!(page.body.contains(&text), "{path} has {text}: {}", page.body);
    }
    // The picture of the overview may be two seconds old.
    for text in ["FAILED: 3 events of 3 aggregates", "no relay is alive"] {
        eventually(text, || Ok(site.get(&cookie, "")?.body.contains(text)))?;
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
    world.note("user")?;
    world.note("visitor")?;
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
    // Two groups by cause, and as many letters as a page has. A stream that has no room left is named, without a heading of its own.
    assert_eq!(page.matches(">mail</td>").count(), 2 + 25, "{page}");
    assert!(page.contains(&format!(">{other}</a>")) && !page.contains(&format!("<h2>{other}</h2>")), "{page}");
    assert!(!page.contains(&format!("More of {user}")), "{page}");
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
