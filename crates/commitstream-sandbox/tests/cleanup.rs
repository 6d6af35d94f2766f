//! However the process that started the servers ends, nothing of them stays behind.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{address, processes_mentioning, wait_until};

/// `commitstream-sandbox exec` with a command that waits for its end, in a process group of its own.
struct Run {
    child: Child,
    /// The process id of the command that `exec` runs.
    command: String,
    urls: [String; 2],
    directories: Vec<PathBuf>,
}

fn exec(script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_commitstream-sandbox"));
    command.args(["exec", "--", "sh", "-c", script]);
    command
}

fn start_waiting_command() -> Run {
    let script = "echo $$; echo $COMMITSTREAM_SANDBOX_POSTGRES; echo $COMMITSTREAM_SANDBOX_REDIS; exec sleep 300";
    let mut command = exec(script);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn().unwrap();
    let mut notice = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut notice).unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let command = lines.next().unwrap();
    let urls = [lines.next().unwrap(), lines.next().unwrap()];
    let directories: Vec<PathBuf> = notice.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect();
    let run = Run { child, command, urls, directories };
    assert_eq!(run.directories.len(), 2, "{notice}");
    assert!(notice.starts_with("PostgreSQL 1") && notice.contains(" and Redis "), "{notice}");
    for directory in &run.directories {
        assert!(directory.is_dir() && !processes_mentioning(directory).is_empty(), "{notice}");
    }
    for url in &run.urls {
        TcpStream::connect(address(url)).unwrap();
    }
    run
}

fn signal(name: &str, target: &str) {
    let script = format!("kill -s {name} -- {target}");
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
}

fn wait_until_nothing_is_left(run: &Run) {
    for directory in &run.directories {
        wait_until("the directory is gone", || !directory.exists());
        wait_until("the processes are gone", || processes_mentioning(directory).is_empty());
    }
    for url in &run.urls {
        assert!(TcpStream::connect(address(url)).is_err());
    }
}

#[test]
fn a_parent_killed_by_sigkill_leaves_nothing() {
    let mut run = start_waiting_command();
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    wait_until_nothing_is_left(&run);
    signal("KILL", &run.command); // the command is not ours to end: it was orphaned by the SIGKILL
}

#[test]
fn ctrl_c_leaves_nothing() {
    let mut run = start_waiting_command();
    // To the whole group, as a terminal does. A shell that runs the tests in the background makes them ignore SIGINT, and
    // what they start inherits that; SIGTERM ends it all the same.
    let group = format!("-{}", run.child.id());
    for name in ["INT", "TERM"] {
        if run.child.try_wait().unwrap().is_none() {
            signal(name, &group);
            let deadline = Instant::now() + Duration::from_secs(5);
            while run.child.try_wait().unwrap().is_none() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    assert!(run.child.try_wait().unwrap().is_some(), "it outlived both signals");
    wait_until_nothing_is_left(&run);
}

#[test]
fn the_exit_code_is_the_commands_own() {
    assert_eq!(exec("exit 7").output().unwrap().status.code(), Some(7));
    assert_eq!(exec("kill -TERM $$").output().unwrap().status.code(), Some(128 + 15));
}

#[test]
fn a_command_that_does_not_exist_is_named() {
    let binary = env!("CARGO_BIN_EXE_commitstream-sandbox");
    let output = Command::new(binary).args(["exec", "--", "/nonexistent/command"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("cannot run `/nonexistent/command`: No such file"), "{message}");
}

#[test]
fn wrong_use_is_answered_with_the_usage() {
    let run = |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_commitstream-sandbox")).args(arguments).output().unwrap();
    for wrong in [&["exec"][..], &["exec", "--"], &["run"]] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("Usage:"), "{wrong:?}");
    }
    for help in [&[][..], &["--help"]] {
        let output = run(help);
        assert_eq!(output.status.code(), Some(0), "{help:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("Usage:"), "{help:?}");
    }
}

#[test]
fn a_panic_leaves_nothing() {
    let directory = std::sync::Mutex::new(PathBuf::new());
    let panicked = std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            let redis = commitstream_sandbox::Redis::start().unwrap();
            redis.directory().clone_into(&mut directory.lock().unwrap());
            panic!("on purpose");
        });
        test.join().is_err()
    });
    let directory = directory.into_inner().unwrap();
    assert!(panicked && directory.starts_with("/"));
    assert!(!directory.exists());
    assert_eq!(processes_mentioning(&directory), Vec::<String>::new());
}
