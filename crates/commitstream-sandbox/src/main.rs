//! `commitstream-sandbox exec -- COMMAND`: runs a command beside a throwaway PostgreSQL and Redis.

use std::error::Error;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};

use commitstream_sandbox::{POSTGRES_VARIABLE, REDIS_VARIABLE, Sandbox, SandboxError};

const USAGE: &str = "\
Runs a command beside a throwaway PostgreSQL and Redis.

Usage: commitstream-sandbox exec -- COMMAND [ARGUMENT]...

Both servers are made from the programs installed on this machine, listen on free
ports of 127.0.0.1 with random passwords, and keep their data in /tmp, or in
COMMITSTREAM_SANDBOX_DIR if that is set. The command finds their URLs in its
environment:

  COMMITSTREAM_SANDBOX_POSTGRES   postgres://postgres:PASSWORD@127.0.0.1:PORT/postgres
  COMMITSTREAM_SANDBOX_REDIS      redis://default:PASSWORD@127.0.0.1:PORT

When the command ends, the servers are stopped and their data removed; also on
Ctrl-C, and when this process is killed.

Examples:
  commitstream-sandbox exec -- cargo test --workspace
  commitstream-sandbox exec -- sh -c 'psql \"$COMMITSTREAM_SANDBOX_POSTGRES\"'

Exit code: the command's own (128 + the signal if one ended it); 1 if the servers
or the command cannot be started; 2 for wrong use.
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match arguments.split_first() {
        None => help(),
        Some((first, _)) if first == "--help" || first == "-h" || first == "help" => help(),
        Some((first, rest)) if first == "exec" => {
            let command = rest.strip_prefix(&[OsString::from("--")]).unwrap_or(rest);
            match command.split_first() {
                Some((program, arguments)) => exec(program, arguments),
                None => wrong_use("`exec` needs a command to run"),
            }
        }
        Some((first, _)) => wrong_use(&format!("`{}` is not a command", first.display())),
    }
}

fn help() -> ExitCode {
    print!("{USAGE}");
    ExitCode::SUCCESS
}

fn wrong_use(problem: &str) -> ExitCode {
    eprintln!("commitstream-sandbox: {problem}\n\n{USAGE}");
    ExitCode::from(2)
}

fn exec(program: &OsString, arguments: &[OsString]) -> ExitCode {
    match run(program, arguments) {
        Ok(status) => exit_code(status),
        Err(error) => {
            let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            eprintln!("commitstream-sandbox: {error}{source}");
            ExitCode::FAILURE
        }
    }
}

fn run(program: &OsString, arguments: &[OsString]) -> Result<ExitStatus, SandboxError> {
    let sandbox = Sandbox::start()?;
    if let (Some(postgres), Some(redis)) = (sandbox.postgres(), sandbox.redis()) {
        eprintln!(
            "PostgreSQL {} and Redis {} on private ports, in {} and {}",
            postgres.version()?,
            redis.version()?,
            postgres.directory().display(),
            redis.directory().display()
        );
    }
    let mut command = Command::new(program);
    command.args(arguments).env(POSTGRES_VARIABLE, sandbox.postgres_url()).env(REDIS_VARIABLE, sandbox.redis_url());
    // What `cargo run` says of this crate is not meant for the program: a cargo that finds it builds ring, and all above it, anew.
    for (name, _) in std::env::vars_os() {
        if ["CARGO_MANIFEST_", "CARGO_PKG_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    let action = format!("run `{}`", program.display());
    command.status().map_err(|source| SandboxError::Io { action, source })
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
