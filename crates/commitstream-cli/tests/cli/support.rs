//! A database and a key prefix for each test, and the binary run on them.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use commitstream_sandbox::{Redis, Sandbox, TestDatabase};
use serde_json::Value;

/// Longest that anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a run of the binary came to.
#[derive(Debug)]
pub struct Answer {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {self:?}"))
    }
}

pub struct World {
    pub database: TestDatabase,
    pub prefix: String,
    pub redis_url: String,
}

impl World {
    /// A migrated database.
    pub fn new() -> Result<Self> {
        let world = Self::unmigrated()?;
        world.ok(&["migrate"])?;
        Ok(world)
    }

    pub fn unmigrated() -> Result<Self> {
        let sandbox = Sandbox::shared();
        Ok(Self { database: sandbox.database()?, prefix: sandbox.key_prefix()?, redis_url: sandbox.redis_url() })
    }

    /// The same, with a Redis of the test's own.
    pub fn on(redis: &Redis) -> Result<Self> {
        Ok(Self { redis_url: redis.url(), ..Self::new()? })
    }

    /// The binary with the environment of this world and nothing else.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = bare_command(args);
        command.env("DATABASE_URL", self.database.url()).env("REDIS_URL", &self.redis_url).env("STREAM_PREFIX", &self.prefix);
        // Tests run at the same time: each that wants the server takes a free port.
        command.env("HTTP_LISTEN", "off");
        command
    }

    pub fn run(&self, args: &[&str]) -> Result<Answer> {
        finish(self.command(args))
    }

    /// Runs, and expects exit code 0; returns standard output.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let answer = self.run(args)?;
        ensure!(answer.code == Some(0), "{answer:?}");
        Ok(answer.stdout)
    }

    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.ok(&[args, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Publishes a UserCreated for this user; returns its id.
    pub fn publish_user(&self, user: &str) -> Result<String> {
        let args = ["publish", "--type", "UserCreated", "--aggregate-type", "user", "--aggregate-id", user];
        let published = self.json(&args)?;
        Ok(published["id"].as_str().context("no id")?.to_owned())
    }

    /// Three events that are refused, because they are too large; they are FAILED, and small enough to be retried.
    pub fn fail_users(&self) -> Result<Vec<String>> {
        let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                      VALUES ('UserCreated', 'user', '{}', jsonb_build_object('fill', repeat('x', 2000000))) RETURNING id;";
        let mut ids = Vec::new();
        for user in ["1", "2", "3"] {
            let answer = self.database.psql(&insert.replace("{}", user))?;
            ids.push(answer.lines().next().context("an id")?.trim().to_owned());
        }
        let mut relay = self.command(&["relay", "--until-empty"]);
        relay.env("OUTBOX_MAX_RETRIES", "0");
        let answer = finish(relay)?;
        ensure!(answer.code == Some(0) && answer.stdout.contains("3 events in the outbox failed"), "{answer:?}");
        self.database.psql("UPDATE event_outbox SET payload = '{}' WHERE status = 'FAILED';")?;
        Ok(ids)
    }

    /// Makes a stream known that a test writes to by itself, as a publisher does.
    pub fn note(&self, aggregate_type: &str) -> Result<()> {
        let key = format!("{}{{streams}}", self.prefix);
        Ok(redis::cmd("HSET").arg(key).arg(aggregate_type).arg("").exec(&mut self.redis()?)?)
    }

    pub fn user_stream(&self) -> String {
        format!("{}user", self.prefix)
    }

    /// What stays the same of a table: `events:` in place of the prefix, `TIME` in place of durations, one space between words.
    pub fn lasting(&self, text: &str) -> String {
        const UNITS: [&str; 6] = ["ms", "s", "min", "h", "day", "days"];
        let mut lasting = String::new();
        for line in text.lines() {
            let line = line.replace(&self.prefix, "events:");
            let words: Vec<&str> = line.split_whitespace().collect();
            let is_unit = |at: usize| words.get(at).is_some_and(|word| UNITS.contains(word));
            // Of `2 h 10 min`, only the 2 is kept.
            let is_dropped = |at: usize| is_unit(at) || (at > 1 && is_unit(at - 1) && is_unit(at + 1));
            let kept = words.iter().enumerate().filter(|(at, _)| !is_dropped(*at));
            let kept: Vec<&str> = kept.map(|(at, word)| if is_unit(at + 1) { "TIME" } else { *word }).collect();
            lasting += &format!("{}\n", kept.join(" "));
        }
        lasting
    }

    pub fn redis(&self) -> Result<redis::Connection> {
        Ok(redis::Client::open(self.redis_url.as_str())?.get_connection()?)
    }

    /// What the audit says, oldest first: who, action, about, events, number of ids; separated by `|`.
    pub fn deeds(&self) -> Result<Vec<String>> {
        let sql = "SELECT who, action, about, events, cardinality(event_ids) FROM outbox_audit ORDER BY audit_id;";
        Ok(self.database.psql(sql)?.lines().map(str::to_owned).collect())
    }

    pub fn stats(&self) -> Result<Value> {
        self.json(&["stats"])
    }
}

/// The binary with an empty environment, in a directory without settings.
pub fn bare_command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_commitstream"));
    command.args(args).env_clear().current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command
}

/// Runs to the end, within [`PATIENCE`].
pub fn finish(command: Command) -> Result<Answer> {
    let (mut running, stdin) = Running::start(command, Stdio::null())?;
    drop(stdin);
    running.ended()
}

/// Runs to the end with this on standard input.
pub fn finish_with_input(command: Command, input: &[u8]) -> Result<Answer> {
    let (mut running, stdin) = Running::start(command, Stdio::piped())?;
    stdin.context("standard input is piped")?.write_all(input)?;
    running.ended()
}

/// A run that is not over, and the lines that it has printed.
pub struct Running {
    child: Child,
    stdout: Lines,
    stderr: Lines,
}

/// Lines as they come, and all of them in the end.
struct Lines {
    coming: Receiver<String>,
    seen: String,
    reader: Option<JoinHandle<std::io::Result<()>>>,
}

impl Lines {
    fn read(from: impl Read + Send + 'static) -> Self {
        let (sender, coming) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(from).lines() {
                if sender.send(line?).is_err() {
                    break;
                }
            }
            Ok(())
        });
        Self { coming, seen: String::new(), reader: Some(reader) }
    }

    fn wait_for(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.coming.recv_timeout(left) else { bail!("no line with {text:?} after:\n{}", self.seen) };
            self.seen += &format!("{line}\n");
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    fn all(&mut self) -> Result<String> {
        if let Some(Err(_)) = self.reader.take().map(JoinHandle::join) {
            bail!("a reader panicked");
        }
        self.seen.extend(self.coming.try_iter().map(|line| line + "\n"));
        Ok(std::mem::take(&mut self.seen))
    }
}

impl Running {
    pub fn start(mut command: Command, stdin: Stdio) -> Result<(Self, Option<ChildStdin>)> {
        let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = Lines::read(child.stdout.take().context("standard output is piped")?);
        let stderr = Lines::read(child.stderr.take().context("standard error is piped")?);
        let stdin = child.stdin.take();
        Ok((Self { child, stdout, stderr }, stdin))
    }

    pub fn new(command: Command) -> Result<Self> {
        Ok(Self::start(command, Stdio::null())?.0)
    }

    /// Waits for a line with this text on standard error, and returns it.
    pub fn says(&mut self, text: &str) -> Result<String> {
        self.stderr.wait_for(text)
    }

    /// Waits for a line with this text on standard output, and returns it.
    pub fn prints(&mut self, text: &str) -> Result<String> {
        self.stdout.wait_for(text)
    }

    pub fn signal(&self, name: &str) -> Result<()> {
        signal(&self.child, name)
    }

    pub fn ended(&mut self) -> Result<Answer> {
        let status = wait(&mut self.child)?;
        Ok(Answer { code: status.code(), stdout: self.stdout.all()?, stderr: self.stderr.all()? })
    }
}

impl Drop for Running {
    /// A test that failed must not leave a daemon behind. It may have ended by itself.
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub fn signal(child: &Child, name: &str) -> Result<()> {
    let done = Command::new("kill").args(["-s", name, &child.id().to_string()]).status()?;
    ensure!(done.success(), "kill -s {name} failed");
    Ok(())
}

pub fn wait(child: &mut Child) -> Result<ExitStatus> {
    let mut ended = None;
    eventually("the program to end", || {
        ended = child.try_wait()?;
        Ok(ended.is_some())
    })?;
    ended.context("it has ended")
}

/// Waits until `condition` holds, and says what was waited for when it does not come.
pub fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition()? {
        ensure!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
