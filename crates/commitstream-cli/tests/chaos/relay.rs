//! One relay or consumer in a process of its own, started any number of times.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::consumers;
use crate::world::{PREFIX, World};

/// Short, so that outages are noticed and paused relays taken over within seconds. The clean-up would remove evidence.
const SETTINGS: &str = "\
app.database.timeout = 3s
app.redis { connectTimeout = 500ms, responseTimeout = 1s }
app.outbox.processor { leaseDuration = 2s, shutdownTimeout = 3s }
app.outbox.cleanup.enabled = false
app.consumer { claimIdle = 2s, shutdownTimeout = 3s, concurrency = 4, batchSize = 100, retryBaseDelay = 50ms }
";

/// Longer than `leaseDuration` and `claimIdle`.
pub const LONGER_THAN_LEASE_MILLIS: std::ops::Range<u64> = 2_200..5_000;

const BATCH_SIZES: [&str; 5] = ["3", "20", "100", "500", "1000"];
const POLL_INTERVALS: [&str; 3] = ["50ms", "200ms", "1s"];

/// What `abort` ends a process with.
const SIGABRT: i32 = 6;

/// A stop takes `shutdownTimeout` and a few time-outs of the servers.
const STOP_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The real daemon.
    Relay,
    /// This program as a consumer: see `consumers.rs`.
    Consumer,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Consumer => "consumer",
        }
    }
}

pub struct Relay {
    pub role: Role,
    /// Also of its links.
    pub number: usize,
    world: Arc<World>,
    directory: PathBuf,
    child: Option<Child>,
    started: u64,
}

impl Relay {
    pub fn new(world: Arc<World>, role: Role, number: usize) -> Result<Self> {
        let directory = world.directory.join(format!("{}-{number}", role.name()));
        fs::create_dir(&directory)?;
        fs::write(directory.join("application.conf"), SETTINGS)?;
        Ok(Self { role, number, world, directory, child: None, started: 0 })
    }

    pub fn started(&self) -> u64 {
        self.started
    }

    /// Starts it through its own links, with some batch size and poll interval. Its log is added to that of its former lives.
    pub fn start(&mut self, dice: &mut StdRng) -> Result<()> {
        let links = &self.world.links[self.number];
        let log = File::options().create(true).append(true).open(self.directory.join("log"))?;
        let mut command = match self.role {
            Role::Relay => Command::new(env!("CARGO_BIN_EXE_commitstream")),
            Role::Consumer => Command::new(std::env::current_exe()?),
        };
        match self.role {
            Role::Relay => command.arg("relay"),
            Role::Consumer => command.args(["--exact", "consumers::consumer_process", "--nocapture"]),
        };
        let child = command
            .env_clear()
            .env(consumers::IS_CONSUMER, if self.role == Role::Consumer { "yes" } else { "" })
            .env("DATABASE_URL", links.postgres.url(&self.world.postgres.url()))
            // Both Redis servers have the same user and password.
            .env("REDIS_URL", links.redis.url(&self.world.redis.master().url()))
            .env("STREAM_PREFIX", PREFIX)
            .env("HTTP_LISTEN", "off")
            .env("OUTBOX_BATCH_SIZE", BATCH_SIZES.choose(dice).context("batch sizes")?)
            .env("OUTBOX_POLL_INTERVAL", POLL_INTERVALS.choose(dice).context("poll intervals")?)
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        self.started += 1;
        if self.role == Role::Relay {
            self.world.relays_alive.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A daemon that waits for servers does not end by itself. One that has is a finding, unless it is a consumer that a poison event
    /// ended, and is started again.
    pub fn expect_running(&mut self, dice: &mut StdRng) -> Result<()> {
        let child = self.child.as_mut().context("it was started")?;
        if let Some(status) = child.try_wait()? {
            if self.role == Role::Consumer && status.signal() == Some(SIGABRT) {
                self.world.faults.count("consumer ended by a poison event");
            } else {
                self.world.findings.add(format!("{self} ended by itself with {status}; see its log"));
            }
            self.ended();
            self.start(dice)?;
        }
        Ok(())
    }

    pub fn signal(&self, name: &str) -> Result<()> {
        let child = self.child.as_ref().context("it was started")?;
        let done = Command::new("kill").args(["-s", name, &child.id().to_string()]).status()?;
        ensure!(done.success(), "kill -s {name} failed");
        Ok(())
    }

    pub fn kill(&mut self) -> Result<()> {
        let child = self.child.as_mut().context("it was started")?;
        child.kill()?;
        child.wait()?;
        self.ended();
        Ok(())
    }

    /// Ends it gracefully.
    pub async fn end(&mut self) -> Result<ExitStatus> {
        self.signal("TERM")?;
        let name = self.to_string();
        let child = self.child.as_mut().context("it was started")?;
        let deadline = Instant::now() + STOP_LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                self.world.findings.add(format!("{name} did not end within {STOP_LIMIT:?} of SIGTERM"));
                child.kill()?;
                break child.wait()?;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        self.ended();
        Ok(status)
    }

    fn ended(&mut self) {
        self.child = None;
        if self.role == Role::Relay {
            self.world.relays_alive.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl fmt::Display for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role.name(), self.number)
    }
}

impl Drop for Relay {
    /// A test that failed must not leave a process behind. It may have ended by itself.
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().ok();
            child.wait().ok();
        }
    }
}
