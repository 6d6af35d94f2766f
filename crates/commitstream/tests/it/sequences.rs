//! Sequences that begin anew below the numbers of their tables.

use anyhow::{Context, Result};
use commitstream::doctor::Severity;
use commitstream::outbox::Continued;
use commitstream::relay::RelayState;
use commitstream_sandbox::Postgres;
use sqlx::{Connection, Executor, PgConnection};

use crate::doctor_report::{examine, mend, only, passes};
use crate::support::{Form, World, eventually};

/// One aggregate, whose events say in which order they were written.
const INSERT: &str = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                      SELECT 'E', 'user', '1', jsonb_build_object('n', n) FROM generate_series($1::int, $2::int) n";

async fn insert(connection: &mut PgConnection, from: i32, to: i32) -> Result<()> {
    sqlx::query(INSERT).bind(from).bind(to).execute(connection).await?;
    Ok(())
}

/// The order in which the events stand in the stream.
async fn streamed(world: &World) -> Result<Vec<i64>> {
    let number = |entry: &commitstream::streams::Entry| {
        let payload: serde_json::Value = serde_json::from_str(entry.field("payload").context("a payload")?)?;
        payload["n"].as_i64().context("a number")
    };
    world.entries(&world.user_stream()).await?.iter().map(number).collect()
}

async fn left(connection: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT count(*) FROM event_outbox WHERE status = 'PENDING'").fetch_one(connection).await?)
}

/// A copy of `from` that follows it by a publication of all tables, with all rows there, as a blue/green switch begins.
async fn follow(world: &World, from: &Postgres) -> Result<(Postgres, PgConnection)> {
    let copy = Postgres::start_with(&[("wal_level", "logical"), ("max_prepared_transactions", "0")])?;
    let mut connection = PgConnection::connect(&copy.url()).await?;
    world.outbox.migrate(&mut connection).await?;
    connection.execute("TRUNCATE outbox_lease, outbox_migration").await?;
    let subscribe = format!("CREATE SUBSCRIPTION copy CONNECTION '{}' PUBLICATION everything", from.url());
    connection.execute(sqlx::AssertSqlSafe(subscribe)).await?;
    eventually("all tables to be copied", async || {
        let sql = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel";
        Ok(sqlx::query_scalar(sql).fetch_one(&mut connection).await?)
    })
    .await?;
    Ok((copy, connection))
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_switch_by_logical_replication_newer_events_stay_behind_older_ones() -> Result<()> {
    let blue = Postgres::start_with(&[("wal_level", "logical")])?;
    let mut world = World::unmigrated()?;
    let mut connection = PgConnection::connect(&blue.url()).await?;
    world.outbox.migrate(&mut connection).await?;
    connection.execute("CREATE PUBLICATION everything FOR ALL TABLES").await?;
    world.settings.database.url = Some(blue.url());
    let relay = world.relay()?;
    insert(&mut connection, 1, 50).await?;
    eventually("the first events to be published", async || Ok(left(&mut connection).await? == 0)).await?;
    world.outbox.pause(&mut connection, "ada").await?;
    relay.stop().await?;
    insert(&mut connection, 51, 100).await?;

    let (green, mut connection) = follow(&world, &blue).await?;
    blue.stop()?;
    connection
        .execute("ALTER SUBSCRIPTION copy DISABLE; ALTER SUBSCRIPTION copy SET (slot_name = NONE); DROP SUBSCRIPTION copy")
        .await?;
    world.settings.database.url = Some(green.url());
    for behind in ["event_outbox.seq has begun anew: the next number is 1, and the table holds 100", "batch_no", "audit_id"] {
        let report = examine(&world).await;
        let told = crate::doctor_report::found(&report, "sequences");
        assert!(told.iter().any(|finding| finding.seen.contains(behind)), "{told:#?}");
    }
    let relay = world.relay()?;
    relay.watch().wait_for(|status| status.state == RelayState::Paused).await?;
    insert(&mut connection, 101, 150).await?;
    world.outbox.resume(&mut connection, "ada").await?;
    eventually("the rest to be published", async || Ok(left(&mut connection).await? == 0)).await?;
    relay.stop().await?;
    assert_eq!(streamed(&world).await?, (1..=150).collect::<Vec<_>>());
    passes(&examine(&world).await, "sequences");
    Ok(())
}

/// Of a user who may read the sequence and of one who may not.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_may_not_set_the_sequence_refuses_with_the_statement() -> Result<()> {
    for form in Form::BOTH {
        let mut world = World::of(form).await?;
        let mut owner = world.connect().await?;
        insert(&mut owner, 1, 20).await?;
        world.outbox.pause(&mut owner, "ada").await?;
        owner.execute("ALTER TABLE event_outbox ALTER COLUMN seq RESTART WITH 5").await?;
        let role = format!("r_{}", world.database.name());
        owner
            .execute(sqlx::AssertSqlSafe(format!(
                "CREATE ROLE {role} LOGIN PASSWORD 'p'; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"
            )))
            .await?;
        let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
        let as_owner = world.settings.database.url.replace(format!("postgres://{role}:p@{place}"));
        for may_read in [false, true] {
            if may_read {
                owner.execute(sqlx::AssertSqlSafe(format!("GRANT SELECT ON SEQUENCE event_outbox_seq_seq TO {role}"))).await?;
                let report = examine(&world).await;
                only(&report, "sequences", Severity::Error, "event_outbox.seq has begun anew: the next number is ");
            }
            let relay = world.relay()?;
            let mut status = relay.watch();
            let unable = status.wait_for(|status| matches!(&status.state, RelayState::Unable { .. })).await?.state.clone();
            let RelayState::Unable { reason } = unable else { anyhow::bail!("{unable:?}") };
            assert!(reason.contains("run: SELECT setval('public.event_outbox_seq_seq', 1000020)"), "{reason}");
            relay.stop().await?;
        }
        let report = examine(&world).await;
        let finding = only(&report, "sequences", Severity::Error, "the table holds 20");
        assert!(finding.mend.ends_with(" (as the owner of the table)"), "{finding:?}");
        world.settings.database.url = as_owner;
        let relay = {
            mend(&world.settings, finding)?;
            passes(&examine(&world).await, "sequences");
            world.relay()?
        };
        relay.watch().wait_for(|status| status.state == RelayState::Paused).await?;
        insert(&mut owner, 21, 30).await?;
        world.outbox.resume(&mut owner, "ada").await?;
        world.drained().await?;
        relay.stop().await?;
        assert_eq!(streamed(&world).await?, (1..=30).collect::<Vec<_>>());
        owner.execute(sqlx::AssertSqlSafe(format!("DROP OWNED BY {role}; DROP ROLE {role}"))).await?;
    }
    Ok(())
}

/// Two at once do not set it back, and what was written meanwhile is counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_is_set_once_and_events_with_low_numbers_are_counted() -> Result<()> {
    let world = World::new().await?;
    let (mut one, mut other) = (world.connect().await?, world.connect().await?);
    insert(&mut one, 1, 20).await?;
    one.execute("UPDATE event_outbox SET status = 'PUBLISHED', published_at = now() WHERE seq < 10").await?;
    assert_eq!(world.outbox.continue_sequences(&mut one).await?, [], "it is right as it is");
    one.execute("ALTER TABLE event_outbox ALTER COLUMN seq RESTART").await?;
    insert(&mut one, 21, 23).await?;
    let (a, b) = tokio::join!(world.outbox.continue_sequences(&mut one), world.outbox.continue_sequences(&mut other));
    let set: Vec<Continued> = a?.into_iter().chain(b?).collect();
    let expected = Continued { column: "event_outbox.seq".into(), was: 4, highest: 20, now: 1_000_020, unsent_below: 3 };
    assert_eq!(set, [expected]);
    insert(&mut one, 24, 24).await?;
    assert_eq!(world.database.psql("SELECT max(seq) FROM event_outbox;")?, "1000021\n");
    Ok(())
}

/// A number that is drawn between the two looks is no sign of a sequence that begins anew.
#[tokio::test(flavor = "multi_thread")]
async fn producers_at_work_do_not_make_a_sequence_look_behind() -> Result<()> {
    let world = World::new().await?;
    let mut producer = world.connect().await?;
    let producing = tokio::spawn(async move {
        for n in 1..=500 {
            insert(&mut producer, n, n).await?;
        }
        anyhow::Ok(())
    });
    let (mut connection, mut looks) = (world.connect().await?, 0);
    while !producing.is_finished() {
        assert_eq!(world.outbox.continue_sequences(&mut connection).await?, []);
        looks += 1;
    }
    producing.await??;
    println!("{looks} looks");
    Ok(())
}

/// Nobody has to read the sequence for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_read_the_sequence_finds_out_by_a_row_that_is_not_kept() -> Result<()> {
    let world = World::new().await?;
    let mut owner = world.connect().await?;
    insert(&mut owner, 1, 5).await?;
    let role = format!("r_{}", world.database.name());
    owner
        .execute(sqlx::AssertSqlSafe(format!(
            "CREATE ROLE {role}; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}; SET ROLE {role}"
        )))
        .await?;
    assert_eq!(world.outbox.continue_sequences(&mut owner).await?, []);
    assert_eq!(world.outbox.sequences(&mut owner).await?[0].next, None);
    owner.execute("RESET ROLE").await?;
    assert_eq!(world.database.psql("SELECT count(*), count(*) FILTER (WHERE event_type = 'probe') FROM event_outbox;")?, "5|0\n");
    owner.execute(sqlx::AssertSqlSafe(format!("DROP OWNED BY {role}; DROP ROLE {role}"))).await?;
    Ok(())
}
