//! The web console: pages for the person on call, rendered here, without scripts of others and without a build step.
//!
//! | file | what |
//! |---|---|
//! | `session` | login, its limits, cookies, roles, what every act must bring |
//! | `servers` | sessions on PostgreSQL, and Redis |
//! | `page` | the frame of a page, times, numbers, refusals |
//! | the others | one page each |

mod audit;
mod blocked;
mod dead;
mod doctor;
mod events;
mod failures;
mod overview;
mod page;
mod relays;
mod servers;
mod session;
mod streams;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{self, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use commitstream::config::{ConsoleSettings, Settings};

use page::{Frame, Refusal};
use servers::Servers;
use session::{Doorman, Passwords, Viewer};

use crate::failure::WrongUse;

/// Hexadecimal digits of a generated password: 96 bits.
const GENERATED: usize = 24;

/// What all pages share.
#[derive(Clone)]
struct Console {
    servers: Arc<Servers>,
    doorman: Arc<Doorman>,
}

/// Nothing is loaded from elsewhere, nothing is inline, and no other page may frame this one.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// Whether the console may be served on this address.
pub fn check(settings: &Settings, address: SocketAddr) -> Result<(), WrongUse> {
    let ConsoleSettings { password, read_only_password, .. } = &settings.console;
    if password.is_none() && !address.ip().is_loopback() {
        let message = format!("the console would be open to others on {address}, and CONSOLE_PASSWORD is not set");
        let hint = "set CONSOLE_PASSWORD (app.console.password), or listen on 127.0.0.1, or set CONSOLE_ENABLED=false";
        return Err(WrongUse::with_hint(message, hint));
    }
    if password.is_some() && password == read_only_password {
        let message = "CONSOLE_PASSWORD and CONSOLE_READ_ONLY_PASSWORD are the same";
        return Err(WrongUse::with_hint(message, "set different ones: the password decides who may act"));
    }
    Ok(())
}

/// The console under `/console`, and the password that was generated where none is set. Cookies are marked `Secure` unless it is for
/// this host only.
pub fn routes(settings: &Settings, address: SocketAddr) -> anyhow::Result<(Router, Option<String>)> {
    let ConsoleSettings { password, read_only_password, .. } = settings.console.clone();
    let generated = if password.is_none() { Some(session::secret()?.chars().take(GENERATED).collect::<String>()) } else { None };
    let operator = password.or_else(|| generated.clone()).unwrap_or_default();
    let passwords = Passwords { operator, read_only: read_only_password };
    page::serve_below(&settings.console.path_prefix);
    let frame = Arc::new(Frame::new(settings));
    let doorman = Doorman::new(passwords, address, Arc::clone(&frame));
    let console = Console { servers: Arc::new(Servers::new(settings, frame)?), doorman: Arc::new(doorman) };
    let pages = Router::new()
        .route("/", get(overview::page))
        .route("/live", get(overview::live))
        .route("/login", get(session::form).post(session::login))
        .route("/entered", get(session::entered))
        .route("/logout", post(session::logout))
        .route("/doctor", get(doctor::show))
        .route("/doctor/line", get(doctor::line))
        .route("/events", get(events::list))
        .route("/events/{id}", get(events::one))
        .route("/failures", get(failures::list))
        .route("/failures/confirm", get(failures::confirm))
        .route("/failures/act", post(failures::act))
        .route("/blocked", get(blocked::list))
        .route("/dead", get(dead::list))
        .route("/dead/confirm", get(dead::confirm))
        .route("/dead/act", post(dead::act))
        .route("/streams", get(streams::list))
        .route("/relays", get(relays::list))
        .route("/relays/switch", post(relays::switch))
        .route("/audit", get(audit::list))
        .route("/outcome/{number}", get(session::outcome))
        .route("/assets/{name}", get(asset))
        .route("/{*nowhere}", get(nowhere))
        .with_state(console.clone());
    let home = || async { page::to("") };
    let routes = Router::new().route("/", get(home)).route("/console/", get(home)).nest("/console", pages);
    let routes = if address.ip().is_loopback() { routes.route_layer(middleware::from_fn(local_only)) } else { routes };
    let routes = routes.route_layer(middleware::from_fn_with_state(console, guarded));
    // A proxy may pass the prefix on or take it off.
    let prefix = &settings.console.path_prefix;
    let routes = if prefix.is_empty() { routes } else { Router::new().nest(prefix, routes.clone()).merge(routes) };
    Ok((routes, generated))
}

/// A console on loopback is for this host: whoever asks by another name than an address or localhost comes from a page of somebody else,
/// or through a proxy that has to set it.
async fn local_only(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    if host.is_some_and(session::is_local) {
        return next.run(request).await;
    }
    Refusal::forbidden("ask for 127.0.0.1 or localhost; a proxy in front of this must send one of them as Host").into_response()
}

async fn guarded(State(console): State<Console>, request: Request, next: Next) -> Response {
    let is_asset = request.uri().path().starts_with("/console/assets/");
    let viewer = console.doorman.viewer(request.headers());
    let mut response = page::with_refusal(next.run(request).await, viewer.as_ref());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // Without a referrer, browsers would not name the origin of a form either.
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    let cache = if is_asset { "public, max-age=3600" } else { "no-store" };
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    response
}

async fn nowhere(_: Viewer) -> Refusal {
    Refusal::not_found("there is no such page")
}

async fn asset(axum::extract::Path(name): axum::extract::Path<String>) -> Response {
    const JS: &str = "text/javascript; charset=utf-8";
    const CSS: &str = "text/css; charset=utf-8";
    let (kind, text) = match name.as_str() {
        "console.js" => (JS, include_str!("../../assets/console.js")),
        "console.css" => (CSS, include_str!("../../assets/console.css")),
        "uplot.min.js" => (JS, include_str!("../../assets/uplot.min.js")),
        "uplot.min.css" => (CSS, include_str!("../../assets/uplot.min.css")),
        _ => return Refusal::not_found("there is no such file").into_response(),
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
