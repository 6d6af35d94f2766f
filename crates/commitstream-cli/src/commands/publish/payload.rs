//! The payload: where it is read, and what is wrong with it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use serde_json::value::RawValue;

use crate::failure::WrongUse;
use crate::output::printable;

/// Characters of the faulty line on each side of the fault.
const EXCERPT: usize = 30;

/// The payload from the option, the file or standard input, at most `max_bytes` of it; `{}` when there is none.
pub fn read(given: Option<String>, file: Option<&Path>, max_bytes: usize) -> anyhow::Result<Box<RawValue>> {
    let dash = Path::new("-");
    let (text, name) = match (given, file) {
        (Some(text), _) if text != "-" => (text, "--payload".to_owned()),
        (None, None) => ("{}".to_owned(), "--payload".to_owned()),
        (Some(_), _) => (limited(io::stdin().lock(), "standard input", max_bytes)?, "standard input".to_owned()),
        (None, Some(path)) if path == dash => {
            (limited(io::stdin().lock(), "standard input", max_bytes)?, "standard input".to_owned())
        }
        (None, Some(path)) => {
            let name = path.display().to_string();
            let file =
                File::open(path).map_err(|error| WrongUse::new(format!("cannot read the payload file {name}: {error}")))?;
            (limited(file, &name, max_bytes)?, name)
        }
    };
    // Checked as it stands and kept as it stands: numbers keep their digits.
    let checked: Result<&RawValue, _> = serde_json::from_str(text.trim());
    match checked {
        Ok(value) => Ok(value.to_owned()),
        Err(error) => Err(WrongUse::new(explain(text.trim(), &name, &error)).into()),
    }
}

fn limited(source: impl Read, name: &str, max_bytes: usize) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(max_bytes)?.saturating_add(1);
    source.take(limit).read_to_end(&mut bytes).with_context(|| format!("cannot read the payload from {name}"))?;
    if bytes.len() > max_bytes {
        let setting = "setting app.eventPublishing.maxPayloadBytes";
        return Err(WrongUse::new(format!("the payload in {name} has more than {max_bytes} bytes ({setting})")).into());
    }
    String::from_utf8(bytes).map_err(|_| WrongUse::new(format!("the payload in {name} is not UTF-8 text")).into())
}

/// What is wrong and where, with the place marked by a caret.
fn explain(text: &str, name: &str, error: &serde_json::Error) -> String {
    let what = error.to_string();
    let what = what.split(" at line ").next().unwrap_or_default().replace("EOF while parsing", "it ends within");
    let (line, column) = (error.line(), error.column());
    if text.is_empty() {
        return format!("{name} is not JSON: it is empty");
    }
    let faulty = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    // serde_json counts bytes, from 1; at the end of the text it points at the last one.
    let at = faulty.char_indices().take_while(|(i, _)| i + 1 < column).count();
    let first = at.saturating_sub(EXCERPT);
    let shown = |from: usize, to: usize| printable(&faulty.chars().skip(from).take(to - from).collect::<String>());
    let before = shown(first, at);
    let caret = unicode_width::UnicodeWidthStr::width(before.as_str());
    let excerpt = format!("{before}{}", shown(at, at + EXCERPT));
    format!("{name} is not JSON: {what} at line {line}, column {}\n  {excerpt}\n  {}^", at + 1, " ".repeat(caret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        read(Some(text.to_owned()), None, 1_000).unwrap_err().to_string()
    }

    #[test]
    fn the_place_of_a_mistake_is_marked() {
        insta::assert_snapshot!(refusal(r#"{"name": Ada}"#), @r#"
        --payload is not JSON: expected value at line 1, column 10
          {"name": Ada}
                   ^
        "#);
        insta::assert_snapshot!(refusal("{\n  \"name\": \"日本\",\n  \"a\": 1,\n}"), @r#"
        --payload is not JSON: key must be a string at line 4, column 1
          }
          ^
        "#);
        insta::assert_snapshot!(refusal(r#"{"name": "Ada""#), @r#"
        --payload is not JSON: it ends within an object at line 1, column 14
          {"name": "Ada"
                       ^
        "#);
    }

    #[test]
    fn long_lines_are_cut_around_the_mistake() {
        let text = format!("[{}?{}]", "1,".repeat(300), "2,".repeat(300));
        let refusal = refusal(&text);
        assert!(refusal.contains("column 602") && refusal.lines().all(|line| line.len() < 80), "{refusal}");
    }

    #[test]
    fn an_empty_payload_is_named() {
        assert_eq!(refusal("  "), "--payload is not JSON: it is empty");
    }

    #[test]
    fn digits_are_kept() {
        let value = read(Some(" 1.10000000000000000000001 ".to_owned()), None, 100).unwrap();
        assert_eq!(value.get(), "1.10000000000000000000001");
    }
}
