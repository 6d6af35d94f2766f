//! What PostgreSQL's `jsonb` takes, and how long it makes it.

use super::EventError;

/// Deepest nesting; serde_json reads 127 levels, PostgreSQL some thousands.
const MAX_DEPTH: usize = 100;
/// Largest power of ten, up or down. `jsonb` spells numbers out, and an f64 has no more.
const MAX_EXPONENT: usize = 308;
/// Most characters of one number.
const MAX_NUMBER_BYTES: usize = 1_000;

/// Checks JSON text, which must be valid, and returns the most bytes that `jsonb` makes of it: a space follows each comma and
/// colon, and powers of ten are written out. The relay measures that text.
pub(super) fn check(field: &'static str, json: &str) -> Result<usize, EventError> {
    let bad = |why| EventError::Json { field, why };
    let bytes = json.as_bytes();
    let (mut length, mut depth, mut at) = (bytes.len(), 0_usize, 0);
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'"' => at = end_of_string(field, bytes, at)?,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' | b':' => length += 1,
            b'-' | b'0'..=b'9' => {
                let rest = bytes.get(at..).unwrap_or_default();
                let end =
                    rest.iter().position(|b| !matches!(b, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')).unwrap_or(rest.len());
                let number = json.get(at..at + end).unwrap_or_default();
                let exponent = number.split_once(['e', 'E']).map_or("0", |(_, digits)| digits);
                let exponent = exponent.trim_start_matches(['+', '-']).parse().unwrap_or(usize::MAX);
                if exponent > MAX_EXPONENT || end > MAX_NUMBER_BYTES {
                    return Err(bad("a number is too large, too small or too long"));
                }
                length += exponent;
                at += end;
            }
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(bad("it is nested more than 100 levels deep"));
        }
    }
    Ok(length)
}

/// The place after the closing quote of the string that starts at `at`.
fn end_of_string(field: &'static str, bytes: &[u8], mut at: usize) -> Result<usize, EventError> {
    let mut high_before = false;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        if !high_before {
            at += rest.iter().position(|byte| matches!(byte, b'"' | b'\\')).unwrap_or(rest.len());
        }
        let unit = match bytes.get(at..).unwrap_or_default() {
            [b'\\', b'u', hex @ ..] => {
                at += 6;
                hex.get(..4).and_then(|hex| std::str::from_utf8(hex).ok()).and_then(|hex| u16::from_str_radix(hex, 16).ok())
            }
            [b'\\', ..] => {
                at += 2;
                None
            }
            [b'"', ..] | [] if !high_before => return Ok(at + 1),
            _ => {
                at += 1;
                None
            }
        };
        if unit == Some(0) {
            return Err(EventError::Nul { field });
        }
        let low = matches!(unit, Some(0xdc00..=0xdfff));
        if low != high_before {
            return Err(EventError::Json { field, why: "an escaped surrogate (\\ud800 to \\udfff) stands alone" });
        }
        high_before = matches!(unit, Some(0xd800..=0xdbff));
    }
}
