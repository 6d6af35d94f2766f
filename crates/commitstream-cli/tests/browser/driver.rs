//! The chromedriver of this program.

use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};

/// Waits for the end of a pipe which only we hold open, whichever way we end; then chromedriver ends, with what is left of its browsers,
/// and what they wrote goes.
const GUARD: &str = r#"
home=$(mktemp -d) || exit 1
HOME=$home TMPDIR=$home chromedriver --port=0 </dev/null &
cat >/dev/null
trap '' TERM
kill -s TERM 0
wait
rm -rf "$home"
"#;

pub struct Driver {
    pub url: String,
    /// Its standard input is the pipe.
    _guard: Child,
    /// What it still prints has somewhere to go.
    _stdout: BufReader<ChildStdout>,
}

impl Driver {
    /// Started at first use; `None` where there is no chromedriver.
    pub fn shared() -> Result<Option<&'static Self>> {
        static SHARED: OnceLock<Result<Option<Driver>>> = OnceLock::new();
        match SHARED.get_or_init(Self::start) {
            Ok(driver) => Ok(driver.as_ref()),
            Err(error) => Err(anyhow!("chromedriver cannot be started: {error:#}")),
        }
    }

    fn start() -> Result<Option<Self>> {
        let version = Command::new("chromedriver").arg("--version").stdout(Stdio::null()).status();
        if version.is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            return Ok(None);
        }
        let mut command = Command::new("/bin/sh");
        command.args(["-c", GUARD]).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut guard = command.spawn()?;
        let mut stdout = BufReader::new(guard.stdout.take().context("standard output is piped")?);
        let mut seen = String::new();
        while stdout.read_line(&mut seen)? > 0 {
            let port =
                seen.lines().last().and_then(|line| line.split_once("started successfully on port ")).map(|(_, port)| port);
            if let Some(port) = port {
                let url = format!("http://127.0.0.1:{}", port.trim_end_matches('.'));
                return Ok(Some(Self { url, _guard: guard, _stdout: stdout }));
            }
        }
        Err(anyhow!("it ended with: {seen}"))
    }
}
