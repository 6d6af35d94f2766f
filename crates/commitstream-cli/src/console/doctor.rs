//! What `commitstream doctor` finds: all of it, looked for anew with each visit, and how much that is, for the overview.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use commitstream::doctor::{self, Report, Severity, Step};
use maud::{Markup, html};
use serde::Serialize;

use super::Console;
use super::page::{Refusal, Tone, at, nothing, page, page_of};
use super::servers::Servers;
use super::session::Viewer;
use crate::commands::doctor::verdict;
use crate::output::plural;

/// Within the time of an answer.
const LIMIT: Duration = Duration::from_secs(12);

/// The overview's line is not looked for anew while it is younger.
const FRESH: Duration = Duration::from_secs(60);

/// The findings in one line.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    tone: &'static str,
    sign: &'static str,
    text: String,
}

impl Line {
    fn of(report: &Report) -> Self {
        let tone = match report.worst() {
            Some(Severity::Error) => Tone::Bad,
            Some(Severity::Warning) => Tone::Warn,
            Some(Severity::Note) | None => Tone::Good,
        };
        Self { tone: tone.class(), sign: tone.sign(), text: verdict(report) }
    }
}

/// One examination at a time, for all who look at the overview.
#[derive(Default)]
pub struct Examiner {
    latest: Mutex<Option<(Instant, Line)>>,
    turn: tokio::sync::Mutex<()>,
}

impl Examiner {
    /// The latest line, however old.
    fn latest(&self) -> Option<(Instant, Line)> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fresh(&self) -> Option<Line> {
        self.latest().filter(|(at, _)| at.elapsed() < FRESH).map(|(_, line)| line)
    }

    fn keep(&self, line: &Line) {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), line.clone()));
    }

    /// What the overview says before it has asked.
    pub fn line(&self) -> Markup {
        let asking = || Line { tone: "", sign: "…", text: "is being asked".to_owned() };
        let line = self.latest().map_or_else(asking, |(_, line)| line);
        html! {
            p #doctor .{ "finding " (line.tone) } data-source=(at("/doctor/line")) {
                span.sign { (line.sign) } " " a href=(at("/doctor")) { "Doctor" } ": " span.text { (line.text) }
            }
        }
    }
}

async fn examine(servers: &Servers) -> Result<Report, Refusal> {
    let _turn = servers.turn().await?;
    let late = |_| anyhow::anyhow!("the examination takes too long for a page: run `commitstream doctor`");
    Ok(tokio::time::timeout(LIMIT, doctor::examine(&servers.settings)).await.map_err(late)?)
}

/// The line, at most a minute old.
pub async fn line(_: Viewer, State(console): State<Console>) -> Json<Line> {
    let servers = Arc::clone(&console.servers);
    let _turn = servers.examiner.turn.lock().await;
    if let Some(line) = servers.examiner.fresh() {
        return Json(line);
    }
    let line = match examine(&servers).await {
        Ok(report) => Line::of(&report),
        Err(refusal) => Line { tone: Tone::Warn.class(), sign: Tone::Warn.sign(), text: refusal.why().to_owned() },
    };
    servers.examiner.keep(&line);
    Json(line)
}

pub async fn show(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let report = examine(&console.servers).await?;
    console.servers.examiner.keep(&Line::of(&report));
    let checks = plural(report.passed.len() as u64, "check");
    Ok(page(
        "Doctor",
        &viewer,
        &html! {
            p.quiet { @if !report.findings.is_empty() { (verdict(&report)) "; " } (checks) " passed." }
            @if report.findings.is_empty() { (nothing("All is well: no known cause of trouble was found.")) }
            @for finding in &report.findings {
                @let (class, word) = look(finding.severity);
                section .{ "verdict finding " (class) } data-test=(finding.check) {
                    p { span.sign { (word) } " " (finding.seen) " " code.quiet { (finding.check) } }
                    p.quiet { (finding.why) }
                    pre { @for step in finding.steps() { @match step {
                        Step::Command(command) => { (command) "\n" }
                        Step::Words(words) => { span.quiet { "# " (words) } "\n" }
                    } } }
                    @if let Some(path) = page_of(finding.check) { p { a href=(at(path)) { "Look at it here" } } }
                }
            }
        },
    ))
}

fn look(severity: Severity) -> (&'static str, &'static str) {
    match severity {
        Severity::Error => ("bad", "✗ Error:"),
        Severity::Warning => ("warn", "! Warning:"),
        Severity::Note => ("", "Note:"),
    }
}
