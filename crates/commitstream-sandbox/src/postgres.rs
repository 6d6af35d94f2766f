//! A private PostgreSQL.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::Path;

use crate::binaries::{self, PostgresBinaries};
use crate::guard::Guard;
use crate::server::{Server, Service, check_settings, wait_until};
use crate::{SandboxError, psql, random};

/// Made for tests: quick, and forgetful only when the machine itself goes down. A killed server loses nothing.
const SETTINGS: [(&str, &str); 8] = [
    ("listen_addresses", "127.0.0.1"),
    // TCP only: the path of a socket in the temporary directory could exceed the 107 bytes that Unix allows.
    ("unix_socket_directories", ""),
    ("max_connections", "300"),
    // A login that a test cut off holds back vacuum in all databases until it times out.
    ("authentication_timeout", "20s"),
    ("shared_buffers", "128MB"),
    ("fsync", "off"),
    // In the data directory rather than in /dev/shm, where a killed server would leave its segments behind.
    ("dynamic_shared_memory_type", "mmap"),
    ("log_line_prefix", "%m [%p] %q%d "),
];

/// Of a file in `pg_xact`: 32 pages, four transactions in a byte.
const TRANSACTIONS_IN_FILE: u32 = 4 * 32 * 8_192;

/// A PostgreSQL server of our own on 127.0.0.1, with its data in a temporary directory.
///
/// It is stopped and its directory removed when this value is dropped, and also when the process ends in any other
/// way: Ctrl-C, a panic, SIGKILL.
#[derive(Debug)]
pub struct Postgres {
    server: Server<PostgresService>,
    password: String,
}

impl Postgres {
    /// Starts a server with `fsync=off` and room for 300 connections. Takes about a second.
    pub fn start() -> Result<Postgres, SandboxError> {
        Postgres::start_with(&[])
    }

    /// As [`Postgres::start`], with further settings for `postgresql.conf`, each as name and value. They win over the
    /// sandbox's own: `("fsync", "on")` makes a durable server.
    pub fn start_with(settings: &[(&str, &str)]) -> Result<Postgres, SandboxError> {
        check_settings(settings)?;
        let binaries = binaries::postgres()?;
        let mut guard = Guard::new("postgres", "INT")?; // SIGINT: fast shutdown
        let password = random::hex(16)?;
        let data = guard.directory().join("data");
        let password_file = guard.write("password", &password)?;
        let locale = if cfg!(target_os = "linux") { "C.UTF-8" } else { "C" };
        guard.prepare(&[
            binaries.initdb.clone().into(),
            "--pgdata".into(),
            data.into(),
            "--username=postgres".into(),
            "--auth=password".into(),
            "--pwfile".into(),
            password_file.into(),
            "--encoding=UTF8".into(),
            format!("--locale={locale}").into(),
            "--no-sync".into(),
        ])?;
        guard.write("data/sandbox.conf", &configuration(settings))?;
        Ok(Postgres { server: Server::start(PostgresService { binaries }, guard)?, password })
    }

    /// Starts a hot standby of a running server, with the same settings and password. Returns when the server's changes
    /// stream to it. They do so asynchronously, unless [`Postgres::set_synchronous_replication`] says otherwise.
    pub fn start_standby_of(primary: &Postgres) -> Result<Postgres, SandboxError> {
        let binaries = primary.server.service.binaries.clone();
        let mut guard = Guard::new("postgres", "INT")?;
        let name = format!("standby_{}", random::hex(5)?);
        // In a file, since arguments can be read by every user of the machine. The standby needs it as long as it lives.
        let password_file = guard.write("password", &format!("*:*:*:postgres:{}\n", primary.password))?;
        let connection = format!(
            "host=127.0.0.1 port={} user=postgres application_name={name} passfile='{}'",
            primary.server.port(),
            password_file.display().to_string().replace('\\', "\\\\").replace('\'', "\\'")
        );
        guard.prepare(&[
            binaries::pg_basebackup()?.into(),
            format!("--dbname={connection}").into(),
            "--pgdata".into(),
            guard.directory().join("data").into(),
            "--write-recovery-conf".into(),
            "--create-slot".into(),
            format!("--slot={name}").into(),
            "--checkpoint=fast".into(),
            "--no-sync".into(),
        ])?;
        let password = primary.password.clone();
        let standby = Postgres { server: Server::start(PostgresService { binaries }, guard)?, password };
        let streaming =
            format!("SELECT count(*) FROM pg_stat_replication WHERE application_name = '{name}' AND state = 'streaming';");
        wait_until("changes stream to the PostgreSQL standby", || Ok(primary.sql(&streaming)?.trim() == "1"))?;
        Ok(standby)
    }

    /// With `on`, each commit on this server waits from now on until a standby has written it down, so that a promoted
    /// standby has everything that was committed; without a standby that answers, commits wait for one. With `on` false,
    /// commits wait for nobody.
    pub fn set_synchronous_replication(&self, on: bool) -> Result<(), SandboxError> {
        let standbys = if on { "*" } else { "" };
        self.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{standbys}'; SELECT pg_reload_conf();"))?;
        let synchronous = "SELECT current_setting('synchronous_standby_names'),
            (SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync');";
        let expected = if on { "*|t" } else { "|f" };
        wait_until("PostgreSQL replicates as it was told", || Ok(self.sql(synchronous)?.trim() == expected))?;
        // The process that writes checkpoints tells the others whether to wait, and does so before its next checkpoint.
        self.sql("CHECKPOINT;")?;
        Ok(())
    }

    /// Makes a standby a primary of its own, whose commits wait for nobody. Its former primary is not told: stop or kill
    /// it before, or both take writes. Returns when it takes writes.
    pub fn promote(&self) -> Result<(), SandboxError> {
        self.sql("ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf();")?;
        self.sql("SELECT pg_promote();")?;
        wait_until("the PostgreSQL standby is promoted", || Ok(self.sql("SELECT pg_is_in_recovery();")?.trim() == "f"))
    }

    fn sql(&self, sql: &str) -> Result<String, SandboxError> {
        psql::run(&binaries::psql()?, &self.url(), sql)
    }

    /// `postgres://postgres:PASSWORD@127.0.0.1:PORT/postgres`, the superuser's access. It stays the same over restarts.
    pub fn url(&self) -> String {
        format!("postgres://postgres:{}@{}/postgres", self.password, self.server.host_and_port())
    }

    /// The postmaster's process id, as last started.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// The server's private directory.
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// The server's version, such as `15.18`.
    pub fn version(&self) -> Result<String, SandboxError> {
        binaries::version(&self.server.service.binaries.postgres)
    }

    /// Ends the server in an orderly way: connections are closed, transactions rolled back. After 10 s, by SIGKILL.
    pub fn stop(&self) -> Result<(), SandboxError> {
        self.server.order("stop")
    }

    /// Kills the server and all its backends with SIGKILL, and returns when they have ended.
    pub fn kill(&self) -> Result<(), SandboxError> {
        self.server.order("kill")
    }

    /// Starts the server again on the same port and data, after [`Postgres::stop`] or [`Postgres::kill`]; a running
    /// server is stopped before. Returns when it serves.
    pub fn restart(&self) -> Result<(), SandboxError> {
        self.server.restart()
    }

    /// Restarts the server as it would be after transactions up to this number, 1,000,000,000 for example: those that nobody froze
    /// before are old.
    pub fn advance_transactions(&self, to: u32) -> Result<(), SandboxError> {
        let program = binaries::pg_resetwal()?;
        let data = self.directory().join("data");
        self.stop()?;
        let advance = [program.into(), "-D".into(), data.clone().into(), format!("--next-transaction-id={to}").into()];
        self.server.prepare(&advance)?;
        // The server does not itself make the file that will say what becomes of the next ones.
        let file = data.join(format!("pg_xact/{:04X}", to / TRANSACTIONS_IN_FILE));
        if !file.exists() {
            let mut output = OsString::from("of=");
            output.push(file);
            self.server.prepare(&["dd".into(), "if=/dev/zero".into(), output, "bs=8192".into(), "count=32".into()])?;
        }
        self.restart()
    }

    /// Freezes the server and its backends (SIGSTOP): connections stay open, and nobody answers.
    pub fn pause(&self) -> Result<(), SandboxError> {
        self.server.order("pause")
    }

    /// Lets a paused server go on.
    pub fn resume(&self) -> Result<(), SandboxError> {
        self.server.order("resume")
    }
}

#[derive(Debug)]
struct PostgresService {
    binaries: PostgresBinaries,
}

impl Service for PostgresService {
    const NAME: &'static str = "PostgreSQL";

    fn command(&self, directory: &Path, port: u16) -> Vec<OsString> {
        let data = directory.join("data");
        let configuration = format!("config_file={}", data.join("sandbox.conf").display());
        let postgres = self.binaries.postgres.clone();
        vec![postgres.into(), "-D".into(), data.into(), "-p".into(), port.to_string().into(), "-c".into(), configuration.into()]
    }

    /// The server says so itself in its lock file: the process id in the first line, the state in the eighth.
    fn is_ready(&self, directory: &Path, _port: u16, pid: u32) -> bool {
        let Ok(lock_file) = std::fs::read_to_string(directory.join("data/postmaster.pid")) else {
            return false; // not written yet
        };
        let line = |number| lock_file.lines().nth(number).map(str::trim);
        line(0) == Some(pid.to_string().as_str()) && line(7) == Some("ready")
    }
}

/// A configuration file: what `initdb` found fitting for this machine, then our settings, then the caller's.
fn configuration(settings: &[(&str, &str)]) -> String {
    let mut text = String::from("include 'postgresql.conf'\n");
    for (name, value) in SETTINGS.iter().chain(settings) {
        let value = value.replace('\\', "\\\\").replace('\'', "''");
        if writeln!(text, "{name} = '{value}'").is_err() {
            unreachable!("a String takes all that is written to it");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_settings_come_last_and_are_quoted() {
        let text = configuration(&[("fsync", "on"), ("search_path", "it's")]);
        assert!(text.ends_with("fsync = 'on'\nsearch_path = 'it''s'\n"), "{text}");
    }

    #[test]
    fn a_setting_with_a_line_break_is_refused() {
        let error = Postgres::start_with(&[("work_mem", "1MB\nfsync = on")]).unwrap_err();
        assert_eq!(error.to_string(), "server setting `work_mem` contains a line break");
    }

    #[test]
    fn a_wrong_setting_is_explained_by_the_servers_own_words() {
        let error = Postgres::start_with(&[("no_such_setting", "1")]).unwrap_err().to_string();
        assert!(error.contains("no_such_setting"), "{error}");
    }
}
