//! `console`: how long each page of the web console takes on an outbox of 10,000,000 rows, of which 1,000,000 have failed.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use sqlx::PgConnection;
use tokio::net::TcpListener;
use uuid::Uuid;

use super::figure::{Aim, Figure, Measured, Round};
use super::mixture;
use super::stage::Stage;
use super::visitor::Visitor;
use crate::console;
use crate::http::HttpServer;
use crate::output::count;

/// How often each page is asked for.
const ROUNDS: u32 = 20;
const EVENTS: u64 = 10_000_000;
const MOST_MS: f64 = 200.0;

const PASSWORD: &str = "of the benchmark";
/// The overview shows a picture that is not older than this, taken for another viewer.
const PICTURE: Duration = Duration::from_millis(2_100);

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut connection = stage.connect("console").await?;
    let events = stage.events(EVENTS);
    mixture::make(stage, &mut connection, events).await?;
    let mut notes: Vec<_> = mixture::consumers(stage, events).await?.into_iter().collect();
    let site = Site::open(stage).await?;
    let mut figures = Vec::new();
    for (name, path) in pages(&mut connection, &site).await? {
        let mut rounds = Vec::new();
        for round in stage.rounds(ROUNDS) {
            stage.tell(|| format!("console, {name}, round {round}"));
            if name.starts_with("overview") {
                tokio::time::sleep(stage.time(PICTURE)).await;
            }
            rounds.push(Round::alone(site.page(&path).await.with_context(|| path.clone())?.millis));
        }
        figures.push(Figure::new(format!("console, {name}"), "ms", Some(Aim::AtMost(MOST_MS)), rounds));
    }
    notes.push("the first figure is that of the slowest page".to_owned());
    notes.push(format!("the longest answer of each page, in ms: {}", worst(&figures)));
    let slowest = figures.iter().map(Figure::figure).fold(0.0, f64::max);
    figures.insert(0, Figure::new("console", "ms", Some(Aim::AtMost(MOST_MS)), vec![Round::alone(slowest)]));
    notes.push(remedy(stage, &site, "discard", Some("OrderPaid")).await?);
    notes.push(remedy(stage, &site, "retry", None).await?);
    site.server.stop().await;
    stage.clear(&mut connection).await?;
    mixture::clear(&mut connection).await?;
    Ok(Measured { name: "console", figures, notes })
}

fn worst(figures: &[Figure]) -> String {
    let of_one = |figure: &Figure| {
        let worst = figure.rounds.iter().map(|round| round.figure).fold(0.0, f64::max);
        format!("{} {worst:.0}", figure.name.trim_start_matches("console, "))
    };
    figures.iter().map(of_one).collect::<Vec<_>>().join(", ")
}

/// Each page and each typical search: its name, and its path below `/console`.
async fn pages(connection: &mut PgConnection, site: &Site) -> anyhow::Result<Vec<(&'static str, String)>> {
    let one = async |connection: &mut PgConnection, condition: &'static str| {
        let sql = format!("SELECT id FROM event_outbox WHERE {condition} LIMIT 1");
        sqlx::query_scalar::<_, Uuid>(sqlx::AssertSqlSafe(sql)).fetch_one(connection).await
    };
    let failed = one(connection, "status = 'FAILED' AND created_at < now() - interval '2 days' ORDER BY created_at DESC").await?;
    let waiting = one(connection, "status = 'PENDING' ORDER BY seq DESC").await?;
    let sent = one(connection, "status = 'PUBLISHED' ORDER BY published_at DESC").await?;
    let old = one(connection, "status = 'PUBLISHED' ORDER BY published_at").await?;
    let hours_ago = |hours| (chrono::Utc::now() - chrono::TimeDelta::hours(hours)).format("%Y-%m-%dT%H:%M");
    let (from, until) = (hours_ago(73), hours_ago(72));
    let mut pages: Vec<(&'static str, String)> = [
        ("overview", ""),
        ("overview, live", "/live"),
        ("doctor", "/doctor"),
        ("events", "/events"),
        ("events, pending", "/events?status=PENDING"),
        ("events, processing", "/events?status=PROCESSING"),
        ("events, published", "/events?status=PUBLISHED"),
        ("events, failed", "/events?status=FAILED"),
        ("events, of an aggregate", "/events?aggregate_type=order&aggregate_id=00123"),
        ("events, of an aggregate, failed", "/events?aggregate_type=order&aggregate_id=00123&status=FAILED"),
        ("events, of an aggregate, pending", "/events?aggregate_type=order&aggregate_id=00123&status=PENDING"),
        ("events, of a type", "/events?type=OrderPaid"),
        ("events, of a type, failed", "/events?type=OrderPaid&status=FAILED"),
        ("events, of a type that there is not", "/events?type=Nothing"),
        ("events, failed, of a type that there is not", "/events?type=Nothing&status=FAILED"),
        ("failures", "/failures"),
        ("failures, retry all?", "/failures/confirm?remedy=retry"),
        ("failures, discard all?", "/failures/confirm?remedy=discard"),
        ("blocked", "/blocked"),
        ("blocked, further on", "/blocked?aggregate_type=payment&aggregate_id=20000"),
        ("dead letters", "/dead"),
        ("streams", "/streams"),
        ("relays", "/relays"),
        ("audit", "/audit"),
        ("audit, further on", "/audit?before=10000"),
    ]
    .map(|(name, path)| (name, path.to_owned()))
    .into();
    pages.extend([
        ("events, by id", format!("/events?id={sent}")),
        ("events, of an hour", format!("/events?from={from}&until={until}")),
        ("events, of an hour, failed", format!("/events?from={from}&until={until}&status=FAILED")),
        ("events, of an hour, pending", format!("/events?from={from}&until={until}&status=PENDING")),
        ("event, just sent", format!("/events/{sent}")),
        ("event, sent long ago", format!("/events/{old}")),
        ("event, waiting", format!("/events/{waiting}")),
        ("event, failed", format!("/events/{failed}")),
        ("failures, discard one?", format!("/failures/confirm?remedy=discard&id={failed}")),
    ]);
    for (name, first) in [("events, deep down", ""), ("events, failed, deep down", "&status=FAILED")] {
        let page = site.page(&format!("/events?until={until}{first}")).await?;
        pages.extend(older(&page.body).map(|path| (name, path)));
    }
    let groups = site.page("/failures").await?.body;
    let group = fields(&groups).into_iter().filter(|(name, _)| ["type", "cause"].contains(&name.as_str())).take(2);
    let group: Vec<_> = group.collect();
    ensure!(group.len() == 2, "the failures have no group");
    let query = serde_urlencoded::to_string(&group)?;
    pages.push(("failures, retry a group?", format!("/failures/confirm?remedy=retry&{query}")));
    pages.push(("failures, discard a group?", format!("/failures/confirm?remedy=discard&{query}")));
    Ok(pages)
}

/// Where a page of a search goes on.
fn older(body: &str) -> Option<String> {
    let (_, rest) = body.split_once("id=\"older\" href=\"/console")?;
    Some(rest.split('"').next()?.replace("&amp;", "&"))
}

/// The hidden fields of the forms of a page.
fn fields(body: &str) -> Vec<(String, String)> {
    let field = |text: &str| {
        let (name, rest) = text.split_once("\" value=\"")?;
        let value = rest.split('"').next()?;
        Some((name.to_owned(), value.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")))
    };
    body.split("type=\"hidden\" name=\"").skip(1).filter_map(field).collect()
}

/// Retries or discards all failed events, or those of a type, by the buttons, for as long as there are more.
async fn remedy(stage: &Stage, site: &Site, remedy: &str, event_type: Option<&str>) -> anyhow::Result<String> {
    let mut connection = stage.connect("console").await?;
    let mut failed = async || {
        let sql = "SELECT count(*) FROM event_outbox WHERE status = 'FAILED' AND ($1::text IS NULL OR event_type = $1)";
        sqlx::query_scalar::<_, i64>(sql).bind(event_type).fetch_one(&mut connection).await
    };
    let before = failed().await?;
    let of_type = event_type.map_or_else(String::new, |event_type| format!("&type={event_type}"));
    let asked = format!("/failures/confirm?remedy={remedy}{of_type}");
    let started = Instant::now();
    let mut page = site.page(&asked).await?;
    if page.body.contains("id=\"count-all\"") {
        page = site.page(&format!("{asked}&count_all=true")).await?;
    }
    let (mut longest, mut requests) = (page.millis, 0);
    while page.body.contains("action=\"/console/failures/act\"") {
        stage.tell(|| format!("console, {remedy}, request {}", requests + 1));
        let mut form = fields(&page.body);
        form.retain(|(name, _)| name != "token");
        form.extend([("token".to_owned(), site.token.clone()), ("remedy".to_owned(), remedy.to_owned())]);
        page = site.send("POST", "/failures/act", &serde_urlencoded::to_string(&form)?).await?;
        (longest, requests) = (longest.max(page.millis), requests + 1);
    }
    let took = started.elapsed().as_secs_f64();
    let (after, longest) = (failed().await?, longest / 1_000.0);
    ensure!(after == 0, "{after} failed events are left by: {}", page.body);
    let (events, of) = (count(before.unsigned_abs()), event_type.unwrap_or("any type"));
    Ok(format!("{remedy} of {events} failed events of {of}: {took:.1} s by {requests} requests, the longest of {longest:.1} s"))
}

/// The console as `commitstream console` serves it, and somebody who is logged in.
struct Site {
    server: HttpServer,
    visitor: Visitor,
    token: String,
}

struct Page {
    body: String,
    /// From the connection to the last byte.
    millis: f64,
}

impl Site {
    async fn open(stage: &Stage) -> anyhow::Result<Self> {
        let mut settings = stage.settings.clone();
        settings.console.password = Some(PASSWORD.to_owned());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = HttpServer::serve(listener, console::routes(&settings, address)?.0);
        let visitor = Visitor::log_in(address, PASSWORD).await?;
        let mut site = Self { server, visitor, token: String::new() };
        let all = fields(&site.page("/audit").await?.body);
        site.token = all.into_iter().find(|(name, _)| name == "token").context("a form with a token")?.1;
        Ok(site)
    }

    async fn page(&self, path: &str) -> anyhow::Result<Page> {
        self.send("GET", path, "").await
    }

    /// Of the live numbers it waits for the first ones.
    async fn send(&self, method: &str, path: &str, form: &str) -> anyhow::Result<Page> {
        let begun = Instant::now();
        let is_enough = |answer: &[u8]| path == "/live" && answer.windows(14).any(|bytes| bytes == b"event: figures");
        let mut answer = self.visitor.send(method, &format!("/console{path}"), form, is_enough).await?;
        // An act leads to its outcome.
        if let Some(outcome) = answer.head.lines().find_map(|line| line.strip_prefix("location: ")) {
            answer = self.visitor.send("GET", outcome, "", |_| false).await?;
        }
        Ok(Page { body: answer.body, millis: begun.elapsed().as_secs_f64() * 1_000.0 })
    }
}
