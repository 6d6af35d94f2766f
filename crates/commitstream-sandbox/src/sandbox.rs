//! A PostgreSQL and a Redis together, private or given from outside.

use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;

use crate::{Postgres, Redis, SandboxError, TestDatabase, binaries, random};

/// The environment variable with the URL of a PostgreSQL to use for tests (a superuser's) in place of a private one.
pub const POSTGRES_VARIABLE: &str = "COMMITSTREAM_SANDBOX_POSTGRES";
/// The environment variable with the URL of a Redis to use for tests in place of a private one.
pub const REDIS_VARIABLE: &str = "COMMITSTREAM_SANDBOX_REDIS";

/// A PostgreSQL and a Redis to test against.
#[derive(Debug)]
pub struct Sandbox {
    postgres: Source<Postgres>,
    redis: Source<Redis>,
    psql: PathBuf,
}

/// A server of our own, or the URL of somebody else's.
#[derive(Debug)]
enum Source<S> {
    Private(S),
    Given(String),
}

impl Sandbox {
    /// Starts a private PostgreSQL and a private Redis, at the same time.
    pub fn start() -> Result<Sandbox, SandboxError> {
        Sandbox::assemble(None, None)
    }

    /// The servers of this run, started at first use: those that [`POSTGRES_VARIABLE`] and [`REDIS_VARIABLE`] name
    /// (`commitstream-sandbox exec -- cargo test` sets both for all test programs), else private ones that end with
    /// this process.
    ///
    /// # Panics
    ///
    /// When they cannot be started: no test can go on without them. The message says what is missing.
    pub fn shared() -> &'static Sandbox {
        static SHARED: OnceLock<Result<Sandbox, SandboxError>> = OnceLock::new();
        let given = |variable| env::var(variable).ok().filter(|url| !url.is_empty());
        match SHARED.get_or_init(|| Sandbox::assemble(given(POSTGRES_VARIABLE), given(REDIS_VARIABLE))) {
            Ok(sandbox) => sandbox,
            Err(error) => panic!("tests need PostgreSQL and Redis: {error}"),
        }
    }

    fn assemble(postgres_url: Option<String>, redis_url: Option<String>) -> Result<Sandbox, SandboxError> {
        let psql = binaries::psql()?;
        let start_redis = || redis_url.map_or_else(|| Redis::start().map(Source::Private), |url| Ok(Source::Given(url)));
        let (postgres, redis) = thread::scope(|scope| {
            let redis = scope.spawn(start_redis);
            let postgres = postgres_url.map_or_else(|| Postgres::start().map(Source::Private), |url| Ok(Source::Given(url)));
            (postgres, redis.join())
        });
        let redis = redis.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(Sandbox { postgres: postgres?, redis: redis?, psql })
    }

    /// The private PostgreSQL, or `None` where the server was given from outside.
    pub fn postgres(&self) -> Option<&Postgres> {
        match &self.postgres {
            Source::Private(server) => Some(server),
            Source::Given(_) => None,
        }
    }

    /// The private Redis, or `None` where the server was given from outside.
    pub fn redis(&self) -> Option<&Redis> {
        match &self.redis {
            Source::Private(server) => Some(server),
            Source::Given(_) => None,
        }
    }

    /// The superuser's access to PostgreSQL. Tests use a [`Sandbox::database`] of their own.
    pub fn postgres_url(&self) -> String {
        match &self.postgres {
            Source::Private(server) => server.url(),
            Source::Given(url) => url.clone(),
        }
    }

    /// The access to Redis. Tests use a [`Sandbox::key_prefix`] of their own.
    pub fn redis_url(&self) -> String {
        match &self.redis {
            Source::Private(server) => server.url(),
            Source::Given(url) => url.clone(),
        }
    }

    /// A fresh, empty database. Takes about 0.2 s.
    pub fn database(&self) -> Result<TestDatabase, SandboxError> {
        TestDatabase::create(self.psql.clone(), &self.postgres_url())
    }

    /// The same with an encoding such as `LATIN1` or `SQL_ASCII`, and the locale `C`.
    pub fn database_encoded(&self, encoding: &str) -> Result<TestDatabase, SandboxError> {
        TestDatabase::create_encoded(self.psql.clone(), &self.postgres_url(), encoding)
    }

    /// A prefix for Redis keys that no other caller gets, such as `t5d41402a:events:`.
    pub fn key_prefix(&self) -> Result<String, SandboxError> {
        Ok(format!("t{}:events:", random::hex(8)?))
    }
}
