//! Sentinels name the master, and replicas confirm.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream::config::RedisSettings;
use commitstream::relay::RelayState;
use commitstream::streams::Streams;
use commitstream_sandbox::{Redis, RedisSentinel, Sandbox};

use crate::events::envelope;
use crate::support::{World, eventually};

/// One failover demotes a master that runs, and one replaces a master that was killed, each while the relay drains.
///
/// All replicas are waited for. One of the two would not do: while a Sentinel promotes one, the former master still takes writes, and
/// the other confirms them before both are told to follow the new master and forget.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_drains_through_failovers_and_loses_nothing() -> Result<()> {
    let redis = RedisSentinel::start(2)?;
    let mut world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.settings.redis.wait_replicas = 2;
    world.outbox.migrate(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    world.insert(10_000, 200).await?;
    status.wait_for(|s| s.published > 1_000).await?;
    redis.failover()?;
    world.drained().await?;
    world.insert(10_000, 200).await?;
    status.wait_for(|s| s.published > 11_000).await?;
    let former = redis.master()?;
    redis.servers()[former].kill()?;
    status.wait_for(|s| matches!(s.state, RelayState::Unable { .. })).await?;
    redis.wait_for_master_other_than(former)?;
    redis.servers()[former].restart()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 20_000);
    Ok(())
}

/// What only the master has is not settled; when the replica is back, it is not sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_no_replica_has_is_not_settled() -> Result<()> {
    let master = Redis::start()?;
    let replica = Redis::start_replica_of(&master)?;
    let mut world = World::on(Sandbox::shared().database()?, &master.url(), "events:".into())?;
    world.settings.redis.wait_replicas = 1;
    world.settings.redis.wait_timeout = Duration::from_millis(100);
    world.outbox.migrate(&mut world.connect().await?).await?;
    let relay = world.relay()?;
    world.insert(1_000, 10).await?;
    world.drained().await?;
    replica.pause()?;
    world.insert(50, 10).await?;
    let said = |state: &RelayState| matches!(state, RelayState::Unable { reason } if reason.contains("0 of 1 replicas"));
    relay.watch().wait_for(|s| said(&s.state)).await?;
    assert_eq!(world.streams.len(&world.user_stream()).await?, 1_050, "the master has them");
    assert_eq!(world.stats().await?.published, 1_000);
    replica.resume()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 1_050);
    Ok(())
}

/// The former master is still there, and says READONLY.
#[tokio::test(flavor = "multi_thread")]
async fn the_direct_lane_finds_the_new_master() -> Result<()> {
    let redis = RedisSentinel::start(1)?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.streams.publish(&[envelope("user", "before", &1)?]).await.map_err(|e| e.error)?;
    redis.failover()?;
    eventually("the new master to be found", async || {
        let published = world.streams.publish(&[envelope("user", "after", &1)?]).await;
        ensure!(published.as_ref().err().is_none_or(|e| e.error.is_outage()), "{published:?}");
        Ok(published.is_ok())
    })
    .await?;
    assert_eq!(world.streams.len(&world.user_stream()).await?, 2, "READONLY says that nothing was written");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_no_sentinel_knows_is_an_outage_that_says_so() -> Result<()> {
    let redis = RedisSentinel::start(1)?;
    let url = redis.url().replace("#mymaster", "#other");
    let world = World::on(Sandbox::shared().database()?, &url, "events:".into())?;
    let error = world.streams.ping().await.expect_err("nobody knows it");
    let said = format!("{:#}", anyhow::Error::from(error));
    assert!(said.contains("other (sentinels 127.0.0.1:") && said.contains("know no master of this name"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_of_a_sentinel_blames_that_setting() -> Result<()> {
    let redis = RedisSentinel::start(0)?;
    let url = redis.url();
    let (_, hosts) = url.rsplit_once('@').context("a login")?;
    let hosts = hosts.split('/').next().unwrap_or_default();
    for host in hosts.split(',') {
        let mut connection = redis::Client::open(format!("redis://{host}"))?.get_multiplexed_async_connection().await?;
        let mut acl = redis::cmd("ACL");
        acl.arg("SETUSER").arg("default").arg("resetpass").arg(">sesame").exec_async(&mut connection).await?;
    }
    let with = |password: Option<&str>| {
        let settings = RedisSettings { sentinel_password: password.map(str::to_owned), ..RedisSettings::default() };
        Streams::new(&url, &settings)
    };
    for password in [None, Some("wrong")] {
        let error = with(password)?.ping().await.unwrap_err();
        let text = error.to_string();
        ensure!(error.is_outage() && text.contains("REDIS_SENTINEL_PASSWORD"), "{error:?}");
        ensure!(hosts.split(',').any(|host| text.contains(host)) && !text.contains("REDIS_URL"), "{text}");
    }
    Ok(with(Some("sesame"))?.ping().await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_cannot_be_reached_is_named_with_its_address() -> Result<()> {
    let redis = RedisSentinel::start(0)?;
    let streams = Streams::new(&redis.url(), &RedisSettings::default())?;
    streams.ping().await?;
    let master = &redis.servers()[0];
    let (_, address) = master.url().rsplit_once('@').map(|(login, at)| (login.to_owned(), at.to_owned())).context("a login")?;
    // One that does not answer, and one that is not there.
    for silence in [Redis::pause, Redis::kill] {
        silence(master)?;
        streams.ping().await.unwrap_err();
        let error = streams.ping().await.unwrap_err();
        ensure!(
            error.is_outage() && error.to_string().contains(&format!("Redis at {address}, the address of mymaster")),
            "{error}"
        );
    }
    Ok(())
}
