//! The frame of a page, and how things are written in it.

use std::time::Duration;

use axum::Extension;
use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, SecondsFormat, Utc};
use commitstream::outbox::{Counted, OutboxError};
use commitstream::streams::StreamsError;
use maud::{DOCTYPE, Markup, html};
use serde::de::DeserializeOwned;

use super::session::Viewer;
use crate::failure::on_one_line;
use crate::output::{age, count};

const PAGES: [(&str, &str); 9] = [
    ("Overview", "/console"),
    ("Doctor", "/console/doctor"),
    ("Events", "/console/events"),
    ("Failures", "/console/failures"),
    ("Blocked", "/console/blocked"),
    ("Dead letters", "/console/dead"),
    ("Streams", "/console/streams"),
    ("Relays", "/console/relays"),
    ("Audit", "/console/audit"),
];

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Good,
    Warn,
    Bad,
}

impl Tone {
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
                link rel="stylesheet" href="/console/assets/uplot.min.css";
                link rel="stylesheet" href="/console/assets/console.css";
                script defer src="/console/assets/uplot.min.js" {}
                script defer src="/console/assets/console.js" {}
            }
            body { (body) }
        }
    }
}

pub fn page(title: &str, viewer: &Viewer, body: &Markup) -> Markup {
    bare(
        title,
        &html! {
            a.skip href="#main" { "To the content" }
            header {
                strong { "Commitstream" }
                nav aria-label="Pages" {
                    // One event's page is among `Events`.
                    @for (name, path) in PAGES {
                        @if name.starts_with(title) { a href=(path) aria-current="page" { (name) } } @else { a href=(path) { (name) } }
                    }
                }
                span.quiet data-test="viewer" { (viewer.who) @if !viewer.may_act() { " (read-only)" } }
                form method="post" action="/console/logout" { (token(viewer)) button #logout { "Log out" } }
            }
            main #main tabindex="-1" { h1 { (title) } (body) }
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
    format!("{path}?{}", serde_urlencoded::to_string(query).unwrap_or_default())
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
        None => bare(title, &html! { main { h1 { (title) } (problem) p { a href="/console" { "To the overview" } } } }),
    };
    (code, page).into_response()
}
