//! Watches the streams grow: how long nothing came while there was work, and how long it took after a kill.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use redis::aio::MultiplexedConnection;
use sqlx::PgConnection;
use tokio::time::{sleep, timeout};

use crate::redis_faults;
use crate::words::count;
use crate::world::{Phase, World, unsent};

const INTERVAL: Duration = Duration::from_millis(100);
const PRINT_INTERVAL: Duration = Duration::from_secs(5);
/// A server that does not answer in this time has an outage.
const PATIENCE: Duration = Duration::from_millis(500);

/// The longest times in which no entry came, while there was work to do.
#[derive(Debug, Default)]
pub struct Watched {
    pub longest: Duration,
    /// Counted from the end of the last outage of a whole server.
    pub longest_without_outage: Duration,
}

/// Watches until all is over.
pub async fn watch(world: Arc<World>) -> Watched {
    let mut watched = Watched::default();
    let mut eyes = Eyes { world: &world, postgres: None, redis: None };
    let mut entries = 0;
    let (started, mut printed) = (Instant::now(), Instant::now());
    let (mut progress, mut calm) = (Instant::now(), Instant::now());
    while world.is_before(Phase::Over) {
        if world.has_outage() {
            calm = Instant::now();
        }
        let backlog = eyes.backlog().await;
        let seen = eyes.entries().await;
        // They are fewer after a failover with loss.
        let grown = seen.is_some_and(|seen| seen > entries);
        entries = seen.unwrap_or(entries);
        if grown || backlog == Some(0) {
            progress = Instant::now();
        }
        watched.longest = watched.longest.max(progress.elapsed());
        watched.longest_without_outage = watched.longest_without_outage.max(progress.max(calm).elapsed());
        if printed.elapsed() >= PRINT_INTERVAL {
            printed = Instant::now();
            print(&world, started.elapsed(), entries);
        }
        sleep(INTERVAL).await;
    }
    watched
}

fn print(world: &World, elapsed: Duration, entries: u64) {
    println!(
        "{:>5} s {:>11} events published {:>8} waiting {:>6} faults   relays: {}",
        elapsed.as_secs(),
        count(entries),
        count(world.backlog.load(Ordering::Relaxed)),
        count(world.faults.total()),
        world.relays_alive.load(Ordering::Relaxed),
    );
}

/// Connections that are made again when they fail.
struct Eyes<'a> {
    world: &'a World,
    postgres: Option<PgConnection>,
    /// And at which failover it was made: the server may be another by now.
    redis: Option<(usize, MultiplexedConnection)>,
}

impl Eyes<'_> {
    async fn backlog(&mut self) -> Option<u64> {
        let look = async {
            let mut connection = match self.postgres.take() {
                Some(connection) => connection,
                None => self.world.connect().await?,
            };
            let backlog = unsent(&mut connection).await?;
            self.postgres = Some(connection);
            anyhow::Ok(backlog)
        };
        let backlog = timeout(PATIENCE, look).await.ok()?.ok()?;
        self.world.backlog.store(backlog, Ordering::Relaxed);
        Some(backlog)
    }

    async fn entries(&mut self) -> Option<u64> {
        let look = async {
            let now = self.world.redis.failovers();
            let mut connection = match self.redis.take() {
                Some((then, connection)) if then == now => connection,
                _ => redis_faults::connect(self.world.redis.master()).await?,
            };
            let entries = redis_faults::entries(&mut connection).await?;
            self.redis = Some((now, connection));
            anyhow::Ok(entries)
        };
        timeout(PATIENCE, look).await.ok()?.ok()
    }
}

/// What waits to be published at the time of a kill.
pub struct Waiting {
    seqs: Vec<i64>,
    since: Instant,
}

/// `None` when nothing waits, or PostgreSQL does not answer just now.
pub async fn waiting(world: &World) -> Option<Waiting> {
    let look = async {
        let sql = "SELECT seq FROM event_outbox WHERE status IN ('PENDING', 'PROCESSING')";
        anyhow::Ok(sqlx::query_scalar(sql).fetch_all(&mut world.connect().await?).await?)
    };
    let seqs: Vec<i64> = timeout(PATIENCE, look).await.ok()?.ok()?;
    (!seqs.is_empty()).then(|| Waiting { seqs, since: Instant::now() })
}

/// How long it takes until all of it is published; `None` where it is not known.
pub async fn recovery(world: Arc<World>, waiting: Option<Waiting>) -> Option<Duration> {
    let Waiting { seqs, since } = waiting?;
    let sql = "SELECT EXISTS (SELECT 1 FROM event_outbox WHERE status IN ('PENDING', 'PROCESSING') AND seq = ANY ($1))";
    let mut connection: Option<PgConnection> = None;
    while world.is_before(Phase::Over) {
        let mut ask = async || -> Result<bool> {
            let mut open = match connection.take() {
                Some(open) => open,
                None => world.connect().await?,
            };
            let left = sqlx::query_scalar(sql).bind(&seqs).fetch_one(&mut open).await?;
            connection = Some(open);
            Ok(left)
        };
        if let Ok(false) = ask().await {
            return Some(since.elapsed());
        }
        sleep(INTERVAL).await;
    }
    None
}
