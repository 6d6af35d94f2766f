//! The relay and its servers are killed, paused and restarted.

use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::relay::RelayState;
use commitstream_sandbox::{Postgres, Redis, Sandbox};
use rand::{Rng, SeedableRng};
use sqlx::Connection;

use crate::relay_process;
use crate::support::{World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn killed_five_times_while_draining_50_000_nothing_is_lost_doubled_or_out_of_order() -> Result<()> {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let world = World::new().await?;
    world.insert(50_000, 500).await?;
    let mut connection = world.connect().await?;
    let mut published = async || -> Result<i64> {
        Ok(sqlx::query_scalar("SELECT count(*) FROM event_outbox WHERE status = 'PUBLISHED'").fetch_one(&mut connection).await?)
    };
    for kill in 1..=5 {
        let before = published().await?;
        let started = std::time::Instant::now();
        let mut relay = relay_process::spawn(&world)?;
        eventually("the relay to publish", async || Ok(published().await? > before)).await?;
        println!("kill {kill}: {before} published before, progress after {:?}", started.elapsed());
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..150_000))).await;
        relay.kill()?;
        relay.wait()?;
    }
    println!("{} published after five kills", published().await?);
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 50_000, "seed {seed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_redis_costs_no_attempt_and_no_event() -> Result<()> {
    let redis = Redis::start()?;
    let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.settings.redis.response_timeout = Duration::from_millis(500);
    world.outbox.migrate(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    world.insert(5_000, 50).await?;
    status.wait_for(|s| s.published > 0).await?;
    redis.kill()?;
    world.insert(5_000, 50).await?;
    status.wait_for(|s| matches!(&s.state, RelayState::Unable { reason } if reason.contains("Redis"))).await?;
    redis.restart()?;
    world.drained().await?;
    // No answer at all: calls time out, their outcome is unknown, and some were carried out.
    for _ in 0..3 {
        redis.pause()?;
        world.insert(2_000, 50).await?;
        status.wait_for(|s| matches!(s.state, RelayState::Unable { .. })).await?;
        redis.resume()?;
        world.drained().await?;
    }
    let counted: i64 = sqlx::query_scalar("SELECT count(*) FROM event_outbox WHERE retry_count > 0 OR last_error IS NOT NULL")
        .fetch_one(&mut world.connect().await?)
        .await?;
    assert_eq!(counted, 0);
    relay.stop().await?;
    assert_eq!(world.audit().await?, 16_000);
    Ok(())
}

/// No memory is an outage of Redis, not a fault of the events.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_is_waited_for() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    let mut client = world.redis().await?;
    redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).query_async::<()>(&mut client).await?;
    let relay = world.relay()?;
    world.insert(100, 10).await?;
    relay.watch().wait_for(|s| matches!(&s.state, RelayState::Unable { reason } if reason.contains("OOM"))).await?;
    redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(0).query_async::<()>(&mut client).await?;
    world.drained().await?;
    assert_eq!(relay.status().refused, 0);
    relay.stop().await?;
    assert_eq!(world.audit().await?, 100);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_reconnects_after_restarts_of_postgresql() -> Result<()> {
    // Settles do not wait for the disk, so a kill undoes the last of them: the more, the longer PostgreSQL takes to write them.
    let postgres = Postgres::start_with(&[("wal_writer_delay", "10s")])?;
    let sandbox = Sandbox::shared();
    let mut world = World::on(sandbox.database()?, &sandbox.redis_url(), sandbox.key_prefix()?)?;
    world.settings.database.url = Some(postgres.url());
    let connect = async || -> Result<sqlx::PgConnection> { Ok(sqlx::PgConnection::connect(&postgres.url()).await?) };
    world.outbox.migrate(&mut connect().await?).await?;
    let relay = world.relay()?;
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                  SELECT 'E', 'user', (n % 50)::text, '{}' FROM generate_series(1, 5000) n";
    for round in 0..4 {
        sqlx::raw_sql(insert).execute(&mut connect().await?).await?;
        // Of the table: what was settled when a server was killed is not counted by the relay.
        let until = round * 5_000 + if round < 2 { 1 } else { 5_000 };
        let mut connection = connect().await?;
        eventually("the round's events to be published", async || {
            let sent = "SELECT count(*) FROM event_outbox WHERE status = 'PUBLISHED'";
            Ok(sqlx::query_scalar::<_, i64>(sent).fetch_one(&mut connection).await? >= until)
        })
        .await?;
        if round % 2 == 0 {
            postgres.kill()?
        } else {
            postgres.stop()?
        }
        postgres.restart()?;
        let mut connection = connect().await?;
        eventually("the outbox to be drained", async || {
            let unsent = "SELECT count(*) FROM event_outbox WHERE status = 'PENDING'";
            Ok(sqlx::query_scalar::<_, i64>(unsent).fetch_one(&mut connection).await? == 0)
        })
        .await?;
    }
    relay.stop().await?;
    let ids: Vec<String> = sqlx::query_scalar("SELECT id::text FROM event_outbox ORDER BY aggregate_id, seq")
        .fetch_all(&mut connect().await?)
        .await?;
    let mut entries = world.entries(&world.user_stream()).await?;
    entries.sort_by(|a, b| a.field("aggregate_id").cmp(&b.field("aggregate_id")));
    let sent = entries.iter().map(|e| e.field("id").map(str::to_owned).context("no id")).collect::<Result<Vec<_>>>()?;
    assert_eq!(sent, ids);
    Ok(())
}
