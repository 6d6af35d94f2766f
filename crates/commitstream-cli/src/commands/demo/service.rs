//! The example: a user service as an application writes it.

use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context;
use chrono::Utc;
use commitstream::DomainEvent;
use commitstream::config::Settings;
use commitstream::publisher::{DomainEventPublisher, HybridEventPublisher, UnitOfWork};
use commitstream::relay::RelayWaker;
use sqlx::PgPool;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, Postgres};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::events::{MetricUpdated, PaymentProcessed, SessionStarted, TrainingStarted, UserCreated};

/// The tables of the business. They live beside the outbox.
const TABLES: &str = "
    CREATE TABLE users (id uuid PRIMARY KEY, email text NOT NULL, sequence bigint NOT NULL, trainings bigint NOT NULL DEFAULT 0);
    CREATE TABLE payments (id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users, amount_cents bigint NOT NULL);
    CREATE TABLE training_jobs (id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users, model text NOT NULL);
    CREATE TABLE receipts (number bigint GENERATED ALWAYS AS IDENTITY, payment_id uuid NOT NULL, user_id uuid NOT NULL,
        sequence bigint NOT NULL)";

/// Users that come back. Few enough that transactions meet on the same one.
const REGULARS: usize = 100;
/// One transaction in so many is rolled back after it has published. Shares no factor with [`KINDS`]: all kinds get their turn.
pub const ROLLBACK_EVERY: u64 = 47;
/// Of so many operations one registers a user and one starts a training; the others are payments.
const KINDS: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(30);

/// What became of a transaction.
pub enum Outcome {
    /// `commit()` returned at that instant.
    Committed {
        event: Uuid,
        at: Instant,
    },
    RolledBack {
        event: Uuid,
    },
    /// The answer to the commit was lost. Whether the business row is there will tell.
    InDoubt {
        event: Uuid,
        row: Uuid,
    },
}

pub struct Service {
    pool: PgPool,
    publisher: HybridEventPublisher,
    regulars: Mutex<Vec<Uuid>>,
}

/// Sessions in the schema of the demonstration.
pub async fn pool(settings: &Settings, connections: u32, of: &str) -> anyhow::Result<PgPool> {
    let url = settings.database.url.as_deref().context("the demonstration has a database")?;
    let schema = settings.database.schema.clone();
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(PATIENCE)
        // A lost connection shows in the next statement; asking first would cost a round trip each time.
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            let path = schema.clone();
            Box::pin(async move {
                sqlx::query("SELECT set_config('search_path', $1, false)").bind(path).execute(connection).await.map(drop)
            })
        })
        .connect_with(PgConnectOptions::from_str(url)?.application_name(&format!("commitstream demo: {of}")))
        .await
        .with_context(|| format!("the {of} of the example cannot connect to PostgreSQL"))
}

impl Service {
    /// Creates the business tables and connects, with up to `connections` sessions.
    pub async fn open(settings: &Settings, relay: RelayWaker, connections: u32) -> anyhow::Result<Self> {
        let pool = pool(settings, connections, "user service").await?;
        sqlx::raw_sql(TABLES).execute(&pool).await.context("cannot create the tables of the example service")?;
        let publisher = HybridEventPublisher::new(settings)?.with_relay(relay);
        Ok(Self { pool, publisher, regulars: Mutex::default() })
    }

    /// One transaction: business data and its event, both or neither. `turn` decides which, and whether it rolls back.
    pub async fn transact(&self, turn: u64) -> anyhow::Result<Outcome> {
        let mut work = self.publisher.begin(&self.pool).await?;
        let row = Uuid::now_v7();
        let registers = turn.is_multiple_of(KINDS);
        let event = match self.regular(turn).await {
            Some(user) if !registers && turn % KINDS == 1 => start_training(&mut work, row, user).await?,
            Some(user) if !registers => pay(&mut work, row, user, 100 + turn.cast_signed() % 9_900).await?,
            _ => register(&mut work, row).await?,
        };
        if turn % ROLLBACK_EVERY == ROLLBACK_EVERY - 1 {
            work.rollback().await?;
            return Ok(Outcome::RolledBack { event });
        }
        if work.commit().await.is_err() {
            return Ok(Outcome::InDoubt { event, row });
        }
        let at = Instant::now();
        if registers {
            self.welcome(row).await;
        }
        Ok(Outcome::Committed { event, at })
    }

    /// Of the business rows in doubt, those that are there.
    pub async fn rows_found(&self, rows: &[Uuid]) -> anyhow::Result<Vec<Uuid>> {
        let sql = "SELECT id FROM users WHERE id = ANY ($1) UNION ALL SELECT id FROM payments WHERE id = ANY ($1)
                   UNION ALL SELECT id FROM training_jobs WHERE id = ANY ($1)";
        sqlx::query_scalar(sql).bind(rows).fetch_all(&self.pool).await.context("looking for the rows of unanswered commits")
    }

    /// A connection for publishing high-frequency events; see [`Devices::report`].
    pub async fn connection(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        self.pool.acquire().await
    }

    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn regular(&self, turn: u64) -> Option<Uuid> {
        let regulars = self.regulars.lock().await;
        // Scatters the turns: neighbours meet on the same user now and then.
        let at = usize::try_from(turn.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33).unwrap_or(0);
        regulars.get(at.checked_rem(regulars.len())?).copied()
    }

    async fn welcome(&self, user: Uuid) {
        let mut regulars = self.regulars.lock().await;
        if regulars.len() < REGULARS {
            regulars.push(user);
        }
    }
}

async fn register(work: &mut UnitOfWork<'_>, user_id: Uuid) -> anyhow::Result<Uuid> {
    let (sequence, email) = (1, format!("user-{}@example.org", user_id.simple()));
    let sql = "INSERT INTO users (id, email, sequence) VALUES ($1, $2, $3)";
    sqlx::query(sql).bind(user_id).bind(&email).bind(sequence).execute(work.connection()).await?;
    Ok(work.publish(&UserCreated { user_id, sequence, email, occurred_at: Utc::now() }).await?)
}

/// The UPDATE comes first: it locks the user's row, as SELECT … FOR UPDATE would, and so gives this user's events an order.
async fn pay(work: &mut UnitOfWork<'_>, payment_id: Uuid, user_id: Uuid, amount_cents: i64) -> anyhow::Result<Uuid> {
    let sql = "UPDATE users SET sequence = sequence + 1 WHERE id = $1 RETURNING sequence";
    let sequence = sqlx::query_scalar(sql).bind(user_id).fetch_one(work.connection()).await?;
    let sql = "INSERT INTO payments (id, user_id, amount_cents) VALUES ($1, $2, $3)";
    sqlx::query(sql).bind(payment_id).bind(user_id).bind(amount_cents).execute(work.connection()).await?;
    Ok(work.publish(&PaymentProcessed { user_id, sequence, payment_id, amount_cents, occurred_at: Utc::now() }).await?)
}

async fn start_training(work: &mut UnitOfWork<'_>, job_id: Uuid, user_id: Uuid) -> anyhow::Result<Uuid> {
    let model = "small";
    let sql = "UPDATE users SET trainings = trainings + 1 WHERE id = $1 RETURNING trainings";
    let sequence = sqlx::query_scalar(sql).bind(user_id).fetch_one(work.connection()).await?;
    let sql = "INSERT INTO training_jobs (id, user_id, model) VALUES ($1, $2, $3)";
    sqlx::query(sql).bind(job_id).bind(user_id).bind(model).execute(work.connection()).await?;
    Ok(work.publish(&TrainingStarted { user_id, sequence, job_id, model, occurred_at: Utc::now() }).await?)
}

/// Devices that report sessions and metrics. Each belongs to one task, so that its events have an order.
pub struct Devices {
    devices: Vec<Device>,
    turn: usize,
}

struct Device {
    id: Uuid,
    sessions: i64,
    metrics: i64,
}

/// Events that were sent straight to their streams, and what came of it.
pub struct Sent {
    /// When the call started.
    pub at: Instant,
    pub result: anyhow::Result<Vec<Uuid>>,
    /// Device and number of each event of a call that failed: they may be in their streams or not.
    pub in_doubt: Vec<(String, i64)>,
}

impl Devices {
    pub fn new(devices: usize) -> Self {
        let device = |_| Device { id: Uuid::now_v7(), sessions: 0, metrics: 0 };
        Self { devices: (0..devices.max(1)).map(device).collect(), turn: 0 }
    }

    /// Publishes the next `count` events in one call. High-frequency events do not use the connection, but through this
    /// interface any event can be published.
    pub async fn report(&mut self, service: &Service, connection: &mut PoolConnection<Postgres>, count: usize) -> Sent {
        let events: Vec<Box<dyn DomainEvent>> = (0..count).map(|_| self.next()).collect();
        let borrowed: Vec<&dyn DomainEvent> = events.iter().map(Box::as_ref).collect();
        let at = Instant::now();
        let result = service.publisher.publish_all(connection, &borrowed).await.map_err(anyhow::Error::from);
        let in_doubt = if result.is_err() { borrowed.iter().filter_map(|event| numbered(*event)).collect() } else { Vec::new() };
        Sent { at, result, in_doubt }
    }

    /// One session for every four metrics.
    fn next(&mut self) -> Box<dyn DomainEvent> {
        self.turn += 1;
        let (turn, devices) = (self.turn, self.devices.len());
        let device = &mut self.devices[turn % devices];
        let (device_id, occurred_at) = (device.id, Utc::now());
        if (turn / devices).is_multiple_of(5) {
            device.sessions += 1;
            return Box::new(SessionStarted { device_id, sequence: device.sessions, occurred_at });
        }
        device.metrics += 1;
        Box::new(MetricUpdated {
            device_id,
            sequence: device.metrics,
            name: "loss",
            value: 1.0 / device.metrics as f64,
            occurred_at,
        })
    }
}

/// `stream/aggregate` and number of an event.
fn numbered(event: &dyn DomainEvent) -> Option<(String, i64)> {
    let payload = event.payload().ok()?;
    Some((format!("{}/{}", event.aggregate_type(), event.aggregate_id()), super::audit::sequence_of(payload.get())?))
}
