//! Several relays share the outbox: evenly, in order, and whatever becomes of one of them.

use std::collections::BTreeSet;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use commitstream::config::AfterFailure;
use commitstream::outbox::{Deed, RelayRow, Remedy, Selection};
use commitstream::relay::{RelayHandle, RelayState};
use commitstream_sandbox::Redis;
use uuid::Uuid;

use crate::relay_process;
use crate::support::{World, eventually};

impl World {
    async fn relays(&self) -> Result<Vec<RelayRow>> {
        Ok(self.outbox.relays(&mut self.connect().await?).await?)
    }

    /// Waits until so many living relays own all partitions, each as many as the others, give or take one.
    async fn shared_by(&self, relays: usize) -> Result<()> {
        eventually("the partitions to be shared evenly", async || {
            let alive: Vec<i64> = self.relays().await?.iter().filter(|r| r.alive).map(|r| r.partitions).collect();
            let spread = alive.iter().max().zip(alive.iter().min()).map(|(most, least)| most - least);
            Ok(alive.len() == relays && alive.iter().sum::<i64>() == 64 && spread.is_some_and(|spread| spread <= 1))
        })
        .await
    }
}

fn signal(relay: &Child, name: &str) -> Result<()> {
    let sent = Command::new("kill").args(["-s", name, &relay.id().to_string()]).status()?;
    ensure!(sent.success(), "SIG{name} was not sent");
    Ok(())
}

/// A relay comes, another, and then all but the first go again, while events flow.
#[tokio::test(flavor = "multi_thread")]
async fn relays_share_the_work_evenly_and_in_order() -> Result<()> {
    let world = World::new().await?;
    let mut relays: Vec<RelayHandle> = Vec::new();
    for count in 1..=4_u32 {
        relays.push(world.relay()?);
        world.insert(5_000, 300).await?;
        world.shared_by(relays.len()).await?;
        world.insert(5_000, 300).await?;
        world.drained().await?;
        let published: Vec<u64> = relays.iter().map(|r| r.status().published).collect();
        println!("{count} relays, published since the start of each: {published:?}");
    }
    ensure!(relays.iter().all(|relay| relay.status().published > 0), "each had its share");
    while relays.len() > 1 {
        world.insert(5_000, 300).await?;
        relays.swap_remove(1).stop().await?;
        world.shared_by(relays.len()).await?;
        world.drained().await?;
    }
    ensure!(relays.iter().all(|relay| relay.status().state == RelayState::Active));
    relays.remove(0).stop().await?;
    assert_eq!(world.audit().await?, 55_000);
    assert!(world.relays().await?.is_empty(), "who stopped gracefully is off the list");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_relay_had_is_taken_over_at_once() -> Result<()> {
    let world = World::new().await?;
    let mut victim = relay_process::spawn(&world)?;
    let relay = world.relay()?;
    world.shared_by(2).await?;
    world.insert(20_000, 500).await?;
    relay.watch().wait_for(|s| s.published > 0).await?;
    victim.kill()?;
    let killed = Instant::now();
    victim.wait()?;
    relay.watch().wait_for(|s| s.partitions == 64 && s.state == RelayState::Active).await?;
    println!("taken over {:?} after the kill", killed.elapsed());
    ensure!(killed.elapsed() < Duration::from_secs(5), "long before the lease of 10 s ends");
    world.drained().await?;
    let gone: Vec<RelayRow> = world.relays().await?.into_iter().filter(|r| !r.alive).collect();
    assert_eq!((gone.len(), gone[0].state.as_str(), gone[0].partitions), (1, "gone", 0));
    relay.stop().await?;
    assert_eq!(world.audit().await?, 20_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_alone_goes_on_at_once_after_a_kill() -> Result<()> {
    let world = World::new().await?;
    let mut victim = relay_process::spawn(&world)?;
    world.insert(10_000, 100).await?;
    eventually("the relay to publish", async || Ok(world.stats().await?.published > 0)).await?;
    victim.kill()?;
    victim.wait()?;
    let restarted = Instant::now();
    let relay = world.relay()?;
    relay.watch().wait_for(|s| s.published > 0).await?;
    println!("published again {:?} after the restart", restarted.elapsed());
    ensure!(restarted.elapsed() < Duration::from_secs(5), "long before the lease of 10 s ends");
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 10_000);
    Ok(())
}

/// Of idle relays one holds the sleep lock and the others wait for it in PostgreSQL. A session that waits must not outlive its
/// process: restarts would use up all connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_relay_leaves_no_session_behind() -> Result<()> {
    let world = World::new().await?;
    let relay = world.relay()?;
    world.shared_by(1).await?;
    let mut connection = world.connect().await?;
    let sql = "SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name LIKE 'commitstream relay: sleep%'";
    let mut sessions = async || -> Result<i64> { Ok(sqlx::query_scalar(sql).fetch_one(&mut connection).await?) };
    for _ in 0..2 {
        let mut victim = relay_process::spawn(&world)?;
        eventually("the second relay to wait for the lock", async || Ok(sessions().await? == 2)).await?;
        world.shared_by(2).await?;
        victim.kill()?;
        victim.wait()?;
        eventually("its session to end", async || Ok(sessions().await? == 1)).await?;
    }
    relay.stop().await?;
    Ok(())
}

/// A statement that waits keeps its snapshot, and that holds back vacuum in the whole database. Relays idle for days.
#[tokio::test(flavor = "multi_thread")]
async fn relays_that_wait_for_the_sleep_lock_do_not_hold_back_vacuum() -> Result<()> {
    let world = World::new().await?;
    let relays = [world.relay()?, world.relay()?];
    world.shared_by(2).await?;
    let mut connection = world.connect().await?;
    let horizon = "SELECT backend_xmin::text::bigint FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock' AND application_name LIKE 'commitstream relay: sleep%'";
    let mut first = None;
    eventually("the horizon of the waiting session to move on", async || {
        // Heartbeats use up transaction ids meanwhile.
        let now: Option<i64> = sqlx::query_scalar(horizon).fetch_optional(&mut connection).await?.flatten();
        first = first.or(now);
        Ok(now > first)
    })
    .await?;
    for relay in relays {
        relay.stop().await?;
    }
    Ok(())
}

/// A role or a database may have time-outs. They are not for sessions that wait and idle for long.
#[tokio::test(flavor = "multi_thread")]
async fn time_outs_of_the_database_do_not_end_the_sessions_of_a_relay() -> Result<()> {
    let world = World::new().await?;
    let names = ["statement_timeout", "lock_timeout", "idle_session_timeout"];
    for name in names {
        world.database.psql(&format!("ALTER DATABASE {} SET {name} = '50ms';", world.database.name()))?;
    }
    let mut session = commitstream::outbox::connect(world.database.url(), "test", Duration::from_secs(10)).await?;
    for name in names {
        let value: String = sqlx::query_scalar("SELECT current_setting($1)").bind(name).fetch_one(&mut session).await?;
        assert_eq!(value, "0", "{name}");
    }
    Ok(())
}

/// SIGSTOP for longer than the lease is what a vanished host looks like: its sessions stay. When it comes back it must change nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_relay_is_taken_over_and_changes_nothing_when_it_goes_on() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.lease_duration = Duration::from_secs(1);
    let mut paused = relay_process::spawn(&world)?;
    let relay = world.relay()?;
    world.shared_by(2).await?;
    for round in 1..=5_u32 {
        world.insert(4_000, 200).await?;
        relay.watch().wait_for(|s| s.published > 0).await?;
        signal(&paused, "STOP")?;
        let stopped = Instant::now();
        relay.watch().wait_for(|s| s.partitions == 64).await?;
        println!("round {round}: taken over {:?} after the pause began", stopped.elapsed());
        world.insert(4_000, 200).await?;
        world.drained().await?;
        signal(&paused, "CONT")?;
        world.insert(2_000, 200).await?;
        world.shared_by(2).await?;
        world.drained().await?;
    }
    paused.kill()?;
    paused.wait()?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 50_000);
    Ok(())
}

/// A second relay, with a wrong address for Redis, must not take half of the work and sit on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_cannot_reach_redis_takes_no_partition_and_says_why() -> Result<()> {
    let mut world = World::new().await?;
    let relay = world.relay()?;
    world.shared_by(1).await?;
    let right = world.settings.redis.url.replace("redis://127.0.0.1:1".into());
    let misled = world.relay()?;
    misled.watch().wait_for(|s| matches!(s.state, RelayState::Unable { .. })).await?;
    eventually("the list to name the reason", async || {
        let listed = world.relays().await?;
        Ok(listed.iter().any(|r| r.state == "unable" && r.reason.as_ref().is_some_and(|why| why.contains("127.0.0.1:1"))))
    })
    .await?;
    world.settings.redis.url = right;
    world.insert(1_000, 100).await?;
    world.drained().await?;
    assert_eq!((relay.status().partitions, misled.status().partitions), (64, 0));
    misled.stop().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 1_000);
    Ok(())
}

/// Of two relays one loses its way to Redis, with batches in hand. The other one gets its partitions and finishes them.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_loses_redis_leaves_its_partitions_to_one_that_has_it() -> Result<()> {
    let redis = Redis::start()?;
    let proxy = commitstream_sandbox::FaultProxy::start(redis.url().rsplit_once('@').map_or("", |(_, address)| address))?;
    let sandbox = commitstream_sandbox::Sandbox::shared();
    let mut world = World::on(sandbox.database()?, &redis.url(), "events:".into())?;
    world.settings.outbox.processor.lease_duration = Duration::from_secs(1);
    world.settings.redis.response_timeout = Duration::from_millis(300);
    world.outbox.migrate(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    world.settings.redis.url = Some(proxy.url(&redis.url()));
    let cut_off = world.relay()?;
    world.shared_by(2).await?;
    proxy.stall();
    world.insert(5_000, 200).await?;
    relay.watch().wait_for(|s| s.partitions == 64).await?;
    world.drained().await?;
    proxy.flow();
    cut_off.watch().wait_for(|s| s.state == RelayState::Active).await?;
    world.insert(5_000, 200).await?;
    world.shared_by(2).await?;
    world.drained().await?;
    relay.stop().await?;
    cut_off.stop().await?;
    assert_eq!(world.audit().await?, 10_000);
    Ok(())
}

/// Relays that sleep are woken by commits, although only one of them can hold the sleep lock. Only a notification can be in time.
#[tokio::test(flavor = "multi_thread")]
async fn every_commit_wakes_the_relay_that_it_is_for() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.poll_interval = Duration::from_secs(60);
    let relays = [world.relay()?, world.relay()?, world.relay()?];
    world.shared_by(3).await?;
    let mut connection = world.connect().await?;
    let published = "SELECT count(*) FROM event_outbox WHERE status = 'PUBLISHED'";
    for n in 1..=150_i64 {
        sqlx::query(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user', $1, '{}')",
        )
        .bind(n.to_string())
        .execute(&mut connection)
        .await?;
        let noticed = async {
            while sqlx::query_scalar::<_, i64>(published).fetch_one(&mut connection).await? < n {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok::<_, sqlx::Error>(())
        };
        ensure!(tokio::time::timeout(Duration::from_secs(10), noticed).await.is_ok(), "event {n} was not noticed");
    }
    for relay in relays {
        ensure!(relay.status().published > 0);
        relay.stop().await?;
    }
    assert_eq!(world.audit().await?, 150);
    Ok(())
}

/// With `afterFailure = hold` a failed event keeps the later ones of its aggregate back, and no others, until an operator acts.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_event_holds_its_aggregate_until_an_operator_acts() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.after_failure = AfterFailure::Hold;
    world.settings.outbox.processor.max_retries = 0;
    world.settings.outbox.processor.poll_interval = Duration::from_millis(100);
    world.settings.publishing.max_payload_bytes = 1_024;
    let insert = |aggregate: &str, bytes: u32| {
        format!(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
             VALUES ('E', 'user', '{aggregate}', to_jsonb(repeat('x', {bytes})));"
        )
    };
    for aggregate in ["A", "B"] {
        world.database.psql(&[insert(aggregate, 10), insert(aggregate, 5_000), insert(aggregate, 10)].concat())?;
    }
    world.insert(100, 50).await?;
    let relay = world.relay()?;
    relay.watch().wait_for(|s| s.published == 102 && s.failed == 2).await?;
    for aggregate in ["A", "B"] {
        world.database.psql(&insert(aggregate, 10))?;
    }
    world.insert(100, 50).await?;
    relay.watch().wait_for(|s| s.published == 202).await?;
    let stats = world.stats().await?;
    assert_eq!((stats.pending + stats.processing, stats.failed), (4, 2), "two of each aggregate wait");

    let mut connection = world.connect().await?;
    let failed = world.outbox.failed(&mut connection, &Selection::All { event_type: None }, 10).await?;
    let of = |name: &str| -> Vec<Uuid> { failed.iter().filter(|e| e.aggregate_id == name).map(|e| e.id).collect() };
    let deed = Deed { who: "ada", about: "one" };
    assert_eq!(world.outbox.remedy_events(&mut connection, deed, Remedy::Discard, &of("A")).await?.changed, 1);
    relay.watch().wait_for(|s| s.published == 204).await?;
    relay.stop().await?;
    world.settings.publishing.max_payload_bytes = 1 << 20;
    let relay = world.relay()?;
    assert_eq!(world.outbox.remedy_events(&mut connection, deed, Remedy::Retry, &of("B")).await?.changed, 1);
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 207);
    let entries = world.entries(&world.user_stream()).await?;
    let of_b = entries.iter().filter(|e| e.field("aggregate_id") == Some("B")).count();
    assert_eq!(of_b, 4);
    Ok(())
}

/// The names of the partitions of each aggregate do not change, so the shares of two relays never overlap.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_claimed_by_the_owner_of_its_partition() -> Result<()> {
    let world = World::new().await?;
    let relays = [world.relay()?, world.relay()?];
    world.shared_by(2).await?;
    world.insert(3_000, 300).await?;
    world.drained().await?;
    let mut connection = world.connect().await?;
    let strangers: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM outbox_batch b, unnest(b.event_ids) AS claimed JOIN event_outbox e ON e.id = claimed
         JOIN outbox_lease l USING (partition_no) WHERE l.relay_id <> b.relay_id",
    )
    .fetch_one(&mut connection)
    .await?;
    assert_eq!(strangers, 0);
    let claimers: Vec<Uuid> = sqlx::query_scalar("SELECT relay_id FROM outbox_batch").fetch_all(&mut connection).await?;
    assert_eq!(claimers.into_iter().collect::<BTreeSet<_>>().len(), 2);
    for relay in relays {
        relay.stop().await?;
    }
    assert_eq!(world.audit().await?, 3_000);
    Ok(())
}
