//! Effects outside PostgreSQL: each by its name, and what becomes of one that may have happened.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use commitstream::EventEnvelope;
use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError, WhenUnknown};

use crate::consumer_book::{publish, start};
use crate::support::World;

#[derive(Default)]
struct Sent {
    mails: AtomicUsize,
    messages: AtomicUsize,
}

/// Two effects, and a failure behind them.
struct Both(Arc<Sent>);

async fn count(sent: &AtomicUsize) -> Result<(), HandlerError> {
    sent.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

impl Handler<EventEnvelope> for Both {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        delivery.once("mail", WhenUnknown::Repeat, || count(&self.0.mails)).await?;
        delivery.once("message", WhenUnknown::Repeat, || count(&self.0.messages)).await?;
        Err("after both".into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_two_effects_of_an_event_happens_once() -> Result<()> {
    let mut world = World::unmigrated()?;
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    publish(&world, 1, 1).await?;
    let sent = Arc::new(Sent::default());
    let consumer = start(&world, Both(sent.clone()))?;
    consumer.wait_for(|status| status.dead == 1).await.context("ended")?;
    assert_eq!(consumer.stop().await?.failed, 5);
    assert_eq!((sent.mails.load(Ordering::Relaxed), sent.messages.load(Ordering::Relaxed)), (1, 1));

    let mut consumer = Consumer::new("mail", &world.settings)?.on_any("user", Both(sent.clone())).in_memory()?;
    consumer.publish(&crate::events::user(1))?;
    consumer.run().await;
    assert_eq!((sent.mails.load(Ordering::Relaxed), sent.messages.load(Ordering::Relaxed)), (2, 2), "in the test kit");
    Ok(())
}

/// What the effect comes to the first time.
#[derive(Debug, Clone, Copy)]
enum First {
    TimesOut,
    SaysUnknown,
    RunsOutOfTime,
    IsRefused,
}

struct Unsure {
    sent: Arc<AtomicUsize>,
    first: First,
    when_unknown: WhenUnknown,
}

impl Unsure {
    async fn send(&self) -> Result<(), HandlerError> {
        if self.sent.fetch_add(1, Ordering::Relaxed) > 0 {
            return Ok(());
        }
        match self.first {
            First::TimesOut => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
            First::SaysUnknown => Err(HandlerError::outcome_unknown(Duration::from_millis(1), "no answer")),
            First::RunsOutOfTime => Ok(tokio::time::timeout(Duration::from_millis(1), std::future::pending()).await?),
            First::IsRefused => Err(io::Error::from(io::ErrorKind::ConnectionRefused).into()),
        }
    }
}

impl Handler<EventEnvelope> for Unsure {
    async fn handle(&self, _event: EventEnvelope, delivery: &Delivery) -> Result<(), HandlerError> {
        delivery.once("mail", self.when_unknown, || self.send()).await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_effect_that_ran_out_of_time_is_unknown_and_one_that_was_refused_has_not_happened() -> Result<()> {
    let mut world = World::unmigrated()?;
    world.settings.consumer.retry_base_delay = Duration::from_millis(1);
    publish(&world, 1, 1).await?;
    let unknown = [First::TimesOut, First::SaysUnknown, First::RunsOutOfTime];
    let mut cases: Vec<_> = unknown
        .into_iter()
        .flat_map(|first| {
            [(first, WhenUnknown::Repeat, 2, 0), (first, WhenUnknown::Skip, 1, 0), (first, WhenUnknown::GiveUp, 1, 1)]
        })
        .collect();
    cases.push((First::IsRefused, WhenUnknown::Skip, 2, 0));
    for (first, when_unknown, times, dead) in cases {
        let sent = Arc::new(AtomicUsize::new(0));
        let handler = Unsure { sent: sent.clone(), first, when_unknown };
        let consumer = Consumer::new(&format!("{first:?}-{when_unknown:?}"), &world.settings)?.on_any("user", handler).start()?;
        consumer.wait_for(|status| status.handled + status.dead == 1).await.context("ended")?;
        let status = consumer.stop().await?;
        assert_eq!((sent.load(Ordering::Relaxed), status.dead), (times, dead), "{first:?} {when_unknown:?}");
    }
    Ok(())
}

/// Versions before effects had names noted one for each event.
#[tokio::test(flavor = "multi_thread")]
async fn a_note_without_a_name_still_counts() -> Result<()> {
    let world = World::unmigrated()?;
    publish(&world, 1, 1).await?;
    let stream = world.user_stream();
    let event = world.entries(&stream).await?[0].envelope()?.id;
    let mut done = redis::cmd("SET");
    done.arg(format!("{{{stream}}}:group:{}:effect:{event}", crate::consumer_book::GROUP)).arg("done");
    let () = done.query_async(&mut world.redis().await?).await?;
    let sent = Arc::new(AtomicUsize::new(0));
    let consumer = start(&world, Unsure { sent: sent.clone(), first: First::IsRefused, when_unknown: WhenUnknown::Repeat })?;
    consumer.wait_for(|status| status.handled == 1).await.context("ended")?;
    consumer.stop().await?;
    assert_eq!(sent.load(Ordering::Relaxed), 0);
    Ok(())
}
