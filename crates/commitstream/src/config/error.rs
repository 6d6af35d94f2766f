//! What can be wrong with settings. Each message names the key, where the value came from, the value, and what is allowed.

use std::error::Error;
use std::path::PathBuf;

use super::Source;

/// Why settings were refused. No message shows the password of a URL. Print the sources as well: they say what
/// the system or a parser had to say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file that was named, or that a `required` include names, cannot be read.
    #[error("cannot read the settings file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },

    /// The file is not HOCON.
    #[error("{}:{line}: {reason}", path.display())]
    Syntax { path: PathBuf, line: u32, reason: String },

    /// An `include` that cannot be followed.
    #[error("{}:{line}: include \"{target}\": {reason}", path.display())]
    Include { path: PathBuf, line: u32, target: String, reason: &'static str },

    /// `${NAME}` names something that is neither in the file nor in the environment.
    #[error("{origin}: ${{{name}}} is set neither in the file nor in the environment; write ${{?{name}}} if it may be absent")]
    Unresolved { name: String, origin: Source },

    /// References that multiply without end.
    #[error("{origin}: too many references inside references")]
    TooManyReferences { origin: Source },

    /// Nothing has this name.
    #[error("{key} (from {origin}) is not a setting; did you mean {suggestion}?")]
    UnknownKey { key: String, origin: Source, suggestion: String },

    /// A value that is not allowed. `value` is redacted where it can hold a password.
    #[error("{key} = {value}{}: {reason}", from_where(.origin.as_ref()))]
    Value {
        key: String,
        value: String,
        /// `None` when the settings were built in code.
        origin: Option<Source>,
        reason: String,
        #[source]
        cause: Option<Box<dyn Error + Send + Sync>>,
    },

    /// Two values that are allowed, but not together.
    #[error("{key} = {value}{}: must not be more than {limit}", from_where(.origin.as_ref()))]
    Conflict {
        key: String,
        value: String,
        origin: Option<Source>,
        /// The other setting, with its value and where that came from.
        limit: String,
    },
}

/// ` (from OUTBOX_BATCH_SIZE)`, or nothing.
pub(super) fn from_where(origin: Option<&Source>) -> String {
    origin.map_or_else(String::new, |origin| format!(" (from {origin})"))
}
