//! "Did you mean": the nearest of the known names.

/// The candidate that takes the fewest edits to reach; case does not count.
pub(super) fn nearest<'a, T>(name: &str, candidates: &'a [T], name_of: impl Fn(&T) -> &str) -> Option<&'a T> {
    candidates.iter().min_by_key(|candidate| distance(name, name_of(candidate)))
}

/// Whether someone who wrote `name` is likely to have meant `known`.
pub(super) fn is_near_miss(name: &str, known: &str) -> bool {
    name != known && distance(name, known) <= 2
}

/// Levenshtein distance without regard to ASCII case.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.to_ascii_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.to_ascii_lowercase().chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, r) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(l != *r);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_edits_without_regard_to_case() {
        assert_eq!(distance("outbx", "outbox"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
        assert_eq!(distance("eventpublishing", "eventPublishing"), 0);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
