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
        for figure in self.measured.iter().flat_map(|measured| &measured.figures) {
            let Figure { name, .. } = figure;
            let aim = if figure.is_met() == Some(false) { format!("{}, {MISSED}", figure.aim_text()) } else { figure.aim_text() };
            table.row([name.clone(), figure.figure_text(), figure.baseline_text(), figure.ratio_text(), aim]);
        }
        let table = table.render(output).replace(MISSED, &output.paint(Style::Warning, MISSED));
        format!("{table}\n{}", self.remarks().join("\n")) + "\n"
    }

    /// What must be known to read the figures, a paragraph each.
    fn remarks(&self) -> Vec<String> {
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
