//! Clients and conditions for the tests of the sandbox.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Polls until the condition holds; fails the test after 30 s.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited 30 s in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `HOST:PORT` of a URL.
pub fn address(url: &str) -> &str {
    let host = url.rsplit_once('@').unwrap().1;
    host.split('/').next().unwrap()
}

/// Runs SQL and returns the trimmed result, or psql's message.
pub fn try_psql(url: &str, sql: &str) -> Result<String, String> {
    let output = Command::new("psql").args(["-X", "-q", "-A", "-t", "-d", url, "-c", sql]).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap().trim_end().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

pub fn psql(url: &str, sql: &str) -> String {
    try_psql(url, sql).unwrap()
}

/// A connection that has said its password.
pub fn redis_connection(url: &str) -> TcpStream {
    try_redis_connection(url).unwrap()
}

fn try_redis_connection(url: &str) -> std::io::Result<TcpStream> {
    let password = url.strip_prefix("redis://default:").unwrap().split('@').next().unwrap();
    let mut connection = TcpStream::connect(address(url))?;
    connection.write_all(format!("AUTH {password}\r\n").as_bytes())?;
    let mut answer = [0; 5];
    connection.read_exact(&mut answer)?;
    assert_eq!(&answer, b"+OK\r\n");
    Ok(connection)
}

/// Sends one command; the lines of the answer, joined by spaces.
pub fn redis_says(url: &str, command: &str) -> String {
    try_redis_says(url, command).unwrap()
}

/// As [`redis_says`], of a server that may close the connection: Redis does when its role changes.
pub fn try_redis_says(url: &str, command: &str) -> std::io::Result<String> {
    let mut connection = try_redis_connection(url)?;
    connection.write_all(format!("{command}\r\nQUIT\r\n").as_bytes())?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let answer = answer.strip_suffix("+OK\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    Ok(answer.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" "))
}

/// The command lines of all processes that mention a path.
pub fn processes_mentioning(path: &Path) -> Vec<String> {
    let path = path.to_str().unwrap();
    process_table("args=").into_iter().filter(|line| line.contains(path)).collect()
}

pub fn is_running(pid: u32) -> bool {
    process_table("pid=").iter().any(|row| row.trim().parse() == Ok(pid))
}

/// The state letters (`R` running, `S` sleeping, `T` stopped) of the children of a process.
pub fn child_states(parent: u32) -> Vec<char> {
    let rows = process_table("ppid=,state=");
    let children = rows.iter().filter_map(|row| row.trim().split_once(char::is_whitespace));
    children.filter(|(ppid, _)| ppid.parse() == Ok(parent)).filter_map(|(_, state)| state.trim().chars().next()).collect()
}

/// `ps` where it is installed; these tests of the test tool itself may ask for more than the tool does.
fn process_table(columns: &str) -> Vec<String> {
    let output = Command::new("ps").args(["-A", "-ww", "-o", columns]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}
