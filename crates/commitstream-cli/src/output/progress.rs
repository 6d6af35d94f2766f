use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use super::printable;

/// How often progress is told on a terminal, and elsewhere, where each time is a line that stays.
const ON_TERMINAL: Duration = Duration::from_millis(500);
const ELSEWHERE: Duration = Duration::from_secs(5);

/// Progress on standard error: one line that is written over on a terminal, a line now and then elsewhere. That nobody
/// reads it must not stop the work.
#[derive(Debug)]
pub struct Progress {
    told: Instant,
    is_terminal: bool,
}

impl Progress {
    /// Work that is done sooner than progress would be told is silent.
    pub fn start() -> Self {
        Self { told: Instant::now(), is_terminal: io::stderr().is_terminal() }
    }

    pub fn tell(&mut self, text: impl FnOnce() -> String) {
        let pause = if self.is_terminal { ON_TERMINAL } else { ELSEWHERE };
        if self.told.elapsed() < pause {
            return;
        }
        self.told = Instant::now();
        let text = printable(&text());
        let text = if self.is_terminal { format!("\r\x1b[K{text}") } else { format!("{text}\n") };
        io::stderr().write_all(text.as_bytes()).ok();
    }

    /// Makes room for the result.
    pub fn clear(&self) {
        if self.is_terminal {
            io::stderr().write_all(b"\r\x1b[K").ok();
        }
    }
}
