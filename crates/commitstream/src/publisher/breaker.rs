//! Keeps transactions from waiting, one after the other, for a Redis that does not answer.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::streams::StreamsError;

/// A failure that took less costs nobody anything: it may be tried again at once.
const SLOW: Duration = Duration::from_millis(250);

/// After a call that has waited in vain, one call in such a time is tried; the others fail at once.
const PAUSE: Duration = Duration::from_secs(1);

/// Open after a call that waited in vain, until one succeeds.
#[derive(Debug, Default)]
pub(super) struct Breaker(Mutex<Option<Open>>);

#[derive(Debug)]
struct Open {
    next_try: Instant,
    server: String,
}

impl Breaker {
    /// Whether a call may be tried; else what to say in its place.
    pub fn admit(&self, now: Instant) -> Result<(), StreamsError> {
        match &mut *self.state() {
            Some(open) if now < open.next_try => Err(StreamsError::not_tried(&open.server)),
            Some(open) => {
                open.next_try = now + PAUSE;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Notes what came of a call that began then.
    pub fn note(&self, failure: Option<&StreamsError>, began: Instant, now: Instant) {
        match failure.filter(|failure| failure.is_outage()) {
            Some(outage) if now.saturating_duration_since(began) > SLOW => {
                let server = outage.server().unwrap_or("app.redis.url").to_owned();
                *self.state() = Some(Open { next_try: now + PAUSE, server });
            }
            Some(_) => {}
            None => *self.state() = None,
        }
    }

    fn state(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_call_that_waited_in_vain_one_in_a_second_is_tried() {
        let (breaker, start) = (Breaker::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let outage = StreamsError::not_tried("cache:6379");
        assert!(breaker.admit(at(0)).is_ok());
        breaker.note(Some(&outage), at(0), at(10));
        assert!(breaker.admit(at(11)).is_ok(), "it failed at once");
        breaker.note(Some(&outage), at(11), at(5_000));
        let refused = breaker.admit(at(5_500)).unwrap_err();
        assert!(refused.is_outage() && refused.to_string().contains("cache:6379"), "{refused}");
        assert!(breaker.admit(at(6_100)).is_ok());
        assert!(breaker.admit(at(6_200)).is_err(), "another one is being tried");
        breaker.note(Some(&outage), at(6_100), at(6_110));
        assert!(breaker.admit(at(6_300)).is_err());
        assert!(breaker.admit(at(7_200)).is_ok());
        breaker.note(None, at(7_200), at(7_900));
        assert!(breaker.admit(at(7_901)).is_ok() && breaker.admit(at(7_902)).is_ok());
    }
}
