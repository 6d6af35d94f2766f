//! The programs as they are, on real servers.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod handlers;
mod mail_server;
mod programs;
mod signals;
mod support;
