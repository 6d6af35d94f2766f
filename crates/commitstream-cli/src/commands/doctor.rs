//! `commitstream doctor`

use std::process::ExitCode;

use commitstream::doctor::{self, Finding, Report, Severity, Step, Verdict};
use serde::Serialize;

use crate::context::Context;
use crate::output::{Output, Style, plural, printable};

/// Look for every known cause of trouble: what is wrong, why it matters, the command that mends it
///
/// Asks PostgreSQL and Redis about their settings, old transactions, the outbox tables, relays, events that wait or failed, streams and
/// consumer groups. Changes nothing, reads no table in full, and takes some seconds with any number of events. Where a server cannot be
/// reached, that is a finding, and the other one is examined all the same. docs/doctor.md describes each check.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream doctor
  commitstream doctor --passed                         name the checks that found nothing, too
  commitstream doctor --json | jq -r '.findings[] | [.severity, .check, .mend] | @tsv'

Exit codes: 0 nothing worse than notes, 3 warnings, 4 errors; as for every command, 1 when the work itself
failed and 2 after wrong use.")]
pub struct Args {
    /// List the checks that found nothing
    #[arg(long)]
    passed: bool,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let report = doctor::examine(&settings).await;
    if context.output.json {
        context.output.json(&Answer { worst: report.worst(), verdict: report.verdict(), report: &report })?;
    } else {
        context.output.write(&describe(&report, args.passed, &context.output))?;
    }
    Ok(match report.worst() {
        Some(Severity::Error) => ExitCode::from(4),
        Some(Severity::Warning) => ExitCode::from(3),
        Some(Severity::Note) | None => ExitCode::SUCCESS,
    })
}

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    worst: Option<Severity>,
    verdict: Verdict,
    #[serde(flatten)]
    report: &'a Report,
}

fn describe(report: &Report, passed: bool, output: &Output) -> String {
    let mut text: String = report.findings.iter().map(|finding| entry(finding, output)).collect();
    let checks = plural(report.passed.len() as u64, "check");
    let style = report.worst().map_or(Style::Good, |worst| look(worst).0);
    text += &format!("{}; {checks} passed{}\n", output.paint(style, &verdict(report)), if passed { ":" } else { "" });
    if passed {
        text += &report.passed.iter().map(|check| format!("  {check}\n")).collect::<String>();
    }
    text
}

/// How many findings there are of each severity.
pub fn verdict(report: &Report) -> String {
    let count = |severity| report.findings.iter().filter(|finding| finding.severity == severity).count() as u64;
    let counts = [(Severity::Error, "error"), (Severity::Warning, "warning"), (Severity::Note, "note")];
    let found = counts.iter().filter(|(severity, _)| count(*severity) > 0);
    let found: Vec<String> = found.map(|(severity, noun)| plural(count(*severity), noun)).collect();
    if found.is_empty() { "all is well".to_owned() } else { found.join(", ") }
}

/// The finding in one line, then what to know and what to do: each command on a line of its own, such that all of it can be pasted.
fn entry(finding: &Finding, output: &Output) -> String {
    let (style, word) = look(finding.severity);
    let steps = finding.steps().into_iter().map(|step| match step {
        Step::Command(command) => output.paint(Style::Label, &printable(&command)),
        Step::Words(words) => output.paint(Style::Quiet, &format!("# {}", printable(&words))),
    });
    format!(
        "{} {}  {}\n  why   {}\n  fix   {}\n\n",
        output.paint(style, &format!("{word:<8}")),
        printable(&finding.seen),
        output.paint(Style::Quiet, &format!("[{}]", finding.check)),
        printable(&finding.why),
        steps.collect::<Vec<_>>().join("\n        "),
    )
}

pub fn look(severity: Severity) -> (Style, &'static str) {
    match severity {
        Severity::Error => (Style::Error, "error:"),
        Severity::Warning => (Style::Warning, "warning:"),
        Severity::Note => (Style::Name, "note:"),
    }
}
