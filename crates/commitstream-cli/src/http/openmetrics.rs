//! OpenMetrics, made of the text format of Prometheus, which is what the recorder writes: <https://prometheus.io/docs/specs/om/open_metrics_spec/>.

use std::collections::HashSet;

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

pub const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Who can read it and asks for it gets it.
pub fn is_asked_for(headers: &HeaderMap) -> bool {
    let mut asked = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    asked.any(|accept| accept.contains("application/openmetrics-text"))
}

/// The same samples: a counter is described without the `_total` that its samples have, no line is empty, and the end is marked.
pub fn of(text: &str) -> String {
    let counters: HashSet<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let described = |line: &str| {
        let parts = line.strip_prefix("# ").and_then(|rest| rest.split_once(' ')).and_then(|(what, rest)| {
            let (name, rest) = rest.split_once(' ')?;
            Some((what, name.strip_suffix("_total").filter(|_| counters.contains(name))?, rest))
        });
        parts.map_or_else(|| line.to_owned(), |(what, base, rest)| format!("# {what} {base} {rest}"))
    };
    let lines = text.lines().filter(|line| !line.is_empty()).map(described).chain(["# EOF".to_owned()]);
    lines.flat_map(|line| [line, "\n".to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::of;

    #[test]
    fn counters_are_described_by_their_base_and_the_end_is_marked() {
        let text = "# HELP a_total How many.\n# TYPE a_total counter\na_total{x=\"1\"} 2\n\n# TYPE b_total gauge\nb_total 3\n\n";
        let expected = "# HELP a How many.\n# TYPE a counter\na_total{x=\"1\"} 2\n# TYPE b_total gauge\nb_total 3\n# EOF\n";
        assert_eq!(of(text), expected);
        assert_eq!(of(""), "# EOF\n");
    }
}
