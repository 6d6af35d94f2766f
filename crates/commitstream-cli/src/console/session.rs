//! Who may look and who may act.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Form;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Request, State};
use axum::http::header::{COOKIE, HOST, ORIGIN, RETRY_AFTER, SET_COOKIE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Redirect, Response};
use maud::{Markup, html};
use rand::TryRngCore;
use rand::rngs::OsRng;
use subtle::ConstantTimeEq;

use super::Console;
use super::page::{self, Frame, Refusal, at};
use crate::output::printable;

/// With the port behind it: browsers send cookies to all ports of a host.
const COOKIE_NAME: &str = "commitstream_console_";

/// Of a session, however much it is used.
const LIFE: Duration = Duration::from_secs(12 * 60 * 60);
/// Sessions at a time; with one more, the oldest ends.
const MAX_SESSIONS: usize = 100;
/// Outcomes of acts that are kept for a session, some kilobytes each.
const MAX_OUTCOMES: usize = 20;
/// Wrong passwords of one address within a window; then nobody can log in from there until it is over. Sessions go on.
const MAX_WRONG: u32 = 10;
/// The same of all addresses together.
const MAX_WRONG_OF_ALL: u32 = 100;
const WINDOW: Duration = Duration::from_secs(60);
/// Characters of a name.
const LONGEST_NAME: usize = 100;

/// What opens the console.
pub struct Passwords {
    pub operator: String,
    /// For who may look and not act.
    pub read_only: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Operator,
    ReadOnly,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::ReadOnly => "read-only",
        }
    }
}

/// Somebody who is logged in.
#[derive(Clone)]
pub struct Viewer {
    /// As they called themselves.
    pub who: String,
    pub role: Role,
    /// What a form of theirs must bring along.
    pub token: String,
    /// What stands on every page.
    pub frame: Arc<Frame>,
    since: Instant,
}

impl Viewer {
    pub fn may_act(&self) -> bool {
        self.role == Role::Operator
    }
}

pub struct Doorman {
    passwords: Passwords,
    secure: bool,
    cookie_name: String,
    frame: Arc<Frame>,
    state: Mutex<DoorState>,
}

/// What became of an act. It is a page of its own: who loads that again does nothing.
#[derive(Clone)]
struct Outcome {
    number: u64,
    title: &'static str,
    body: Markup,
}

struct Session {
    viewer: Viewer,
    /// The newest ones.
    outcomes: VecDeque<Outcome>,
}

#[derive(Default)]
struct DoorState {
    sessions: HashMap<String, Session>,
    /// By address; as many addresses as wrong passwords at most.
    wrong: HashMap<IpAddr, u32>,
    window: Option<Instant>,
}

impl Doorman {
    pub fn new(passwords: Passwords, address: SocketAddr, frame: Arc<Frame>) -> Self {
        let cookie_name = format!("{COOKIE_NAME}{}", address.port());
        Self { passwords, secure: !address.ip().is_loopback(), cookie_name, frame, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, DoorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn viewer(&self, headers: &HeaderMap) -> Option<Viewer> {
        let id = self.id(headers)?;
        self.state().sessions.get(id).map(|session| &session.viewer).filter(|viewer| viewer.since.elapsed() < LIFE).cloned()
    }

    /// Keeps it for the session, and returns its number.
    fn keep(&self, session: &str, title: &'static str, body: Markup) -> u64 {
        let mut state = self.state();
        // One that has ended has no use for it.
        let Some(Session { outcomes, .. }) = state.sessions.get_mut(session) else { return 0 };
        let number = outcomes.back().map_or(1, |latest| latest.number + 1);
        outcomes.push_back(Outcome { number, title, body });
        if outcomes.len() > MAX_OUTCOMES {
            outcomes.pop_front();
        }
        number
    }

    fn outcome(&self, headers: &HeaderMap, number: &str) -> Option<Outcome> {
        let state = self.state();
        let number = number.parse::<u64>().ok()?;
        state.sessions.get(self.id(headers)?)?.outcomes.iter().find(|outcome| outcome.number == number).cloned()
    }

    /// The seconds until this address may try again, if too many were wrong.
    fn locked(&self, client: IpAddr) -> Option<u64> {
        let mut state = self.state();
        let left = state.window.map_or(Duration::ZERO, |since| WINDOW.saturating_sub(since.elapsed()));
        if left.is_zero() {
            (state.wrong, state.window) = (HashMap::new(), None);
        }
        let of_client = state.wrong.get(&client).copied().unwrap_or_default();
        let is_locked = of_client >= MAX_WRONG || state.wrong.values().sum::<u32>() >= MAX_WRONG_OF_ALL;
        is_locked.then(|| left.as_secs() + 1)
    }

    fn role_of(&self, password: &str, client: IpAddr) -> Option<Role> {
        let is = |known: &str| bool::from(known.as_bytes().ct_eq(password.as_bytes()));
        let reads = self.passwords.read_only.as_deref().is_some_and(is);
        match (is(&self.passwords.operator), reads) {
            (true, _) => Some(Role::Operator),
            (false, true) => Some(Role::ReadOnly),
            (false, false) => {
                let mut state = self.state();
                *state.wrong.entry(client).or_default() += 1;
                state.window.get_or_insert_with(Instant::now);
                None
            }
        }
    }

    /// The cookie of a new session.
    fn enter(&self, who: &str, role: Role) -> anyhow::Result<String> {
        let (id, token) = (secret()?, secret()?);
        let mut state = self.state();
        state.sessions.retain(|_, session| session.viewer.since.elapsed() < LIFE);
        if state.sessions.len() >= MAX_SESSIONS
            && let Some(oldest) = state.sessions.iter().min_by_key(|(_, session)| session.viewer.since).map(|(id, _)| id.clone())
        {
            state.sessions.remove(&oldest);
        }
        let viewer = Viewer { who: who.to_owned(), role, token, frame: Arc::clone(&self.frame), since: Instant::now() };
        state.sessions.insert(id.clone(), Session { viewer, outcomes: VecDeque::new() });
        Ok(self.cookie(&id, LIFE.as_secs()))
    }

    fn leave(&self, headers: &HeaderMap) -> String {
        if let Some(id) = self.id(headers) {
            self.state().sessions.remove(id);
        }
        self.cookie("", 0)
    }

    fn cookie(&self, id: &str, seconds: u64) -> String {
        let secure = if self.secure { "; Secure" } else { "" };
        format!("{}={id}; Path={}; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}", self.cookie_name, at(""))
    }

    /// Of the session, as the browser has it.
    fn id<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(';'));
        cookies.filter_map(|cookie| cookie.trim().split_once('=')).find(|(name, _)| *name == self.cookie_name).map(|(_, id)| id)
    }
}

/// 256 random bits.
pub fn secret() -> anyhow::Result<String> {
    let mut bytes = [0_u8; 32];
    OsRng.try_fill_bytes(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The name by which a console on loopback is asked for. Another one may be that of a site that made its name lead here (DNS rebinding).
pub fn is_local(host: &str) -> bool {
    let host =
        host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit())).map_or(host, |(host, _)| host);
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || address.parse::<std::net::IpAddr>().is_ok()
}

/// Browsers name the origin of each POST; it must be this host.
/// Where they say so themselves, that counts: a proxy in between may change the host.
fn is_from_here(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site == "same-origin";
    }
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(_, origin)| Some(origin) == host)
}

/// Another site cannot know the token, and cannot send the cookie either.
fn check_form(headers: &HeaderMap, viewer: &Viewer, fields: &HashMap<String, String>) -> Result<(), Refusal> {
    let token = fields.get("token").map(String::as_bytes).unwrap_or_default();
    if is_from_here(headers) && bool::from(token.ct_eq(viewer.token.as_bytes())) {
        return Ok(());
    }
    Err(Refusal::forbidden("this form is not of your session: load the page again"))
}

impl FromRequestParts<Console> for Viewer {
    type Rejection = Redirect;

    async fn from_request_parts(parts: &mut Parts, console: &Console) -> Result<Self, Redirect> {
        console.doorman.viewer(&parts.headers).ok_or_else(|| page::to("/login"))
    }
}

/// An act of an operator: logged in, allowed to act, from a form of this very session.
pub struct Act {
    pub viewer: Viewer,
    pub fields: HashMap<String, String>,
    session: String,
}

impl Act {
    /// A field that is there and not empty.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    /// 0 where it is none.
    pub fn number(&self, name: &str) -> i64 {
        self.field(name).and_then(|number| number.parse().ok()).unwrap_or_default()
    }

    /// Leads to the page of its outcome.
    pub fn ended(&self, console: &Console, title: &'static str, outcome: Markup) -> Redirect {
        // What is counted in the menu has changed.
        self.viewer.frame.count(None);
        page::to(&format!("/outcome/{}", console.doorman.keep(&self.session, title, outcome)))
    }
}

impl FromRequest<Console> for Act {
    type Rejection = Response;

    async fn from_request(request: Request, console: &Console) -> Result<Self, Response> {
        let headers = request.headers().clone();
        let viewer = console.doorman.viewer(&headers).ok_or_else(|| page::to("/login").into_response())?;
        if !viewer.may_act() {
            return Err(Refusal::forbidden("you may look and not act: log in with the operator's password").into_response());
        }
        let Form(fields) =
            Form::<HashMap<String, String>>::from_request(request, console).await.map_err(IntoResponse::into_response)?;
        check_form(&headers, &viewer, &fields).map_err(IntoResponse::into_response)?;
        if fields.values().any(|text| text.contains('\0')) {
            return Err(Refusal::wrong(page::NO_TEXT).into_response());
        }
        Ok(Self { viewer, fields, session: console.doorman.id(&headers).unwrap_or_default().to_owned() })
    }
}

/// What became of an act.
pub async fn outcome(
    viewer: Viewer,
    State(console): State<Console>,
    headers: HeaderMap,
    Path(number): Path<String>,
) -> Result<Markup, Refusal> {
    let gone = "this outcome is not kept any more: the audit says what was done";
    let Outcome { title, body, .. } = console.doorman.outcome(&headers, &number).ok_or_else(|| Refusal::not_found(gone))?;
    Ok(page::page(title, &viewer, &body))
}

pub async fn form() -> Markup {
    login_page(None)
}

fn login_page(problem: Option<&str>) -> Markup {
    page::bare(
        "Log in",
        &html! {
            div.login {
                h1 { "Commitstream" }
                @if let Some(problem) = problem { p.verdict.bad role="alert" data-test="problem" { (problem) } }
                form method="post" action=(at("/login")) {
                    label for="name" { "Your name, for the audit" }
                    input #name name="name" required maxlength=(LONGEST_NAME) autocomplete="username" autofocus;
                    label for="password" { "Password" }
                    input #password type="password" name="password" required autocomplete="current-password";
                    button.main #login type="submit" { "Log in" }
                }
            }
        },
    )
}

#[derive(serde::Deserialize)]
pub struct Login {
    name: String,
    password: String,
}

pub async fn login(
    State(console): State<Console>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    Form(login): Form<Login>,
) -> Result<Response, Refusal> {
    // IPv4 on a socket of both kinds is the same client.
    let client = client.ip().to_canonical();
    if !is_from_here(&headers) {
        return Err(Refusal::forbidden("this form is of another site"));
    }
    if let Some(seconds) = console.doorman.locked(client) {
        let problem = format!("Too many wrong passwords. Try again in {seconds} seconds.");
        let answer = (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, seconds.to_string())], login_page(Some(&problem)));
        return Ok(answer.into_response());
    }
    let name: String = login.name.trim().chars().filter(|c| !c.is_control()).take(LONGEST_NAME).collect();
    if name.is_empty() {
        return Ok((StatusCode::UNAUTHORIZED, login_page(Some("Give a name: the audit says who did what."))).into_response());
    }
    let Some(role) = console.doorman.role_of(&login.password, client) else {
        tracing::warn!("a wrong password for the console from {client}");
        return Ok((StatusCode::UNAUTHORIZED, login_page(Some("That is not the password."))).into_response());
    };
    let cookie = console.doorman.enter(&name, role)?;
    tracing::info!("{} has logged in to the console from {client}, role {}", printable(&name), role.name());
    Ok(([(SET_COOKIE, cookie)], page::to("/entered")).into_response())
}

/// Where a login leads: it would lead to the form again, without a word, for who does not send the cookie back.
pub async fn entered(State(console): State<Console>, headers: HeaderMap) -> Response {
    if console.doorman.viewer(&headers).is_some() {
        return page::to("").into_response();
    }
    let problem = "The password was right, but the browser has not sent the cookie of the session back. It has to allow cookies, and where the \
                   console is not on this computer it has to ask for it by https.";
    (StatusCode::UNAUTHORIZED, login_page(Some(problem))).into_response()
}

pub async fn logout(
    viewer: Viewer,
    State(console): State<Console>,
    headers: HeaderMap,
    Form(fields): Form<HashMap<String, String>>,
) -> Result<Response, Refusal> {
    check_form(&headers, &viewer, &fields)?;
    Ok(([(SET_COOKIE, console.doorman.leave(&headers))], page::to("/login")).into_response())
}

#[cfg(test)]
mod tests {
    use commitstream::config::Settings;

    use super::*;

    #[test]
    fn local_names_are_addresses_and_localhost() {
        for host in ["127.0.0.1", "127.0.0.1:9464", "localhost:9464", "LocalHost", "[::1]:9464", "[::1]"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example:80"] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn wrong_passwords_are_counted_by_address_and_in_total() {
        let passwords = Passwords { operator: "right".to_owned(), read_only: None };
        let doorman =
            Doorman::new(passwords, SocketAddr::from(([127, 0, 0, 1], 9464)), Arc::new(Frame::new(&Settings::default())));
        let client = |n: u8| IpAddr::from([10, 0, 0, n]);
        for n in 1..=10 {
            assert_eq!(doorman.locked(client(n)), None, "others do not lock {n} out");
            (0..MAX_WRONG).for_each(|_| assert_eq!(doorman.role_of("wrong", client(n)), None));
            assert!(doorman.locked(client(n)).is_some());
        }
        assert!(doorman.locked(client(11)).is_some(), "all together");
    }
}
