//! The real binary, run as people and programs run it, against a real PostgreSQL and Redis.

mod admin;
mod bench;
mod config;
mod console;
mod console_deeds;
mod console_site;
mod console_verdict;
mod daemon;
mod dead;
mod deploy;
mod doctor;
mod doctor_mends;
mod flow;
mod groups;
mod help;
mod http;
mod metrics;
mod mistakes;
mod otlp;
#[path = "../../../commitstream/tests/it/pgbouncer.rs"]
mod pgbouncer;
mod pooler;
mod relays;
mod secrets;
mod silence;
mod support;
mod tail;
mod tracing;
mod verify;
