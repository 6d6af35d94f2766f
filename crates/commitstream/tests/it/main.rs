//! Tests against real servers: one process, a database and a key prefix for each test.

mod relay;
mod relay_faults;
mod relay_process;
mod support;
