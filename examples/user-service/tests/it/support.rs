//! A migrated database and a key prefix for each test, a relay, the programs on them, and requests to the service.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use commitstream::config::Settings;
use commitstream::outbox::OutboxRepository;
use commitstream::relay::{OutboxProcessor, RelayHandle};
use commitstream::streams::{Entry, Streams};
use commitstream_sandbox::{Sandbox, TestDatabase};
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::{sleep, timeout};

/// Longest that any condition is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub database: TestDatabase,
    pub settings: Settings,
    pub streams: Streams,
    _relay: RelayHandle,
}

impl World {
    pub async fn new() -> Result<Self> {
        let sandbox = Sandbox::shared();
        let database = sandbox.database()?;
        let mut settings = Settings::default();
        settings.database.url = Some(database.url().to_owned());
        settings.redis.url = Some(sandbox.redis_url());
        settings.redis.stream_prefix = sandbox.key_prefix()?;
        let mut connection = PgConnection::connect(database.url()).await?;
        OutboxRepository::new(&settings.database.schema).migrate(&mut connection).await?;
        let streams = Streams::new(&sandbox.redis_url(), &settings.redis)?;
        let relay = OutboxProcessor::new(settings.clone())?.start();
        Ok(Self { database, settings, streams, _relay: relay })
    }

    /// Starts a program with the environment of this world.
    pub fn start(&self, program: &str, environment: &[(&str, &str)]) -> Result<Program> {
        self.start_with(program, &[], environment)
    }

    pub fn start_with(&self, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Result<Program> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it"))
            .env("DATABASE_URL", self.database.url())
            .env("REDIS_URL", Sandbox::shared().redis_url())
            .env("STREAM_PREFIX", &self.settings.redis.stream_prefix)
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG")
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        let log = BufReader::new(child.stderr.take().context("no standard error")?).lines();
        Ok(Program { child, log })
    }

    /// The service on a free port.
    pub async fn service(&self) -> Result<Service> {
        let mut program = self.start(env!("CARGO_BIN_EXE_user-service"), &[("LISTEN", "127.0.0.1:0")])?;
        let line = program.logs("listening on http://").await?;
        let address = line.rsplit("http://").next().unwrap_or_default().to_owned();
        Ok(Service { program, address })
    }

    pub fn welcome_mail(&self, smtp_url: &str) -> Result<Program> {
        self.start(env!("CARGO_BIN_EXE_welcome-mail"), &[("SMTP_URL", smtp_url), ("MAIL_FROM", "welcome@example.org")])
    }

    /// What a statement of one value says, as text.
    pub async fn sql(&self, statement: &'static str) -> Result<String> {
        let mut connection = PgConnection::connect(self.database.url()).await?;
        Ok(sqlx::query_scalar(statement).fetch_one(&mut connection).await?)
    }

    pub async fn entries(&self, aggregate_type: &str) -> Result<Vec<Entry>> {
        Ok(self.streams.range(&self.streams.stream_of(aggregate_type), "0", 100).await?)
    }
}

/// A running program; killed when it is dropped.
pub struct Program {
    pub child: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Program {
    /// Waits for a line of its log that has this in it.
    pub async fn logs(&mut self, text: &str) -> Result<String> {
        let found = timeout(PATIENCE, async {
            let mut before = Vec::new();
            while let Some(line) = self.log.next_line().await? {
                if line.contains(text) {
                    return Ok(line);
                }
                before.push(line);
            }
            bail!("ended without {text:?}: {}", before.join("\n"))
        });
        found.await.with_context(|| format!("waited for {text:?} in a log"))?
    }

    /// Sends SIGTERM and waits for the end.
    pub async fn terminate(mut self) -> Result<ExitStatus> {
        let id = self.child.id().context("it has ended before")?.to_string();
        Command::new("kill").args(["-s", "TERM", &id]).status().await?;
        Ok(timeout(PATIENCE, self.child.wait()).await??)
    }
}

pub struct Service {
    pub program: Program,
    address: String,
}

impl Service {
    /// Posts JSON; returns the status code and the body.
    pub async fn post(&self, path: &str, body: &serde_json::Value) -> Result<(u16, serde_json::Value)> {
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).await?;
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut response)).await??;
        let (head, body) = response.split_once("\r\n\r\n").context("no HTTP response")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, serde_json::from_str(body).with_context(|| response.clone())?))
    }

    /// Posts what must be accepted; returns its id.
    pub async fn create(&self, path: &str, body: &serde_json::Value) -> Result<String> {
        match self.post(path, body).await? {
            (201, answer) => Ok(answer["id"].as_str().context("no id")?.to_owned()),
            refused => bail!("{path}: {refused:?}"),
        }
    }
}

/// Waits until `condition` holds, and says what was waited for when it does not come.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let waiting = timeout(PATIENCE, async {
        while !condition().await? {
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    });
    waiting.await.with_context(|| format!("waited {PATIENCE:?} for {what}"))?
}
