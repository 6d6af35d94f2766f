//! Consumers: read events from their streams, handle them in order per aggregate, acknowledge.
//!
//! ```text
//!  stream ──► cycle ──► lanes ──► workers ──► handler ──► Ok: acknowledged by the next cycle
//!               ▲         ▲                      ├──────► failed: noted, waits, is delivered again
//!  dead members ┘         └── what waited ◄──────┘        and after maxDeliveries: dead letter
//! ```
//!
//! | file | what | I/O |
//! |---|---|---|
//! | `handler` | what an application writes | none |
//! | `lanes` | what is in hand, aggregate by aggregate | none |
//! | `session` | one membership in the group of one stream: reads, acknowledges, takes over from the dead | Redis |
//! | `worker` | calls handlers and decides what becomes of each event | both |
//! | `heartbeat`, `pulse` | the thread that says for members that they live; whether one does, and what its handlers are at | Redis |
//! | `suspects` | which event ends the process | none |
//! | `recovery` | what a member finds after a lost answer, and what the dead have left | Redis |
//! | `inbox` | a handler's PostgreSQL transaction, in which its effect happens once | PostgreSQL |
//! | `effects` | effects outside PostgreSQL | Redis |
//! | `brake` | holds dead letters back | none |
//! | `memory` | the test kit: the same handlers without servers | none |
//!
//! The processes of a group share the work through scripts in Redis: `streams/members.rs`.

mod brake;
mod delivery;
mod effects;
mod handler;
mod heartbeat;
mod inbox;
mod lanes;
#[cfg(test)]
mod lanes_model;
mod memory;
mod outage;
mod pulse;
mod recovery;
mod session;
mod status;
mod suspects;
mod worker;

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::PgPool;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinSet};
use uuid::Uuid;

pub use delivery::Delivery;
pub(crate) use effects::Known;
pub use effects::WhenUnknown;
pub use handler::{BatchHandler, Handler, HandlerError, TransactionalHandler};
pub use memory::{InMemory, InMemoryDeadLetter};
pub use status::{ConsumerState, ConsumerStatus};

use crate::backoff::Backoff;
use crate::chain::chain;
use crate::config::{ConfigError, Settings, StartFrom};
use crate::event::{DecodeEvent, EventEnvelope, EventKind};
use crate::outbox::OutboxRepository;
use crate::streams::{EntryId, Member, Streams, StreamsError};
use brake::Brake;
use effects::Effects;
use handler::{AnyHandler, Batch, Raw, Typed};
use heartbeat::Heartbeat;
use inbox::{Inbox, Transactional};
use lanes::Lanes;
use session::{End, Routes, Session};
use status::{Inner, Part, Reporter};
use suspects::Started;

/// Longest name of a group, in bytes; the inbox has the same limit.
pub const MAX_GROUP_BYTES: usize = EventEnvelope::MAX_NAME_BYTES;

/// Why a consumer could not start, or ended by itself.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConsumerError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("no REDIS_URL (app.redis.url) is set")]
    MissingUrl,
    #[error(transparent)]
    Streams(#[from] StreamsError),
    #[error("the name of a group has 1 to {MAX_GROUP_BYTES} bytes and no braces: {0:?}")]
    Group(String),
    #[error("the consumer has no handler: give it one with `on`")]
    NoHandler,
    #[error("two handlers are for {0}: give each event type to one handler of a group, and use a second group for the other")]
    TwoHandlers(String),
    #[error("a task of the consumer failed; this is a defect of the consumer")]
    Task(#[source] JoinError),
    #[error("the consumer has no thread for its heartbeat")]
    Heartbeat(#[source] std::io::Error),
    /// Everything else has ended. The handler goes on until it returns or the process ends, and keeps its event so long.
    #[error("a handler holds its thread and did not end within {0:?} (app.consumer.shutdownTimeout): end the process")]
    Blocked(Duration),
}

/// A consumer group of this process: its handlers, and with them the streams that it reads.
///
/// Every process with the same group name shares the work. Each event goes to one of them; events of one aggregate are handled
/// in order and one at a time, wherever they are handled.
pub struct Consumer {
    group: String,
    settings: Settings,
    handlers: Handlers,
    inboxes: Vec<Inbox>,
}

/// Handlers by number, and who handles what.
#[derive(Default)]
struct Handlers {
    all: Vec<Arc<dyn AnyHandler>>,
    /// By aggregate type.
    routes: BTreeMap<String, Routes>,
    twice: Option<String>,
}

impl Handlers {
    fn add(&mut self, kinds: &[EventKind], handler: impl AnyHandler + 'static) {
        for kind in kinds {
            let routes = self.routes.entry(kind.aggregate_type.to_owned()).or_default();
            if routes.by_type.insert(kind.event_type.to_owned(), self.all.len()).is_some() {
                self.twice = Some(kind.event_type.to_owned());
            }
        }
        self.all.push(Arc::new(handler));
    }

    fn add_raw(&mut self, aggregate_type: &str, handler: impl AnyHandler + 'static) {
        let routes = self.routes.entry(aggregate_type.to_owned()).or_default();
        if routes.raw.replace(self.all.len()).is_some() {
            self.twice = Some(format!("all events of aggregate type {aggregate_type}"));
        }
        self.all.push(Arc::new(handler));
    }
}

impl Handlers {
    fn check(&self) -> Result<(), ConsumerError> {
        match &self.twice {
            Some(what) => Err(ConsumerError::TwoHandlers(what.clone())),
            None if self.all.is_empty() => Err(ConsumerError::NoHandler),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let streams: Vec<&String> = self.handlers.routes.keys().collect();
        f.debug_struct("Consumer").field("group", &self.group).field("streams", &streams).finish_non_exhaustive()
    }
}

impl Consumer {
    /// A consumer of this group. Nothing is connected yet.
    ///
    /// # Errors
    /// A setting is out of its range, `claimIdle` is shorter than a connection may take, or the name is not allowed.
    pub fn new(group: &str, settings: &Settings) -> Result<Self, ConsumerError> {
        settings.validate()?;
        settings.validate_heartbeat()?;
        if group.is_empty() || group.len() > MAX_GROUP_BYTES || group.contains(['{', '}', '\0']) {
            return Err(ConsumerError::Group(group.to_owned()));
        }
        let settings = settings.clone();
        Ok(Self { group: group.to_owned(), settings, handlers: Handlers::default(), inboxes: Vec::new() })
    }

    /// Handles events of type `E`.
    #[must_use]
    pub fn on<E: DecodeEvent>(mut self, handler: impl Handler<E>) -> Self {
        self.handlers.add(E::KINDS, Typed::<E, _>(handler, PhantomData));
        self
    }

    /// Handles events of type `E` in a transaction of `pool`, together with the inbox: the effect happens once.
    #[must_use]
    pub fn on_transaction<E: DecodeEvent>(mut self, pool: &PgPool, handler: impl TransactionalHandler<E>) -> Self {
        let inbox = Inbox {
            pool: pool.clone(),
            outbox: OutboxRepository::new(&self.settings.database.schema),
            retention: Duration::from_secs(u64::from(self.settings.consumer.inbox_retention_days) * 86_400),
            timeout: self.settings.database.timeout,
        };
        if self.inboxes.is_empty() {
            self.inboxes.push(inbox.clone());
        }
        self.handlers.add(E::KINDS, Transactional { handler, inbox, event: PhantomData::<fn(E)> });
        self
    }

    /// Handles events of type `E`, as many as there are at a time.
    #[must_use]
    pub fn on_batch<E: DecodeEvent>(mut self, handler: impl BatchHandler<E>) -> Self {
        self.handlers.add(E::KINDS, Batch::<E, _>(handler, PhantomData));
        self
    }

    /// Handles every event of an aggregate type that no other handler is for, as it travelled.
    #[must_use]
    pub fn on_any(mut self, aggregate_type: &str, handler: impl Handler<EventEnvelope>) -> Self {
        self.handlers.add_raw(aggregate_type, Raw(handler));
        self
    }

    /// The same handlers without servers, for tests: see [`InMemory`].
    ///
    /// # Errors
    /// There is no handler, or there are two for one event type.
    pub fn in_memory(self) -> Result<InMemory, ConsumerError> {
        self.handlers.check()?;
        Ok(InMemory::new(self))
    }

    /// Starts to consume in tasks of its own, on the current tokio runtime. Redis is reached by itself, now and after every outage.
    ///
    /// # Errors
    /// There is no handler, or there are two for one event type; `REDIS_URL` is missing or malformed; there is no thread for the heartbeat.
    pub fn start(self) -> Result<ConsumerHandle, ConsumerError> {
        self.handlers.check()?;
        let Handlers { all, routes, .. } = self.handlers;
        let url = self.settings.redis.url.as_deref().ok_or(ConsumerError::MissingUrl)?;
        let connection = Streams::new(url, &self.settings.redis)?;
        let (stop, stopped) = watch::channel(false);
        let streams: Vec<Arc<str>> = routes.keys().map(|of| connection.stream_of(of).into()).collect();
        let (reporters, status) = Reporter::all(&streams, &self.group);
        let handlers: Arc<[Arc<dyn AnyHandler>]> = all.into();
        let settings = Arc::new(self.settings.consumer);
        let heartbeat = Heartbeat::start(&connection, settings.claim_idle).map_err(ConsumerError::Heartbeat)?;
        let shutdown_timeout = settings.shutdown_timeout;
        let mut tasks = JoinSet::new();
        for ((stream, routes), reporter) in streams.into_iter().zip(routes.into_values()).zip(reporters) {
            let (settings, handlers, stop) = (Arc::clone(&settings), Arc::clone(&handlers), stopped.clone());
            let (group, streams) = (Arc::<str>::from(self.group.as_str()), connection.clone());
            let (start, heartbeat, brake) = (settings.start_from, heartbeat.shared(), Arc::new(Brake::new(&settings)));
            let begin = move || {
                let member = Member {
                    stream: stream.to_string(),
                    group: group.to_string(),
                    name: member_name(),
                    life: settings.claim_idle,
                };
                Arc::new(Session {
                    pulse: heartbeat.enter(&member, settings.concurrency),
                    started: Started::default(),
                    member,
                    settings: Arc::clone(&settings),
                    waiting: streams.dedicated(session::LONGEST_WAIT),
                    effects: Effects::Redis(streams.clone()),
                    brake: Arc::clone(&brake),
                    streams: streams.clone(),
                    stream: Arc::clone(&stream),
                    group: Arc::clone(&group),
                    routes: routes.clone(),
                    handlers: Arc::clone(&handlers),
                    reporter: reporter.clone(),
                    stop: stop.clone(),
                    lanes: Mutex::new(Lanes::default()),
                    turn: AtomicU64::new(0),
                    ready: Notify::new(),
                    settled: Notify::new(),
                })
            };
            tasks.spawn(supervise(begin, start));
        }
        let mut cleaning = JoinSet::new();
        for inbox in self.inboxes {
            cleaning.spawn(async move { match inbox.clean_up().await {} });
        }
        Ok(ConsumerHandle { status, stop, tasks, cleaning, heartbeat, shutdown_timeout })
    }
}

/// Unique: a name that others took over from is never used again.
fn member_name() -> String {
    let host = whoami::hostname().unwrap_or_else(|_| "unknown".to_owned());
    let id = Uuid::new_v4().simple().to_string();
    format!("{host}-{}-{}", std::process::id(), &id[..8])
}

/// A member that has ended without leaving, and what it had noted as being at work.
type Ended = (Member, Vec<(EntryId, u32)>);

/// Session after session until told to stop.
async fn supervise(begin: impl Fn() -> Arc<Session>, mut start: StartFrom) {
    let mut backoff = Backoff::default();
    let mut before: Option<Ended> = None;
    loop {
        let session = begin();
        let mut stop = session.stop.clone();
        let started = tokio::time::Instant::now();
        let tables = tokio::select! {
            tables = session.find_tables() => tables,
            _ = stop.wait_for(|stop| *stop) => return session.reporter.state(ConsumerState::Stopped),
        };
        if let Err(error) = tables {
            session.reporter.trouble(Part::Tables, &chain(&error));
            if !rest(backoff.next(), &mut stop).await {
                return session.reporter.state(ConsumerState::Stopped);
            }
            continue;
        }
        session.reporter.works(Part::Tables);
        let ended = match enter(&session, &mut before, start).await {
            Ok(()) => {
                // A group that is lost later, with all of Redis or alone, is to read what came since as well.
                start = StartFrom::Beginning;
                let ended = session.run().await;
                before = Some((session.member.clone(), session.started.noted()));
                ended
            }
            Err(error) => Err(error),
        };
        match ended {
            Ok(End::Stopped) => {
                session.reporter.in_hand((0, 0));
                return session.reporter.state(ConsumerState::Stopped);
            }
            Ok(End::TakenOver) => {
                tracing::warn!(stream = %session.stream, group = %session.group,
                    "nothing was heard of this consumer for claimIdle, so others take over what was in hand; it begins anew");
            }
            Err(error) => session.reporter.trouble(Part::Group, &chain(&error)),
        }
        session.pulse.end();
        if started.elapsed() > Duration::from_secs(10) {
            backoff = Backoff::default();
        }
        if !rest(backoff.next(), &mut stop).await {
            return session.reporter.state(ConsumerState::Stopped);
        }
    }
}

/// Waits so long, or until told to stop; `false` then.
async fn rest(wait: Duration, stop: &mut watch::Receiver<bool>) -> bool {
    tokio::select! {
        () = tokio::time::sleep(wait) => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    !*stop.borrow()
}

/// Joins. First, the member of the session before leaves: none of its handlers is at work any more, and it was not dead.
async fn enter(session: &Session, before: &mut Option<Ended>, start: StartFrom) -> Result<(), StreamsError> {
    if let Some((member, started)) = before {
        match session.streams.leave_group(member, started).await {
            Err(error) if error.is_outage() => return Err(error),
            Err(error) => tracing::debug!(stream = %session.stream, %error, "a former member could not leave"),
            Ok(()) => {}
        }
        *before = None;
    }
    session.join(start).await
}

/// A running consumer. Dropping it ends it at once: others take over what is in hand after `claimIdle`. A handler that holds its thread
/// cannot be ended; it keeps its event until it returns.
#[derive(Debug)]
pub struct ConsumerHandle {
    status: watch::Receiver<Inner>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// Ends with the handle.
    cleaning: JoinSet<()>,
    heartbeat: Heartbeat,
    shutdown_timeout: Duration,
}

impl ConsumerHandle {
    /// What the consumer is doing now.
    #[must_use]
    pub fn status(&self) -> ConsumerStatus {
        self.status.borrow().status()
    }

    /// Waits until the status is as wanted. `None` if the consumer ended before.
    pub async fn wait_for(&self, mut wanted: impl FnMut(&ConsumerStatus) -> bool) -> Option<ConsumerStatus> {
        let mut status = self.status.clone();
        let reached = status.wait_for(|inner| wanted(&inner.status())).await;
        reached.ok().map(|inner| inner.status())
    }

    /// Stops: reads no more, lets handlers finish (at most `shutdownTimeout`), acknowledges, and returns the rest to the others of
    /// the group, at once. Returns the last status.
    ///
    /// It ends about a second after `shutdownTimeout`, even if handlers hold every thread of the runtime. Such a thread is left to the end of
    /// the process: end it with `std::process::exit`, or the runtime with `shutdown_background`, as the end of `main` waits for that thread.
    ///
    /// # Errors
    /// [`ConsumerError::Blocked`]: a handler holds its thread. Else a task had failed, which is a defect.
    pub async fn stop(mut self) -> Result<ConsumerStatus, ConsumerError> {
        self.heartbeat.stop_within(self.shutdown_timeout + session::AFTER_SHUTDOWN);
        self.stop.send_replace(true);
        loop {
            tokio::select! {
                ended = self.tasks.join_next() => match ended {
                    Some(ended) => ended.map_err(ConsumerError::Task)?,
                    None => break,
                },
                () = self.heartbeat.overdue() => return Err(ConsumerError::Blocked(self.shutdown_timeout)),
            }
        }
        let status = self.status();
        if self.heartbeat.has_members() {
            return Err(ConsumerError::Blocked(self.shutdown_timeout));
        }
        self.heartbeat.end().await;
        self.cleaning.shutdown().await;
        Ok(status)
    }
}
