//! A private Redis.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::guard::Guard;
use crate::server::{Server, Service, check_settings};
use crate::{SandboxError, binaries, random};

/// An append-only file that is written before each reply but never synced: a killed server loses nothing, and only a
/// crash of the machine would. No snapshots.
const SETTINGS: [(&str, &str); 6] =
    [("bind", "127.0.0.1"), ("save", ""), ("appendonly", "yes"), ("appendfsync", "no"), ("daemonize", "no"), ("logfile", "")];

/// A Redis server of our own on 127.0.0.1, with its data in a temporary directory.
///
/// It is stopped and its directory removed when this value is dropped, and also when the process ends in any other
/// way: Ctrl-C, a panic, SIGKILL.
#[derive(Debug)]
pub struct Redis {
    server: Server<RedisService>,
}

impl Redis {
    /// Starts a server with an append-only file, so that its data outlives [`Redis::kill`] and [`Redis::restart`].
    pub fn start() -> Result<Redis, SandboxError> {
        Redis::start_with(&[])
    }

    /// As [`Redis::start`], with further settings for `redis.conf`, each as name and value. They win over the sandbox's
    /// own: `("appendfsync", "always")` makes a durable server.
    pub fn start_with(settings: &[(&str, &str)]) -> Result<Redis, SandboxError> {
        check_settings(settings)?;
        let binary = binaries::redis_server()?;
        let guard = Guard::new("redis", "TERM")?;
        let password = random::hex(16)?;
        guard.write("redis.conf", &configuration(guard.directory(), &password, settings))?;
        Ok(Redis { server: Server::start(RedisService { binary, password }, guard)? })
    }

    /// `redis://default:PASSWORD@127.0.0.1:PORT`. It stays the same over restarts. The user is named because `redis-cli -u`
    /// fails to log in with a URL that leaves it empty.
    pub fn url(&self) -> String {
        format!("redis://default:{}@{}", self.server.service.password, self.server.host_and_port())
    }

    /// The server's process id, as last started.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// The server's private directory.
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// The server's version, such as `7.0.15`.
    pub fn version(&self) -> Result<String, SandboxError> {
        binaries::version(&self.server.service.binary)
    }

    /// Ends the server in an orderly way; after 10 s, by SIGKILL.
    pub fn stop(&self) -> Result<(), SandboxError> {
        self.server.order("stop")
    }

    /// Kills the server with SIGKILL, and returns when it has ended.
    pub fn kill(&self) -> Result<(), SandboxError> {
        self.server.order("kill")
    }

    /// Starts the server again on the same port and data, after [`Redis::stop`] or [`Redis::kill`]; a running server
    /// is stopped before. Returns when it serves.
    pub fn restart(&self) -> Result<(), SandboxError> {
        self.server.restart()
    }

    /// Freezes the server (SIGSTOP): connections stay open, and nobody answers.
    pub fn pause(&self) -> Result<(), SandboxError> {
        self.server.order("pause")
    }

    /// Lets a paused server go on.
    pub fn resume(&self) -> Result<(), SandboxError> {
        self.server.order("resume")
    }
}

#[derive(Debug)]
struct RedisService {
    binary: PathBuf,
    password: String,
}

impl Service for RedisService {
    const NAME: &'static str = "Redis";

    fn command(&self, directory: &Path, port: u16) -> Vec<OsString> {
        vec![self.binary.clone().into(), directory.join("redis.conf").into(), "--port".into(), port.to_string().into()]
    }

    /// It takes our password, so it is ours, and answers a command, so it has loaded its data.
    fn is_ready(&self, _directory: &Path, port: u16, _pid: u32) -> bool {
        ping(port, &self.password).is_ok_and(|answer| answer == *b"+OK\r\n+PONG\r\n")
    }
}

fn ping(port: u16, password: &str) -> std::io::Result<[u8; 12]> {
    let patience = Duration::from_secs(1);
    let mut connection = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), patience)?;
    connection.set_read_timeout(Some(patience))?;
    connection.write_all(format!("AUTH {password}\r\nPING\r\n").as_bytes())?;
    let mut answer = [0; 12];
    connection.read_exact(&mut answer)?;
    Ok(answer)
}

fn configuration(directory: &Path, password: &str, settings: &[(&str, &str)]) -> String {
    let mut text = format!("dir \"{}\"\nrequirepass {password}\n", directory.display());
    for (name, value) in SETTINGS.iter().chain(settings) {
        // Some values are several words, so they are not quoted; an empty one must be.
        let value = if value.is_empty() { "\"\"" } else { value };
        if writeln!(text, "{name} {value}").is_err() {
            unreachable!("a String takes all that is written to it");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_settings_come_last() {
        let text = configuration(Path::new("/tmp/x"), "secret", &[("maxmemory", "1mb"), ("save", "60 1")]);
        assert!(text.starts_with("dir \"/tmp/x\"\nrequirepass secret\n"), "{text}");
        assert!(text.contains("save \"\"\n") && text.ends_with("maxmemory 1mb\nsave 60 1\n"), "{text}");
    }

    #[test]
    fn a_wrong_setting_is_explained_by_the_servers_own_words() {
        let error = Redis::start_with(&[("no-such-setting", "1")]).unwrap_err().to_string();
        assert!(error.contains("no-such-setting"), "{error}");
    }
}
