//! Tests against real servers: one process, a database and a key prefix for each test.

mod bad_input;
mod claim;
mod cluster;
mod consumer;
mod consumer_faults;
mod consumer_rate;
mod crash_windows;
mod dead;
mod docs;
mod events;
mod explain;
mod failover;
mod inbox;
mod publishing;
mod publishing_outage;
mod python;
mod relay;
mod relay_faults;
mod relay_process;
mod schema;
mod sentinel;
mod sharing;
mod sql_acceptance;
mod support;
mod trim;
mod verify;
