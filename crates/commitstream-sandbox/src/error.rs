//! What can go wrong in a sandbox.

use std::io;

/// Why a sandbox server could not be started, steered or asked.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A program of PostgreSQL or Redis is not installed where the sandbox looks.
    #[error(
        "cannot find the program `{program}` of {product} in {looked_in}. Install it with \
         `apt-get install postgresql redis-server` (Debian, Ubuntu) or `brew install postgresql redis` (macOS), \
         or run `make demo` or `scripts/install-servers.sh`, which do this for you"
    )]
    MissingBinary {
        /// The program's file name.
        program: &'static str,
        /// PostgreSQL or Redis.
        product: &'static str,
        /// The directories that were searched.
        looked_in: String,
    },
    /// PostgreSQL refuses to run as root, and there is nobody else to run it as.
    #[error("running as root, but neither user `postgres` nor `nobody` is in /etc/passwd: run as an ordinary user instead")]
    NoUnprivilegedUser,
    /// A server setting contains a line break.
    #[error("server setting `{name}` contains a line break")]
    InvalidSetting {
        /// The setting's name.
        name: String,
    },
    /// A preparing program, such as `initdb`, failed.
    #[error("{program} failed with exit code {code}; it printed:\n{log}")]
    Prepare {
        /// The program.
        program: String,
        /// Its exit code.
        code: String,
        /// The last lines that it printed.
        log: String,
    },
    /// A server ended while it was starting.
    #[error("{server} ended while starting; the last lines of its log:\n{log}")]
    Ended {
        /// PostgreSQL or Redis.
        server: &'static str,
        /// The last lines of the server's log.
        log: String,
    },
    /// A server did not become ready in time.
    #[error("{server} was not ready after {seconds} s; the last lines of its log:\n{log}")]
    NotReady {
        /// PostgreSQL or Redis.
        server: &'static str,
        /// How long the sandbox waited.
        seconds: u64,
        /// The last lines of the server's log.
        log: String,
    },
    /// Several servers did not come to terms in time.
    #[error("waited {seconds} s in vain until {what}")]
    InVain {
        /// What the sandbox waited for.
        what: &'static str,
        /// How long the sandbox waited.
        seconds: u64,
    },
    /// No free port was found, or the server's own port is taken.
    #[error("{server} found no free port on 127.0.0.1 (last tried: {port})")]
    NoPort {
        /// PostgreSQL or Redis.
        server: &'static str,
        /// The port tried last.
        port: u16,
    },
    /// The guard process, which runs the server, ended or gave an unexpected answer.
    #[error("the sandbox's guard process did not do `{command}`: {answer}")]
    Guard {
        /// What the guard was asked to do.
        command: String,
        /// What it said, or that it said nothing.
        answer: String,
    },
    /// Redis answered a command with an error.
    #[error("the Redis on port {port} answered {command} with: {message}")]
    Redis {
        /// The command's first word.
        command: String,
        /// The server's port.
        port: u16,
        /// The server's words.
        message: String,
    },
    /// `psql` ended with an error.
    #[error("psql failed: {message}")]
    Psql {
        /// What psql printed on standard error.
        message: String,
    },
    /// A server URL given from outside cannot be understood.
    #[error("`{variable}` is not a URL of the form {expected}")]
    InvalidUrl {
        /// The environment variable, or what else the URL is for.
        variable: &'static str,
        /// The form that is understood.
        expected: &'static str,
    },
    /// A file or a process could not be used.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
}

impl SandboxError {
    /// For `map_err`: names what was being done when the operating system refused.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> SandboxError {
        let action = action.into();
        move |source| SandboxError::Io { action, source }
    }
}
