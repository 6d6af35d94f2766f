//! When to try again. Pure but for the dice.

use std::time::Duration;

use crate::backoff::delay;
use crate::config::ProcessorSettings;

/// What becomes of an event that was refused after `retry_count` earlier refusals: wait so long, or `None` for `FAILED`.
pub fn after_refusal(retry_count: i32, settings: &ProcessorSettings) -> Option<Duration> {
    let refusals = u32::try_from(retry_count).unwrap_or(0);
    (refusals < settings.max_retries).then(|| delay(refusals, settings.retry_base_delay, settings.retry_max_delay))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_tried_once_and_then_max_retries_times() {
        let settings = ProcessorSettings { max_retries: 3, ..ProcessorSettings::default() };
        for (count, least_ms, most_ms) in [(0, 500, 1_000), (1, 1_000, 2_000), (2, 2_000, 4_000)] {
            let wait = after_refusal(count, &settings).unwrap().as_millis();
            assert!((least_ms..=most_ms).contains(&wait), "{wait} ms after {count} refusals");
        }
        assert_eq!(after_refusal(3, &settings), None);
        assert_eq!(after_refusal(0, &ProcessorSettings { max_retries: 0, ..settings }), None);
    }

    #[test]
    fn waits_have_a_limit() {
        let settings = ProcessorSettings { max_retries: 100, ..ProcessorSettings::default() };
        assert!(after_refusal(99, &settings).unwrap() <= settings.retry_max_delay);
    }
}
