//! What commands print: results on standard output, remarks on standard error.

mod progress;
mod table;
mod words;

use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

pub use progress::Progress;
pub use table::Table;
pub use words::{age, count, plural, size};

use crate::cli::Color;

/// The width that is assumed of a terminal that does not tell.
const USUAL_WIDTH: usize = 100;

/// Where results go, and in which form.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
    /// Colours on standard output.
    pub colored: bool,
    /// Columns of the terminal; `None` when standard output is a file or a pipe.
    pub width: Option<usize>,
}

impl Output {
    pub fn new(json: bool, color: Color) -> Self {
        let is_terminal = io::stdout().is_terminal();
        let size = || terminal_size::terminal_size().map_or(USUAL_WIDTH, |(width, _)| usize::from(width.0));
        Self { json, colored: !json && color_is_wanted(color, is_terminal), width: is_terminal.then(size) }
    }

    /// A result, with a line break after it.
    pub fn line(&self, text: &str) -> io::Result<()> {
        self.write(&format!("{text}\n"))
    }

    /// A result as it is.
    pub fn write(&self, text: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        stdout.flush()
    }

    /// One JSON value on one line.
    pub fn json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(self.line(&serde_json::to_string(value)?)?)
    }

    /// A remark for a person, which is not part of the result.
    pub fn remark(&self, text: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{text}")
    }

    pub fn paint(&self, style: Style, text: &str) -> String {
        paint(style, text, self.colored)
    }
}

/// What a text is, and so how it looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Label,
    Quiet,
    Name,
    Good,
    Warning,
    Error,
}

/// Whether to use colours on a stream.
pub fn color_is_wanted(color: Color, is_terminal: bool) -> bool {
    let refused = || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => is_terminal && !refused() && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
    }
}

pub fn paint(style: Style, text: &str, colored: bool) -> String {
    let code = match style {
        Style::Label => "1",
        Style::Quiet => "2",
        Style::Name => "36",
        Style::Good => "32",
        Style::Warning => "33",
        Style::Error => "1;31",
    };
    if colored && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// The text on one line: what others wrote into events must not steer the terminal.
pub fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        // Besides control characters, those that reorder the text around them.
        if c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            clean.extend(c.escape_default());
        } else {
            clean.push(c);
        }
    }
    clean
}

/// The text with spaces up to `width` columns.
pub fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(text.width())))
}

/// The text cut to `width` columns, with an ellipsis where something is missing.
pub fn shortened(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut short = String::new();
    let mut used = 0;
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used + 1 > width {
            break;
        }
        short.push(c);
    }
    if width > 0 { short + "…" } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_by_columns_not_by_bytes() {
        for (text, width, expected) in
            [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("日本語", 5, "日本…"), ("日本語", 4, "日…"), ("é", 0, "")]
        {
            assert_eq!(shortened(text, width), expected);
        }
        assert_eq!(padded("日本", 6), "日本  ");
    }

    #[test]
    fn nothing_that_steers_a_terminal_is_printed() {
        assert_eq!(printable("a\x1b[31mb\nc\u{202e}d"), "a\\u{1b}[31mb\\nc\\u{202e}d");
    }
}
