//! Latencies, collected in microseconds.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longer ones count as this.
const LONGEST: Duration = Duration::from_secs(3_600);
/// One part in a thousand.
const SIGNIFICANT_DIGITS: u8 = 3;

pub struct Latency(Histogram<u64>);

/// In milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Latency {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, micros(LONGEST), SIGNIFICANT_DIGITS)?))
    }

    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(micros(latency));
    }

    pub fn reset(&mut self) {
        self.0.reset();
    }

    /// A quantile, in milliseconds.
    pub fn millis(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1_000.0
    }

    /// `None` when nothing was recorded.
    pub fn summary(&self) -> Option<Summary> {
        let max_ms = self.0.max() as f64 / 1_000.0;
        (!self.0.is_empty()).then(|| Summary { p50_ms: self.millis(0.5), p99_ms: self.millis(0.99), max_ms })
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut latency = Latency::new().unwrap();
        assert_eq!(latency.summary(), None);
        (1..=100).for_each(|n| latency.record(Duration::from_micros(n * 10)));
        assert_eq!(latency.summary(), Some(Summary { p50_ms: 0.5, p99_ms: 0.99, max_ms: 1.0 }));
        latency.reset();
        assert_eq!(latency.summary(), None);
    }
}
