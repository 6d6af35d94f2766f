//! Numbers, sizes and durations as people write them. Whatever is printed here can be read back here.

use std::time::Duration;

/// Nanoseconds per unit, largest first.
const TIMES: &[(&str, u128)] = &[
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// The names of units that HOCON knows and humantime does not, by the one that both know.
/// <https://github.com/lightbend/config/blob/main/HOCON.md#duration-format>
const HOCON_NAMES: &[(&str, &[&str])] = &[
    ("ns", &["nano", "nanos", "nanosecond", "nanoseconds"]),
    ("us", &["micro", "micros", "microsecond", "microseconds"]),
    ("ms", &["milli", "millis", "millisecond", "milliseconds"]),
];

/// Bytes per unit, largest first.
const SIZES: &[(&str, u128)] = &[("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)];

/// `7d`, `90s`, `500ms`: a whole number of the largest unit that fits. Not humantime's own form (`7days`, `1m 30s`),
/// because `m` and `s` mean the same to every HOCON reader.
pub(super) fn print_duration(duration: Duration) -> String {
    if duration.is_zero() { "0s".to_owned() } else { print(duration.as_nanos(), TIMES) }
}

/// `16MiB`, or a plain number of bytes.
pub(super) fn print_size(bytes: usize) -> String {
    if bytes == 0 { "0".to_owned() } else { print(bytes as u128, SIZES) }
}

fn print(amount: u128, units: &[(&str, u128)]) -> String {
    let unit = units.iter().find(|(_, size)| amount.is_multiple_of(*size));
    unit.map_or_else(|| amount.to_string(), |(name, size)| format!("{}{name}", amount / size))
}

/// A number with any of HOCON's units, or what humantime reads: `1m 30s`, `2 weeks`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, humantime::DurationError> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    match HOCON_NAMES.iter().find(|(_, names)| names.contains(&unit)) {
        Some((known, _)) => humantime::parse_duration(&format!("{number}{known}")),
        None => humantime::parse_duration(text),
    }
}

/// A number of bytes, bare or with `KiB`, `MiB` or `GiB`.
pub(super) fn parse_size(text: &str) -> Option<usize> {
    let (digits, unit) = SIZES.iter().find_map(|(name, size)| Some((text.strip_suffix(name)?, *size)))?;
    let amount: u128 = digits.trim_end().parse().ok()?;
    usize::try_from(amount.checked_mul(unit)?).ok()
}

/// `10000` as `10,000`.
pub(super) fn print_number(number: u32) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_back() {
        for (millis, printed) in [(0, "0s"), (500, "500ms"), (1_000, "1s"), (90_000, "90s"), (300_000, "5m"), (604_800_000, "7d")]
        {
            let duration = Duration::from_millis(millis);
            assert_eq!(print_duration(duration), printed);
            assert_eq!(parse_duration(printed).unwrap(), duration);
        }
        for (bytes, printed) in
            [(0, "0"), (1_000, "1000"), (1_024, "1KiB"), (1_536, "1536"), (16 << 20, "16MiB"), (1 << 30, "1GiB")]
        {
            assert_eq!(print_size(bytes), printed);
            assert_eq!(parse_size(printed), Some(bytes));
        }
        assert_eq!(parse_size("16 MiB"), Some(16 << 20));
        for wrong in ["", "MiB", "-1", "1.5MiB", "99999999999999999999999999999999999GiB", "12MB"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_name_that_hocon_has_for_a_unit_is_read() {
        let names = [
            (1, "ns nano nanos nanosecond nanoseconds"),
            (1_000, "us micro micros microsecond microseconds"),
            (1_000_000, "ms milli millis millisecond milliseconds"),
            (1_000_000_000, "s second seconds"),
            (60_000_000_000, "m minute minutes"),
            (3_600_000_000_000, "h hour hours"),
            (86_400_000_000_000, "d day days"),
        ];
        for (nanos, names) in names {
            for name in names.split(' ') {
                for written in [format!("3{name}"), format!("3 {name}")] {
                    assert_eq!(parse_duration(&written).ok(), Some(Duration::from_nanos(3 * nanos)), "{written}");
                }
            }
        }
        assert_eq!(parse_duration("1.5 milliseconds").ok(), Some(Duration::from_micros(1_500)));
        assert_eq!(parse_duration("1m 30s").ok(), Some(Duration::from_secs(90)));
        for wrong in ["milliseconds", "1 Milliseconds", "1 millisecondss", "-1 millis", "1 µ", "99999999999999999999 micros"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn thousands_are_grouped() {
        for (number, printed) in [(0, "0"), (999, "999"), (1_000, "1,000"), (36_500, "36,500"), (1_234_567, "1,234,567")] {
            assert_eq!(print_number(number), printed);
        }
    }
}
