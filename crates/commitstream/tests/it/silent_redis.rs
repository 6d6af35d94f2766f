//! Connections to Redis that die in silence: nothing is passed on any more, nobody says so, and new connections are served. Everything
//! goes on within seconds, at the default settings, wherever the connection leads to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::EventEnvelope;
use commitstream::config::RedisSettings;
use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError};
use commitstream::publisher::RedisStreamsPublisher;
use commitstream::streams::Streams;
use commitstream_sandbox::{FaultProxy, Redis, RedisCluster, RedisSentinel, Sandbox};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::events::{envelope, session, user};
use crate::support::World;

/// Longest that anything may take to go on, and a second for a busy machine.
const BOUND: Duration = Duration::from_secs(6);

/// Longer than a connection may lie idle before it is tested.
const IDLE: Duration = Duration::from_millis(300);

/// Silences of one connection after the other.
const ROUNDS: usize = 3;

/// Servers, each behind a proxy.
struct Silenced {
    name: &'static str,
    proxies: Vec<FaultProxy>,
    /// Through the proxies.
    url: String,
    /// Past them.
    direct: String,
    _servers: Servers,
}

enum Servers {
    Plain { _redis: Redis },
    Sentinel { _redis: RedisSentinel },
    Cluster { _redis: RedisCluster },
}

impl Silenced {
    fn plain() -> Result<Self> {
        let redis = Redis::start()?;
        let proxy = FaultProxy::start(address(&redis.url())?)?;
        let (url, direct) = (proxy.url(&redis.url()), redis.url());
        Ok(Self { name: "plain", proxies: vec![proxy], url, direct, _servers: Servers::Plain { _redis: redis } })
    }

    /// The proxy before each sentinel has it name that of the master.
    fn sentinel() -> Result<Self> {
        let redis = RedisSentinel::start(0)?;
        let direct = redis.url();
        let (url, proxies) = Self::behind_proxies(&direct, &[redis.servers()[0].url()], |port| format!("\r\n{port}\r\n"))?;
        Ok(Self { name: "sentinel", proxies, url, direct, _servers: Servers::Sentinel { _redis: redis } })
    }

    /// The proxy before each node has it name the proxies of the others.
    fn cluster() -> Result<Self> {
        let redis = RedisCluster::start()?;
        let direct = redis.url();
        let (url, proxies) = Self::behind_proxies(&direct, &[], |port| format!(":{port}\r\n"))?;
        Ok(Self { name: "cluster", proxies, url, direct, _servers: Servers::Cluster { _redis: redis } })
    }

    /// A proxy for each address of the URL and for each server besides; in what servers say of each other, `named` is a port.
    fn behind_proxies(url: &str, besides: &[String], named: impl Fn(&str) -> String) -> Result<(String, Vec<FaultProxy>)> {
        let (login, rest) = url.rsplit_once('@').context("a login")?;
        let (hosts, path) = rest.split_once('/').map_or((rest, String::new()), |(hosts, path)| (hosts, format!("/{path}")));
        let besides = besides.iter().map(|url| address(url)).collect::<Result<Vec<_>>>()?;
        let addresses: Vec<&str> = hosts.split(',').chain(besides.iter().map(String::as_str)).collect();
        let proxies: Vec<FaultProxy> = addresses.iter().map(|at| Ok(FaultProxy::start(*at)?)).collect::<Result<_>>()?;
        for (at, proxy) in addresses.iter().zip(&proxies) {
            let (_, port) = at.rsplit_once(':').context("a port")?;
            proxies.iter().for_each(|each| each.rewrite(named(port), named(&proxy.port().to_string())));
        }
        let hosts: Vec<String> = proxies[..hosts.split(',').count()].iter().map(|p| format!("127.0.0.1:{}", p.port())).collect();
        Ok((format!("{login}@{}{path}", hosts.join(",")), proxies))
    }

    fn all() -> Result<[Self; 3]> {
        Ok([Self::plain()?, Self::sentinel()?, Self::cluster()?])
    }

    fn silence(&self) {
        self.proxies.iter().for_each(FaultProxy::swallow);
    }

    async fn world(&self) -> Result<World> {
        let mut world = World::on(Sandbox::shared().database()?, &self.url, "events:".into())?;
        let RedisSettings { connect_timeout, response_timeout, .. } = RedisSettings::default();
        world.settings.redis.connect_timeout = connect_timeout;
        world.settings.redis.response_timeout = response_timeout;
        world.streams = self.past()?;
        world.outbox.migrate(&mut world.connect().await?).await?;
        Ok(world)
    }

    fn past(&self) -> Result<Streams> {
        Ok(Streams::new(&self.direct, &RedisSettings::default())?)
    }

    fn through(&self) -> Result<Streams> {
        Ok(Streams::new(&self.url, &RedisSettings::default())?)
    }
}

fn address(url: &str) -> Result<String> {
    Ok(url.rsplit_once('@').context("a login")?.1.to_owned())
}

/// Silences all connections some times, and each time waits until what must go on has gone on.
async fn silenced(
    what: &str,
    silenced: &Silenced,
    idle: Duration,
    mut goes_on: impl AsyncFnMut(usize) -> Result<()>,
) -> Result<()> {
    let mut slowest = Duration::ZERO;
    goes_on(0).await.context("before anything is silent")?;
    for round in 1..=ROUNDS {
        sleep(idle).await;
        silenced.silence();
        let began = Instant::now();
        let bounded = timeout(Duration::from_secs(60), goes_on(round)).await;
        bounded.with_context(|| format!("{what}, {}, round {round}: nothing for a minute", silenced.name))??;
        slowest = slowest.max(began.elapsed());
    }
    let when = if idle.is_zero() { "at work" } else { "idle" };
    println!("slowest recovery: {what}, {}, {when}: {slowest:?}", silenced.name);
    ensure!(slowest < BOUND, "{what}, {}: {slowest:?}", silenced.name);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_goes_on_past_dead_connections() -> Result<()> {
    for servers in Silenced::all()? {
        let world = servers.world().await?;
        let publisher = RedisStreamsPublisher::new(&world.settings)?;
        for idle in [IDLE, Duration::ZERO] {
            silenced("publisher", &servers, idle, async |_| {
                // It repeats nothing by itself; whoever calls again succeeds.
                while publisher.publish(&session(1)).await.is_err() {}
                Ok(())
            })
            .await?;
        }
    }
    Ok(())
}

/// An idle connection is tested before anything is sent, so nothing fails at all.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_fails_on_an_idle_connection_that_is_dead() -> Result<()> {
    for servers in Silenced::all()? {
        let streams = servers.through()?;
        silenced("first call", &servers, IDLE, async |_| Ok(streams.publish(&[happened()?]).await.map_err(|n| n.error)?)).await?;
    }
    Ok(())
}

/// Whoever gives up early, again and again, leaves no dead connection for the next.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_gives_up_leaves_no_dead_connection_behind() -> Result<()> {
    for servers in Silenced::all()? {
        let streams = servers.through()?;
        for idle in [IDLE, Duration::ZERO] {
            silenced("callers that give up", &servers, idle, async |_| {
                while !matches!(timeout(Duration::from_millis(80), streams.len("events:user")).await, Ok(Ok(_))) {
                    sleep(Duration::from_millis(5)).await;
                }
                Ok(())
            })
            .await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_goes_on_past_dead_connections() -> Result<()> {
    for servers in Silenced::all()? {
        let world = servers.world().await?;
        let relay = world.relay()?;
        for idle in [IDLE, Duration::ZERO] {
            silenced("relay", &servers, idle, async |_| {
                world.insert(10, 5).await?;
                world.drained().await
            })
            .await?;
        }
        relay.stop().await?;
        world.audit().await?;
    }
    Ok(())
}

/// Batches are counted as appended when replicas have them, for which a connection is blocked.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_waits_for_replicas_goes_on_past_dead_connections() -> Result<()> {
    let master = Redis::start()?;
    let _replica = Redis::start_replica_of(&master)?;
    let proxy = FaultProxy::start(address(&master.url())?)?;
    let (url, direct) = (proxy.url(&master.url()), master.url());
    let servers =
        Silenced { name: "with a replica", proxies: vec![proxy], url, direct, _servers: Servers::Plain { _redis: master } };
    let mut world = servers.world().await?;
    world.settings.redis.wait_replicas = 1;
    let relay = world.relay()?;
    for idle in [IDLE, Duration::ZERO] {
        silenced("relay", &servers, idle, async |_| {
            world.insert(10, 5).await?;
            world.drained().await
        })
        .await?;
    }
    relay.stop().await?;
    world.audit().await?;
    Ok(())
}

struct Tells(mpsc::Sender<Uuid>);

impl Handler<EventEnvelope> for Tells {
    async fn handle(&self, event: EventEnvelope, _: &Delivery) -> Result<(), HandlerError> {
        Ok(self.0.send(event.id).await?)
    }
}

/// Its commands and its blocking read have a connection each.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_goes_on_past_dead_connections() -> Result<()> {
    for servers in Silenced::all()? {
        let world = servers.world().await?;
        let (handled, mut received) = mpsc::channel(1_000);
        let consumer = Consumer::new("silent", &world.settings)?.on_any("user", Tells(handled)).start()?;
        for idle in [IDLE, Duration::from_secs(2), Duration::ZERO] {
            silenced("consumer", &servers, idle, async |_| {
                let event = happened()?;
                world.streams.publish(std::slice::from_ref(&event)).await.map_err(|not_published| not_published.error)?;
                while received.recv().await.context("the consumer has ended")? != event.id {}
                Ok(())
            })
            .await?;
        }
        consumer.stop().await?;
    }
    Ok(())
}

/// What the command line and the console follow streams with.
#[tokio::test(flavor = "multi_thread")]
async fn a_tail_goes_on_past_dead_connections() -> Result<()> {
    for servers in Silenced::all()? {
        let (past, through) = (servers.past()?, servers.through()?);
        let stream = past.stream_of("user");
        let mut tail = through.tail(BTreeMap::from([(stream, "0".to_owned())]));
        for idle in [IDLE, Duration::ZERO] {
            silenced("tail", &servers, idle, async |_| {
                let event = happened()?;
                past.publish(std::slice::from_ref(&event)).await.map_err(|not_published| not_published.error)?;
                let id = event.id.to_string();
                loop {
                    let entries = tail.next(100, Duration::from_secs(1)).await.unwrap_or_default();
                    if entries.iter().any(|entry| entry.field("id") == Some(&id)) {
                        return Ok(());
                    }
                }
            })
            .await?;
        }
    }
    Ok(())
}

/// A server that is slow is no dead connection: what was sent has its answer, on the connection that it was sent on.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_server_is_waited_for() -> Result<()> {
    let servers = Silenced::plain()?;
    let (streams, events) = (servers.through()?, [happened()?]);
    let stalled = async {
        // Longer than the moment when another connection is tried, shorter than the limit of an answer.
        sleep(RedisSettings::default().response_timeout * 7 / 10).await;
        servers.proxies.iter().for_each(FaultProxy::flow);
    };
    streams.ping().await?;
    servers.proxies.iter().for_each(FaultProxy::stall);
    let (published, ()) = tokio::join!(streams.publish(&events), stalled);
    published.map_err(|not_published| not_published.error)?;
    assert_eq!(streams.len("events:user").await?, 1);
    Ok(())
}

fn happened() -> Result<EventEnvelope> {
    envelope("user", "1", &user(1))
}
