//! Consumers share the work, keep the order, and lose nothing.
#![allow(clippy::unwrap_used, reason = "locks that only a failed test poisons")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::EventEnvelope;
use commitstream::config::{StartFrom, UnknownEvents};
use commitstream::consumer::{
    BatchHandler, Consumer, ConsumerHandle, ConsumerState, Delivery, Handler, HandlerError, WhenUnknown,
};
use commitstream::streams::dead_stream;
use tokio::sync::Semaphore;

use crate::consumer_book::{Book, GROUP, Writer, all_acknowledged, pending, publish, start};
use crate::events::envelope;
use crate::support::{World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn three_consumers_share_the_work_and_keep_the_order_of_each_aggregate() -> Result<()> {
    let world = World::new().await?;
    let book = Arc::new(Book::default());
    let consumers: Vec<ConsumerHandle> = (0..3).map(|_| start(&world, Writer(book.clone()))).collect::<Result<_>>()?;
    for consumer in &consumers {
        consumer.wait_for(|status| status.state == ConsumerState::Active).await.context("ended")?;
    }
    publish(&world, 5_000, 50).await?;
    publish_more(&world, 5_000, 50, 100).await?;
    eventually("all to be handled", async || Ok(book.count() >= 10_000)).await?;
    all_acknowledged(&world).await?;
    let mut handled = Vec::new();
    for consumer in consumers {
        handled.push(consumer.stop().await?.handled);
    }
    book.check(10_000)?;
    assert_eq!(handled.iter().sum::<u64>(), 10_000);
    assert!(handled.iter().all(|handled| *handled > 1_000), "{handled:?}");
    Ok(())
}

async fn publish_more(world: &World, events: u64, aggregates: u64, from: u64) -> Result<()> {
    for chunk in 0..10 {
        let envelopes = (0..events / 10).map(|n| {
            let n = n + chunk * events / 10;
            envelope("user", &(n % aggregates).to_string(), &(from + n / aggregates))
        });
        let envelopes: Vec<EventEnvelope> = envelopes.collect::<Result<_>>()?;
        world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    }
    Ok(())
}

/// Holds every handler until it is let go.
struct Gate(Arc<Semaphore>, Arc<Book>);

impl Handler<EventEnvelope> for Gate {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        self.1.begin(delivery)?;
        self.0.acquire().await?.forget();
        self.1.end(delivery);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_handler_keeps_its_event_and_a_dead_consumer_does_not() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.claim_idle = Duration::from_secs(1);
    publish(&world, 3, 1).await?;
    let (gate, held) = (Arc::new(Semaphore::new(0)), Arc::new(Book::default()));
    let long = start(&world, Gate(gate.clone(), held.clone()))?;
    eventually("the handler to begin", async || Ok(held.count() == 1)).await?;
    let book = Arc::new(Book::default());
    let other = start(&world, Writer(book.clone()))?;
    // Several times as long as a silent consumer would live.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((held.count(), book.count()), (1, 0));
    drop(long);
    eventually("the other one to take over", async || Ok(book.count() == 3)).await?;
    all_acknowledged(&world).await?;
    other.stop().await?;
    book.check(3)
}

/// Fails for one aggregate, as long as it is told to.
struct Choosy {
    book: Arc<Book>,
    refused: &'static str,
    mended: Arc<AtomicBool>,
}

impl Handler<EventEnvelope> for Choosy {
    async fn handle(&self, event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        if event.aggregate_id == self.refused && !self.mended.load(Ordering::Relaxed) {
            return Err("the bank said no".into());
        }
        self.book.begin(delivery)?;
        self.book.end(delivery);
        Ok(())
    }
}

/// Fields of all dead letters.
async fn dead_letters(world: &World) -> Result<Vec<HashMap<String, String>>> {
    let mut command = redis::cmd("XRANGE");
    let reply: Vec<(String, HashMap<String, String>)> =
        command.arg(dead_stream(&world.user_stream())).arg("-").arg("+").query_async(&mut world.redis().await?).await?;
    Ok(reply.into_iter().map(|(_, fields)| fields).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_aggregate_holds_back_itself_only_and_its_dead_letter_says_why() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 3;
    world.settings.consumer.retry_base_delay = Duration::from_millis(300);
    // More behind the failing event than is ever read at once.
    world.settings.consumer.batch_size = 20;
    publish(&world, 4_000, 10).await?;
    let (book, mended) = (Arc::new(Book::default()), Arc::new(AtomicBool::new(false)));
    let consumer = start(&world, Choosy { book: book.clone(), refused: "3", mended: mended.clone() })?;
    eventually("all others to be handled", async || Ok(book.count() == 3_600)).await?;
    assert!(consumer.status().dead < 400, "they were not waited for");
    consumer.wait_for(|status| status.dead > 0).await.context("ended")?;
    mended.store(true, Ordering::Relaxed);
    all_acknowledged(&world).await?;
    let status = consumer.stop().await?;
    assert_eq!(status.handled + status.dead, 4_000);
    let letters = dead_letters(&world).await?;
    assert_eq!(letters.len() as u64, status.dead);
    let first = letters.first().context("a dead letter")?;
    assert_eq!((&*first["reason"], &*first["aggregate_id"], &*first["attempts"]), ("the bank said no", "3", "3"));
    assert_eq!((&*first["group"], &*first["payload"]), (GROUP, "0"));
    let history: Vec<serde_json::Value> = serde_json::from_str(&first["history"])?;
    assert_eq!(history.len(), 3);
    assert!(history.iter().all(|attempt| attempt["reason"] == "the bank said no"));
    Ok(())
}

/// Says "later" until it is let through, then counts.
struct Later(Arc<AtomicBool>, Arc<Book>);

impl Handler<EventEnvelope> for Later {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        if !self.0.load(Ordering::Relaxed) {
            return Err(HandlerError::retry_later(Duration::from_millis(20), "the mail server is being moved"));
        }
        self.1.begin(delivery)?;
        self.1.end(delivery);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_waits_for_something_is_no_dead_letter() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 1;
    publish(&world, 100, 5).await?;
    let (open, book) = (Arc::new(AtomicBool::new(false)), Arc::new(Book::default()));
    let consumer = start(&world, Later(open.clone(), book.clone()))?;
    consumer.wait_for(|status| status.waiting == 100).await.context("ended")?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    open.store(true, Ordering::Relaxed);
    all_acknowledged(&world).await?;
    assert_eq!(consumer.stop().await?.dead, 0);
    book.check(100)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_a_handler_is_a_failure_of_its_event_only() -> Result<()> {
    struct Panics(Arc<Book>);
    impl Handler<EventEnvelope> for Panics {
        async fn handle(&self, event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
            assert_ne!(event.aggregate_id, "1", "no ones");
            self.0.begin(delivery)?;
            self.0.end(delivery);
            Ok(())
        }
    }
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 2;
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    publish(&world, 30, 3).await?;
    let book = Arc::new(Book::default());
    let consumer = start(&world, Panics(book.clone()))?;
    all_acknowledged_of(&world, 30, &consumer).await?;
    assert_eq!(consumer.stop().await?.dead, 10);
    assert!(dead_letters(&world).await?[0]["reason"].contains("no ones"));
    book.check(20)
}

/// As [`all_acknowledged`], of a consumer that may not have begun.
async fn all_acknowledged_of(world: &World, events: u64, consumer: &ConsumerHandle) -> Result<()> {
    let over = |status: &commitstream::consumer::ConsumerStatus| status.handled + status.dead + status.skipped >= events;
    consumer.wait_for(over).await.context("ended")?;
    all_acknowledged(world).await
}

struct Batches(Arc<Mutex<Vec<usize>>>);

impl BatchHandler<Number> for Batches {
    async fn handle(&self, events: Vec<(Number, Delivery)>) -> Result<(), HandlerError> {
        self.0.lock().unwrap().push(events.len());
        if events.iter().any(|(number, _)| number.n == 13) { Err("thirteen".into()) } else { Ok(()) }
    }
}

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize, commitstream::DomainEvent)]
#[event(aggregate = "user")]
struct Number {
    #[event(key)]
    n: u64,
}

#[tokio::test(flavor = "multi_thread")]
async fn one_event_of_a_batch_that_fails_is_given_up_alone() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 2;
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    let numbers: Vec<EventEnvelope> =
        (0..1_000).map(|n| Ok(commitstream::DomainEvent::envelope(&Number { n })?)).collect::<Result<_>>()?;
    world.streams.publish(&numbers).await.map_err(|e| e.error)?;
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let consumer = Consumer::new(GROUP, &world.settings)?.on_batch::<Number>(Batches(sizes.clone())).start()?;
    all_acknowledged_of(&world, 1_000, &consumer).await?;
    let status = consumer.stop().await?;
    assert_eq!((status.handled, status.dead), (999, 1));
    assert!(sizes.lock().unwrap().iter().any(|size| *size > 100), "{sizes:?}");
    assert_eq!(dead_letters(&world).await?[0]["aggregate_id"], "13");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn events_without_a_handler_are_skipped_parked_or_an_error() -> Result<()> {
    struct Ignore;
    impl Handler<Number> for Ignore {
        async fn handle(&self, _event: Number, _delivery: &Delivery) -> Result<(), HandlerError> {
            Ok(())
        }
    }
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 2;
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    publish(&world, 10, 2).await?;
    let number = commitstream::DomainEvent::envelope(&Number { n: 1 })?;
    world.streams.publish(&[number]).await.map_err(|e| e.error)?;
    for (policy, skipped, dead, attempts) in
        [(UnknownEvents::Skip, 10, 0, ""), (UnknownEvents::Park, 0, 10, "1"), (UnknownEvents::Error, 0, 10, "2")]
    {
        world.settings.consumer.unknown_events = policy;
        let group = format!("{policy:?}");
        let consumer = Consumer::new(&group, &world.settings)?.on::<Number>(Ignore).start()?;
        let over = |status: &commitstream::consumer::ConsumerStatus| status.handled + status.dead + status.skipped >= 11;
        consumer.wait_for(over).await.context("ended")?;
        let status = consumer.stop().await?;
        assert_eq!((status.handled, status.skipped, status.dead), (1, skipped, dead), "{policy:?}");
        let letters = dead_letters(&world).await?;
        let of_group: Vec<_> = letters.iter().filter(|letter| letter["group"] == group).collect();
        assert!(of_group.iter().all(|letter| letter["attempts"] == attempts && letter["reason"].contains("no handler")));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_event_is_a_dead_letter_at_once() -> Result<()> {
    let world = World::new().await?;
    let mut add = redis::cmd("XADD");
    add.arg(world.user_stream()).arg("*").arg("hello").arg("world");
    let _: String = add.query_async(&mut world.redis().await?).await?;
    publish(&world, 1, 1).await?;
    let book = Arc::new(Book::default());
    let consumer = start(&world, Writer(book.clone()))?;
    all_acknowledged_of(&world, 2, &consumer).await?;
    assert_eq!(consumer.stop().await?.dead, 1);
    let letters = dead_letters(&world).await?;
    assert_eq!(letters[0]["hello"], "world");
    assert!(letters[0]["reason"].contains("`id` is missing"), "{letters:?}");
    book.check(1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_finishes_what_is_at_work_and_returns_the_rest() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.concurrency = 2;
    publish(&world, 40, 4).await?;
    let (gate, book) = (Arc::new(Semaphore::new(0)), Arc::new(Book::default()));
    let first = start(&world, Gate(gate.clone(), book.clone()))?;
    eventually("two handlers to begin", async || Ok(book.count() == 2)).await?;
    let mut stopping = std::pin::pin!(first.stop());
    // It is asked for before the gate opens.
    tokio::select! {
        biased;
        _ = &mut stopping => anyhow::bail!("it did not wait for its handlers"),
        () = std::future::ready(()) => {}
    }
    gate.add_permits(100);
    let status = stopping.await?;
    assert_eq!(status.handled, 2, "what had begun, and no more");
    assert_eq!(pending(&world).await?, 38);
    let begun = std::time::Instant::now();
    let second = start(&world, Gate(gate, book.clone()))?;
    all_acknowledged_of(&world, 38, &second).await?;
    assert!(begun.elapsed() < world.settings.consumer.claim_idle, "it need not wait for claimIdle");
    second.stop().await?;
    book.check(40)
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted_over_the_death_of_consumers() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.claim_idle = Duration::from_secs(1);
    world.settings.consumer.max_deliveries = 3;
    world.settings.consumer.retry_base_delay = Duration::from_secs(60);
    world.settings.consumer.retry_max_delay = Duration::from_secs(60);
    publish(&world, 1, 1).await?;
    for _ in 0..3 {
        let handler = Choosy { book: Arc::default(), refused: "0", mended: Arc::default() };
        let consumer = start(&world, handler)?;
        consumer.wait_for(|status| status.failed == 1).await.context("ended")?;
        eventually("the failure to be noted", async || Ok(consumer.status().waiting == 1 || consumer.status().dead == 1)).await?;
        drop(consumer);
    }
    assert_eq!(dead_letters(&world).await?[0]["attempts"], "3");
    all_acknowledged(&world).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_removed_is_made_anew() -> Result<()> {
    let world = World::new().await?;
    publish(&world, 10, 2).await?;
    let book = Arc::new(Book::default());
    let consumer = start(&world, Writer(book.clone()))?;
    all_acknowledged_of(&world, 10, &consumer).await?;
    let mut destroy = redis::cmd("XGROUP");
    let _: u8 = destroy.arg("DESTROY").arg(world.user_stream()).arg(GROUP).query_async(&mut world.redis().await?).await?;
    eventually("everything to be delivered again", async || Ok(book.count() == 20)).await?;
    all_acknowledged(&world).await?;
    consumer.stop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_from_now_on_that_is_lost_with_its_stream_misses_nothing_that_comes_after() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.start_from = StartFrom::Now;
    publish(&world, 10, 2).await?;
    let book = Arc::new(Book::default());
    let consumer = start(&world, Writer(book.clone()))?;
    consumer.wait_for(|status| status.state == ConsumerState::Active).await.context("ended")?;
    let _: u8 = redis::cmd("DEL").arg(world.user_stream()).query_async(&mut world.redis().await?).await?;
    publish(&world, 10, 2).await?;
    all_acknowledged_of(&world, 10, &consumer).await?;
    assert_eq!(book.count(), 10);
    consumer.stop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_redis_is_waited_for_and_nothing_is_handled_twice() -> Result<()> {
    let redis = commitstream_sandbox::Redis::start()?;
    let world = World::on(commitstream_sandbox::Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    publish(&world, 2_000, 20).await?;
    let book = Arc::new(Book::default());
    let consumer = start(&world, Writer(book.clone()))?;
    consumer.wait_for(|status| status.handled > 100).await.context("ended")?;
    redis.pause()?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    redis.resume()?;
    all_acknowledged_of(&world, 2_000, &consumer).await?;
    consumer.stop().await?;
    book.check(2_000)
}

/// An effect outside PostgreSQL.
struct Mailer {
    sent: Arc<AtomicUsize>,
    when_unknown: WhenUnknown,
}

impl Handler<EventEnvelope> for Mailer {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        let send = || async {
            self.sent.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        delivery.once("mail", self.when_unknown, send).await?;
        Err("after the mail".into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_effect_outside_the_database_happens_once_though_its_event_fails_later() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    publish(&world, 1, 1).await?;
    let sent = Arc::new(AtomicUsize::new(0));
    let consumer = start(&world, Mailer { sent: sent.clone(), when_unknown: WhenUnknown::Repeat })?;
    all_acknowledged_of(&world, 1, &consumer).await?;
    assert_eq!((consumer.stop().await?.failed, sent.load(Ordering::Relaxed)), (5, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_effect_of_which_nobody_knows_whether_it_happened_is_as_the_handler_says() -> Result<()> {
    let world = World::new().await?;
    publish(&world, 1, 1).await?;
    for (when_unknown, sent_again, dead) in [(WhenUnknown::Repeat, 1, 0), (WhenUnknown::Skip, 0, 0), (WhenUnknown::GiveUp, 0, 1)]
    {
        struct Once(Arc<AtomicUsize>, WhenUnknown);
        impl Handler<EventEnvelope> for Once {
            async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
                let send = || async {
                    self.0.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                };
                delivery.once("mail", self.1, send).await.map(|_| ())
            }
        }
        let group = format!("{when_unknown:?}");
        let event = world.entries(&world.user_stream()).await?[0].envelope()?.id;
        // What a process that died in the middle of the effect has left.
        let mut begun = redis::cmd("SET");
        begun.arg(format!("{{{}}}:group:{group}:effect:{event}:mail", world.user_stream())).arg("begun");
        let () = begun.query_async(&mut world.redis().await?).await?;
        let sent = Arc::new(AtomicUsize::new(0));
        let consumer = Consumer::new(&group, &world.settings)?.on_any("user", Once(sent.clone(), when_unknown)).start()?;
        consumer.wait_for(|status| status.handled + status.dead == 1).await.context("ended")?;
        let status = consumer.stop().await?;
        assert_eq!((sent.load(Ordering::Relaxed), status.dead), (sent_again, dead), "{when_unknown:?}");
    }
    Ok(())
}

/// As an operator does it: the dead letter goes to its group again, when what was wrong is mended.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_is_retried_succeeds_in_its_group_only() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.max_deliveries = 1;
    publish(&world, 30, 3).await?;
    let (book, mended) = (Arc::new(Book::default()), Arc::new(AtomicBool::new(false)));
    let consumer = start(&world, Choosy { book: book.clone(), refused: "2", mended: mended.clone() })?;
    let bystander = Arc::new(Book::default());
    let other = Consumer::new("others", &world.settings)?.on_any("user", Writer(bystander.clone())).start()?;
    all_acknowledged_of(&world, 30, &consumer).await?;
    assert_eq!(consumer.status().dead, 10);
    mended.store(true, Ordering::Relaxed);
    let letters = world.streams.dead_letters(&world.user_stream(), "0", 100).await?;
    // One of them has to come back although its entry is gone.
    let mut delete = redis::cmd("XDEL");
    let _: u8 = delete.arg(world.user_stream()).arg(&letters[9].entry).query_async(&mut world.redis().await?).await?;
    for letter in &letters {
        world.streams.retry_dead(letter).await?;
    }
    eventually("the retried events to be handled", async || Ok(book.count() == 30)).await?;
    all_acknowledged(&world).await?;
    assert!(dead_letters(&world).await?.is_empty());
    let read_on = async || Ok(world.streams.groups(&world.user_stream()).await?.iter().all(|group| group.behind == Some(0)));
    eventually("the other group to have read on", read_on).await?;
    consumer.stop().await?;
    other.stop().await?;
    // What comes back comes behind what went on without it, in no promised order.
    book.seen.lock().unwrap().values_mut().for_each(|seen| seen.sort_unstable());
    book.check(30)?;
    bystander.check(30)
}
