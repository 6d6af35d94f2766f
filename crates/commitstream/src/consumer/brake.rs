//! Holds dead letters back where it is not the events that are at fault: too many in a row for one reason, or no memory for them.
//! Pure but for the dice.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::delay;
use crate::config::ConsumerSettings;

/// Between two dead letters that are written although Redis has no memory.
const WITHOUT_MEMORY: Duration = Duration::from_secs(5);

/// What one stream of a consumer does with its dead letters, over all its sessions.
#[derive(Debug)]
pub(super) struct Brake {
    /// Dead letters in a row for one reason, after which each further one waits. 0 is no brake.
    most: u32,
    base: Duration,
    longest: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Why the last event became a dead letter, as [`cause_of`] has it.
    cause: String,
    in_row: u32,
    pauses: u32,
    until: Option<Instant>,
    without_memory: Option<Instant>,
}

/// What to do with an event that is to become a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Write,
    /// So many were written in a row; this one is tried again then.
    Wait {
        in_row: u32,
        until: Instant,
    },
}

impl Brake {
    pub fn new(settings: &ConsumerSettings) -> Self {
        Self {
            most: settings.max_dead_letters_in_row,
            base: settings.retry_base_delay,
            longest: settings.retry_max_delay,
            inner: Mutex::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event is to become a dead letter. After as many in a row as are allowed, one in each pause is, and pauses double.
    pub fn judge(&self, reason: &str, now: Instant) -> Verdict {
        let mut inner = self.inner();
        let cause = cause_of(reason);
        if inner.cause != cause {
            *inner = Inner { cause, without_memory: inner.without_memory, ..Inner::default() };
        }
        if let Some(until) = inner.until.filter(|until| now < *until) {
            return Verdict::Wait { in_row: inner.in_row, until };
        }
        inner.in_row = inner.in_row.saturating_add(1);
        if self.most > 0 && inner.in_row >= self.most {
            inner.until = Some(now + delay(inner.pauses, self.base, self.longest));
            inner.pauses = inner.pauses.saturating_add(1);
        }
        Verdict::Write
    }

    /// An event was handled.
    pub fn release(&self) {
        let mut inner = self.inner();
        if inner.in_row > 0 {
            *inner = Inner { without_memory: inner.without_memory, ..Inner::default() };
        }
    }

    /// Whether a dead letter may be written although Redis has no memory; else when it may be tried again.
    pub fn without_memory(&self, now: Instant) -> Result<(), Instant> {
        let mut inner = self.inner();
        match inner.without_memory.map(|last| last + WITHOUT_MEMORY) {
            Some(next) if now < next => Err(next),
            _ => {
                inner.without_memory = Some(now);
                Ok(())
            }
        }
    }
}

/// A reason without what differs from event to event: words that have a digit or an `@` are ids, numbers and addresses.
pub(super) fn cause_of(reason: &str) -> String {
    let is_id = |word: &str| word.contains(|c: char| c.is_ascii_digit() || c == '@');
    let words: Vec<&str> = reason.split_whitespace().map(|word| if is_id(word) { "#" } else { word }).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brake(most: u32) -> Brake {
        Brake::new(&ConsumerSettings { max_dead_letters_in_row: most, ..crate::config::Settings::default().consumer })
    }

    #[test]
    fn many_in_a_row_for_one_reason_wait_and_pauses_grow() {
        let (brake, mut now) = (brake(3), Instant::now());
        for n in 0..3 {
            assert_eq!(brake.judge(&format!("no user u{n}"), now), Verdict::Write);
        }
        let mut last = Duration::ZERO;
        for pauses in 0..5 {
            let Verdict::Wait { until, in_row } = brake.judge("no user u9", now) else { panic!("no pause") };
            assert_eq!(in_row, 3 + pauses);
            assert!(until - now >= last, "{:?} after {last:?}", until - now);
            (last, now) = ((until - now) / 2, until);
            assert_eq!(brake.judge("no user u9", now), Verdict::Write);
        }
    }

    #[test]
    fn another_reason_or_an_event_that_is_handled_lets_go() {
        let (brake, now) = (brake(2), Instant::now());
        for reason in ["a", "b", "a", "b", "b"] {
            assert_eq!(brake.judge(reason, now), Verdict::Write);
        }
        assert_ne!(brake.judge("b", now), Verdict::Write);
        brake.release();
        assert_eq!(brake.judge("b", now), Verdict::Write);
        let off = self::brake(0);
        assert!((0..1_000).all(|_| off.judge("a", now) == Verdict::Write));
    }

    #[test]
    fn causes_are_compared_without_ids() {
        let one = cause_of("no user 0198a1b2-0000-7000-8000-00000000000a at ada@example.org, try 3");
        assert_eq!(one, cause_of("no user 0198a1b2-0000-7000-8000-00000000000b at bob@example.org, try 4"));
        assert_ne!(cause_of("missing field `name`"), cause_of("missing field `email`"));
    }
}
