//! The pictures of the console in `docs/console`, taken while events flow: `make screenshots`.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, ConsumerHandle, Delivery, HandlerError};
use commitstream::event::EventEnvelope;
use commitstream_sandbox::Sandbox;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::browser::{Browser, patiently};
use crate::stage::{PASSWORD, Stage};
use crate::support::{Running, World};

/// No picture is higher, in pixels; of lists, the beginning will do.
const HIGHEST: u32 = 900;
const HIGHEST_LIST: u32 = 580;

/// Seconds that the charts show.
const HISTORY: usize = 45;

/// Between two transactions of the producer.
const TICK: Duration = Duration::from_millis(100);

/// A shop at work, until it is dropped.
struct Shop {
    is_open: Arc<AtomicBool>,
    producer: Option<JoinHandle<Result<()>>>,
    _second_relay: Running,
    _consumers: Vec<ConsumerHandle>,
    _runtime: Runtime,
}

impl Shop {
    fn open(world: &World) -> Result<Self> {
        let mut command = world.command(&["relay"]);
        command.env("OUTBOX_MAX_RETRIES", "2");
        let second_relay = Running::new(command)?;
        let runtime = Runtime::new()?;
        let consumers = runtime.block_on(consume(world))?;
        let is_open = Arc::new(AtomicBool::new(true));
        let (open, url, redis, prefix) =
            (Arc::clone(&is_open), world.database.url().to_owned(), world.redis()?, world.prefix.clone());
        let producer = thread::spawn(move || Runtime::new()?.block_on(produce(&open, &url, redis, &prefix)));
        Ok(Self { is_open, producer: Some(producer), _second_relay: second_relay, _consumers: consumers, _runtime: runtime })
    }

    fn close(&mut self) -> Result<()> {
        self.is_open.store(false, Ordering::Relaxed);
        let producer = self.producer.take().context("it is open")?;
        producer.join().map_err(|_| anyhow!("the producer panicked"))?
    }
}

/// Some transactions a second, more and less in waves, and what is not worth a row straight into a stream.
async fn produce(open: &AtomicBool, url: &str, mut redis: redis::Connection, prefix: &str) -> Result<()> {
    use sqlx::{Connection, Executor, PgConnection};
    let mut connection = PgConnection::connect(url).await?;
    let mut dice = StdRng::seed_from_u64(7);
    let mut ticks = tokio::time::interval(TICK);
    for n in 0_u32.. {
        ticks.tick().await;
        if !open.load(Ordering::Relaxed) {
            break;
        }
        let wave = 40.0 + 25.0 * (f64::from(n) / 60.0).sin() + dice.random_range(0.0..10.0);
        let [orders, users, payments] = [wave, wave / 6.0, wave / 2.0].map(|events| events as u32);
        let sql = format!(
            r#"INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
               SELECT CASE WHEN n % 3 = 0 THEN 'OrderPaid' WHEN n % 7 = 0 THEN 'OrderShipped' ELSE 'OrderPlaced' END, 'order', 'A-' || (10000 + (random() * 5000)::int),
                      jsonb_build_object('orderId', 'A-' || n, 'items', 1 + n % 4, 'totalCents', 990 + n * 310, 'currency', 'EUR'),
                      jsonb_build_object('traceparent', '00-' || md5(random()::text) || '-' || left(md5(random()::text), 16) || '-01')
               FROM generate_series(1, {orders}) n
               UNION ALL SELECT CASE WHEN n % 4 = 0 THEN 'UserRenamed' ELSE 'UserCreated' END, 'user', gen_random_uuid()::text, '{{"plan": "basic"}}', '{{}}' FROM generate_series(1, {users}) n
               UNION ALL SELECT 'PaymentProcessed', 'payment', 'P-' || {n} || '-' || n, '{{"amountCents": 4200}}', '{{}}' FROM generate_series(1, {payments}) n;"#
        );
        connection.execute(sqlx::AssertSqlSafe(sql)).await?;
        redis::cmd("HSET").arg(format!("{prefix}{{streams}}")).arg("session").arg("").exec(&mut redis)?;
        for session in 0..users {
            let session = session.to_string();
            let event =
                ["id", "?", "type", "SessionSeen", "aggregate_type", "session", "aggregate_id", &session, "payload", "{}"];
            redis::cmd("XADD").arg(format!("{prefix}session")).arg("*").arg(&event).exec(&mut redis)?;
        }
    }
    Ok(())
}

/// Groups that keep up, one that does not, and one that nobody serves any more.
async fn consume(world: &World) -> Result<Vec<ConsumerHandle>> {
    let mut settings = Settings::default();
    settings.database.url = Some(world.database.url().to_owned());
    settings.redis.url = Some(world.redis_url.clone());
    settings.redis.stream_prefix.clone_from(&world.prefix);
    let mut consumers = Vec::new();
    for (group, stream, pause) in [("receipts", "payment", 0), ("welcome-mail", "user", 2), ("warehouse", "order", 40)] {
        let consumer = Consumer::new(group, &settings)?.on_any(stream, Work { group, pause: Duration::from_millis(pause) });
        consumers.push(consumer.start()?);
    }
    Ok(consumers)
}

struct Work {
    group: &'static str,
    pause: Duration,
}

impl commitstream::consumer::Handler<EventEnvelope> for Work {
    async fn handle(&self, event: EventEnvelope, _: &Delivery) -> Result<(), HandlerError> {
        tokio::time::sleep(self.pause).await;
        let id = event.aggregate_id.as_str();
        match self.group {
            "receipts" if id.ends_with("-20") && id.starts_with("P-1") && id.len() < 7 => {
                Err(HandlerError::give_up("the bank does not know this payment"))
            }
            "welcome-mail" if id.starts_with("00") => Err(HandlerError::give_up("550 5.1.1 no such mailbox")),
            _ => Ok(()),
        }
    }
}

/// Events that Redis or the relay refuses.
fn trouble(world: &World) -> Result<()> {
    world.database.psql(
        r#"INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, status, retry_count, last_error)
           SELECT CASE WHEN n % 5 = 0 THEN 'InvoiceCancelled' ELSE 'InvoiceIssued' END, 'invoice', '2026-' || (1000 + n), jsonb_build_object('totalCents', n * 990),
                  'FAILED', 3, 'Elements are too large to be stored' FROM generate_series(1, 23) n;
           INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
           SELECT 'CatalogueImported', 'catalogue', 'spring', jsonb_build_object('items', repeat('x', 1200000)) FROM generate_series(1, 2);"#,
    )?;
    Ok(())
}

/// Events that wait for another attempt, with others of their aggregate behind them.
fn more_trouble(world: &World) -> Result<()> {
    world.database.psql(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, retry_count, next_retry_at, last_error)
         SELECT CASE WHEN n <= 6 THEN 'ShipmentPacked' ELSE 'ShipmentSent' END, 'shipment', 'S-' || (500 + n % 6), '{}',
                CASE WHEN n <= 6 THEN 1 ELSE 0 END, now() + interval '1 hour', CASE WHEN n <= 6 THEN 'Elements are too large to be stored' END
         FROM generate_series(1, 17) n;",
    )?;
    Ok(())
}

/// Servers of tests keep nothing on disk, which doctor would say.
fn keep_what_is_written(world: &World) -> Result<()> {
    for setting in ["fsync", "full_page_writes", "synchronous_commit"] {
        world.database.psql(&format!("ALTER SYSTEM SET {setting} = on;"))?;
    }
    world.database.psql("SELECT pg_reload_conf();")?;
    Ok(redis::cmd("CONFIG").arg(&["SET", "appendfsync", "everysec"]).exec(&mut world.redis()?)?)
}

/// What an operator did before.
fn deeds(browser: &Browser, world: &World) -> Result<()> {
    patiently("failures", || Ok(world.stats()?["failed"].as_u64() > Some(20)))?;
    let id = |kind: &str| {
        world.database.psql(&format!("SELECT id FROM event_outbox WHERE status = 'FAILED' AND event_type = '{kind}' LIMIT 1;"))
    };
    for (kind, remedy) in [("InvoiceIssued", "discard"), ("InvoiceCancelled", "retry")] {
        browser.open(&format!("/failures/confirm?remedy={remedy}&id={}", id(kind)?.trim()))?;
        browser.click("#confirm")?;
        browser.text("#outcome")?;
    }
    browser.open("/relays")?;
    browser.click("details summary")?;
    browser.click("#pause")?;
    browser.click("#resume")?;
    patiently("dead letters", || {
        browser.open("/dead")?;
        Ok(browser.count("[data-test=retry-dead]")? > 3)
    })?;
    browser.click("[data-test=retry-dead]")?;
    browser.text("#outcome").map(drop)
}

/// One page as it is now, light and dark.
fn take(browser: &Browser, name: &str, height: u32) -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/console");
    fs::create_dir_all(&directory)?;
    for scheme in ["light", "dark"] {
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        browser.devtools("Emulation.setEmulatedMedia", features)?;
        let picture = browser.picture(height)?;
        fs::write(directory.join(format!("{name}-{scheme}.png")), picture)?;
    }
    browser.resize(1280, 900)
}

#[test]
#[ignore = "takes a minute and writes into docs/console: make screenshots"]
fn screenshots() -> Result<()> {
    let sandbox = Sandbox::shared();
    ensure!(sandbox.postgres().is_some() && sandbox.redis().is_some(), "this wants servers of its own");
    let world = World { prefix: "events:".to_owned(), ..World::new()? };
    let Some(stage) = Stage::of(world, "2")? else { return Err(anyhow!("this needs chromium and chromedriver")) };
    let (browser, world) = (&stage.browser, &stage.world);
    keep_what_is_written(world)?;
    let mut shop = Shop::open(world)?;
    trouble(world)?;
    stage.enter(PASSWORD)?;
    deeds(browser, world)?;
    let redis = &mut world.redis()?;
    redis::cmd("XGROUP").arg(&["CREATE", &format!("{}order", world.prefix), "analytics", "0"]).exec(redis)?;

    browser.open("")?;
    browser.until("some history in the charts", &format!("charts.every((chart) => chart.data[0].length >= {HISTORY})"))?;
    browser.until("what doctor says", "!document.querySelector('#doctor').textContent.includes('asked')")?;
    take(browser, "overview", HIGHEST)?;
    more_trouble(world)?;
    patiently("blocked aggregates", || {
        browser.open("/blocked")?;
        Ok(browser.count("#blocked tbody tr")? >= 6)
    })?;
    take(browser, "blocked", HIGHEST_LIST)?;
    for name in ["doctor", "events", "failures", "dead", "streams", "relays", "audit"] {
        browser.open(&format!("/{name}"))?;
        take(browser, name, HIGHEST_LIST)?;
    }
    let handled =
        "SELECT id FROM event_outbox WHERE event_type = 'OrderPlaced' AND status = 'PUBLISHED' ORDER BY seq LIMIT 1 OFFSET 20;";
    browser.open(&format!("/events/{}", world.database.psql(handled)?.trim()))?;
    take(browser, "event", HIGHEST)?;
    shop.close()
}
