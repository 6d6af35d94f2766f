//! What `commitstream doctor` finds, looked for anew with each visit.

use std::time::Duration;

use axum::extract::State;
use commitstream::doctor::{self, Severity};
use maud::{Markup, html};

use super::Console;
use super::page::{Refusal, nothing, page};
use super::session::Viewer;
use crate::output::plural;

/// Within the time of an answer.
const LIMIT: Duration = Duration::from_secs(12);

pub async fn show(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let _turn = console.servers.turn().await?;
    let late = |_| anyhow::anyhow!("the examination takes too long for a page: run `commitstream doctor`");
    let report = tokio::time::timeout(LIMIT, doctor::examine(&console.servers.settings)).await.map_err(late)?;
    let checks = plural(report.passed.len() as u64, "check");
    Ok(page(
        "Doctor",
        &viewer,
        &html! {
            @if report.findings.is_empty() { (nothing("All is well: no known cause of trouble was found.")) }
            @for finding in &report.findings {
                @let (class, word) = look(finding.severity);
                section .{ "verdict finding " (class) } data-test=(finding.check) {
                    p { span.sign { (word) } " " (finding.seen) " " span.quiet { (finding.check) } }
                    p.quiet { (finding.why) }
                    pre { (finding.mend) }
                }
            }
            p.quiet { (checks) " passed." }
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
