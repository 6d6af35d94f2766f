//! A Redis Cluster: streams on several masters, which change places.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::event::EventEnvelope;
use commitstream::streams::{Entry, StreamTail};
use commitstream_sandbox::{RedisCluster, Sandbox};

use crate::events::envelope;
use crate::support::{World, eventually};

/// So many aggregate types that every master has streams.
const TYPES: usize = 12;

fn world_on(cluster: &RedisCluster) -> Result<World> {
    let world = World::on(Sandbox::shared().database()?, &cluster.url(), "events:".into())?;
    let masters: BTreeSet<usize> = (0..TYPES).map(|n| Ok(cluster.master_of(&stream(n))?)).collect::<Result<_>>()?;
    ensure!(masters.len() == 3, "streams on {masters:?} only");
    Ok(world)
}

fn stream(n: usize) -> String {
    format!("events:type{n}")
}

/// The numbers that arrived in each stream, in order; one that came a second time after a failover only once.
#[derive(Default)]
struct Arrived(BTreeMap<String, Vec<u64>>);

impl Arrived {
    fn add(&mut self, entries: &[Entry]) -> Result<()> {
        for entry in entries {
            let number = entry.field("aggregate_id").context("an aggregate")?.parse()?;
            let numbers = self.0.entry(entry.stream.clone()).or_default();
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
        Ok(())
    }

    /// Reads on until every stream has the numbers from 0.
    async fn all(&mut self, tail: &mut StreamTail, each: u64) -> Result<()> {
        eventually("the tail to have everything", async || {
            match tail.next(500, Duration::from_millis(200)).await {
                Ok(entries) => self.add(&entries)?,
                Err(error) => ensure!(error.is_outage(), "{error:?}"),
            }
            Ok((0..TYPES).all(|n| self.0.get(&stream(n)).is_some_and(|numbers| numbers.len() as u64 == each)))
        })
        .await?;
        for (stream, numbers) in &self.0 {
            ensure!(numbers.is_sorted(), "{stream}: {numbers:?}");
        }
        Ok(())
    }
}

/// Events `from..to` of every type, mixed as an application would.
fn envelopes(from: u64, to: u64) -> Result<Vec<EventEnvelope>> {
    (from..to).flat_map(|id| (0..TYPES).map(move |n| envelope(&format!("type{n}"), &id.to_string(), &id))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_on_all_masters_are_written_listed_followed_and_removed() -> Result<()> {
    let cluster = RedisCluster::start()?;
    let world = world_on(&cluster)?;
    world.streams.ping().await?;
    let mut tail = world.streams.tail((0..TYPES).map(|n| (stream(n), "0".to_owned())).collect());
    let mut arrived = Arrived::default();
    world.streams.publish(&envelopes(0, 300)?).await.map_err(|e| e.error)?;
    arrived.all(&mut tail, 300).await?;
    // Its replica takes the place of a master: the next call is redirected, and nobody notices.
    let master = cluster.master_of(&stream(0))?;
    let client = redis::Client::open(cluster.nodes()[master + 3].url())?;
    let mut replica = client.get_multiplexed_async_connection().await?;
    let mut asked = None::<Instant>;
    eventually("the replica to take the place", async || {
        let done = cluster.master_of(&stream(0))? != master;
        // Redis gives an attempt up after five seconds, and says nothing.
        if !done && asked.is_none_or(|asked| asked.elapsed() > Duration::from_secs(6)) {
            redis::cmd("CLUSTER").arg("FAILOVER").query_async::<()>(&mut replica).await?;
            asked = Some(Instant::now());
        }
        Ok(done)
    })
    .await?;
    cluster.wait_for_master_of_other_than(&stream(0), master)?;
    world.streams.publish(&envelopes(300, 400)?).await.map_err(|e| e.error)?;
    arrived.all(&mut tail, 400).await?;
    let streams: BTreeSet<String> = (0..TYPES).map(stream).collect();
    assert_eq!(world.streams.list().await?, streams.iter().cloned().collect::<Vec<_>>());
    for stream in &streams {
        assert_eq!(world.streams.len(stream).await?, 400, "{stream}");
        assert_eq!(world.streams.newest(stream, 1).await?[0].field("aggregate_id"), Some("399"));
    }
    world.streams.remove_all().await?;
    assert!(world.streams.list().await?.is_empty());
    Ok(())
}

/// The killed master comes back as a replica, so that there is one to confirm.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_drains_through_the_loss_of_a_master() -> Result<()> {
    const EACH: i32 = 1_500;
    let cluster = RedisCluster::start()?;
    let mut world = world_on(&cluster)?;
    world.settings.redis.wait_replicas = 1;
    world.outbox.migrate(&mut world.connect().await?).await?;
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                  SELECT 'E', 'type' || t, n::text, '{}' FROM generate_series(0, $1 - 1) n, generate_series(0, $2 - 1) t";
    let types = i32::try_from(TYPES)?;
    sqlx::query(insert).bind(EACH).bind(types).execute(&mut world.connect().await?).await?;
    let mut tail = world.streams.tail((0..TYPES).map(|n| (stream(n), "0".to_owned())).collect());
    let relay = world.relay()?;
    relay.watch().wait_for(|s| s.published > 2_000).await?;
    let master = cluster.master_of(&stream(0))?;
    cluster.nodes()[master].kill()?;
    cluster.wait_for_master_of_other_than(&stream(0), master)?;
    cluster.nodes()[master].restart()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, usize::try_from(EACH * types)?);
    Arrived::default().all(&mut tail, EACH.try_into()?).await
}
