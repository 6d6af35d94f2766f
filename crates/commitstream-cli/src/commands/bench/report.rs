//! The report: a table for people, JSON for programs.

use super::figure::{Figure, Measured};
use super::machine::Machine;
use super::stage::Scale;
use crate::output::{Output, Style, Table, count};

const MISSED: &str = "missed";

pub struct Report {
    pub machine: Machine,
    pub scale: Scale,
    pub measured: Vec<Measured>,
}

impl Report {
    pub fn print(&self, output: &Output) -> anyhow::Result<()> {
        match self.measured.as_slice() {
            [one] if output.json => output.json(one),
            all if output.json => output.json(&all),
            _ => Ok(output.write(&self.text(output))?),
        }
    }

    fn text(&self, output: &Output) -> String {
        let mut table = Table::new(&["NAME", "FIGURE", "BASELINE", "RATIO", "AIM"]);
        for figure in self.figures() {
            let missed = if figure.is_met() == Some(false) { format!(", {MISSED}") } else { String::new() };
            let aim = figure.aim_text() + &missed;
            table.row([figure.name.clone(), figure.figure_text(), figure.baseline_text(), figure.ratio_text(), aim]);
        }
        let table = table.render(output).replace(MISSED, &output.paint(Style::Warning, MISSED));
        format!("{table}\n{}", self.remarks().join("\n")) + "\n"
    }

    pub fn figures(&self) -> impl Iterator<Item = &Figure> {
        self.measured.iter().flat_map(|measured| &measured.figures)
    }

    /// What must be known to read the figures, a paragraph each.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = vec![format!("Machine: {}.", self.machine.describe())];
        if let Some(events) = self.scale.events {
            remarks.push(format!("Scaled down to {} events: these figures say nothing of its speed.", count(events)));
        }
        let noted =
            |measured: &Measured| measured.notes.iter().map(|note| format!("{}: {note}", measured.name)).collect::<Vec<_>>();
        remarks.extend(self.measured.iter().flat_map(noted));
        remarks
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::commands::bench::figure::{Aim, Round};

    /// Of each kind of figure one.
    pub fn report() -> Report {
        let machine = Machine {
            cores: 2,
            cpu: Some("Some <CPU>".to_owned()),
            memory_gib: Some(15.6),
            postgres: "PostgreSQL 15.18 with fsync on".to_owned(),
            redis: "Redis 7.0.15 with an append-only file".to_owned(),
        };
        let figure = |name: &str, unit, aim, rounds: &[Round]| Figure::new(name, unit, Some(aim), rounds.to_vec());
        let drains = vec![
            figure(
                "drain",
                "events/s",
                Aim::RatioAtLeast(1.3),
                &[Round::new(60_000.0, 40_000.0), Round::new(66_000.0, 40_000.0)],
            ),
            figure("drain, retention 0", "events/s", Aim::RatioAtLeast(1.4), &[Round::new(50_000.0, 40_000.0)]),
        ];
        let latencies = vec![
            figure("latency 500/s p50", "ms", Aim::AtMost(1.5), &[Round::new(1.25, 0.8)]),
            figure("latency 500/s p99", "ms", Aim::AtMost(5.0), &[Round::new(7.5, 2.0)]),
        ];
        let idle = vec![figure("idle", "statements/s", Aim::AtMost(2.0), &[Round::alone(1.5)])];
        let measured = |name, figures, notes: &[&str]| Measured {
            name,
            figures,
            notes: notes.iter().map(|&note| note.to_owned()).collect(),
        };
        let measured = vec![
            measured("drain", drains, &[]),
            measured("latency", latencies, &["10503 events at 500/s"]),
            measured("idle", idle, &[]),
        ];
        Report { machine, scale: Scale::default(), measured }
    }

    #[test]
    fn a_missed_aim_is_said_to_be_missed() {
        let output = Output { json: false, colored: false, width: None };
        insta::assert_snapshot!(report().text(&output), @r"
        NAME                FIGURE             BASELINE         RATIO  AIM
        drain               63,000 events/s    40,000 events/s  1.57   ratio ≥ 1.3
        drain, retention 0  50,000 events/s    40,000 events/s  1.25   ratio ≥ 1.4, missed
        latency 500/s p50   1.25 ms            0.80 ms          1.56   ≤ 1.5 ms
        latency 500/s p99   7.50 ms            2.00 ms          3.75   ≤ 5 ms, missed
        idle                1.50 statements/s  -                -      ≤ 2 statements/s

        Machine: 2 cores of Some <CPU>, 16 GiB; PostgreSQL 15.18 with fsync on; Redis 7.0.15 with an append-only file.
        latency: 10503 events at 500/s
        ");
        let colored = report().text(&Output { colored: true, ..output });
        assert!(colored.contains("ratio ≥ 1.4, \x1b[33mmissed\x1b[0m\n"), "{colored}");
    }
}
