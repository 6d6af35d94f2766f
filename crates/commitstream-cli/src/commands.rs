//! One file per command.

pub mod bench;
pub mod cleanup;
pub mod config;
pub mod console;
mod days;
pub mod dead;
pub mod demo;
pub mod doctor;
pub mod failed;
pub mod groups;
mod interrupt;
mod latency;
pub mod migrate;
pub mod publish;
pub mod relay;
pub mod relays;
mod servers;
pub mod stats;
pub mod tail;
pub mod verify;

use std::process::ExitCode;

use crate::cli::Command;
use crate::context::Context;

pub async fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Bench(args) => bench::run(args, context).await,
        Command::Demo(args) => demo::run(args, context).await,
        Command::Migrate(args) => migrate::run(args, context).await,
        Command::Relay(args) => relay::run(args, context).await,
        Command::Relays(args) => relays::run(args, context).await,
        Command::Publish(args) => publish::run(args, context).await,
        Command::Stats(args) => stats::run(args, context).await,
        Command::Failed(args) => failed::run(args, context).await,
        Command::Groups(args) => groups::run(args, context).await,
        Command::Dead(args) => dead::run(args, context).await,
        Command::Cleanup(args) => cleanup::run(args, context).await,
        Command::Tail(args) => tail::run(args, context).await,
        Command::Verify(args) => verify::run(args, context).await,
        Command::Doctor(args) => doctor::run(args, context).await,
        Command::Console(args) => console::run(args, context).await,
        Command::Config(args) => config::run(args, context).await,
    }
}
