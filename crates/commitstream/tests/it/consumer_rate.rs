//! How fast an empty handler is, against a loop without anything. Run it with
//! `cargo test --release -p commitstream --test it -- --ignored --nocapture handling_rate`.

use std::time::Instant;

use anyhow::Result;
use commitstream::EventEnvelope;
use commitstream::consumer::{BatchHandler, Consumer, Delivery, Handler, HandlerError};
use redis::streams::StreamReadReply;

use crate::events::{UserCreated, envelope};
use crate::support::World;

const EVENTS: u64 = 200_000;
const AGGREGATES: u64 = 10_000;
const BATCH: usize = 500;
const ROUNDS: usize = 5;

struct Empty;

impl Handler<UserCreated> for Empty {
    async fn handle(&self, _event: UserCreated, _delivery: &Delivery) -> Result<(), HandlerError> {
        Ok(())
    }
}

impl BatchHandler<UserCreated> for Empty {
    async fn handle(&self, _events: Vec<(UserCreated, Delivery)>) -> Result<(), HandlerError> {
        Ok(())
    }
}

async fn fill(world: &World) -> Result<()> {
    for chunk in 0..EVENTS / 10_000 {
        let envelopes = (0..10_000).map(|n| {
            let n = chunk * 10_000 + n;
            let user =
                serde_json::json!({ "user_id": n % AGGREGATES, "email": "x".repeat(150), "occurred_at": "2026-01-01T00:00:00Z" });
            let mut envelope = envelope("user", &(n % AGGREGATES).to_string(), &user)?;
            envelope.event_type = "UserCreated".into();
            Ok(envelope)
        });
        let envelopes: Vec<EventEnvelope> = envelopes.collect::<Result<_>>()?;
        world.streams.publish(&envelopes).await.map_err(|e| e.error)?;
    }
    Ok(())
}

/// XREADGROUP and XACK, one after the other, and nothing is looked at. Events a second.
async fn bare(world: &World) -> Result<f64> {
    let (stream, mut redis) = (world.user_stream(), world.redis().await?);
    let () = redis::cmd("XGROUP").arg("CREATE").arg(&stream).arg("bare").arg("0").query_async(&mut redis).await?;
    let (begun, mut handled) = (Instant::now(), 0);
    while handled < EVENTS {
        let mut read = redis::cmd("XREADGROUP");
        read.arg("GROUP").arg("bare").arg("me").arg("COUNT").arg(BATCH).arg("STREAMS").arg(&stream).arg(">");
        let reply: StreamReadReply = read.query_async(&mut redis).await?;
        let ids: Vec<&String> = reply.keys.iter().flat_map(|key| &key.ids).map(|entry| &entry.id).collect();
        handled += ids.len() as u64;
        let () = redis::cmd("XACK").arg(&stream).arg("bare").arg(&ids).query_async(&mut redis).await?;
    }
    let rate = EVENTS as f64 / begun.elapsed().as_secs_f64();
    let () = redis::cmd("XGROUP").arg("DESTROY").arg(&stream).arg("bare").query_async(&mut redis).await?;
    Ok(rate)
}

async fn ours(world: &World, round: usize, batches: bool) -> Result<f64> {
    let group = format!("ours-{batches}-{round}");
    let consumer = Consumer::new(&group, &world.settings)?;
    let begun = Instant::now();
    let consumer = if batches { consumer.on_batch::<UserCreated>(Empty) } else { consumer.on::<UserCreated>(Empty) }.start()?;
    consumer.wait_for(|status| status.handled >= EVENTS).await;
    let rate = EVENTS as f64 / begun.elapsed().as_secs_f64();
    consumer.stop().await?;
    let () =
        redis::cmd("XGROUP").arg("DESTROY").arg(world.user_stream()).arg(&group).query_async(&mut world.redis().await?).await?;
    Ok(rate)
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn handling_rate_against_a_bare_loop() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.consumer.batch_size = BATCH as u32;
    fill(&world).await?;
    let (mut baseline, mut single, mut batches) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        baseline.push(bare(&world).await?);
        single.push(ours(&world, round, false).await?);
        batches.push(ours(&world, round, true).await?);
    }
    let (baseline, single, batches) = (median(baseline), median(single), median(batches));
    println!(
        "bare loop {baseline:.0}/s, handler {single:.0}/s ({:.2}), batch handler {batches:.0}/s ({:.2})",
        single / baseline,
        batches / baseline
    );
    Ok(())
}
