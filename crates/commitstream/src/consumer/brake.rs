//! Holds dead letters back. No I/O.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Between two dead letters that are written although Redis has no memory.
const WITHOUT_MEMORY: Duration = Duration::from_secs(5);

/// What one stream of a consumer does with its dead letters, over all its sessions.
#[derive(Debug, Default)]
pub(super) struct Brake {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    without_memory: Option<Instant>,
}

impl Brake {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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
