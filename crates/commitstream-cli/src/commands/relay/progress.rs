//! Whether the relay gets on.

use std::time::{Duration, Instant};

/// When the relay last had nothing to answer for: it did something, or nothing was due, or a server kept it from working.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    since: Instant,
    done: u64,
}

impl Progress {
    pub fn new(now: Instant) -> Self {
        Self { since: now, done: 0 }
    }

    /// `done` only grows. `due` is false when it is not known.
    pub fn observe(&mut self, now: Instant, is_active: bool, done: u64, due: bool) {
        if !is_active || !due || done != self.done {
            *self = Self { since: now, done };
        }
    }

    /// For how long it has stood still, if for longer than the limit.
    pub fn stalled(&self, now: Instant, limit: Duration) -> Option<Duration> {
        Some(now.saturating_duration_since(self.since)).filter(|stalled| *stalled > limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stalls_only_when_it_could_work_and_does_not() {
        const LIMIT: Duration = Duration::from_secs(60);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut progress = Progress::new(start);
        progress.observe(at(50), true, 1, true);
        assert_eq!(progress.stalled(at(100), LIMIT), None, "something was done at 50");
        progress.observe(at(100), true, 1, true);
        assert_eq!(progress.stalled(at(111), LIMIT), Some(Duration::from_secs(61)));
        for (is_active, done, due, case) in
            [(false, 1, true, "an outage"), (true, 1, false, "nothing due"), (true, 2, true, "work")]
        {
            let mut again = progress;
            again.observe(at(111), is_active, done, due);
            assert_eq!(again.stalled(at(120), LIMIT), None, "{case}");
        }
    }
}
