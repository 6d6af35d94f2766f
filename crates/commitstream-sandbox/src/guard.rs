//! The guard process: see `guard.sh`, which is the other half of this module.
//!
//! We hold the writing end of the guard's standard input and never hand it on (the standard library's pipes close on
//! exec). So the guard sees the end of its input when we drop it, exit, panic, or are killed with SIGKILL.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::account::Account;
use crate::{SandboxError, random};

const SCRIPT: &str = include_str!("guard.sh");
/// Longer than the longest thing a guard does: `initdb` on a slow disk, or a stop with its 10 s of patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Of a log, this much goes into an error.
const LOG_LINES: usize = 20;

/// One guard with its private directory, for one server.
#[derive(Debug)]
pub(crate) struct Guard {
    directory: PathBuf,
    account: Option<Account>,
    child: Child,
    commands: Option<ChildStdin>,
    answers: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Guard {
    /// Starts a guard for a server which ends in an orderly way on `stop_signal`, and creates its directory.
    pub(crate) fn new(kind: &str, stop_signal: &str) -> Result<Guard, SandboxError> {
        let account = Account::for_servers()?;
        let name = format!("commitstream-{kind}-{}", random::hex(5)?);
        let configured = std::env::var_os("COMMITSTREAM_SANDBOX_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        match Guard::spawn(configured.join(&name), stop_signal, account) {
            // A private temporary directory of root is closed to the account that the servers run as.
            Err(SandboxError::Guard { .. }) if configured != Path::new("/tmp") => {
                Guard::spawn(Path::new("/tmp").join(&name), stop_signal, account)
            }
            result => result,
        }
    }

    fn spawn(directory: PathBuf, stop_signal: &str, account: Option<Account>) -> Result<Guard, SandboxError> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "eval \"$COMMITSTREAM_GUARD\"", "commitstream-guard"]).arg(&directory).arg(stop_signal);
        forget_postgres_variables(&mut command);
        command.env("COMMITSTREAM_GUARD", SCRIPT).env("LC_ALL", "C").current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.process_group(0); // a terminal's Ctrl-C is not for the servers
        if let Some(Account { uid, gid }) = account {
            command.uid(uid).gid(gid);
        }
        let mut child = command.spawn().map_err(SandboxError::io("start /bin/sh"))?;
        let commands = child.stdin.take();
        let (answers, reader) = child.stdout.take().map(read_lines).transpose()?.unzip();
        let answers = answers.unwrap_or_else(|| sync_channel(1).1);
        let guard = Guard { directory, account, child, commands, answers, reader };
        match guard.answer() {
            Ok(answer) if answer == "ready" => Ok(guard),
            Ok(answer) | Err(answer) => Err(SandboxError::Guard { command: "create a directory".to_owned(), answer }),
        }
    }

    /// The private directory, which the guard removes at the end.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a file that only the servers' account can read.
    pub(crate) fn write(&self, name: &str, content: &str) -> Result<PathBuf, SandboxError> {
        let path = self.directory.join(name);
        let mut options = std::fs::OpenOptions::new();
        let opened = options.write(true).create_new(true).mode(0o600).open(&path);
        let written = opened.and_then(|mut file| file.write_all(content.as_bytes()));
        let owned = written.and_then(|()| self.account.map_or(Ok(()), |account| account.own(&path)));
        owned.map_err(SandboxError::io(format!("write {}", path.display())))?;
        Ok(path)
    }

    /// Runs a program to its end.
    pub(crate) fn prepare(&mut self, command: &[OsString]) -> Result<(), SandboxError> {
        let start = self.log_length();
        let answer = self.ask("prepare", command)?;
        match answer.strip_prefix("exit ") {
            Some("0") => Ok(()),
            Some(code) => Err(SandboxError::Prepare {
                program: command.first().map(|program| program.display().to_string()).unwrap_or_default(),
                code: code.to_owned(),
                log: self.log_tail(start),
            }),
            None => Err(SandboxError::Guard { command: "prepare".to_owned(), answer }),
        }
    }

    /// Starts the server and returns its process id. Whether it gets ready is another question.
    pub(crate) fn start(&mut self, command: &[OsString]) -> Result<u32, SandboxError> {
        let answer = self.ask("start", command)?;
        let pid = answer.strip_prefix("pid ").and_then(|pid| pid.parse().ok());
        pid.ok_or(SandboxError::Guard { command: "start".to_owned(), answer })
    }

    pub(crate) fn alive(&mut self) -> Result<bool, SandboxError> {
        Ok(self.ask("alive", &[])? == "yes")
    }

    /// One of the commands that are answered with `done`: `stop`, `kill`, `pause`, `resume`.
    pub(crate) fn order(&mut self, command: &'static str) -> Result<(), SandboxError> {
        match self.ask(command, &[])? {
            answer if answer == "done" => Ok(()),
            answer => Err(SandboxError::Guard { command: command.to_owned(), answer }),
        }
    }

    fn ask(&mut self, command: &str, arguments: &[OsString]) -> Result<String, SandboxError> {
        let mut line = command.as_bytes().to_vec();
        for argument in arguments {
            line.push(b' ');
            line.extend(quoted(argument));
        }
        line.push(b'\n');
        let sent = self.commands.as_mut().map_or(Ok(()), |commands| commands.write_all(&line));
        let failed = |answer| SandboxError::Guard { command: command.to_owned(), answer };
        sent.map_err(|error| failed(format!("it has ended ({error})")))?;
        self.answer().map_err(failed)
    }

    fn answer(&self) -> Result<String, String> {
        self.answers.recv_timeout(ANSWER_TIMEOUT).map_err(|problem| match problem {
            RecvTimeoutError::Timeout => format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
            RecvTimeoutError::Disconnected => "it has ended".to_owned(),
        })
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("server.log")
    }

    /// How long the log is now: the place from which [`Guard::log_tail`] shows what came after.
    pub(crate) fn log_length(&self) -> u64 {
        self.log_path().metadata().map_or(0, |metadata| metadata.len())
    }

    /// The last lines of what was logged after `start`.
    pub(crate) fn log_tail(&self, start: u64) -> String {
        let log = match std::fs::read(self.log_path()) {
            Ok(log) => log,
            Err(error) => return format!("(cannot read {}: {error})", self.log_path().display()),
        };
        let start = usize::try_from(start).map_or(log.len(), |start| start.min(log.len()));
        let text = String::from_utf8_lossy(&log[start..]).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Guard {
    /// Lets the guard end, and with it the server and the directory, and waits for that.
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Err(error) = self.child.wait() {
            eprintln!("commitstream-sandbox: cannot wait for the guard of {}: {error}", self.directory.display());
        }
        if self.reader.take().is_some_and(|reader| reader.join().is_err()) {
            eprintln!("commitstream-sandbox: the reader of the guard of {} panicked", self.directory.display());
        }
    }
}

/// A thread that reads lines, so that waiting for one can have a time-out. It ends when the guard does.
fn read_lines(output: ChildStdout) -> Result<(Receiver<String>, JoinHandle<()>), SandboxError> {
    let (sender, receiver) = sync_channel(16);
    let read = move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    };
    let reader = std::thread::Builder::new().name("sandbox-guard".to_owned()).spawn(read);
    Ok((receiver, reader.map_err(SandboxError::io("start a thread"))?))
}

/// A word in single quotes for the shell.
fn quoted(word: &OsStr) -> Vec<u8> {
    let inner = word.as_bytes().iter().flat_map(|byte| match byte {
        b'\'' => b"'\\''".to_vec(),
        byte => vec![*byte],
    });
    [b'\''].into_iter().chain(inner).chain([b'\'']).collect()
}

/// Keeps the caller's `PGHOST`, `PGDATA`, `PGOPTIONS` and so on from reaching our programs.
pub(crate) fn forget_postgres_variables(command: &mut Command) {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let awkward = OsStr::new("it's $HOME `id` \"x\" \\ *");
        let script = [b"printf %s ".to_vec(), quoted(awkward)].concat();
        let output = Command::new("/bin/sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
        assert_eq!(output.stdout, awkward.as_bytes());
    }

    #[test]
    fn a_failing_preparation_shows_what_it_printed_and_the_directory_goes() {
        let mut guard = Guard::new("test", "TERM").unwrap();
        let directory = guard.directory().to_owned();
        let command = ["sh", "-c", "echo 'the disk is made of cheese'; exit 3"].map(OsString::from);
        let message = guard.prepare(&command).unwrap_err().to_string();
        assert!(message.contains("exit code 3") && message.contains("made of cheese"), "{message}");
        drop(guard);
        assert!(!directory.exists());
    }

    #[test]
    fn a_server_that_ended_by_itself_is_noticed() {
        let mut guard = Guard::new("test", "TERM").unwrap();
        guard.start(&["true"].map(OsString::from)).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while guard.alive().unwrap() {
            assert!(std::time::Instant::now() < deadline, "still taken for alive");
        }
    }
}
