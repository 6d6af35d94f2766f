//! The table in a Markdown file, between two marks; what stands around them is written by people.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::report::Report;
use crate::failure::WrongUse;

const BEGIN: &str = "<!-- What follows is written by `commitstream bench --markdown`. -->";
const END: &str = "<!-- What precedes is written by `commitstream bench --markdown`. -->";

/// A file that has a place for the table.
pub struct Page {
    path: PathBuf,
    before: String,
    after: String,
}

impl Page {
    /// Looked at before anything is measured: a file without the marks is not ours to write over.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => format!("{BEGIN}\n{END}\n"),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let Some((before, after)) = around(&text) else {
            let message = format!("{} has no place for the table: it needs the lines `{BEGIN}` and `{END}`", path.display());
            return Err(WrongUse::new(message).into());
        };
        Ok(Self { path: path.to_owned(), before: before.to_owned(), after: after.to_owned() })
    }

    pub fn write(&self, report: &Report) -> anyhow::Result<()> {
        let Self { path, before, after } = self;
        write(path, &format!("{before}{BEGIN}\n\n{}\n{END}{after}", section(report)))
    }
}

pub fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Before anything is measured, too. It leaves everything as it is.
pub fn try_to_write(path: &Path) -> anyhow::Result<()> {
    let tried = match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => OpenOptions::new().write(true).open(path).map(drop),
        Err(error) => Err(error),
    };
    tried.with_context(|| format!("cannot write {}", path.display()))
}

/// What stands before the first mark and after the second.
fn around(text: &str) -> Option<(&str, &str)> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some((before, after))
}

fn section(report: &Report) -> String {
    let mut text = String::from("| | figure | baseline | ratio | aim |\n|---|---:|---:|---:|---|\n");
    for figure in report.figures() {
        let missed = if figure.is_met() == Some(false) { ", **missed**" } else { "" };
        let (value, baseline, ratio, aim) =
            (figure.figure_text(), figure.baseline_text(), figure.ratio_text(), figure.aim_text());
        text += &format!("| {} | {value} | {baseline} | {ratio} | {aim}{missed} |\n", escaped(&figure.name));
    }
    text.push('\n');
    report.remarks().iter().for_each(|remark| text += &format!("* {}\n", escaped(remark)));
    text
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::report::tests::report;

    #[test]
    fn the_table_in_markdown() {
        insta::assert_snapshot!(section(&report()), @r"
        | | figure | baseline | ratio | aim |
        |---|---:|---:|---:|---|
        | drain | 63,000 events/s | 40,000 events/s | 1.57 | ratio ≥ 1.3 |
        | drain, retention 0 | 50,000 events/s | 40,000 events/s | 1.25 | ratio ≥ 1.4, **missed** |
        | latency 500/s p50 | 1.25 ms | 0.80 ms | 1.56 | ≤ 1.5 ms |
        | latency 500/s p99 | 7.50 ms | 2.00 ms | 3.75 | ≤ 5 ms, **missed** |
        | idle | 1.50 statements/s | - | - | ≤ 2 statements/s |

        * Machine: 2 cores of Some &lt;CPU>, 16 GiB; PostgreSQL 15.18 with fsync on; Redis 7.0.15 with an append-only file.
        * latency: 10503 events at 500/s
        ");
    }

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let text = format!("above\n{BEGIN}\nold\n{END}\nbelow\n");
        assert_eq!(around(&text), Some(("above\n", "\nbelow\n")));
        assert_eq!(around("something else"), None);
    }
}
