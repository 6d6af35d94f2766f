use unicode_width::UnicodeWidthStr;

use super::{Output, Style, padded, printable, shortened};

/// What parts two columns.
const GAP: &str = "  ";

/// The last column is not cut below this.
const LEAST_LAST: usize = 20;

/// In a file or a pipe it is cut there: what a server said of an error may fill pages, and --json has it whole.
const MOST_LAST: usize = 300;

/// Rows under a header, in columns that line up.
#[derive(Debug)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// The table as lines. The last column is cut: on a terminal, to fit.
    pub fn render(&self, output: &Output) -> String {
        let header: Vec<String> = self.header.iter().map(|&name| name.to_owned()).collect();
        let mut widths = vec![0; header.len()];
        for row in self.rows.iter().chain([&header]) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.width().max(*width);
            }
        }
        let before_last: usize = widths.iter().rev().skip(1).map(|width| width + GAP.len()).sum();
        let last = output.width.map_or(MOST_LAST, |width| width.saturating_sub(before_last).max(LEAST_LAST));
        let line = |row: &[String]| {
            let mut cells = Vec::new();
            for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                cells.push(if i + 1 == row.len() { shortened(cell, last) } else { padded(cell, width) });
            }
            cells.join(GAP).trim_end().to_owned()
        };
        let mut text = format!("{}\n", output.paint(Style::Label, &line(&header)));
        for row in &self.rows {
            text += &format!("{}\n", line(row));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_the_last_is_cut() {
        let mut table = Table::new(&["NAME", "ERROR"]);
        table.row(["日本".to_owned(), "a long explanation of what went wrong".to_owned()]);
        table.row(["longer name".to_owned(), "short\n".to_owned()]);
        let output = Output { json: false, colored: false, width: Some(40) };
        insta::assert_snapshot!(table.render(&output), @r"
        NAME         ERROR
        日本         a long explanation of what…
        longer name  short\n
        ");
        table.row(["endless".to_owned(), "x".repeat(20_000)]);
        let text = table.render(&Output { width: None, ..output });
        assert!(
            text.ends_with(&format!("endless      {}…\n", "x".repeat(MOST_LAST - 1))) && text.contains("what went wrong\n"),
            "{text}"
        );
    }
}
