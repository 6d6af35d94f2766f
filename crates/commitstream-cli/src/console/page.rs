//! The frame of a page, and how things are written in it.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Redirect, Response};
use chrono::{DateTime, SecondsFormat, Utc};
use commitstream::config::{Settings, redact_url};
use commitstream::doctor::{Finding, Severity};
use commitstream::outbox::{Counted, OutboxError};
use commitstream::streams::StreamsError;
use maud::{DOCTYPE, Markup, html};
use serde::de::DeserializeOwned;

use super::session::Viewer;
use crate::failure::on_one_line;
use crate::output::{age, count};

const PAGES: [(&str, &str); 9] = [
    ("Overview", ""),
    ("Doctor", "/doctor"),
    ("Events", "/events"),
    ("Failures", "/failures"),
    ("Blocked", "/blocked"),
    ("Dead letters", "/dead"),
    ("Streams", "/streams"),
    ("Relays", "/relays"),
    ("Audit", "/audit"),
];

/// Of a URL, where a proxy in front serves the console: one for the process.
static PREFIX: OnceLock<String> = OnceLock::new();

/// Where the pages are, from the browser's side. Only the first call counts.
pub fn serve_below(prefix: &str) {
    PREFIX.get_or_init(|| prefix.to_owned());
}

/// The address of a page, from its path below `/console`.
pub fn at(path: &str) -> String {
    format!("{}/console{path}", PREFIX.get().map_or("", String::as_str))
}

/// Leads to a page.
pub fn to(path: &str) -> Redirect {
    Redirect::to(&at(path))
}

/// Counts in the menu are of the last minute, or are left out.
const COUNTS_LIVE: Duration = Duration::from_secs(60);

/// What stands on every page: which servers these are, and what waits for a decision.
pub struct Frame {
    environment: Option<(String, &'static str)>,
    place: String,
    counts: Mutex<Option<(Instant, Counts)>>,
}

/// How much waits for somebody, as the menu says it.
#[derive(Clone, Default)]
pub struct Counts {
    pub failed: Option<String>,
    pub dead: Option<String>,
}

impl Frame {
    pub fn new(settings: &Settings) -> Self {
        let console = &settings.console;
        // Everybody who looks sees this: servers and database, and nothing else of the URL.
        let url = |url: &Option<String>| url.as_deref().map_or_else(|| "none".to_owned(), |url| servers_of(&redact_url(url)));
        let place = format!(
            "PostgreSQL {}, schema {} · Redis {}, prefix {} · Commitstream {}",
            url(&settings.database.url),
            settings.database.schema,
            url(&settings.redis.url),
            settings.redis.stream_prefix,
            env!("CARGO_PKG_VERSION"),
        );
        let environment = console.environment.clone().map(|name| (name, console.environment_color.name()));
        Self { environment, place, counts: Mutex::default() }
    }

    pub fn count(&self, counts: Option<Counts>) {
        let counted = counts.map(|counts| (Instant::now(), counts));
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = counted;
    }

    fn counts(&self) -> Counts {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = counts.as_ref().filter(|(at, _)| at.elapsed() < COUNTS_LIVE);
        fresh.map(|(_, counts)| counts.clone()).unwrap_or_default()
    }

    fn badge(&self) -> Markup {
        html! { @if let Some((name, color)) = &self.environment { span #environment .{ "environment " (color) } { (name) } } }
    }
}

/// Of a URL without its password, the part between login and query.
fn servers_of(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let authority = rest.split('/').next().unwrap_or_default();
    let login = authority.rfind('@').map_or(0, |at| at + 1);
    format!("{}{}", if scheme == "unix" { "unix:" } else { "" }, &rest[login..])
}

/// The page that says more about what a check has found.
pub fn page_of(check: &str) -> Option<&'static str> {
    Some(match check {
        "relays" | "relay-versions" | "pause" | "open-batches" | "leases" => "/relays",
        "backlog" => "/events?status=PENDING",
        "refused-events" => "/blocked",
        "failed-events" => "/failures",
        "consumer-groups" | "stream-keys" | "trimming" => "/streams",
        "dead-letters" => "/dead",
        _ => return None,
    })
}

/// How a finding looks: class, sign, and the page that says more.
pub fn look(finding: &Finding) -> (Tone, &'static str) {
    (Tone::of(Some(finding.severity)), page_of(finding.check).unwrap_or("/doctor"))
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Good,
    Warn,
    Bad,
}

impl Tone {
    /// Of a verdict.
    pub fn of(severity: Option<Severity>) -> Self {
        match severity {
            Some(Severity::Error) => Self::Bad,
            Some(Severity::Warning | Severity::Note) => Self::Warn,
            None => Self::Good,
        }
    }

    pub fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }

    /// Colour is not for everybody.
    pub fn sign(self) -> &'static str {
        match self {
            Self::Good => "✓",
            Self::Warn => "!",
            Self::Bad => "✗",
        }
    }
}

/// A page without a viewer.
pub fn bare(title: &str, body: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) " · Commitstream" }
                link rel="icon" href="data:,";
                link rel="stylesheet" href=(at("/assets/uplot.min.css"));
                link rel="stylesheet" href=(at("/assets/console.css"));
                script defer src=(at("/assets/uplot.min.js")) {}
                script defer src=(at("/assets/console.js")) {}
            }
            body { (body) }
        }
    }
}

pub fn page(title: &str, viewer: &Viewer, body: &Markup) -> Markup {
    let counts = viewer.frame.counts();
    let count = |name: &str| match name {
        "Failures" => counts.failed.as_deref(),
        "Dead letters" => counts.dead.as_deref(),
        _ => None,
    };
    bare(
        title,
        &html! {
            a.skip href="#main" { "To the content" }
            header {
                strong { "Commitstream" }
                (viewer.frame.badge())
                nav aria-label="Pages" {
                    @for (name, path) in PAGES {
                        // One event's page is among `Events`.
                        a href=(at(path)) aria-current=[name.starts_with(title).then_some("page")] {
                            (name) @if let Some(count) = count(name) { " " span.count data-test={ "count-" (name) } { (count) } }
                        }
                    }
                }
                span.quiet data-test="viewer" { (viewer.who) @if !viewer.may_act() { " (read-only)" } }
                form method="post" action=(at("/logout")) { (token(viewer)) button #logout { "Log out" } }
            }
            main #main tabindex="-1" { h1 { (title) } (body) }
            footer.quiet #place { (viewer.frame.place) }
        },
    )
}

/// What a form of the viewer must bring along.
pub fn token(viewer: &Viewer) -> Markup {
    html! { input type="hidden" name="token" value=(viewer.token); }
}

/// A time, which a script writes in the viewer's zone.
pub fn time(at: DateTime<Utc>) -> Markup {
    html! { time datetime=(at.to_rfc3339_opts(SecondsFormat::Millis, true)) { (at.format("%Y-%m-%d %H:%M:%S UTC")) } }
}

/// The same to the millisecond.
pub fn moment(at: DateTime<Utc>) -> Markup {
    html! { time.precise datetime=(at.to_rfc3339_opts(SecondsFormat::Millis, true)) { (at.format("%Y-%m-%d %H:%M:%S%.3f UTC")) } }
}

pub fn number(events: i64) -> String {
    count(u64::try_from(events).unwrap_or_default())
}

pub fn counted(events: Counted) -> String {
    let least = if events.at_least { "at least " } else { "" };
    format!("{least}{}", number(events.events))
}

pub fn millis(millis: i64) -> String {
    age(Duration::from_millis(millis.unsigned_abs()))
}

/// What is said in place of an empty list.
pub fn nothing(text: &str) -> Markup {
    html! { p.nothing data-test="nothing" { (text) } }
}

/// The beginning of a long text.
pub fn beginning(text: &str, most: usize) -> Markup {
    let cut = text.char_indices().nth(most).map(|(end, _)| &text[..end]);
    html! { pre { (cut.unwrap_or(text)) } @if cut.is_some() { p.quiet data-test="cut" { "The first " (count(most as u64)) " characters." } } }
}

/// Of a failure that SQL has made, nobody may have said why.
pub fn cause_text(cause: &str) -> &str {
    if cause.is_empty() { "no error is noted" } else { cause }
}

pub fn link(path: &str, query: &[(&str, &str)]) -> String {
    format!("{}?{}", at(path), serde_urlencoded::to_string(query).unwrap_or_default())
}

/// PostgreSQL has no text with a zero byte.
pub const NO_TEXT: &str = "a text with a zero byte is in no event";

/// What the address asks for, or a refusal in words.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        if parts.uri.query().is_some_and(|query| query.contains("%00")) {
            return Err(Refusal::wrong(NO_TEXT));
        }
        let asked = axum::extract::Query::from_request_parts(parts, state).await;
        let axum::extract::Query(asked) =
            asked.map_err(|_| Refusal::wrong("the address is not one of this console's: come here by its links and forms"))?;
        Ok(Self(asked))
    }
}

/// Why there is no page. It becomes one where its viewer is known.
#[derive(Clone)]
pub struct Refusal {
    code: StatusCode,
    why: String,
}

impl Refusal {
    pub fn why(&self) -> &str {
        &self.why
    }

    pub fn not_found(why: &str) -> Self {
        Self { code: StatusCode::NOT_FOUND, why: why.to_owned() }
    }

    pub fn forbidden(why: &str) -> Self {
        Self { code: StatusCode::FORBIDDEN, why: why.to_owned() }
    }

    pub fn wrong(why: &str) -> Self {
        Self { code: StatusCode::BAD_REQUEST, why: why.to_owned() }
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        let why = on_one_line(&error);
        tracing::warn!("a page of the console cannot be shown: {why}");
        Self { code: StatusCode::SERVICE_UNAVAILABLE, why }
    }
}

impl From<OutboxError> for Refusal {
    fn from(error: OutboxError) -> Self {
        anyhow::Error::from(error).into()
    }
}

impl From<StreamsError> for Refusal {
    fn from(error: StreamsError) -> Self {
        anyhow::Error::from(error).into()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.code, Extension(self)).into_response()
    }
}

/// Refusals as pages, from which a viewer can go on to others.
pub fn with_refusal(mut response: Response, viewer: Option<&Viewer>) -> Response {
    let Some(Refusal { code, why }) = response.extensions_mut().remove() else { return response };
    let title = "This did not work";
    let problem = html! { p.verdict.bad role="alert" data-test="problem" { (why) } };
    let page = match viewer {
        Some(viewer) => page(title, viewer, &problem),
        None => bare(title, &html! { main { h1 { (title) } (problem) p { a href=(at("")) { "To the overview" } } } }),
    };
    (code, page).into_response()
}
