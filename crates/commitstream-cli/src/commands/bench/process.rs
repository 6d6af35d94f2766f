//! A relay in a process of its own, as a user runs it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use commitstream::config::Settings;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::time::timeout;

use super::drain::BATCH_SIZE;
use super::machine::field;
use super::stage::Stage;

/// Longest wait for a relay to take up its work, or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Starts a relay, prints its process id, and ends it when standard input ends: as soon as we are gone, whatever became of us.
const SHELL: &str = r#""$@" </dev/null & relay=$!; exec 2>/dev/null; echo "$relay"; read -r _; kill "$relay"; wait "$relay""#;

/// What the relay's log says when it begins to claim.
const ACTIVE: &str = "relay is active";

/// `commitstream relay`. It ends when this is dropped.
pub struct RelayProcess {
    pid: u32,
    shell: Child,
    /// The relay ends when this is closed.
    stdin: ChildStdin,
    active: watch::Receiver<bool>,
}

impl RelayProcess {
    /// Starts a relay with the settings of a drain, and returns at the moment when it begins to claim.
    pub async fn start(stage: &Stage) -> anyhow::Result<Self> {
        Self::start_with(stage, &[]).await
    }

    /// The same with further settings, by the names of their environment variables.
    pub async fn start_with(stage: &Stage, environment: &[(&str, String)]) -> anyhow::Result<Self> {
        let mut command = command(&stage.settings)?;
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut shell = command.spawn().context("cannot start a relay")?;
        let stdin = shell.stdin.take().context("standard input is piped")?;
        let stdout = shell.stdout.take().context("standard output is piped")?;
        let stderr = shell.stderr.take().context("standard error is piped")?;
        let (active_to, active) = watch::channel(false);
        tokio::spawn(read_log(stderr, active_to));
        let mut pid = String::new();
        timeout(PATIENCE, BufReader::new(stdout).read_line(&mut pid)).await??;
        let pid = pid.trim().parse().context("the shell tells the process id of the relay")?;
        let mut relay = Self { pid, shell, stdin, active };
        relay.is_active().await?;
        Ok(relay)
    }

    async fn is_active(&mut self) -> anyhow::Result<()> {
        match timeout(PATIENCE, self.active.wait_for(|active| *active)).await {
            Ok(Ok(_)) => Ok(()),
            _ => bail!("a relay did not take up its work within {} s", PATIENCE.as_secs()),
        }
    }

    /// Seconds of processor time that it has used; `None` on a system that does not tell.
    pub fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds_in(&self.proc("stat")?)
    }

    /// The most memory that it has had, in MiB; `None` on a system that does not tell.
    pub fn peak_mib(&self) -> Option<f64> {
        let status = self.proc("status")?;
        let kib = field(&status, "VmHWM")?.split(' ').next()?.parse::<f64>().ok()?;
        Some(kib / 1_024.0)
    }

    fn proc(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid)).ok()
    }

    /// Lets it settle what is in flight and give its partitions back, and waits until it has ended.
    pub async fn stop(self) -> anyhow::Result<()> {
        let Self { mut shell, stdin, .. } = self;
        drop(stdin);
        timeout(PATIENCE, shell.wait()).await.context("a relay does not end")??;
        Ok(())
    }
}

/// This program once more, with these servers, and with the default settings in everything else.
fn command(settings: &Settings) -> anyhow::Result<Command> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", SHELL, "sh"]).arg(std::env::current_exe()?).args(["relay", "--config", NO_SETTINGS]);
    let all = Settings::load(Some(Path::new(NO_SETTINGS)), |_| None, &[])?;
    for name in all.entries().into_iter().filter_map(|entry| entry.env) {
        command.env_remove(name);
    }
    let Settings { database, redis, .. } = settings;
    command.env("OUTBOX_SCHEMA", &database.schema).env("STREAM_PREFIX", &redis.stream_prefix);
    command.env("OUTBOX_BATCH_SIZE", BATCH_SIZE.to_string()).env("RUST_LOG", "error,commitstream=info").env("HTTP_LISTEN", "off");
    let urls =
        [("DATABASE_URL", &database.url), ("REDIS_URL", &redis.url), ("REDIS_SENTINEL_PASSWORD", &redis.sentinel_password)];
    command.envs(urls.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// An empty settings file.
const NO_SETTINGS: &str = "/dev/null";

/// Until the relay ends. What is wrong is passed on.
async fn read_log(log: impl AsyncRead + Unpin, active: watch::Sender<bool>) {
    let mut lines = BufReader::new(log).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if line.contains(ACTIVE) {
            active.send_replace(true);
        } else if !line.contains(" INFO ") {
            tracing::warn!("a relay says: {line}");
        }
    }
}

/// Time in user and in kernel mode are the 14th and the 15th word, in hundredths of a second; the second word is a name in brackets.
fn cpu_seconds_in(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut ticks = after_name.split_whitespace().skip(11).map_while(|word| word.parse::<f64>().ok());
    Some((ticks.next()? + ticks.next()?) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::cpu_seconds_in;

    #[test]
    fn processor_time_is_read_from_what_linux_writes() {
        let stat = "4242 (a (name) here) S 1 4242 4242 0 -1 4194304 1000 0 0 0 150 25 0 0 20 0 9 0 100 1000000 500";
        assert_eq!(cpu_seconds_in(stat), Some(1.75));
        assert_eq!(cpu_seconds_in("4242 (name) S 1"), None);
    }
}
