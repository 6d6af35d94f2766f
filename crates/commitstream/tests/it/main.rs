//! Tests against real servers: one process, a database and a key prefix for each test.

mod bad_input;
mod claim;
mod cluster;
mod crash_windows;
mod dead;
mod docs;
mod events;
mod explain;
mod failover;
mod publishing;
mod publishing_outage;
mod relay;
mod relay_faults;
mod relay_process;
mod schema;
mod sentinel;
mod sharing;
mod sql_acceptance;
mod support;
mod verify;
