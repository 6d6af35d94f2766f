//! Where the demonstration and the benchmarks take place: private servers, or those of the user in a corner of its own.

use anyhow::Context;
use commitstream::config::{Settings, redact_url};
use commitstream::outbox;
use commitstream::streams::Streams;
use commitstream_sandbox::{Postgres, Redis, SandboxError};
use sqlx::{AssertSqlSafe, Connection};
use uuid::Uuid;

/// What servers are needed for.
pub struct Purpose {
    /// Part of the names of the schema and the keys.
    pub name: &'static str,
    /// What people read, such as "the demonstration".
    pub called: &'static str,
    /// Further settings of private servers, each as name and value.
    pub postgres: &'static [(&'static str, &'static str)],
    /// The same, for what may be missing on this machine: left out if PostgreSQL does not start with it.
    pub optional_postgres: &'static [(&'static str, &'static str)],
    pub redis: &'static [(&'static str, &'static str)],
}

/// The servers, and the settings to use them with.
pub struct Servers {
    pub settings: Settings,
    purpose: &'static Purpose,
    source: Source,
}

enum Source {
    /// They end with this value, or with this process.
    Private { postgres: Box<Postgres>, redis: Box<Redis>, remark: String },
    /// `name` is the schema, and part of the prefix of all keys.
    Given { name: String },
}

impl Servers {
    /// Those of the settings when both URLs are set; else private ones are started.
    pub async fn obtain(configured: &Settings, purpose: &'static Purpose) -> anyhow::Result<Self> {
        let mut settings = configured.clone();
        // What is shown and measured goes by the events' own lanes.
        settings.publishing = Settings::default().publishing;
        settings.outbox.enabled = true;
        if let (Some(_), Some(_)) = (&settings.database.url, &settings.redis.url) {
            let random = Uuid::new_v4().simple().to_string();
            let name = format!("commitstream_{}_{}", purpose.name, &random[..8]);
            settings.database.schema.clone_from(&name);
            settings.redis.stream_prefix = format!("{}_{}:events:", purpose.name, &random[..8]);
            return Ok(Self { settings, purpose, source: Source::Given { name } });
        }
        let unused =
            |used: &str, missing: &str| format!("{used} is not used: {missing} is not set, and {} needs both.\n", purpose.called);
        let remark = match (&settings.database.url, &settings.redis.url) {
            (Some(_), None) => unused("DATABASE_URL", "REDIS_URL"),
            (None, Some(_)) => unused("REDIS_URL", "DATABASE_URL"),
            _ => String::new(),
        };
        let started = tokio::task::spawn_blocking(|| start(purpose)).await?;
        let (postgres, redis) =
            started.context("cannot start private servers: install them, or set both DATABASE_URL and REDIS_URL")?;
        settings.database.url = Some(postgres.url());
        settings.database.schema = Settings::default().database.schema;
        settings.redis.url = Some(redis.url());
        settings.redis.stream_prefix = Settings::default().redis.stream_prefix;
        let source = Source::Private { postgres: Box::new(postgres), redis: Box::new(redis), remark };
        Ok(Self { settings, purpose, source })
    }

    /// Where the events go.
    pub fn streams(&self) -> anyhow::Result<Streams> {
        let Settings { redis, .. } = &self.settings;
        Ok(Streams::new(redis.url.as_deref().unwrap_or_default(), redis)?)
    }

    pub fn are_private(&self) -> bool {
        matches!(self.source, Source::Private { .. })
    }

    /// For people: which servers, and what will be left behind.
    pub fn describe(&self) -> anyhow::Result<String> {
        let url = |url: &Option<String>| redact_url(url.as_deref().unwrap_or_default());
        let Settings { database, redis, .. } = &self.settings;
        Ok(match &self.source {
            Source::Private { postgres, redis, remark } => format!(
                "{remark}Servers: a private PostgreSQL {} (fsync on) and a private Redis {} (append-only\n\
                 file, synced every second). Both are stopped and removed at the end.",
                postgres.version()?,
                redis.version()?
            ),
            Source::Given { name } => format!(
                "Servers: {}\n         {}\n\
                 Everything is in the schema {name} and in keys under\n{} and is removed at the end.",
                url(&database.url),
                url(&redis.url),
                self.settings.redis.stream_prefix
            ),
        })
    }

    /// Stops private servers; removes the schema and the keys from given ones. Both are tried, whatever fails.
    pub async fn remove(self) -> anyhow::Result<()> {
        let streams = self.streams()?;
        match self.source {
            Source::Private { postgres, redis, .. } => Ok(tokio::task::spawn_blocking(|| drop((postgres, redis))).await?),
            Source::Given { name } => {
                let schema = drop_schema(&self.settings, self.purpose, &name).await;
                let keys = streams.remove_all().await;
                schema.with_context(|| format!("the schema {name} stays behind: DROP SCHEMA {name} CASCADE"))?;
                keys.with_context(|| format!("keys under {} stay behind in Redis", self.settings.redis.stream_prefix))
            }
        }
    }
}

/// Both at the same time.
fn start(purpose: &Purpose) -> Result<(Postgres, Redis), SandboxError> {
    std::thread::scope(|scope| {
        let redis = scope.spawn(|| Redis::start_with(&[&[("appendfsync", "everysec")], purpose.redis].concat()));
        // The sandbox is made for tests and does not sync; the figures here are to be those of a durable server.
        let durable = [&[("fsync", "on")], purpose.postgres].concat();
        let started = Postgres::start_with(&[&durable[..], purpose.optional_postgres].concat());
        let postgres =
            if purpose.optional_postgres.is_empty() { started } else { started.or_else(|_| Postgres::start_with(&durable)) };
        let redis = redis.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((postgres?, redis?))
    })
}

async fn drop_schema(settings: &Settings, purpose: &Purpose, name: &str) -> anyhow::Result<()> {
    let url = settings.database.url.as_deref().unwrap_or_default();
    let mut connection =
        outbox::connect(url, &format!("commitstream {}: clean-up", purpose.name), settings.database.timeout).await?;
    sqlx::query(AssertSqlSafe(format!("DROP SCHEMA IF EXISTS \"{name}\" CASCADE"))).execute(&mut connection).await?;
    Ok(connection.close().await?)
}
