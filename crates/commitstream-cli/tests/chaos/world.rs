//! The servers, the links to them, and what all actors share.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::config::Settings;
use commitstream::outbox::OutboxRepository;
use commitstream::streams::Streams;
use commitstream_sandbox::{FaultProxy, Postgres};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sqlx::{Connection, PgConnection};
use tokio::sync::watch;

use crate::faults::{Findings, Tally};
use crate::redis_faults::RedisPair;

pub const PREFIX: &str = "events:";

/// Aggregate types, each a stream.
pub const TYPES: [&str; 5] = ["user", "order", "payment", "training", "session"];
pub const AGGREGATES: usize = 200;

/// A slow machine may need longer to recover than new faults leave it. So there is a truce when this many events wait, until they are
/// this few; and relays that do not get that far without new faults are at fault themselves.
const TRUCE_BEGINS: u64 = 10_000;
const TRUCE_ENDS: u64 = 1_000;
const TRUCE_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Producers, relays and faults.
    Storm,
    /// The last faults are mended.
    Calm,
    /// Producers have ended; the relays publish what is left.
    Drain,
    Over,
}

/// The own ways of one relay or consumer to the servers, so that a fault can hit it alone.
pub struct Links {
    pub postgres: FaultProxy,
    pub redis: FaultProxy,
}

pub struct World {
    seed: u64,
    /// Of settings and logs of relays and consumers. It stays when something was found.
    pub directory: PathBuf,
    pub postgres: Postgres,
    pub redis: RedisPair,
    pub links: Vec<Links>,
    pub faults: Tally,
    /// What is wrong and no matter of single events.
    pub findings: Findings,
    /// Events that wait to be published, as last seen.
    pub backlog: AtomicU64,
    pub relays_alive: AtomicUsize,
    /// In milliseconds.
    pub longest_truce: AtomicU64,
    outages: AtomicUsize,
    phase: watch::Sender<Phase>,
}

impl World {
    pub async fn start(seed: u64, links: usize) -> Result<Self> {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{seed}-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let postgres = Postgres::start()?;
        let redis = RedisPair::start()?;
        let link = |_| -> Result<Links> {
            let postgres = FaultProxy::start(address(&postgres.url())?)?;
            Ok(Links { postgres, redis: FaultProxy::start(address(&redis.master().url())?)? })
        };
        let links = (0..links).map(link).collect::<Result<_>>()?;
        let world = Self {
            seed,
            directory,
            postgres,
            redis,
            links,
            faults: Tally::default(),
            findings: Findings::default(),
            backlog: AtomicU64::new(0),
            relays_alive: AtomicUsize::new(0),
            longest_truce: AtomicU64::new(0),
            outages: AtomicUsize::new(0),
            phase: watch::Sender::new(Phase::Storm),
        };
        world.create_tables().await?;
        Ok(world)
    }

    async fn create_tables(&self) -> Result<()> {
        let mut connection = self.connect().await?;
        OutboxRepository::new(&Settings::default().database.schema).migrate(&mut connection).await?;
        // What the service has beside its events: how many each aggregate has had.
        let sql = "CREATE TABLE aggregate (type text, id text, events bigint NOT NULL DEFAULT 0, PRIMARY KEY (type, id))";
        sqlx::raw_sql(sql).execute(&mut connection).await?;
        sqlx::raw_sql(crate::consumers::TABLE).execute(&mut connection).await?;
        let sql = "INSERT INTO aggregate (type, id) SELECT type, n::text FROM unnest($1::text[]) type, generate_series(1, $2) n";
        sqlx::query(sql).bind(TYPES).bind(i32::try_from(AGGREGATES)?).execute(&mut connection).await?;
        Ok(())
    }

    /// The dice of one actor.
    pub fn dice(&self, actor: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ actor.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// A connection to PostgreSQL that goes through no proxy.
    pub async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        PgConnection::connect(&self.postgres.url()).await
    }

    /// The streams on the Redis that is the master now, through no proxy.
    pub fn streams(&self) -> Result<Streams> {
        let mut settings = Settings::default().redis;
        settings.stream_prefix = PREFIX.to_owned();
        Ok(Streams::new(&self.redis.master().url(), &settings)?)
    }

    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    pub fn is_before(&self, phase: Phase) -> bool {
        *self.phase.borrow() < phase
    }

    /// Waits for some of this many milliseconds, and then as long as there is a truce; not longer than the storm. Whether it is
    /// still on.
    pub async fn pause(&self, dice: &mut StdRng, millis: std::ops::Range<u64>) -> bool {
        self.calm_for(Duration::from_millis(dice.random_range(millis))).await;
        if self.backlog.load(Ordering::Relaxed) > TRUCE_BEGINS {
            let begun = Instant::now();
            while self.is_before(Phase::Calm) && self.backlog.load(Ordering::Relaxed) > TRUCE_ENDS {
                self.calm_for(Duration::from_millis(100)).await;
                if begun.elapsed() > TRUCE_LIMIT {
                    self.findings.add(format!("the relays did not catch up in {TRUCE_LIMIT:?} without new faults"));
                    break;
                }
            }
            self.longest_truce.fetch_max(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        }
        self.is_before(Phase::Calm)
    }

    /// Waits, but not longer than the storm.
    async fn calm_for(&self, pause: Duration) {
        let mut phase = self.phase.subscribe();
        // It elapses, and that is no error here.
        drop(tokio::time::timeout(pause, phase.wait_for(|phase| *phase > Phase::Storm)).await);
    }

    /// No relay can work until the guard is dropped.
    pub fn outage(&self) -> Outage<'_> {
        self.outages.fetch_add(1, Ordering::SeqCst);
        Outage { outages: &self.outages }
    }

    pub fn has_outage(&self) -> bool {
        self.outages.load(Ordering::SeqCst) > 0
    }

    /// Waits until no event is left to be published. When that takes too long, it is a finding.
    pub async fn drained(&self, limit: Duration) -> Result<()> {
        let mut connection = self.connect().await?;
        let deadline = Instant::now() + limit;
        loop {
            let unsent = unsent(&mut connection).await?;
            if unsent == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.findings.add(format!("{unsent} events were not published {limit:?} after the last fault"));
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.directory).with_context(|| format!("remove {}", self.directory.display()))
    }
}

/// See [`World::outage`].
pub struct Outage<'a> {
    outages: &'a AtomicUsize,
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        self.outages.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How many events are still to be published.
pub async fn unsent(connection: &mut PgConnection) -> Result<u64> {
    let sql = "SELECT count(*) FROM event_outbox WHERE status IN ('PENDING', 'PROCESSING')";
    let count: i64 = sqlx::query_scalar(sql).fetch_one(connection).await?;
    Ok(count.unsigned_abs())
}

/// Host and port of a server's URL.
pub fn address(url: &str) -> Result<String> {
    let server = url.rsplit_once('@').context("the URL has a user")?.1;
    let address = server.split('/').next().unwrap_or_default();
    ensure!(address.contains(':'), "the URL has a port");
    Ok(address.to_owned())
}

/// Runs what blocks its thread.
pub fn blocking<T, E: Into<anyhow::Error>>(work: impl FnOnce() -> Result<T, E>) -> Result<T> {
    tokio::task::block_in_place(work).map_err(Into::into)
}
