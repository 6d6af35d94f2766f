//! A private Redis.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::guard::Guard;
use crate::server::{Server, Service, check_settings, wait_until};
use crate::{SandboxError, binaries, random, resp};

/// An append-only file that is written before each reply but never synced: a killed server loses nothing, and only a
/// crash of the machine would. No snapshots. A replica gets its copy at once, past the disk.
const SETTINGS: [(&str, &str); 8] = [
    ("bind", "127.0.0.1"),
    ("save", ""),
    ("appendonly", "yes"),
    ("appendfsync", "no"),
    ("daemonize", "no"),
    ("logfile", ""),
    ("repl-diskless-sync", "yes"),
    ("repl-diskless-sync-delay", "0"),
];

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
        Redis::start_as(&random::hex(16)?, settings)
    }

    /// Starts a replica of a running server, with the same password. Returns when it has all of the server's data.
    pub fn start_replica_of(master: &Redis) -> Result<Redis, SandboxError> {
        let replica = Redis::start_as(master.password(), &[])?;
        replica.follow(master)?;
        Ok(replica)
    }

    pub(crate) fn start_as(password: &str, settings: &[(&str, &str)]) -> Result<Redis, SandboxError> {
        check_settings(settings)?;
        let binary = binaries::redis_server()?;
        let guard = Guard::new("redis", "TERM")?;
        guard.write("redis.conf", &configuration(guard.directory(), password, settings))?;
        let in_cluster = settings.contains(&("cluster-enabled", "yes"));
        let service = RedisService { binary, password: password.to_owned(), in_cluster };
        Ok(Redis { server: Server::start(service, guard)? })
    }

    /// `redis://default:PASSWORD@127.0.0.1:PORT`. It stays the same over restarts. The user is named because `redis-cli -u`
    /// fails to log in with a URL that leaves it empty.
    pub fn url(&self) -> String {
        format!("redis://default:{}@{}", self.password(), self.server.host_and_port())
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

    /// Makes this server a replica of another: it forgets its data, and its restarts keep it a replica. Returns when it
    /// has all of the other's data, both in memory and in its append-only file.
    pub fn follow(&self, master: &Redis) -> Result<(), SandboxError> {
        let port = master.port().to_string();
        self.ask(&["CONFIG", "SET", "masterauth", master.password()])?;
        self.ask(&["REPLICAOF", "127.0.0.1", &port])?;
        self.ask(&["CONFIG", "REWRITE"])?;
        self.wait_for_master(master.port())
    }

    /// Makes a replica a master of its own, with the data that it has. Its former master is not told.
    pub fn promote(&self) -> Result<(), SandboxError> {
        self.ask(&["REPLICAOF", "NO", "ONE"])?;
        self.ask(&["CONFIG", "REWRITE"])?;
        Ok(())
    }

    /// After the copy of the data has come, the append-only file is written anew, by a child process.
    pub(crate) fn wait_for_master(&self, port: u16) -> Result<(), SandboxError> {
        let port = port.to_string();
        let expected = [
            ("role", "slave"),
            ("master_port", port.as_str()),
            ("master_link_status", "up"),
            ("aof_rewrite_in_progress", "0"),
            ("aof_rewrite_scheduled", "0"),
        ];
        wait_until("a Redis replica is in step with its master", || {
            let info = self.ask(&["INFO"])?;
            Ok(expected.iter().all(|(name, value)| resp::field(&info, name) == Some(value)))
        })
    }

    pub(crate) fn ask(&self, command: &[&str]) -> Result<Vec<String>, SandboxError> {
        resp::ask(self.port(), Some(self.password()), command)
    }

    pub(crate) fn port(&self) -> u16 {
        self.server.port()
    }

    /// The port where the nodes of a cluster talk with each other: below our range of ports for clients, so that no two
    /// servers take the same one, where the usual `port + 10000` would reach into the system's ephemeral ports.
    pub(crate) fn cluster_port(port: u16) -> u16 {
        port - 12_000
    }

    pub(crate) fn password(&self) -> &str {
        &self.server.service.password
    }
}

#[derive(Debug)]
struct RedisService {
    binary: PathBuf,
    password: String,
    in_cluster: bool,
}

impl Service for RedisService {
    const NAME: &'static str = "Redis";

    fn command(&self, directory: &Path, port: u16) -> Vec<OsString> {
        let mut command =
            vec![self.binary.clone().into(), directory.join("redis.conf").into(), "--port".into(), port.to_string().into()];
        if self.in_cluster {
            command.extend(["--cluster-port".into(), Redis::cluster_port(port).to_string().into()]);
        }
        command
    }

    /// It takes our password, so it is ours, and answers a command, so it has loaded its data.
    fn is_ready(&self, _directory: &Path, port: u16, _pid: u32) -> bool {
        resp::ask(port, Some(&self.password), &["PING"]).is_ok_and(|answer| answer == ["PONG"])
    }
}

fn configuration(directory: &Path, password: &str, settings: &[(&str, &str)]) -> String {
    let mut text = format!("dir \"{}\"\nrequirepass {password}\nmasterauth {password}\n", directory.display());
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
        assert!(text.starts_with("dir \"/tmp/x\"\nrequirepass secret\nmasterauth secret\n"), "{text}");
        assert!(text.contains("save \"\"\n") && text.ends_with("maxmemory 1mb\nsave 60 1\n"), "{text}");
    }

    #[test]
    fn a_wrong_setting_is_explained_by_the_servers_own_words() {
        let error = Redis::start_with(&[("no-such-setting", "1")]).unwrap_err().to_string();
        assert!(error.contains("no-such-setting"), "{error}");
    }
}
