//! Ctrl-C: the first ends the load early, the second ends the process.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Exit code of a process that was interrupted: 128 and the number of SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Listens for Ctrl-C and SIGTERM for as long as it lives.
pub struct Interrupt {
    stop: watch::Receiver<bool>,
    _task: JoinSet<()>,
}

impl Interrupt {
    pub fn listen() -> std::io::Result<Self> {
        let (mut interrupts, mut terminations) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let (stop_to, stop) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(async move {
            for time in 1.. {
                tokio::select! {
                    _ = interrupts.recv() => {}
                    _ = terminations.recv() => {}
                }
                if time > 1 {
                    // Private servers end with their guard, whichever way this process ends.
                    std::process::exit(i32::from(INTERRUPTED));
                }
                stop_to.send_replace(true);
            }
        });
        Ok(Self { stop, _task: task })
    }

    /// Becomes true at the first signal.
    pub fn stop(&self) -> watch::Receiver<bool> {
        self.stop.clone()
    }

    /// Waits for the first signal.
    pub async fn first(&self) {
        // The sender lives in our own task.
        drop(self.stop.clone().wait_for(|stop| *stop).await);
    }
}
