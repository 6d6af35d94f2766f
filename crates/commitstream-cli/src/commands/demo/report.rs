//! The summary: a table for people, one JSON object for programs.

use std::time::Duration;

use serde::Serialize;

use super::audit::{Findings, LaneVerdict, Verdict};
use super::live::{millis, per_second};
use super::load::Plan;
use super::receipts::Receipts;
use super::watch::Watched;
use crate::commands::latency::Summary;
use crate::output::{Output, Style, count, plural};

/// A pace below this share of what was asked for is remarked upon.
const PACE_KEPT: f64 = 0.95;

/// What `demo --json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Nothing was lost, duplicated, out of order or invented, and something was published.
    pub ok: bool,
    private_servers: bool,
    seconds: f64,
    rate_asked: u32,
    /// Events a second, both lanes, that are in the streams.
    rate_reached: f64,
    critical: LaneReport,
    high_frequency: LaneReport,
    lost: u64,
    duplicated: u64,
    out_of_order: u64,
    invented: u64,
    /// What the consumer has made of the payments.
    receipts: Receipts,
    /// Transactions that were rolled back on purpose, after they had published.
    rolled_back: u64,
    failed_operations: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_failure: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    faults: Vec<Fault>,
}

#[derive(Debug, Serialize)]
struct LaneReport {
    events: u64,
    per_second: f64,
    #[serde(flatten)]
    latency: Option<Summary>,
    lost: u64,
    duplicated: u64,
    out_of_order: u64,
    invented: u64,
}

/// One figure of a lane, for people.
type Figure = fn(&LaneReport) -> String;

/// The first few of one kind of fault.
#[derive(Debug, Serialize)]
struct Fault {
    kind: &'static str,
    events: Vec<String>,
}

impl LaneReport {
    fn new(verdict: &LaneVerdict, latency: Option<Summary>, took: Duration) -> Self {
        Self {
            events: verdict.entries,
            per_second: verdict.entries as f64 / took.as_secs_f64(),
            latency,
            lost: verdict.lost.count,
            duplicated: verdict.duplicated.count,
            out_of_order: verdict.out_of_order.count,
            invented: verdict.invented.count,
        }
    }
}

impl Report {
    /// `took` is how long the load ran.
    pub fn new(
        plan: Plan,
        verdict: &Verdict,
        receipts: Receipts,
        watched: &Watched,
        private_servers: bool,
        took: Duration,
    ) -> Self {
        let critical = LaneReport::new(&verdict.critical, watched.critical.summary(), took);
        let high_frequency = LaneReport::new(&verdict.high_frequency, watched.high_frequency.summary(), took);
        Self {
            ok: verdict.is_clean() && receipts.is_clean(),
            private_servers,
            seconds: took.as_secs_f64(),
            rate_asked: plan.critical_rate + plan.high_frequency_rate,
            rate_reached: critical.per_second + high_frequency.per_second,
            lost: critical.lost + high_frequency.lost,
            duplicated: critical.duplicated + high_frequency.duplicated,
            out_of_order: critical.out_of_order + high_frequency.out_of_order,
            invented: critical.invented + high_frequency.invented,
            receipts,
            rolled_back: watched.ledger.rolled_back.len() as u64,
            failed_operations: watched.failures.count,
            last_failure: watched.failures.last.clone(),
            faults: faults(verdict),
            critical,
            high_frequency,
        }
    }

    pub fn print(&self, output: &Output) -> anyhow::Result<()> {
        if output.json { output.json(self) } else { Ok(output.write(&self.text(output))?) }
    }

    fn text(&self, output: &Output) -> String {
        let mut text = format!("\n{}\n", output.paint(Style::Label, "Read back from the streams, entry by entry:"));
        text += &row("", "critical", "high-frequency");
        let rows: [(&str, Figure); 9] = [
            ("events", |lane| count(lane.events)),
            ("events a second", |lane| per_second(lane.per_second)),
            ("latency p50", |lane| millis(lane.latency.map(|latency| latency.p50_ms))),
            ("latency p99", |lane| millis(lane.latency.map(|latency| latency.p99_ms))),
            ("longest", |lane| millis(lane.latency.map(|latency| latency.max_ms))),
            ("lost", |lane| count(lane.lost)),
            ("duplicated", |lane| count(lane.duplicated)),
            ("out of order", |lane| count(lane.out_of_order)),
            ("invented", |lane| count(lane.invented)),
        ];
        for (name, of) in rows {
            text += &row(name, &of(&self.critical), &of(&self.high_frequency));
        }
        text += &self.consumed(output);
        text += &self.remarks();
        let (style, verdict) = self.verdict();
        text + &format!("\n{}\n", output.paint(style, &verdict)) + &self.named()
    }

    fn consumed(&self, output: &Output) -> String {
        let Receipts { payments, receipts, missing, twice, out_of_order } = self.receipts;
        let title = output.paint(Style::Label, "Receipts that the consumer wrote, against the payments:");
        let mut text = format!("\n{title}\n");
        let rows = [
            ("payments", payments),
            ("receipts", receipts),
            ("missing", missing),
            ("twice", twice),
            ("out of order", out_of_order),
        ];
        rows.iter().for_each(|(name, number)| text += &format!("  {name:<16}{:>12}\n", count(*number)));
        text
    }

    fn remarks(&self) -> String {
        let mut text = String::from("\nLatency is the time until a reader of the stream has the entry: of a critical event\n");
        text += "from the return of commit(), of a high-frequency event from the call of publish().\n";
        if self.rate_reached < f64::from(self.rate_asked) * PACE_KEPT {
            let (reached, asked) = (per_second(self.rate_reached), count(u64::from(self.rate_asked)));
            text += &format!("This machine reached {reached} of the {asked} events a second asked for.\n");
        }
        if let Some(reason) = &self.last_failure {
            text += &format!("{} failed; the last: {reason}\n", plural(self.failed_operations, "operation"));
        }
        text
    }

    fn verdict(&self) -> (Style, String) {
        let rolled_back = plural(self.rolled_back, "transaction");
        if self.ok {
            let good = "Nothing was lost, duplicated, out of order or invented; each payment has one receipt.";
            return (Style::Good, format!("{good}\nOf {rolled_back} rolled back on purpose, no event is in a stream."));
        }
        if self.critical.events + self.high_frequency.events == 0 {
            return (Style::Error, "Nothing was published.".to_owned());
        }
        let faults = self.lost + self.duplicated + self.out_of_order + self.invented;
        let what = if faults == 0 { "receipts" } else { "streams" };
        (Style::Error, format!("The {what} are not what was committed."))
    }

    fn named(&self) -> String {
        let line = |fault: &Fault| format!("  {}: {}\n", fault.kind, fault.events.join(", "));
        self.faults.iter().map(line).collect()
    }
}

fn row(name: &str, critical: &str, high_frequency: &str) -> String {
    format!("  {name:<16}{critical:>12}{high_frequency:>18}\n")
}

fn faults(verdict: &Verdict) -> Vec<Fault> {
    let of = |lane: &LaneVerdict| {
        let LaneVerdict { lost, duplicated, out_of_order, invented, .. } = lane.clone();
        [("lost", lost), ("duplicated", duplicated), ("out of order", out_of_order), ("invented", invented)]
    };
    let named =
        |(kind, findings): (&'static str, Findings)| (findings.count > 0).then_some(Fault { kind, events: findings.first });
    of(&verdict.critical).into_iter().chain(of(&verdict.high_frequency)).filter_map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Output = Output { json: false, colored: false, width: None };

    fn report(verdict: &Verdict) -> Report {
        let lane = |verdict| {
            LaneReport::new(verdict, Some(Summary { p50_ms: 2.1, p99_ms: 15.0, max_ms: 1_200.0 }), Duration::from_secs(10))
        };
        Report {
            ok: verdict.is_clean(),
            private_servers: true,
            seconds: 10.0,
            rate_asked: 2_000,
            rate_reached: 1_500.0,
            critical: lane(&verdict.critical),
            high_frequency: lane(&verdict.high_frequency),
            lost: 0,
            duplicated: 0,
            out_of_order: 0,
            invented: 0,
            receipts: Receipts { payments: 3_000, receipts: 3_000, ..Receipts::default() },
            rolled_back: 107,
            failed_operations: 0,
            last_failure: None,
            faults: faults(verdict),
        }
    }

    #[test]
    fn figures_line_up() {
        let mut verdict = Verdict::default();
        (verdict.critical.entries, verdict.high_frequency.entries) = (5_000, 10_000);
        insta::assert_snapshot!(report(&verdict).text(&PLAIN), @r"

        Read back from the streams, entry by entry:
                              critical    high-frequency
          events                 5,000            10,000
          events a second          500             1,000
          latency p50           2.1 ms            2.1 ms
          latency p99            15 ms             15 ms
          longest                1.2 s             1.2 s
          lost                       0                 0
          duplicated                 0                 0
          out of order               0                 0
          invented                   0                 0

        Receipts that the consumer wrote, against the payments:
          payments               3,000
          receipts               3,000
          missing                    0
          twice                      0
          out of order               0

        Latency is the time until a reader of the stream has the entry: of a critical event
        from the return of commit(), of a high-frequency event from the call of publish().
        This machine reached 1,500 of the 2,000 events a second asked for.

        Nothing was lost, duplicated, out of order or invented; each payment has one receipt.
        Of 107 transactions rolled back on purpose, no event is in a stream.
        ");
    }

    #[test]
    fn faults_are_named() {
        let mut verdict = Verdict::default();
        verdict.critical.entries = 5_000;
        verdict.critical.lost = Findings { count: 2, first: vec!["a".to_owned(), "b".to_owned()] };
        let text = Report { lost: 2, ..report(&verdict) }.text(&PLAIN);
        assert!(text.ends_with("The streams are not what was committed.\n  lost: a, b\n"), "{text}");
    }
}
