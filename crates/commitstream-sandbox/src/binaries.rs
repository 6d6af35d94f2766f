//! Finding the programs of PostgreSQL and Redis.
//!
//! The places are those that `scripts/install-servers.sh` looks at: change both together.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::SandboxError;

/// Where packages put versioned PostgreSQL programs outside `PATH`: a parent directory, and what stands before the version.
const POSTGRES_HOMES: [(&str, &str); 4] =
    [("/usr/lib/postgresql", ""), ("/usr", "pgsql-"), ("/opt/homebrew/opt", "postgresql@"), ("/usr/local/opt", "postgresql@")];

/// Searched after `PATH`, which may be cut short where tests run.
const COMMON: [&str; 3] = ["/opt/homebrew/bin", "/usr/local/bin", "/usr/bin"];

/// The programs of one PostgreSQL installation.
#[derive(Debug, Clone)]
pub(crate) struct PostgresBinaries {
    pub(crate) initdb: PathBuf,
    pub(crate) postgres: PathBuf,
}

pub(crate) fn postgres() -> Result<PostgresBinaries, SandboxError> {
    postgres_in(&postgres_directories())
}

/// The one in `PATH` may be Debian's wrapper script, which takes longer to start than most of our statements take to run.
pub(crate) fn psql() -> Result<PathBuf, SandboxError> {
    postgres_client("psql")
}

pub(crate) fn pg_basebackup() -> Result<PathBuf, SandboxError> {
    postgres_client("pg_basebackup")
}

pub(crate) fn pg_resetwal() -> Result<PathBuf, SandboxError> {
    postgres_client("pg_resetwal")
}

/// A client program, if possible the one beside the server programs or where these are linked to: of the same version.
fn postgres_client(program: &'static str) -> Result<PathBuf, SandboxError> {
    let directories = postgres_directories();
    let server = postgres_in(&directories).ok().map(|binaries| binaries.postgres);
    let linked = server.as_ref().and_then(|server| server.canonicalize().ok());
    let beside = [server, linked].into_iter().flatten().map(|server| server.with_file_name(program));
    beside.into_iter().find(|path| is_program(path)).map_or_else(|| find(program, "PostgreSQL", &directories), Ok)
}

pub(crate) fn redis_server() -> Result<PathBuf, SandboxError> {
    find("redis-server", "Redis", &common_directories())
}

/// Server programs are taken from one directory: `initdb` of one version and `postgres` of another do not work together.
fn postgres_in(directories: &[PathBuf]) -> Result<PostgresBinaries, SandboxError> {
    let complete = |directory: &&PathBuf| is_program(&directory.join("initdb")) && is_program(&directory.join("postgres"));
    let Some(home) = directories.iter().find(complete) else {
        find("initdb", "PostgreSQL", directories)?;
        return Err(missing("postgres", "PostgreSQL", directories));
    };
    Ok(PostgresBinaries { initdb: home.join("initdb"), postgres: home.join("postgres") })
}

fn find(program: &'static str, product: &'static str, directories: &[PathBuf]) -> Result<PathBuf, SandboxError> {
    let found = directories.iter().map(|directory| directory.join(program)).find(|path| is_program(path));
    found.ok_or_else(|| missing(program, product, directories))
}

fn missing(program: &'static str, product: &'static str, directories: &[PathBuf]) -> SandboxError {
    let looked_in = directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(", ");
    SandboxError::MissingBinary { program, product, looked_in }
}

fn common_directories() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).filter(|directory| directory.is_absolute()).collect();
    directories.extend(COMMON.map(PathBuf::from));
    directories
}

fn postgres_directories() -> Vec<PathBuf> {
    let versioned = POSTGRES_HOMES.iter().flat_map(|(parent, prefix)| versions(Path::new(parent), prefix));
    common_directories().into_iter().chain(versioned).collect()
}

/// `<parent>/<prefix><version>/bin`, the newest version first.
fn versions(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return Vec::new(); // this way of packaging is not used here
    };
    let version = |name: &OsStr| name.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok();
    let mut found: Vec<(u32, PathBuf)> =
        entries.flatten().filter_map(|entry| Some((version(&entry.file_name())?, entry.path().join("bin")))).collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, directory)| directory).collect()
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The version that a program reports with `--version`: the first word that begins with a digit, after an optional `v=`.
pub(crate) fn version(program: &Path) -> Result<String, SandboxError> {
    let action = || format!("run `{} --version`", program.display());
    let output = Command::new(program).arg("--version").output().map_err(SandboxError::io(action()))?;
    Ok(version_in(&String::from_utf8_lossy(&output.stdout)).unwrap_or("(unknown version)").to_owned())
}

fn version_in(text: &str) -> Option<&str> {
    let words = text.split_whitespace().map(|word| word.strip_prefix("v=").unwrap_or(word));
    words.into_iter().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_the_way_to_install_it() {
        let nowhere = [PathBuf::from("/nonexistent/bin")];
        for message in
            [postgres_in(&nowhere).unwrap_err().to_string(), find("redis-server", "Redis", &nowhere).unwrap_err().to_string()]
        {
            assert!(message.contains("/nonexistent/bin"), "{message}");
            assert!(message.contains("apt-get install postgresql redis-server"), "{message}");
            assert!(message.contains("make demo"), "{message}");
        }
    }

    #[test]
    fn versions_are_read_from_what_the_programs_print() {
        assert_eq!(version_in("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some("15.18"));
        assert_eq!(version_in("postgres (PostgreSQL) 18beta1\n"), Some("18beta1"));
        assert_eq!(version_in("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64\n"), Some("7.0.15"));
        assert_eq!(version_in("something else"), None);
    }
}
