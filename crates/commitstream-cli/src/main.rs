//! `commitstream`: the relay daemon and the commands of an operator.

mod cli;
mod commands;
mod console;
mod context;
mod dead_letters;
mod failure;
mod flow;
mod http;
mod logging;
mod names;
mod output;
mod spans;

use std::process::ExitCode;

use clap::Parser;

use cli::Cli;
use context::Context;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    let runtime = match runtime(cli.command.is_daemon()).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure::report(&anyhow::Error::new(error).context("cannot start the runtime"), cli.global.color),
    };
    let color = cli.global.color;
    logging::start(&cli.global, cli.command.is_daemon());
    let context = Context::new(cli.global);
    let ended = runtime.block_on(commands::run(cli.command, &context));
    // A thread that waits for standard input must not hold the end up.
    runtime.shutdown_background();
    ended.unwrap_or_else(|error| failure::report(&error, color))
}

/// A daemon waits for servers and computes little. On one thread it takes less memory, and less of the processor's time from others.
fn runtime(is_daemon: bool) -> tokio::runtime::Builder {
    if is_daemon { tokio::runtime::Builder::new_current_thread() } else { tokio::runtime::Builder::new_multi_thread() }
}
