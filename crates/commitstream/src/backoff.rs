//! How long to wait before trying again. Pure but for the dice.

use std::time::Duration;

use rand::Rng;

/// Waits between attempts to reach a server: from 50 ms, doubling, to 1 s, so that work goes on soon after the server is back.
#[derive(Debug, Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next wait.
    pub fn next(&mut self) -> Duration {
        let wait = delay(self.attempts, Duration::from_millis(50), Duration::from_secs(1));
        self.attempts = self.attempts.saturating_add(1);
        wait
    }
}

/// `base` doubled `exponent` times, at most `longest`, then between half of it and all of it at random, so that many who
/// failed together do not come back together.
pub fn delay(exponent: u32, base: Duration, longest: Duration) -> Duration {
    let full = base.saturating_mul(2_u32.saturating_pow(exponent)).min(longest);
    full.mul_f64(rand::rng().random_range(0.5..=1.0))
}
