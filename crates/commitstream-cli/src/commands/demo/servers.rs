//! Where the demonstration takes place: private servers, or those of the user in a corner of its own.

use anyhow::Context;
use commitstream::config::{Settings, redact_url};
use commitstream::outbox;
use commitstream::streams::Streams;
use commitstream_sandbox::{Postgres, Redis, SandboxError};
use sqlx::{AssertSqlSafe, Connection};
use uuid::Uuid;

/// The servers, and the settings to use them with.
pub struct Servers {
    pub settings: Settings,
    source: Source,
}

enum Source {
    /// They end with this value, or with this process.
    Private { postgres: Box<Postgres>, redis: Box<Redis>, remark: &'static str },
    /// `name` is the schema, and part of the prefix of all keys.
    Given { name: String },
}

impl Servers {
    /// Those of the settings when both URLs are set; else private ones are started.
    pub async fn obtain(configured: &Settings) -> anyhow::Result<Self> {
        let mut settings = configured.clone();
        // The lanes and the audit of the demonstration go by the events' own lanes.
        settings.publishing = Settings::default().publishing;
        settings.outbox.enabled = true;
        if let (Some(_), Some(_)) = (&settings.database.url, &settings.redis.url) {
            let random = Uuid::new_v4().simple().to_string();
            let name = format!("commitstream_demo_{}", &random[..8]);
            settings.database.schema.clone_from(&name);
            settings.redis.stream_prefix = format!("demo_{}:events:", &random[..8]);
            return Ok(Self { settings, source: Source::Given { name } });
        }
        let remark = match (&settings.database.url, &settings.redis.url) {
            (Some(_), None) => "DATABASE_URL is not used: REDIS_URL is not set, and the demonstration needs both.\n",
            (None, Some(_)) => "REDIS_URL is not used: DATABASE_URL is not set, and the demonstration needs both.\n",
            _ => "",
        };
        let started = tokio::task::spawn_blocking(start).await?;
        let (postgres, redis) =
            started.context("cannot start private servers: install them, or set both DATABASE_URL and REDIS_URL")?;
        settings.database.url = Some(postgres.url());
        settings.database.schema = Settings::default().database.schema;
        settings.redis.url = Some(redis.url());
        settings.redis.stream_prefix = Settings::default().redis.stream_prefix;
        Ok(Self { settings, source: Source::Private { postgres: Box::new(postgres), redis: Box::new(redis), remark } })
    }

    /// Where the events go.
    pub fn streams(&self) -> anyhow::Result<Streams> {
        let Settings { redis, .. } = &self.settings;
        Ok(Streams::new(redis.url.as_deref().unwrap_or_default(), redis)?)
    }

    pub fn are_private(&self) -> bool {
        matches!(self.source, Source::Private { .. })
    }

    /// For people: which servers, and what will be left of the demonstration.
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
                let schema = drop_schema(&self.settings, &name).await;
                let keys = streams.remove_all().await;
                schema.with_context(|| format!("the schema {name} stays behind: DROP SCHEMA {name} CASCADE"))?;
                keys.with_context(|| format!("keys under {} stay behind in Redis", self.settings.redis.stream_prefix))
            }
        }
    }
}

/// Both at the same time.
fn start() -> Result<(Postgres, Redis), SandboxError> {
    std::thread::scope(|scope| {
        let redis = scope.spawn(|| Redis::start_with(&[("appendfsync", "everysec")]));
        // The sandbox is made for tests and does not sync; the figures here are to be those of a durable server.
        let postgres = Postgres::start_with(&[("fsync", "on")]);
        let redis = redis.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((postgres?, redis?))
    })
}

async fn drop_schema(settings: &Settings, name: &str) -> anyhow::Result<()> {
    let url = settings.database.url.as_deref().unwrap_or_default();
    let mut connection = outbox::connect(url, "commitstream demo: clean-up", settings.database.timeout).await?;
    sqlx::query(AssertSqlSafe(format!("DROP SCHEMA IF EXISTS \"{name}\" CASCADE"))).execute(&mut connection).await?;
    Ok(connection.close().await?)
}
