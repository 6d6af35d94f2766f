//! What commands share: the settings in force, and connections made after them.

use std::path::PathBuf;

use anyhow::Context as _;
use commitstream::config::{Loaded, Settings, redact_url};
use commitstream::outbox::{self, OutboxRepository};
use commitstream::streams::Streams;
use sqlx::PgConnection;

use crate::cli::Global;
use crate::failure::WrongUse;
use crate::output::Output;

const SET_DATABASE_URL: &str = "set DATABASE_URL=postgres://user:password@host:5432/database, or app.database.url in application.conf, or give --database-url";
const SET_REDIS_URL: &str =
    "set REDIS_URL=redis://:password@host:6379, or app.redis.url in application.conf, or give --redis-url";

pub struct Context {
    pub output: Output,
    global: Global,
}

impl Context {
    pub fn new(global: Global) -> Self {
        Self { output: Output::new(global.json, global.color), global }
    }

    /// The settings and where each came from. `flags` are keys that options of the command set.
    pub fn load(&self, flags: &[(&str, Option<&String>)]) -> anyhow::Result<Loaded> {
        let urls = [("app.database.url", self.global.database_url.as_ref()), ("app.redis.url", self.global.redis_url.as_ref())];
        let given = urls.iter().chain(flags).filter_map(|(key, value)| Some(((*key).to_owned(), (*value)?.clone())));
        let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        // As for the variables of settings, an empty one counts as not set.
        let named = || std::env::var_os("COMMITSTREAM_CONFIG").filter(|file| !file.is_empty()).map(PathBuf::from);
        let file = self.global.config.clone().or_else(named);
        Ok(Settings::load(file.as_deref(), variable, &given.collect::<Vec<_>>())?)
    }

    pub fn settings(&self) -> anyhow::Result<Settings> {
        Ok(self.load(&[])?.settings)
    }
}

pub fn repository(settings: &Settings) -> OutboxRepository {
    OutboxRepository::new(&settings.database.schema).without_prepared_statements()
}

pub fn database_url(settings: &Settings) -> Result<String, WrongUse> {
    let missing = || WrongUse::with_hint("this command needs PostgreSQL, and no DATABASE_URL is set", SET_DATABASE_URL);
    settings.database.url_with_tls().ok_or_else(missing)
}

pub fn redis_url(settings: &Settings) -> Result<&str, WrongUse> {
    let missing = || WrongUse::with_hint("this command needs Redis, and no REDIS_URL is set", SET_REDIS_URL);
    settings.redis.url.as_deref().ok_or_else(missing)
}

/// A session of this process's own on the database of the outbox. A pooler that shares it is refused.
pub async fn own_session(settings: &Settings, purpose: &str) -> anyhow::Result<PgConnection> {
    let url = database_url(settings)?;
    let connected = outbox::connect_own(&url, &format!("commitstream {purpose}"), settings.database.timeout).await;
    connected.with_context(|| format!("cannot connect to {}", redact_url(&url)))
}

/// The same on a database that has the outbox tables.
pub async fn own_migrated(settings: &Settings, purpose: &str) -> anyhow::Result<PgConnection> {
    let mut connection = own_session(settings, purpose).await?;
    repository(settings).check_migrated(&mut connection).await?;
    Ok(connection)
}

/// A session on a database that has the outbox tables, for transactions of [`outbox::begin`] and [`outbox::begin_reading`]: a pooler may
/// share it.
pub async fn migrated(settings: &Settings, purpose: &str) -> anyhow::Result<PgConnection> {
    let url = database_url(settings)?;
    let connected = outbox::connect_plain(&url, &format!("commitstream {purpose}"), settings.database.timeout).await;
    let mut connection = connected.with_context(|| format!("cannot connect to {}", redact_url(&url)))?;
    let mut transaction = outbox::begin_reading(&mut connection).await?;
    repository(settings).check_migrated(&mut transaction).await?;
    transaction.commit().await?;
    Ok(connection)
}

/// Redis, which has answered once.
pub async fn redis(settings: &Settings) -> anyhow::Result<Streams> {
    let url = redis_url(settings)?;
    let streams = Streams::new(url, &settings.redis)?;
    streams.ping().await.with_context(|| format!("cannot use {}", redact_url(url)))?;
    Ok(streams)
}

/// Who acts, as the audit has it: the user of the system and the host.
pub fn operator() -> String {
    let known = |name: whoami::Result<String>| name.unwrap_or_else(|_| "unknown".to_owned());
    format!("cli:{}@{}", known(whoami::username()), known(whoami::hostname()))
}
