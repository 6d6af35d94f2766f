//! A slow consumer is not a dead one, and what members leave behind in Redis is bounded.
#![allow(clippy::unwrap_used, reason = "locks that only a failed test poisons")]

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::EventEnvelope;
use commitstream::config::StartFrom;
use commitstream::consumer::{BatchHandler, Consumer, ConsumerHandle, Delivery, Handler, HandlerError};
use commitstream::streams::{EntryId, Member, dead_stream};
use serde::{Deserialize, Serialize};
use tokio::runtime::{Builder, Runtime};

use crate::consumer_book::{Book, GROUP, Writer, all_acknowledged, publish, start};
use crate::support::{World, eventually};

/// A runtime of two threads, as a small machine has; its end waits for nobody.
struct Small(Option<Runtime>);

impl Small {
    fn new() -> Result<Self> {
        Ok(Self(Some(Builder::new_multi_thread().worker_threads(2).enable_all().build()?)))
    }

    fn runtime(&self) -> &Runtime {
        self.0.as_ref().unwrap()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// Holds its thread, as a handler does that computes or reads a file: once for the first event of aggregates 1 and 2.
struct Blocks {
    book: Arc<Book>,
    held: Arc<AtomicUsize>,
    time: Duration,
}

impl Handler<EventEnvelope> for Blocks {
    async fn handle(&self, event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        self.book.begin(delivery)?;
        if ["1", "2"].contains(&&*event.aggregate_id) && event.payload.get() == "0" {
            self.held.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(self.time);
        }
        tokio::task::yield_now().await;
        self.book.end(delivery);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_that_hold_every_thread_for_longer_than_claim_idle_keep_their_events() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.claim_idle = Duration::from_secs(2);
    let (small, book, held) = (Small::new()?, Arc::new(Book::default()), Arc::new(AtomicUsize::new(0)));
    let blocks = Blocks { book: book.clone(), held: held.clone(), time: Duration::from_secs(6) };
    publish(&world, 400, 20).await?;
    let slow = {
        let _of = small.runtime().enter();
        start(&world, blocks)?
    };
    eventually("both threads to be held", async || Ok(held.load(Ordering::Relaxed) == 2)).await?;
    let other = start(&world, Writer(book.clone()))?;
    eventually("all to be handled", async || Ok(book.count() >= 400)).await?;
    all_acknowledged(&world).await?;
    small.runtime().spawn(slow.stop()).await??;
    other.stop().await?;
    book.check(400)?;
    assert_eq!(world.streams.len(&dead_stream(&world.user_stream())).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_in_time_though_a_handler_holds_its_thread() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.claim_idle = Duration::from_secs(1);
    world.settings.consumer.shutdown_timeout = Duration::from_secs(1);
    publish(&world, 3, 3).await?;
    let (small, book, held) = (Small::new()?, Arc::new(Book::default()), Arc::new(AtomicUsize::new(0)));
    let blocks = Blocks { book: book.clone(), held: held.clone(), time: Duration::from_secs(20) };
    let slow = {
        let _of = small.runtime().enter();
        start(&world, blocks)?
    };
    eventually("both threads to be held", async || Ok(held.load(Ordering::Relaxed) == 2)).await?;
    let begun = Instant::now();
    // On this runtime, whose threads are free, and whose clock is not needed.
    let stopped = slow.stop().await;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(10), "it took {took:?}");
    let error = stopped.err().context("it says that a handler goes on")?.to_string();
    ensure!(error.contains("app.consumer.shutdownTimeout"), "{error}");
    // As long as the handlers are at work, nobody else has their aggregates.
    let other = Arc::new(Book::default());
    let next = start(&world, Writer(other.clone()))?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(!other.seen.lock().unwrap().contains_key("1"), "{:?}", other.seen.lock().unwrap());
    drop(small);
    next.stop().await?;
    Ok(())
}

#[derive(Debug, Clone, Serialize, Deserialize, commitstream::DomainEvent)]
#[event(aggregate = "user")]
struct Number {
    #[event(key)]
    n: u64,
}

/// Cannot reach its server at first.
struct Offline(Arc<Mutex<Vec<usize>>>, AtomicBool);

impl BatchHandler<Number> for Offline {
    async fn handle(&self, events: Vec<(Number, Delivery)>) -> Result<(), HandlerError> {
        if !self.1.swap(true, Ordering::Relaxed) {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        self.0.lock().unwrap().push(events.len());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_met_an_outage_is_handled_as_a_batch_again() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.concurrency = 1;
    let numbers: Vec<EventEnvelope> =
        (0..400).map(|n| Ok(commitstream::DomainEvent::envelope(&Number { n })?)).collect::<Result<_>>()?;
    world.streams.publish(&numbers).await.map_err(|e| e.error)?;
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let handler = Offline(sizes.clone(), AtomicBool::default());
    let consumer = Consumer::new(GROUP, &world.settings)?.on_batch::<Number>(handler).start()?;
    consumer.wait_for(|status| status.handled >= 400).await.context("ended")?;
    all_acknowledged(&world).await?;
    let status = consumer.stop().await?;
    assert_eq!((status.handled, status.failed, status.dead), (400, 0, 0));
    let calls = sizes.lock().unwrap().len();
    ensure!(calls < 100, "{calls} calls for 400 events");
    Ok(())
}

/// Fails for aggregate 0, so that the group always has something pending.
struct Stubborn(Arc<Book>);

impl Handler<EventEnvelope> for Stubborn {
    async fn handle(&self, event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        if event.aggregate_id == "0" {
            return Err(HandlerError::retry_later(Duration::from_secs(3_600), "not today"));
        }
        self.0.begin(delivery)?;
        self.0.end(delivery);
        Ok(())
    }
}

/// Fields of a hash that members keep.
async fn hash(world: &World, name: &str) -> Result<HashMap<String, String>> {
    let key = format!("{{{}}}:group:{GROUP}:{name}", world.user_stream());
    Ok(redis::cmd("HGETALL").arg(key).query_async(&mut world.redis().await?).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn deploys_leave_nothing_behind_in_a_group_that_is_never_at_rest() -> Result<()> {
    let world = World::new().await?;
    let book = Arc::new(Book::default());
    let (mut handled, deploys, aggregates) = (0, 12, 40);
    let mut running: Option<ConsumerHandle> = None;
    for _ in 0..deploys {
        let next = start(&world, Stubborn(book.clone()))?;
        publish(&world, aggregates, aggregates).await?;
        if let Some(before) = running.replace(next) {
            // In the middle of its work.
            before.stop().await?;
        }
        handled += usize::try_from(aggregates)? - 1;
        eventually("all others to be handled", async || Ok(book.count() >= handled)).await?;
    }
    let last = running.context("one is running")?;
    let settled = async || Ok(hash(&world, "successors").await?.len() <= 1 && hash(&world, "owners").await?.len() <= 1);
    let bounded = eventually("what the dead left to be pruned", settled).await;
    println!("owners {:?}, successors {:?}", hash(&world, "owners").await?, hash(&world, "successors").await?);
    bounded?;
    assert_eq!(book.count(), handled);
    last.stop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lost_answers_gave_is_found_and_handled_once_and_in_order() -> Result<()> {
    let redis = commitstream_sandbox::Redis::start()?;
    let url = redis.url();
    let proxy = commitstream_sandbox::FaultProxy::start(url.rsplit_once('@').context("a login")?.1)?;
    let database = commitstream_sandbox::Sandbox::shared().database()?;
    let mut world = World::on(database, &url, "events:".into())?;
    publish(&world, 3_000, 30).await?;
    world.settings.redis.url = Some(proxy.url(&url));
    world.settings.consumer.batch_size = 50;
    let book = Arc::new(Book::default());
    let consumer = start(&world, Writer(book.clone()))?;
    let mut lost = 0;
    while book.count() < 3_000 {
        let before = (proxy.fired(), book.count());
        proxy.drop_reply();
        eventually("an answer to be lost, and work to go on", async || {
            Ok(book.count() >= 3_000 || (proxy.fired() > before.0 && book.count() > before.1))
        })
        .await?;
        lost += 1;
    }
    all_acknowledged(&world).await?;
    println!("{lost} answers were lost");
    consumer.stop().await?;
    book.check(3_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_member_has_in_hand_is_listed_a_page_at_a_time_and_without_payloads() -> Result<()> {
    let world = World::new().await?;
    publish(&world, 300, 3).await?;
    let member = Member { stream: world.user_stream(), group: GROUP.into(), name: "one".into(), life: Duration::from_secs(60) };
    world.streams.join_group(&member, StartFrom::Beginning).await?;
    let given = world.streams.cycle(&member, 1, &[], &[] as &[&str], 250).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
    let (mut after, mut found) = (EntryId::default(), Vec::new());
    while let Ok(page) = world.streams.pending_of(&member, after, 100).await? {
        let Some((last, _)) = page.last() else { break };
        after = *last;
        ensure!(page.len() <= 100, "{}", page.len());
        found.extend(page);
    }
    assert_eq!(found, given.received.iter().map(|entry| (entry.id, 1)).collect::<Vec<_>>());
    let described = world.streams.describe(&member, &[found[1].0]).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
    assert_eq!(described, [(found[1].0, "1".to_owned(), String::new())]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_counts_no_delivery_and_a_death_only_those_that_were_at_work() -> Result<()> {
    let world = World::new().await?;
    publish(&world, 4, 4).await?;
    let member = |name: &str, life: u64| Member {
        stream: world.user_stream(),
        group: GROUP.into(),
        name: name.into(),
        life: Duration::from_millis(life),
    };
    let (silent, other) = (member("silent", 50), member("other", 60_000));
    let streams = &world.streams;
    streams.join_group(&silent, StartFrom::Beginning).await?;
    let given = streams.cycle(&silent, 1, &[], &[] as &[&str], 10).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
    let ids: Vec<EntryId> = given.received.iter().map(|entry| entry.id).collect();
    streams.note_started(&silent, &ids[1..2]).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
    streams.join_group(&other, StartFrom::Beginning).await?;
    eventually("its time to be over", async || {
        let taken = streams.take_over(&other, 100).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
        Ok(taken.entries == 4)
    })
    .await?;
    let counts = async || {
        let page = streams.pending_of(&other, EntryId::default(), 10).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
        anyhow::Ok(page.into_iter().map(|(_, deliveries)| deliveries).collect::<Vec<_>>())
    };
    assert_eq!(counts().await?, [1, 2, 1, 1]);
    let cycle = streams.cycle(&other, 1, &[], &[] as &[&str], 10).await?.map_err(|gone| anyhow::anyhow!("{gone:?}"))?;
    ensure!(cycle.received.iter().all(|entry| entry.inherited), "that they are at work is said from now on");
    ensure!(streams.heartbeat(&silent).await?.is_err(), "it is no member any more");
    // It was not dead, and says so.
    streams.leave_group(&silent, &[(ids[1], 1)]).await?;
    assert_eq!(counts().await?, [1, 1, 1, 1]);
    Ok(())
}
