//! What PostgreSQL and Redis have in common: a guard, a port, and a life that can be ended and begun again.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::guard::Guard;
use crate::{SandboxError, random};

/// How long a server may take from its start until it serves, and servers until they have come to terms.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How many ports are tried when others are quicker to take them.
pub(crate) const PORT_ATTEMPTS: usize = 10;
/// What the servers log when they cannot have their port, or when a killed predecessor still holds its shared memory.
const BUSY: [&str; 2] = ["Address already in use", "is still in use"];

/// What differs between the servers.
pub(crate) trait Service {
    /// The name for messages.
    const NAME: &'static str;
    /// The command line that runs the server in the foreground.
    fn command(&self, directory: &Path, port: u16) -> Vec<OsString>;
    /// Whether this very server (and not a stranger on the same port) serves clients now.
    fn is_ready(&self, directory: &Path, port: u16, pid: u32) -> bool;
}

#[derive(Debug)]
pub(crate) struct Server<S> {
    pub(crate) service: S,
    port: u16,
    directory: PathBuf,
    running: Mutex<Running>,
}

#[derive(Debug)]
struct Running {
    guard: Guard,
    pid: u32,
}

/// Why one attempt to start did not end in a ready server.
enum Failure {
    /// The port is taken, for now.
    Busy,
    Fatal(SandboxError),
}

impl From<SandboxError> for Failure {
    fn from(error: SandboxError) -> Failure {
        Failure::Fatal(error)
    }
}

impl<S: Service> Server<S> {
    /// Starts a prepared server on a free port.
    pub(crate) fn start(service: S, mut guard: Guard) -> Result<Server<S>, SandboxError> {
        let mut port = 0;
        for _ in 0..PORT_ATTEMPTS {
            port = random::free_port(S::NAME)?;
            match start_once(&service, &mut guard, port) {
                Ok(pid) => {
                    let directory = guard.directory().to_owned();
                    return Ok(Server { service, port, directory, running: Mutex::new(Running { guard, pid }) });
                }
                Err(Failure::Busy) => {}
                Err(Failure::Fatal(error)) => return Err(error),
            }
        }
        Err(SandboxError::NoPort { server: S::NAME, port })
    }

    /// Runs a program to its end, as the server's account.
    pub(crate) fn prepare(&self, command: &[OsString]) -> Result<(), SandboxError> {
        self.running().guard.prepare(command)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn host_and_port(&self) -> String {
        format!("{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running().pid
    }

    /// One of the guard's commands `stop`, `kill`, `pause`, `resume`.
    pub(crate) fn order(&self, command: &'static str) -> Result<(), SandboxError> {
        self.running().guard.order(command)
    }

    /// Starts the server again on its port and data, stopping it before if need be.
    pub(crate) fn restart(&self) -> Result<(), SandboxError> {
        let mut running = self.running();
        running.guard.order("stop")?;
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            match start_once(&self.service, &mut running.guard, self.port) {
                Ok(pid) => {
                    running.pid = pid;
                    return Ok(());
                }
                Err(Failure::Busy) if Instant::now() < deadline => std::thread::sleep(10 * POLL_INTERVAL),
                Err(Failure::Busy) => {
                    return Err(SandboxError::NoPort { server: S::NAME, port: self.port });
                }
                Err(Failure::Fatal(error)) => return Err(error),
            }
        }
    }

    /// A panic of another thread while it held the lock leaves nothing half done: every change is one word.
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start_once<S: Service>(service: &S, guard: &mut Guard, port: u16) -> Result<u32, Failure> {
    let log_start = guard.log_length();
    let command = service.command(guard.directory(), port);
    let pid = guard.start(&command)?;
    let deadline = Instant::now() + READY_TIMEOUT;
    while Instant::now() < deadline {
        if !guard.alive()? {
            let log = guard.log_tail(log_start);
            let busy = BUSY.iter().any(|sign| log.contains(sign));
            return Err(if busy { Failure::Busy } else { SandboxError::Ended { server: S::NAME, log }.into() });
        }
        if service.is_ready(guard.directory(), port, pid) {
            return Ok(pid);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    let log = guard.log_tail(log_start);
    guard.order("kill")?;
    Err(SandboxError::NotReady { server: S::NAME, seconds: READY_TIMEOUT.as_secs(), log }.into())
}

/// Polls until servers have reached a state that they reach by themselves. Until then, some may not answer yet.
pub(crate) fn wait_until(
    what: &'static str,
    mut condition: impl FnMut() -> Result<bool, SandboxError>,
) -> Result<(), SandboxError> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        match condition() {
            Ok(true) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Ok(false) if Instant::now() >= deadline => {
                return Err(SandboxError::InVain { what, seconds: READY_TIMEOUT.as_secs() });
            }
            _ => std::thread::sleep(4 * POLL_INTERVAL),
        }
    }
}

/// Does several things at the same time, such as starting servers. The first error wins.
pub(crate) fn in_parallel<T: Send>(
    count: usize,
    work: impl Fn(usize) -> Result<T, SandboxError> + Sync,
) -> Result<Vec<T>, SandboxError> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|index| scope.spawn(move || work(index))).collect();
        let results: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        results.into_iter().map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Settings become lines of a file, so a line break in one would smuggle in another.
pub(crate) fn check_settings(settings: &[(&str, &str)]) -> Result<(), SandboxError> {
    match settings.iter().find(|(name, value)| name.contains(['\n', '\r']) || value.contains(['\n', '\r'])) {
        Some((name, _)) => Err(SandboxError::InvalidSetting { name: (*name).to_owned() }),
        None => Ok(()),
    }
}
