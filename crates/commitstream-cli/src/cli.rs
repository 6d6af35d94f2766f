//! The command line: global options and the list of commands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::{
    bench, cleanup, config, console, dead, demo, doctor, failed, groups, migrate, publish, relay, relays, stats, tail, verify,
};

const ABOUT: &str = "Transactional events from PostgreSQL to Redis Streams: exactly once, in order";

const LONG_ABOUT: &str = "\
Transactional events from PostgreSQL to Redis Streams: exactly once, in order.

An application writes events into the table event_outbox, in the same transaction as its data. \
The relay publishes them to Redis Streams. The other commands set the tables up, look at them and mend them.";

const AFTER_HELP: &str = "\
Examples:
  commitstream demo               see it work, without any set-up

  export DATABASE_URL=postgres://app:secret@localhost/app
  export REDIS_URL=redis://localhost
  commitstream migrate            create the outbox tables
  commitstream publish --type UserCreated --aggregate-type user \\
    --aggregate-id 42 --payload '{\"name\":\"Ada\"}'
  commitstream relay              publish the outbox, until stopped
  commitstream tail user          watch the events arrive

Settings come from the settings file, then the environment, then the options; the later ones win. \
`commitstream config` shows what is in force. Prefer DATABASE_URL and REDIS_URL to the options: \
a command line can be seen by other users of this computer.

Exit codes: 0 done, 1 the work failed in whole or in part, 2 wrong use (options, settings, fields of an event); \
doctor: 3 warnings, 4 errors.";

#[derive(Parser)]
#[command(name = "commitstream", version, about = ABOUT, long_about = LONG_ABOUT, after_help = AFTER_HELP)]
#[command(max_term_width = 120, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command has.
#[derive(Args, Clone)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Settings file [environment: COMMITSTREAM_CONFIG] [default: application.conf in this directory, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// postgres://user:password@host:5432/database [environment: DATABASE_URL]
    #[arg(long, global = true, value_name = "URL", allow_hyphen_values = true)]
    pub database_url: Option<String>,

    /// redis://:password@host:6379/0 [environment: REDIS_URL]
    #[arg(long, global = true, value_name = "URL", allow_hyphen_values = true)]
    pub redis_url: Option<String>,

    /// Print results as JSON on standard output, and the log as JSON on standard error
    #[arg(long, global = true)]
    pub json: bool,

    /// Colours: auto (on a terminal, unless NO_COLOR is set), always, never
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true,
        hide_default_value = true
    )]
    pub color: Color,

    /// Log what is done, on standard error
    #[arg(long, short, global = true)]
    pub verbose: bool,
}

/// When to use colours.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Subcommand)]
pub enum Command {
    #[command(after_help = "\
Examples:
  commitstream demo
  commitstream demo --seconds 60 --rate 5000")]
    Demo(demo::Args),
    Migrate(migrate::Args),
    Relay(relay::Args),
    Relays(relays::Args),
    Publish(publish::Args),
    Stats(stats::Args),
    Failed(failed::Args),
    Groups(groups::Args),
    Dead(dead::Args),
    Cleanup(cleanup::Args),
    Tail(tail::Args),
    Verify(verify::Args),
    Doctor(doctor::Args),
    Console(console::Args),
    Bench(bench::Args),
    Config(config::Args),
}

impl Command {
    /// True for a command that serves until it is stopped, and tells what it does in the log.
    pub fn is_daemon(&self) -> bool {
        matches!(self, Self::Relay(_) | Self::Console(_))
    }
}
