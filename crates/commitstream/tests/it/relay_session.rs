//! The sessions of a relay with PostgreSQL as people run it: roles with settings of their own, poolers, several hosts, tables swapped by hand.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use commitstream::relay::{OutboxProcessor, RelayState};
use commitstream_sandbox::{Postgres, Sandbox};
use sqlx::{Connection, PgConnection};

use crate::pgbouncer::PgBouncer;
use crate::support::{World, eventually};

/// Nothing may be found by polling.
const NEVER: Duration = Duration::from_secs(10 * 60);

/// What the tasks of this thread log, for as long as `_guard` lives.
struct Log {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: tracing::subscriber::DefaultGuard,
}

struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> Self {
        let text = Arc::<Mutex<Vec<u8>>>::default();
        let written = Arc::clone(&text);
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || Lines(Arc::clone(&written))).finish();
        Self { text, _guard: tracing::subscriber::set_default(subscriber) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

/// A password is changed: the sessions end, and new ones are refused. The second reason is the one to act on.
#[tokio::test]
async fn the_log_has_each_reason_of_an_outage() -> Result<()> {
    let mut world = World::new().await?;
    let role = format!("r_{}", world.database.name());
    world.database.psql(&format!("CREATE ROLE {role} SUPERUSER LOGIN PASSWORD 'first';"))?;
    let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
    world.settings.database.url = Some(format!("postgres://{role}:first@{place}"));
    let log = Log::start();
    let relay = world.relay()?;
    let mut status = relay.watch();
    status.wait_for(|status| status.state == RelayState::Active).await?;
    world.database.psql(&format!(
        "ALTER ROLE {role} PASSWORD 'second';
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}';"
    ))?;
    // Why a session ended depends on which one noticed first.
    let reasons = eventually("both reasons", async || {
        let log = log.text();
        Ok(log.contains("password authentication failed") && log.matches("relay cannot work").count() > 1)
    });
    reasons.await.with_context(|| log.text())?;
    world.database.psql(&format!("ALTER ROLE {role} PASSWORD 'first';"))?;
    status.wait_for(|status| status.state == RelayState::Active).await?;
    let refused = log.text().matches("password authentication failed").count();
    assert!(refused <= 2, "{}", log.text());
    relay.stop().await?;
    world.database.psql(&format!("DROP ROLE {role};"))?;
    Ok(())
}

/// Of two idle relays one holds the wake-up lock, and the other waits for it.
#[tokio::test]
async fn waiting_for_the_wake_up_lock_is_no_slow_statement() -> Result<()> {
    let world = World::new().await?;
    let log = Log::start();
    let relays = [world.relay()?, world.relay()?];
    let mut connection = world.connect().await?;
    let waiting = "SELECT pid::text || query_start FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock' AND application_name LIKE 'commitstream relay: sleep%'";
    let mut waits = std::collections::HashSet::new();
    eventually("three waits", async || {
        waits.extend(sqlx::query_scalar::<_, Option<String>>(waiting).fetch_all(&mut connection).await?.into_iter().flatten());
        Ok(waits.len() > 3)
    })
    .await?;
    for relay in relays {
        relay.stop().await?;
    }
    let log = log.text();
    assert!(!log.contains("slow statement"), "{log}");
    assert!(log.contains("relay is active"), "this shows nothing: {log}");
    Ok(())
}

/// It holds the lock of its insert, so no relay is granted the wake-up lock. PostgreSQL would log each request that times out.
#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_that_stays_open_fills_no_log() -> Result<()> {
    let postgres = Postgres::start_with(&[("max_prepared_transactions", "5")])?;
    let sandbox = Sandbox::shared();
    let mut world = World::on(sandbox.database()?, &sandbox.redis_url(), sandbox.key_prefix()?)?;
    world.settings.database.url = Some(postgres.url());
    world.settings.outbox.processor.poll_interval = NEVER;
    let mut connection = PgConnection::connect(&postgres.url()).await?;
    world.outbox.migrate(&mut connection).await?;
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{}')";
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("BEGIN; {insert}; PREPARE TRANSACTION 'left open'")))
        .execute(&mut connection)
        .await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    let waiting = "SELECT query_start::text FROM pg_stat_activity
                   WHERE wait_event_type = 'Lock' AND application_name LIKE 'commitstream relay: sleep%'";
    let mut waits = std::collections::HashSet::new();
    eventually("three requests to time out", async || {
        waits.extend(sqlx::query_scalar::<_, Option<String>>(waiting).fetch_all(&mut connection).await?.into_iter().flatten());
        Ok(waits.len() > 3)
    })
    .await?;
    // It is woken nevertheless.
    let began = Instant::now();
    sqlx::raw_sql(insert).execute(&mut connection).await?;
    status.wait_for(|status| status.published == 1).await?;
    println!("published after {:?}", began.elapsed());
    sqlx::raw_sql("ROLLBACK PREPARED 'left open'").execute(&mut connection).await?;
    relay.stop().await?;
    let log = std::fs::read_to_string(postgres.directory().join("server.log"))?;
    assert!(!log.contains("lock timeout"), "{log}");
    Ok(())
}

/// The channel of a table goes by its number.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_swapped_by_hand_is_listened_to_soon() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.poll_interval = NEVER;
    let relay = world.relay()?;
    let mut status = relay.watch();
    world.insert(1, 1).await?;
    status.wait_for(|status| status.published == 1).await?;
    let before = channel(&world).await?;
    world.database.psql(SWAP)?;
    let after = channel(&world).await?;
    assert_ne!(before, after);
    // On which channels a session listens is its own secret; that it is woken is not.
    eventually("the relay to start anew", async || {
        let newest = "SELECT max(backend_start) > (SELECT created FROM swapped) FROM pg_stat_activity
                      WHERE datname = current_database() AND application_name = 'commitstream relay: listener';";
        Ok(world.database.psql(newest)?.trim() == "t" && relay.status().state == RelayState::Active)
    })
    .await?;
    for n in 2..5 {
        let began = Instant::now();
        world.insert(1, 1).await?;
        tokio::time::timeout(Duration::from_secs(30), status.wait_for(|status| status.published == n)).await??;
        println!("published after {:?}", began.elapsed());
    }
    relay.stop().await?;
    Ok(())
}

async fn channel(world: &World) -> Result<String> {
    Ok(world.outbox.wake_channel(&mut world.connect().await?).await?)
}

const SWAP: &str = "
BEGIN;
CREATE TABLE swapped AS SELECT clock_timestamp() AS created;
ALTER TABLE event_outbox RENAME TO event_outbox_old;
CREATE TABLE event_outbox (LIKE event_outbox_old INCLUDING ALL);
ALTER TABLE event_outbox ALTER COLUMN seq RESTART WITH 1000;
CREATE TRIGGER event_outbox_wake_relay AFTER INSERT ON event_outbox FOR EACH STATEMENT EXECUTE FUNCTION outbox_wake_relay();
COMMIT;";

/// What a role or a database may have as its defaults, and what would become of the relay with it.
const DEFAULTS: [(&str, &str); 12] = [
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_deferrable", "on"),
    ("statement_timeout", "50ms"),
    ("lock_timeout", "10ms"),
    ("idle_in_transaction_session_timeout", "10ms"),
    ("idle_session_timeout", "1s"),
    ("synchronous_commit", "off"),
    ("enable_indexscan", "off"),
    ("enable_nestloop", "off"),
    ("DateStyle", "German, DMY"),
    ("TimeZone", "Asia/Kathmandu"),
];

/// Two relays, so that they have each other's statements to disturb.
#[tokio::test]
async fn defaults_of_the_database_do_not_reach_the_sessions_of_a_relay() -> Result<()> {
    let world = World::new().await?;
    let set = |(name, value)| format!("ALTER DATABASE {} SET {name} = '{value}';", world.database.name());
    world.database.psql(&DEFAULTS.map(set).concat())?;
    let mut session = commitstream::outbox::connect(world.database.url(), "test", Duration::from_secs(10)).await?;
    for (name, value) in DEFAULTS {
        let now: String = sqlx::query_scalar("SELECT current_setting($1)").bind(name).fetch_one(&mut session).await?;
        assert!(!now.eq_ignore_ascii_case(value), "{name} = {now}");
    }
    let log = Log::start();
    let relays = [world.relay()?, world.relay()?];
    let insert = "SET default_transaction_read_only = off; SET statement_timeout = 0;
                  INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                  SELECT 'E', 'user', n::text, '{}' FROM generate_series(1, 2000) n;";
    for round in 1..=10 {
        world.database.psql(insert)?;
        eventually("all to be published", async || {
            Ok(relays.iter().map(|relay| relay.status().published).sum::<u64>() == 2000 * round)
        })
        .await?;
    }
    for relay in relays {
        relay.stop().await?;
    }
    let log = log.text();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    Ok(())
}

/// Waiting mends none of these.
#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_work_is_refused_at_the_start() -> Result<()> {
    let mut world = World::new().await?;
    let settings = "pool_mode = transaction";
    if let Some(pooler) = PgBouncer::start(&world.database, settings)? {
        pooler.listens()?;
        let direct = world.settings.database.url.replace(pooler.url.clone());
        let mut relay = world.relay()?;
        let error = relay.ended().await.unwrap_err().to_string();
        assert!(error.contains("the address of PostgreSQL itself"), "{error}");
        // What it said once, it need not say again.
        relay.ended().await?;
        relay.stop().await?;
        world.settings.database.url = direct;
    }
    let role = format!("r_{}", world.database.name());
    world.database.psql(&format!("CREATE ROLE {role} LOGIN PASSWORD 'p'; GRANT USAGE ON SCHEMA public TO {role};"))?;
    let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
    world.settings.database.url = Some(format!("postgres://{role}:p@{place}"));
    let mut relay = world.relay()?;
    let error = relay.ended().await.unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("permission denied"), "{error}: {source}");
    assert!(matches!(relay.status().state, RelayState::Unable { .. }));
    relay.stop().await?;
    world.database.psql(&format!("REVOKE ALL ON SCHEMA public FROM {role}; DROP ROLE {role};"))?;
    for (options, part) in [("target_session_attrs=standby", "target_session_attrs"), ("host=a,b", "several values")] {
        world.settings.database.url = Some(format!("{}?{options}", world.database.url()));
        let error = OutboxProcessor::new(world.settings.clone()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}

/// A failover by URL: the hosts are tried in their order, and the one that takes writes is used.
#[tokio::test(flavor = "multi_thread")]
async fn a_url_with_several_hosts_leads_to_the_one_that_takes_writes() -> Result<()> {
    let primary = Postgres::start()?;
    let standby = Postgres::start_standby_of(&primary)?;
    let sandbox = Sandbox::shared();
    let mut world = World::on(sandbox.database()?, &sandbox.redis_url(), sandbox.key_prefix()?)?;
    world.outbox.migrate(&mut PgConnection::connect(&primary.url()).await?).await?;
    let host = |url: &str| url.rsplit_once('@').and_then(|(_, place)| place.split('/').next().map(str::to_owned));
    let (first, second) = (host(&standby.url()).context("a host")?, host(&primary.url()).context("a host")?);
    let nobody = "127.0.0.1:1";
    let url = primary.url().replace(&second, &format!("{nobody},{first},{second}"));
    world.settings.database.url = Some(url + "?target_session_attrs=read-write");
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{}')";
    primary.set_synchronous_replication(true)?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    sqlx::raw_sql(insert).execute(&mut PgConnection::connect(&primary.url()).await?).await?;
    status.wait_for(|status| status.published == 1).await?;
    primary.kill()?;
    standby.promote()?;
    let began = Instant::now();
    sqlx::raw_sql(insert).execute(&mut PgConnection::connect(&standby.url()).await?).await?;
    status.wait_for(|status| status.published == 2).await?;
    println!("published after {:?}", began.elapsed());
    relay.stop().await?;
    Ok(())
}
