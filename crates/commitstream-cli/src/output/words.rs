use std::time::Duration;

/// A duration for people, to two units at most: `850 ms`, `1.5 s`, `3 min 5 s`, `2 h 10 min`, `3 days 4 h`.
pub fn age(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let two = |large: u64, large_unit: &str, small: u64, small_unit: &str| {
        if small == 0 { format!("{large} {large_unit}") } else { format!("{large} {large_unit} {small} {small_unit}") }
    };
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3_600 => two(seconds / 60, "min", seconds % 60, "s"),
        3_600..86_400 => two(seconds / 3_600, "h", seconds % 3_600 / 60, "min"),
        86_400..172_800 => two(1, "day", seconds % 86_400 / 3_600, "h"),
        _ => two(seconds / 86_400, "days", seconds % 86_400 / 3_600, "h"),
    }
}

/// `1234567` as `1,234,567`.
pub fn count(number: u64) -> String {
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

/// `512 B`, `8.0 KiB`, `1.3 GiB`.
pub fn size(bytes: u64) -> String {
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let (mut size, mut unit) = (bytes as f64, units.next());
    while size >= 1024.0
        && let Some(larger) = units.next()
    {
        (size, unit) = (size / 1024.0, Some(larger));
    }
    let digits = usize::from(bytes >= 1024);
    format!("{size:.digits$} {}", unit.unwrap_or_default())
}

/// `1 event`, `2 events`, `2 entries`.
pub fn plural(number: u64, noun: &str) -> String {
    match (number, noun.strip_suffix('y')) {
        (1, _) => format!("1 {noun}"),
        // All nouns of ours that end in y have a consonant before it, but for days.
        (_, Some(stem)) if !stem.ends_with('a') => format!("{} {stem}ies", count(number)),
        _ => format!("{} {noun}s", count(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_say_them() {
        for (millis, expected) in [
            (0, "0 ms"),
            (850, "850 ms"),
            (1_500, "1.5 s"),
            (12_400, "12 s"),
            (185_000, "3 min 5 s"),
            (120_000, "2 min"),
            (7_800_000, "2 h 10 min"),
            (90_000_000, "1 day 1 h"),
            (259_200_000, "3 days"),
        ] {
            assert_eq!(age(Duration::from_millis(millis)), expected);
        }
    }

    #[test]
    fn sizes_are_in_the_largest_unit() {
        for (bytes, expected) in
            [(0, "0 B"), (1_023, "1023 B"), (8_192, "8.0 KiB"), (1_395_864_371, "1.3 GiB"), (1 << 60, "1048576.0 TiB")]
        {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!((count(999), count(1_000), count(1_234_567)), ("999".into(), "1,000".into(), "1,234,567".into()));
        for (number, noun, expected) in
            [(1, "event", "1 event"), (0, "event", "0 events"), (7, "day", "7 days"), (1_000, "entry", "1,000 entries")]
        {
            assert_eq!(plural(number, noun), expected);
        }
    }
}
