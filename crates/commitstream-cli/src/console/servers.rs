use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use commitstream::config::Settings;
use commitstream::outbox::{self, OutboxRepository};
use commitstream::streams::Streams;
use sqlx::{Connection, PgConnection};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::doctor::Examiner;
use super::overview::Sampler;
use super::page::{Frame, Refusal};
use crate::context;

/// Pages that may ask PostgreSQL at a time.
const SESSIONS: usize = 4;

/// How long a page waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a statement may take.
const LONGEST: Duration = Duration::from_secs(10);

/// How long a kept session may take to answer; then there is a new one.
const PROBE: Duration = Duration::from_secs(2);

/// Where pages get their data from.
pub struct Servers {
    pub settings: Settings,
    pub outbox: OutboxRepository,
    pub streams: Streams,
    pub sampler: Sampler,
    pub examiner: Examiner,
    /// What stands on every page.
    pub frame: Arc<Frame>,
    turns: Semaphore,
    idle: Mutex<Vec<PgConnection>>,
}

/// A session for one page. It is kept for the next one if [`done`](Self::done) is called, and closed otherwise: then a statement may be
/// under way on it.
pub struct Session<'a> {
    pub connection: PgConnection,
    servers: &'a Servers,
    _turn: SemaphorePermit<'a>,
}

impl Servers {
    pub fn new(settings: &Settings, frame: Arc<Frame>) -> anyhow::Result<Self> {
        Ok(Self {
            settings: settings.clone(),
            outbox: context::repository(settings),
            streams: Streams::new(context::redis_url(settings)?, &settings.redis)?,
            sampler: Sampler::default(),
            examiner: Examiner::default(),
            frame,
            turns: Semaphore::new(SESSIONS),
            idle: Mutex::default(),
        })
    }

    /// Leave to ask, for as long as it is kept.
    pub async fn turn(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        let busy = || anyhow::anyhow!("the console is busy: too many pages ask at the same time");
        Ok(tokio::time::timeout(PATIENCE, self.turns.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())?)
    }

    pub async fn session(&self) -> Result<Session<'_>, Refusal> {
        let turn = self.turn().await?;
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(mut connection) = idle {
            if tokio::time::timeout(PROBE, connection.ping()).await.is_ok_and(|answer| answer.is_ok()) {
                return Ok(Session { connection, servers: self, _turn: turn });
            }
            // The others will not answer either, and no page shall wait for that.
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        let mut connection = context::own_migrated(&self.settings, "console").await?;
        outbox::for_people(&mut connection, LONGEST).await?;
        Ok(Session { connection, servers: self, _turn: turn })
    }
}

impl Session<'_> {
    /// Nothing is under way on it.
    pub fn done(self) {
        self.servers.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.connection);
    }
}
