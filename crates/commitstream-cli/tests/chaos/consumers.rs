//! Consumers: each event has one effect, a row that commits with the row of the inbox. Some handlers block their thread for longer
//! than `claimIdle`, and some events end the process that handles them: these alone may become dead letters.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, Delivery, HandlerError, TransactionalHandler};
use commitstream::event::EventKind;
use commitstream::streams::DeadLetter;
use commitstream::{DecodeEvent, EventEnvelope, EventError};
use serde::Deserialize;
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, Row as _};
use tokio::signal::unix::{SignalKind, signal};

use crate::relay_faults::Tormented;
use crate::world::World;

/// Set where this program is to be a consumer.
pub const IS_CONSUMER: &str = "COMMITSTREAM_CHAOS_CONSUMER";
const GROUP: &str = "effects";

/// The dice of those who look after consumers at the end.
const LAST: u64 = 1_000;

pub const TABLE: &str = "
    CREATE TABLE effect (place bigint GENERATED ALWAYS AS IDENTITY, event_id uuid, type text, id text, number bigint,
        process bigint, entry text, at timestamptz DEFAULT clock_timestamp());
    CREATE INDEX ON effect (event_id)";

/// Aggregates of which one event ends the process of every consumer that handles it, and the number of that event.
pub const POISONED: [&str; 3] = ["order/13", "payment/77", "training/5"];
const POISON: i64 = 5;

/// One event in so many blocks the thread of its handler, for longer than `claimIdle`.
const BLOCKING: u128 = 4_000;
const BLOCKED: Duration = Duration::from_millis(3_000);

/// Of events in the outbox, as `POISON` of `POISONED`.
const IS_POISON: &str = "aggregate_type || '/' || aggregate_id = ANY ($1) AND (payload->>'number')::bigint = 5";

/// What producers publish.
struct Happened {
    kind: String,
    id: String,
    number: i64,
}

const fn happened(aggregate_type: &'static str) -> EventKind {
    EventKind { aggregate_type, event_type: "Happened" }
}

impl DecodeEvent for Happened {
    // As in `world::TYPES`.
    const KINDS: &'static [EventKind] =
        &[happened("user"), happened("order"), happened("payment"), happened("training"), happened("session")];

    fn decode(envelope: &EventEnvelope) -> Result<Self, EventError> {
        #[derive(Deserialize)]
        struct Payload {
            number: i64,
        }
        let payload: Result<Payload, _> = serde_json::from_str(envelope.payload.get());
        let unreadable = |source| EventError::Payload { event_type: envelope.event_type.clone(), source };
        let Payload { number } = payload.map_err(unreadable)?;
        Ok(Self { kind: envelope.aggregate_type.clone(), id: envelope.aggregate_id.clone(), number })
    }
}

struct Effect;

impl TransactionalHandler<Happened> for Effect {
    async fn handle(&self, event: Happened, delivery: &Delivery, transaction: &mut PgConnection) -> Result<(), HandlerError> {
        if event.number == POISON && POISONED.contains(&format!("{}/{}", event.kind, event.id).as_str()) {
            std::process::abort();
        }
        if delivery.event_id().as_u128().is_multiple_of(BLOCKING) {
            std::thread::sleep(BLOCKED);
        }
        let sql = "INSERT INTO effect (event_id, type, id, number, process, entry) VALUES ($1, $2, $3, $4, $5, $6)";
        sqlx::query(sql)
            .bind(delivery.event_id())
            .bind(event.kind)
            .bind(event.id)
            .bind(event.number)
            .bind(i64::from(std::process::id()))
            .bind(delivery.entry_id().to_string())
            .execute(transaction)
            .await?;
        Ok(())
    }
}

/// Not a test by itself: the body of a consumer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_process() -> Result<()> {
    if std::env::var(IS_CONSUMER).unwrap_or_default().is_empty() {
        return Ok(());
    }
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut stop = signal(SignalKind::terminate())?;
    let settings = Settings::load(None, |name| std::env::var(name).ok(), &[])?.settings;
    let url = settings.database.url.clone().context("a consumer has a database")?;
    let options = PgPoolOptions::new().max_connections(12).acquire_timeout(Duration::from_secs(3));
    let pool = options.connect_lazy(&url)?;
    let consumer = Consumer::new(GROUP, &settings)?.on_transaction(&pool, Effect).start()?;
    stop.recv().await;
    consumer.stop().await?;
    Ok(())
}

async fn effects(connection: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT count(*) FROM effect").fetch_one(connection).await?)
}

/// Waits until every published event has its effect, or is a dead letter as it should be, and nothing is pending. When that takes too
/// long, it is a finding. Consumers that a poison event ends meanwhile are started again.
pub async fn caught_up(world: &World, consumers: &mut [Tormented], limit: Duration) -> Result<()> {
    let (mut connection, streams) = (world.connect().await?, world.streams()?);
    let sql = format!("SELECT count(*) FROM event_outbox WHERE status = 'PUBLISHED' AND NOT ({IS_POISON})");
    let published: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(POISONED).fetch_one(&mut connection).await?;
    let deadline = Instant::now() + limit;
    let mut dice = world.dice(LAST);
    loop {
        for consumer in consumers.iter_mut() {
            consumer.relay.expect_running(&mut dice)?;
        }
        let mut pending = 0;
        for stream in streams.list().await? {
            pending += streams.groups(&stream).await?.iter().map(|group| group.pending).sum::<u64>();
        }
        let done = effects(&mut connection).await?;
        if done >= published && pending == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            world
                .findings
                .add(format!("{done} effects of {published} events, and {pending} pending, {limit:?} after the last fault"));
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The effects against the events of the outbox.
#[derive(Debug, Default)]
pub struct Effects {
    pub effects: u64,
    pub missing: u64,
    pub doubled: u64,
    pub out_of_order: u64,
    /// Of events that nobody committed.
    pub invented: u64,
    /// Dead letters of events that end no process.
    pub innocent: u64,
    /// Of those that do.
    pub poison: u64,
}

impl Effects {
    pub fn is_clean(&self) -> bool {
        self.effects > 0 && self.missing + self.doubled + self.out_of_order + self.invented + self.innocent == 0
    }

    pub fn kinds(&self) -> [(&'static str, u64); 7] {
        [
            ("effects", self.effects),
            ("missing effects", self.missing),
            ("doubled effects", self.doubled),
            ("effects out of order", self.out_of_order),
            ("invented effects", self.invented),
            ("innocent dead letters", self.innocent),
            ("poison dead letters", self.poison),
        ]
    }
}

/// The first effects that are out of order, each with the one before it.
async fn late(connection: &mut PgConnection) -> Result<Vec<String>> {
    let sql = "SELECT format('effect of %s/%s, number %s (entry %s) at %s by %s, after number %s (entry %s) at %s by %s',
                   type, id, number, entry, at, process, before, before_entry, before_at, before_process)
               FROM (SELECT *, max(number) OVER w AS most, lag(number) OVER w AS before, lag(at) OVER w AS before_at,
                         lag(process) OVER w AS before_process, lag(entry) OVER w AS before_entry
                     FROM effect WINDOW w AS (PARTITION BY type, id ORDER BY place)) e
               WHERE number < most AND before > number ORDER BY place LIMIT 8";
    Ok(sqlx::query_scalar(sql).fetch_all(connection).await?)
}

pub async fn judge(world: &World) -> Result<Effects> {
    let mut connection = world.connect().await?;
    let sql = format!("
        SELECT (SELECT count(*) FROM effect),
            (SELECT count(*) FROM event_outbox o WHERE NOT ({IS_POISON}) AND NOT EXISTS (SELECT FROM effect e WHERE e.event_id = o.id)),
            (SELECT count(*) - count(DISTINCT event_id) FROM effect),
            (SELECT count(*) FROM (SELECT number < max(number) OVER (PARTITION BY type, id ORDER BY place) AS late FROM effect) e
             WHERE late),
            (SELECT count(*) FROM effect e WHERE NOT EXISTS (SELECT FROM event_outbox o WHERE o.id = e.event_id))");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(POISONED).fetch_one(&mut connection).await?;
    let number = |at: usize| row.try_get::<i64, _>(at).map(i64::unsigned_abs);
    for example in late(&mut connection).await? {
        world.findings.add(example);
    }
    let (poison, innocent) = dead_letters(world).await?;
    Ok(Effects {
        effects: number(0)?,
        missing: number(1)?,
        doubled: number(2)?,
        out_of_order: number(3)?,
        invented: number(4)?,
        innocent,
        poison,
    })
}

/// Those of poison events, and the others.
async fn dead_letters(world: &World) -> Result<(u64, u64)> {
    let streams = world.streams()?;
    let (mut poison, mut innocent) = (0, 0);
    for stream in streams.dead_streams().await? {
        let mut after = "0".to_owned();
        loop {
            let page = streams.dead_letters(&stream, &after, 100).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.dead_id);
            for letter in page {
                let text = |field: &Option<String>| field.clone().unwrap_or_default();
                let aggregate = format!("{}/{}", text(&letter.aggregate_type), text(&letter.aggregate_id));
                let number = letter.payload.as_ref().map_or(0, |payload| crate::judge::number(payload.get()));
                if number == POISON && POISONED.contains(&aggregate.as_str()) {
                    poison += 1;
                } else {
                    innocent += 1;
                    let DeadLetter { event_id, reason, attempts, .. } = letter;
                    world
                        .findings
                        .add(format!("an innocent dead letter: {event_id:?} of {aggregate}, {attempts} attempts: {reason}"));
                }
            }
        }
    }
    Ok((poison, innocent))
}
