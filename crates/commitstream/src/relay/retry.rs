//! When to try again. Pure but for the dice.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::delay;
use crate::config::ProcessorSettings;

/// What becomes of an event that was refused after `retry_count` earlier refusals: wait so long, or `None` for `FAILED`.
pub fn after_refusal(retry_count: i32, settings: &ProcessorSettings) -> Option<Duration> {
    let refusals = u32::try_from(retry_count).unwrap_or(0);
    (refusals < settings.max_retries).then(|| delay(refusals, settings.retry_base_delay, settings.retry_max_delay))
}

/// When refused events are due again, so that they need not wait for the next poll. In tenths of a second: many of them cost few looks.
#[derive(Debug)]
pub struct Retries {
    since: Instant,
    tenths: BTreeSet<u32>,
}

const TENTH: Duration = Duration::from_millis(100);

impl Retries {
    pub fn new(now: Instant) -> Self {
        Self { since: now, tenths: BTreeSet::new() }
    }

    /// Events that were settled by `now` and are to wait so long from the settle on, by the clock of the database.
    pub fn add(&mut self, waits: Vec<Duration>, now: Instant) {
        let elapsed = now - self.since;
        let tenth = |wait| u32::try_from((elapsed + wait).as_millis().div_ceil(TENTH.as_millis())).ok();
        self.tenths.extend(waits.into_iter().filter_map(tenth));
    }

    pub fn next(&self) -> Option<Instant> {
        self.tenths.first().map(|tenth| self.since + TENTH * *tenth)
    }

    /// Those that are due are being looked for.
    pub fn forget(&mut self, now: Instant) {
        while self.next().is_some_and(|next| next <= now) {
            self.tenths.pop_first();
        }
    }
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
    fn many_that_are_due_at_nearly_the_same_time_are_one_look() {
        let start = Instant::now();
        let mut retries = Retries::new(start);
        assert_eq!(retries.next(), None);
        retries.add((0..1_000).map(|n| Duration::from_millis(1_000 + n / 10)).collect(), start);
        assert_eq!(retries.next(), Some(start + Duration::from_millis(1_000)));
        retries.forget(start + Duration::from_millis(1_000));
        assert_eq!(retries.next(), Some(start + Duration::from_millis(1_100)));
        retries.forget(start + Duration::from_millis(1_100));
        assert_eq!(retries.next(), None);
    }

    #[test]
    fn waits_have_a_limit() {
        let settings = ProcessorSettings { max_retries: 100, ..ProcessorSettings::default() };
        assert!(after_refusal(99, &settings).unwrap() <= settings.retry_max_delay);
    }
}
