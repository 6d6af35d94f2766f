//! Throwaway PostgreSQL and Redis servers, made from the programs installed on this machine.
//!
//! For tests, one pair of servers serves the whole run, and each test takes a database and a key prefix of its own:
//!
//! ```
//! use commitstream_sandbox::Sandbox;
//!
//! # fn main() -> Result<(), commitstream_sandbox::SandboxError> {
//! let sandbox = Sandbox::shared();
//! let database = sandbox.database()?; // dropped with the value
//! database.psql("CREATE TABLE customer (id int); INSERT INTO customer VALUES (7);")?;
//! assert_eq!(database.psql("SELECT id FROM customer;")?, "7\n");
//! assert_ne!(sandbox.key_prefix()?, sandbox.key_prefix()?);
//! # Ok(())
//! # }
//! ```
//!
//! Tests that kill, pause or restart a server, or want it set up otherwise, start their own [`Postgres`] or [`Redis`].
//! Failovers are played with replicas: [`Postgres::start_standby_of`], [`Redis::start_replica_of`], [`RedisSentinel`],
//! [`RedisCluster`].
//! A [`FaultProxy`] before a server cuts, stalls or slows its connections, or loses the reply to a write that happened.
//!
//! The servers listen on free ports of 127.0.0.1 with random passwords, keep their data in a private temporary
//! directory, and never touch a server that is installed here. They run as `postgres` or `nobody` where we are root,
//! which PostgreSQL refuses. Whatever way this process ends, they end with it: each is the child of a small guard
//! process that waits for the end of a pipe which only we hold open (see `guard.sh`).

mod account;
mod binaries;
mod cluster;
mod database;
mod error;
mod guard;
mod postgres;
mod proxy;
mod psql;
mod random;
mod redis;
mod resp;
mod sandbox;
mod sentinel;
mod server;
mod url;

pub use cluster::RedisCluster;
pub use database::TestDatabase;
pub use error::SandboxError;
pub use postgres::Postgres;
pub use proxy::FaultProxy;
pub use redis::Redis;
pub use sandbox::{POSTGRES_VARIABLE, REDIS_VARIABLE, Sandbox};
pub use sentinel::RedisSentinel;
