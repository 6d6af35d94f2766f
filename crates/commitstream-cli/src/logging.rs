//! The log, on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Global;
use crate::output::color_is_wanted;

/// Starts the log: a daemon tells what it does, other commands only what is wrong, `--verbose` everything.
/// `RUST_LOG` overrides all that.
pub fn start(global: &Global, is_daemon: bool) {
    let level = match (global.verbose, is_daemon) {
        (true, _) => "warn,commitstream=debug",
        (false, true) => "error,commitstream=info",
        (false, false) => "error,commitstream=warn",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let registry = tracing_subscriber::registry().with(filter);
    // The daemon must outlive whoever reads its log: reporting a failed write on standard error would panic.
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false).log_internal_errors(false);
    if global.json {
        registry.with(layer.json().flatten_event(true)).init();
    } else {
        registry.with(layer.with_ansi(color_is_wanted(global.color, io::stderr().is_terminal()))).init();
    }
}
