//! Each finding about PostgreSQL and the outbox, provoked on real servers; where a command mends it, the command is run.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::config::AfterFailure;
use commitstream::doctor::{self, CHECKS, Facts, Severity};
use commitstream::outbox::examine::{HolderKind, PostgresFacts};
use commitstream::outbox::{Heartbeat, OutboxError};
use commitstream_sandbox::{Postgres, Redis, Sandbox};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

use crate::doctor_report::{eventually_found, eventually_passes, examine, found, mend, only, passes};
use crate::support::{Form, World, eventually};

const EXPECTED: &str = include_str!("../../src/outbox/examine/definition.tsv");

/// A relay that is alive as long as the session is.
async fn beat(world: &World, version: &'static str, state: &'static str, reason: Option<&str>) -> Result<PgConnection> {
    let mut session = world.connect().await?;
    let heartbeat = Heartbeat {
        relay_id: Uuid::now_v7(),
        host: "app1".into(),
        pid: 7,
        version,
        life: Duration::from_secs(600),
        shares: true,
        state,
        reason: reason.map(str::to_owned),
        published: 0,
        failed: 0,
        republished: 0,
        events_per_second: 0.0,
    };
    world.outbox.beat(&mut session, &heartbeat).await?;
    Ok(session)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_expected_definition_is_that_of_the_migrations() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let definition = world.outbox.definition(&mut world.connect().await?).await?;
        assert_eq!(definition, EXPECTED, "{form:?}: write the left side into definition.tsv");
    }
    Ok(())
}

/// Servers as they should be, and a relay at work: nothing is found, and every check was carried out.
#[tokio::test(flavor = "multi_thread")]
async fn where_all_is_well_every_check_passes() -> Result<()> {
    let postgres = Postgres::start_with(&[("fsync", "on")])?;
    let redis = Redis::start_with(&[("appendfsync", "everysec")])?;
    let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.settings.database.url = Some(postgres.url());
    let mut connection = PgConnection::connect(&postgres.url()).await?;
    world.outbox.migrate(&mut connection).await?;
    let relay = world.relay()?;
    connection
        .execute("INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', '1', '{}')")
        .await?;
    relay.watch().wait_for(|status| status.published == 1).await?;
    let report = examine(&world).await;
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
    let (mut passed, mut all) = (report.passed.clone(), CHECKS.to_vec());
    passed.sort_unstable();
    all.sort_unstable();
    assert_eq!(passed, all);
    assert_eq!(report.worst(), None);
    relay.stop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_is_a_finding_and_the_other_is_examined() -> Result<()> {
    let mut world = World::new().await?;
    let (database, redis) = (world.settings.database.url.clone(), world.settings.redis.url.clone());
    world.settings.database.url = Some("postgres://app:hunter2@127.0.0.1:1/app".into());
    let report = examine(&world).await;
    let finding = only(&report, "postgres-reachable", Severity::Error, "postgres://app:***@127.0.0.1:1/app: ");
    assert!(!format!("{finding:?}").contains("hunter2"));
    passes(&report, "redis-reachable");
    passes(&report, "stream-keys");

    world.settings.database.url = database;
    world.settings.redis.url = Some("redis://:hunter2@127.0.0.1:1".into());
    let report = examine(&world).await;
    let finding = only(&report, "redis-reachable", Severity::Error, "redis://:***@127.0.0.1:1: ");
    assert!(!format!("{finding:?}").contains("hunter2"));
    passes(&report, "schema");

    (world.settings.database.url, world.settings.redis.url) = (None, redis.map(|url| url.replace("default:", "default:wrong")));
    let report = examine(&world).await;
    only(&report, "postgres-reachable", Severity::Error, "DATABASE_URL) is not set");
    let finding = only(&report, "redis-reachable", Severity::Error, "Password authentication failed");
    assert_eq!(finding.mend, "check the user and the password in REDIS_URL");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_postgresql_that_break_promises_are_found() -> Result<()> {
    let bad = [
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("autovacuum", "off"),
        ("track_counts", "off"),
        ("max_connections", "12"),
    ];
    let postgres = Postgres::start_with(&[&bad[..], &[("synchronous_commit", "off")]].concat())?;
    let mut world = World::unmigrated()?;
    world.settings.database.url = Some(postgres.url());
    let mut sessions = Vec::new();
    for _ in 0..8 {
        sessions.push(PgConnection::connect(&postgres.url()).await?);
    }
    let report = examine(&world).await;
    let durability: Vec<_> = found(&report, "postgres-durability").iter().map(|f| (f.severity, f.seen.as_str())).collect();
    assert_eq!(durability[..2], [(Severity::Error, "fsync is off"), (Severity::Error, "full_page_writes is off")]);
    assert_eq!(durability[2], (Severity::Note, "synchronous_commit is off for new sessions"));
    let autovacuum: Vec<_> = found(&report, "autovacuum").iter().map(|f| f.seen.as_str()).collect();
    assert_eq!(
        autovacuum,
        ["autovacuum is off: no table is vacuumed by itself", "track_counts is off: no table is vacuumed by itself"]
    );
    only(&report, "postgres-connections", Severity::Warning, " of 9 sessions are in use");
    for check in ["postgres-durability", "autovacuum"] {
        found(&report, check).into_iter().try_for_each(|finding| mend(&world.settings, finding))?;
    }
    drop(sessions);
    eventually("the settings to be in force", async || {
        let report = examine(&world).await;
        let is_mended = |check| report.passed.contains(&check);
        Ok(is_mended("autovacuum") && found(&report, "postgres-durability").iter().all(|f| f.seen.starts_with("synchronous")))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_and_a_database_for_reading_only_are_found() -> Result<()> {
    let primary = Postgres::start()?;
    let standby = Postgres::start_standby_of(&primary)?;
    let mut world = World::unmigrated()?;
    world.settings.database.url = Some(standby.url());
    mend(&world.settings, only(&examine(&world).await, "postgres-writable", Severity::Error, "leads to a standby"))?;
    passes(&examine(&world).await, "postgres-writable");
    // Each overrides the one before.
    for (whose, source) in [
        ("SYSTEM", "configuration file"),
        ("DATABASE postgres", "database"),
        ("ROLE postgres", "user"),
        ("ROLE postgres IN DATABASE postgres", "database user"),
    ] {
        let mut session = PgConnection::connect(&standby.url()).await?;
        session.execute(AssertSqlSafe(format!("ALTER {whose} SET default_transaction_read_only = on"))).await?;
        session.execute("SELECT pg_reload_conf()").await?;
        let seen = format!("transactions are read-only (default_transaction_read_only, set by: {source})");
        let report = eventually_found(&world, "postgres-writable").await?;
        mend(&world.settings, only(&report, "postgres-writable", Severity::Error, &seen))?;
        eventually_passes(&world, "postgres-writable").await?;
    }
    world.settings.database.url = Some(format!("{}?options=-cdefault_transaction_read_only=on", standby.url()));
    let report = examine(&world).await;
    let finding = only(&report, "postgres-writable", Severity::Error, "set by: client");
    assert!(finding.mend.starts_with("take default_transaction_read_only out of the options"), "{finding:?}");
    Ok(())
}

/// A transaction of minutes is made of one of moments by its age alone: all else is what PostgreSQL says.
#[tokio::test(flavor = "multi_thread")]
async fn old_transactions_are_named_with_a_query_that_shows_no_literal() -> Result<()> {
    let postgres = Postgres::start_with(&[("max_prepared_transactions", "2")])?;
    let mut world = World::unmigrated()?;
    world.settings.database.url = Some(postgres.url());
    let mut old = PgConnection::connect(&format!("{}?application_name=nightly", postgres.url())).await?;
    old.execute("CREATE TABLE t (secret text)").await?;
    old.execute("BEGIN; INSERT INTO t VALUES ('x'); PREPARE TRANSACTION 'left behind'").await?;
    old.execute("BEGIN").await?;
    old.execute("INSERT INTO t SELECT $x$hunter2$x$ || 'hunter3'").await?;
    let facts = world.outbox.examine(&postgres.url(), Duration::from_secs(10)).await?;
    let PostgresFacts::Direct(mut facts) = facts else { anyhow::bail!("{facts:?}") };
    let holders = facts.horizon.as_mut().expect("holders");
    assert_eq!(holders.iter().map(|holder| holder.kind).collect::<Vec<_>>(), [HolderKind::Prepared, HolderKind::Session]);
    holders.iter_mut().for_each(|holder| holder.age_ms = holder.age_ms.map(|age| age + 3 * 3_600_000));
    let report = doctor::judge(&world.settings, &Facts { postgres: Some(Ok(PostgresFacts::Direct(facts))), redis: None });
    let told = found(&report, "vacuum-held-back");
    assert_eq!(told[0].seen.split(" back ").next(), Some("the prepared transaction left behind of postgres holds vacuum"));
    let (who, query) = told[1].seen.split_once("; its last query: ").context("a query")?;
    assert!(who.ends_with(" of postgres, nightly is idle in transaction and holds vacuum back for 3h"), "{who}");
    assert_eq!(query, "INSERT INTO t SELECT ...");
    assert!(!format!("{told:?}").contains("hunter"));
    for finding in &told {
        mend(&world.settings, finding)?;
    }
    assert!(old.execute("SELECT 1").await.is_err(), "it was ended");
    let mut connection = PgConnection::connect(&postgres.url()).await?;
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_prepared_xacts").fetch_one(&mut connection).await?;
    assert_eq!(left, 0);
    let facts = world.outbox.examine_by(&mut connection).await;
    assert!(facts.horizon.expect("holders").is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_missing_old_newer_or_of_others_is_found() -> Result<()> {
    let world = World::unmigrated()?;
    only(&examine(&world).await, "migration", Severity::Error, "has no outbox tables");
    world.outbox.migrate(&mut world.connect().await?).await?;
    passes(&examine(&world).await, "migration");
    world.database.psql("DELETE FROM outbox_migration WHERE version = 9;")?;
    only(&examine(&world).await, "migration", Severity::Error, "have version 8, and this build needs 9");
    world.database.psql("INSERT INTO outbox_migration (version) VALUES (9), (10);")?;
    let report = examine(&world).await;
    only(&report, "migration", Severity::Note, "have version 10");
    assert!(!report.passed.contains(&"schema") && found(&report, "schema").is_empty(), "not compared");
    passes(&report, "leases");
    let foreign = World::unmigrated()?;
    foreign.database.psql("CREATE TABLE event_outbox (id int);")?;
    only(&examine(&foreign).await, "migration", Severity::Error, "no migration of Commitstream made");
    Ok(())
}

/// What was changed by hand is named, and the commands make it again what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_schema_is_found_and_mended_by_the_commands() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        world.database.psql(
            "DROP INDEX idx_outbox_waiting, idx_outbox_published;
             CREATE INDEX idx_outbox_published ON event_outbox (published_at);
             ALTER TABLE event_outbox DISABLE TRIGGER event_outbox_wake_relay;
             ALTER TABLE event_outbox DROP CONSTRAINT event_outbox_aggregate_type_has_no_brace;
             DELETE FROM outbox_lease WHERE partition_no < 3;
             CREATE INDEX somebody_elses ON event_outbox (event_type);",
        )?;
        let report = examine(&world).await;
        let schema: Vec<_> = found(&report, "schema").iter().map(|f| f.seen.as_str()).collect();
        assert!(
            schema[0].contains("the constraint event_outbox.event_outbox_aggregate_type_has_no_brace is missing"),
            "{schema:?}"
        );
        assert!(schema[1].contains("the trigger event_outbox_wake_relay is type 4 DISABLED"), "{schema:?}");
        let indexes: Vec<_> = found(&report, "indexes").iter().map(|f| f.seen.as_str()).collect();
        assert!(indexes[0].starts_with("the index idx_outbox_published is another one"), "{indexes:?}");
        assert_eq!((indexes[1], indexes.len(), schema.len()), ("the index idx_outbox_waiting is missing", 2, 2));
        only(&report, "leases", Severity::Error, "outbox_lease has 61 of 64 rows");
        for check in ["schema", "indexes", "leases"] {
            for finding in found(&report, check) {
                assert_eq!(finding.severity, Severity::Error);
                mend(&world.settings, finding)?;
            }
        }
        let report = examine(&world).await;
        ["schema", "indexes", "leases"].into_iter().for_each(|check| passes(&report, check));

        world.database.psql(
            "DROP TRIGGER event_outbox_wake_relay ON event_outbox;
             CREATE OR REPLACE FUNCTION outbox_wake_relay() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             ALTER TABLE outbox_batch ALTER COLUMN stream TYPE varchar(20);",
        )?;
        let report = examine(&world).await;
        let schema = found(&report, "schema");
        let seen: Vec<_> = schema.iter().map(|f| f.seen.as_str()).collect();
        let column = "the column outbox_batch.stream is character varying(20) NOT NULL, not text NOT NULL";
        assert_eq!(
            seen,
            [column, "the function outbox_wake_relay was changed", "the trigger event_outbox_wake_relay is missing"]
        );
        mend(&world.settings, schema[2])?;
        assert_eq!(found(&examine(&world).await, "schema").len(), 2);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_whose_making_broke_off_is_found_and_mended() -> Result<()> {
    let world = World::new().await?;
    world.insert(2, 1).await?;
    let same = "CREATE UNIQUE INDEX CONCURRENTLY twice ON event_outbox (event_type);";
    assert!(world.database.psql(same).is_err());
    let report = examine(&world).await;
    let finding = only(&report, "indexes", Severity::Error, "the index public.twice is invalid");
    world.database.psql("DELETE FROM event_outbox WHERE seq = 1;")?;
    mend(&world.settings, finding)?;
    passes(&examine(&world).await, "indexes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_vacuumed_is_found() -> Result<()> {
    let world = World::new().await?;
    world.database.psql("ALTER TABLE event_outbox SET (autovacuum_enabled = off);")?;
    world.insert(110_000, 10).await?;
    world.database.psql("UPDATE event_outbox SET status = 'PUBLISHED', published_at = now();")?;
    let report = eventually_found(&world, "bloat").await?;
    let finding = only(&report, "bloat", Severity::Warning, "the table event_outbox has 110000 dead rows");
    mend(&world.settings, finding)?;
    eventually_passes(&world, "bloat").await?;
    mend(&world.settings, only(&report, "autovacuum", Severity::Warning, "off for the table event_outbox"))?;
    passes(&examine(&world).await, "autovacuum");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn days_without_a_partition_are_found() -> Result<()> {
    let world = World::of(Form::ByDay).await?;
    passes(&examine(&world).await, "partitions-ahead");
    let drop = "SELECT format('DROP TABLE %s;', outbox_test_name(day)) FROM generate_series(2, 3) AS day;";
    let drop = world.database.psql(drop)?;
    world.database.psql(&drop)?;
    only(&examine(&world).await, "partitions-ahead", Severity::Warning, "2 days have no partition, from ");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_that_are_missing_unable_or_of_different_builds_are_found() -> Result<()> {
    let mut world = World::new().await?;
    let report = examine(&world).await;
    only(&report, "relays", Severity::Note, "no relay is alive, and nothing waits");
    only(&report, "writers", Severity::Note, "no event was ever written");
    world.settings.outbox.enabled = false;
    let report = examine(&world).await;
    let finding = only(&report, "relays", Severity::Note, "no relay is alive, and outbox.enabled is false");
    assert_eq!(finding.mend, "OUTBOX_ENABLED=true commitstream relay", "what works with these settings");
    world.insert(3, 1).await?;
    let report = examine(&world).await;
    only(&report, "relays", Severity::Error, "no relay is alive; waiting: 3 events, the oldest for ");
    assert!(found(&report, "backlog").is_empty());
    passes(&report, "writers");

    let _one = beat(&world, "0.1.0", "unable", Some("Redis is away")).await?;
    only(&examine(&world).await, "relays", Severity::Error, "the relay on app1 (pid 7) cannot work: Redis is away");
    let _other = beat(&world, "0.2.0", "active", None).await?;
    let report = examine(&world).await;
    only(&report, "relays", Severity::Warning, "cannot work: Redis is away");
    only(&report, "relay-versions", Severity::Warning, "0.1.0, 0.2.0");
    passes(&report, "backlog");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_dead_relays_left_open_are_found() -> Result<()> {
    let world = World::new().await?;
    world.database.psql(
        "INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids, claimed_at)
         SELECT gen_random_uuid(), gen_random_uuid(), 'events:user', '{}', now() - interval '5 minutes' FROM generate_series(1, 2)",
    )?;
    only(&examine(&world).await, "open-batches", Severity::Error, "2 open batches of dead relays, the oldest for 5m");
    let _relay = beat(&world, "0.1.0", "active", None).await?;
    only(&examine(&world).await, "open-batches", Severity::Warning, "2 open batches of dead relays");
    world.database.psql("UPDATE outbox_batch SET relay_id = (SELECT relay_id FROM outbox_relay);")?;
    passes(&examine(&world).await, "open-batches");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_wait_long_were_refused_or_failed_are_found() -> Result<()> {
    for form in Form::BOTH {
        let mut world = World::of(form).await?;
        let _relay = beat(&world, "0.1.0", "active", None).await?;
        world.insert(10, 5).await?;
        passes(&examine(&world).await, "backlog");
        world.database.psql("UPDATE event_outbox SET created_at = now() - interval '10 minutes' WHERE seq = 4;")?;
        only(&examine(&world).await, "backlog", Severity::Warning, "though a relay is alive: 10 events, the oldest for 10m");
        world.database.psql("UPDATE event_outbox SET created_at = now() - interval '2 hours' WHERE seq = 5;")?;
        only(&examine(&world).await, "backlog", Severity::Error, "the oldest for 2h");

        world
            .database
            .psql("UPDATE event_outbox SET next_retry_at = now() + interval '1 minute' WHERE aggregate_id IN ('1', '2');")?;
        let report = examine(&world).await;
        let finding = only(&report, "refused-events", Severity::Warning, "4 events of 2 aggregates");
        mend(&world.settings, finding)?;
        passes(&report, "failed-events");
        assert!(found(&report, "backlog").len() == 1, "those that do not wait for a retry are old still");

        world.database.psql(
            "UPDATE event_outbox SET status = 'FAILED', next_retry_at = NULL, last_error = 'WRONGTYPE: no' WHERE aggregate_id = '1';",
        )?;
        only(
            &examine(&world).await,
            "failed-events",
            Severity::Warning,
            "FAILED: 2 events of 1 aggregate; the newest: WRONGTYPE: no",
        );
        world.settings.outbox.processor.after_failure = AfterFailure::Hold;
        only(&examine(&world).await, "failed-events", Severity::Error, "FAILED: 2 events");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_outbox_and_one_that_is_not_cleaned_up_are_found() -> Result<()> {
    let world = World::new().await?;
    world.insert(3, 1).await?;
    world.database.psql(
        "UPDATE event_outbox SET created_at = now() - interval '20 days', status = 'PUBLISHED', published_at = now() - interval '20 days';",
    )?;
    let report = examine(&world).await;
    only(&report, "writers", Severity::Note, "no event was written for 20days");
    only(&report, "cleanup", Severity::Warning, "published events are kept for 20days");
    world.database.psql("DELETE FROM event_outbox;")?;
    let report = examine(&world).await;
    passes(&report, "writers");
    passes(&report, "cleanup");
    Ok(())
}

/// Neither a session of its own nor a second one: what cannot be asked is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_login_is_a_finding() -> Result<()> {
    let world = World::new().await?;
    let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
    let refused = world.outbox.examine(&format!("postgres://postgres:hunter2@{place}"), Duration::from_secs(10)).await;
    assert!(matches!(refused, Err(OutboxError::Database { .. })), "{refused:?}");
    let report = doctor::judge(&world.settings, &Facts { postgres: Some(refused), redis: None });
    let finding = only(&report, "postgres-reachable", Severity::Error, "password authentication failed");
    assert!(finding.mend.starts_with("check the user, the password"), "{finding:?}");
    Ok(())
}
