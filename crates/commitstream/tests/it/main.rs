//! Tests against real servers: one process, a database and a key prefix for each test.

mod bad_input;
mod claim;
mod docs;
mod events;
mod explain;
mod publishing;
mod publishing_outage;
mod relay;
mod relay_faults;
mod relay_process;
mod schema;
mod sql_acceptance;
mod support;
mod verify;
