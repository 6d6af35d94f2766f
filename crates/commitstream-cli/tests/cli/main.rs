//! The real binary, run as people and programs run it, against a real PostgreSQL and Redis.

mod admin;
mod config;
mod daemon;
mod flow;
mod help;
mod mistakes;
mod secrets;
mod support;
mod tail;
mod verify;
