//! What a whole stream answers alike is nobody's event: the stream waits, nothing becomes FAILED, nothing is overtaken, and the others go on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::relay::{RelayHandle, RelayState, RelayStatus};
use commitstream_sandbox::{Redis, RedisCluster, Sandbox};

use crate::support::{World, eventually};

const INSERT: &str = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)";

/// A migrated outbox with a Redis of its own.
async fn own_redis(settings: &[(&str, &str)]) -> Result<(Redis, World)> {
    let redis = Redis::start_with(settings)?;
    let world = World::on(Sandbox::shared().database()?, &redis.url(), "events:".into())?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    Ok((redis, world))
}

/// So many events of ten aggregates of each of these types, mixed.
async fn insert(world: &World, types: &[&str], each: usize) -> Result<()> {
    let sql = format!("{INSERT} SELECT 'E', t, (n % 10)::text, '{{}}' FROM generate_series(1, $1) n, unnest($2::text[]) t");
    let each = i32::try_from(each)?;
    sqlx::query(sqlx::AssertSqlSafe(sql)).bind(each).bind(types).execute(&mut world.connect().await?).await?;
    Ok(())
}

async fn published(world: &World, aggregate_type: &str) -> Result<i64> {
    let sql = "SELECT count(*) FROM event_outbox WHERE aggregate_type = $1 AND status = 'PUBLISHED'";
    Ok(sqlx::query_scalar(sql).bind(aggregate_type).fetch_one(&mut world.connect().await?).await?)
}

async fn until_published(world: &World, aggregate_type: &str, events: i64) -> Result<()> {
    eventually(&format!("{events} of {aggregate_type}"), async || Ok(published(world, aggregate_type).await? == events)).await
}

async fn until_it_waits(relay: &RelayHandle, words: &[&str]) -> Result<RelayStatus> {
    let says = |s: &RelayStatus| s.waiting.as_ref().is_some_and(|text| words.iter().all(|word| text.contains(word)));
    let mut status = relay.watch();
    let found = tokio::time::timeout(crate::support::PATIENCE, status.wait_for(says)).await;
    let found = found.with_context(|| format!("waited for {words:?}: {:?}", relay.status()))??;
    Ok(found.clone())
}

/// Nothing was blamed on an event, and all is in the streams, once and in order.
async fn none_to_blame(world: &World, events: usize) -> Result<()> {
    let blamed = "SELECT count(*) FROM event_outbox WHERE status = 'FAILED' OR retry_count > 0 OR last_error IS NOT NULL";
    let blamed: i64 = sqlx::query_scalar(blamed).fetch_one(&mut world.connect().await?).await?;
    ensure!(blamed == 0, "{blamed} events were blamed");
    let audited = world.audit().await?;
    ensure!(audited == events, "{audited} of {events} events");
    Ok(())
}

/// Failed before: events became FAILED, later ones of their aggregates went on, and a retry put them behind.
#[tokio::test(flavor = "multi_thread")]
async fn an_acl_slip_fails_no_event_and_breaks_no_order() -> Result<()> {
    let types = ["user", "order", "payment"];
    for slip in [&["-xadd"][..], &["-xadd", "-pexpire"], &["-evalsha"], &["-set"]] {
        let (_redis, mut world) = own_redis(&[]).await?;
        world.settings.outbox.processor.max_retries = 1;
        world.settings.outbox.processor.retry_base_delay = Duration::from_millis(50);
        let mut client = world.redis().await?;
        let relay = world.relay()?;
        insert(&world, &types, 100).await?;
        world.drained().await?;
        redis::cmd("ACL").arg("SETUSER").arg("default").arg(slip).exec_async(&mut client).await?;
        for _ in 0..5 {
            insert(&world, &types, 50).await?;
            let reason = until_it_waits(&relay, &["events:"]).await?.waiting.unwrap_or_default().to_lowercase();
            assert!(reason.contains(&slip[0][1..]), "the command is named: {reason}");
        }
        assert_eq!(relay.status().state, RelayState::Active, "another relay could do no better");
        let back: Vec<String> = slip.iter().map(|command| command.replace('-', "+")).collect();
        redis::cmd("ACL").arg("SETUSER").arg("default").arg(back).exec_async(&mut client).await?;
        insert(&world, &types, 100).await?;
        world.drained().await?;
        relay.watch().wait_for(|s| s.waiting.is_none()).await?;
        relay.stop().await?;
        none_to_blame(&world, 3 * (100 + 250 + 100)).await.with_context(|| format!("{slip:?}"))?;
    }
    Ok(())
}

/// Failed before: all events of the stream became FAILED.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_way_holds_back_its_own_stream_only_and_it_goes_on_by_itself() -> Result<()> {
    let world = World::new().await?;
    let mut client = world.redis().await?;
    redis::cmd("SET").arg(world.user_stream()).arg("not a stream").exec_async(&mut client).await?;
    // More than may be in flight.
    insert(&world, &["user"], 10_000).await?;
    let mut relay = world.relay()?;
    let status = until_it_waits(&relay, &["WRONGTYPE", &world.user_stream()]).await?;
    assert_eq!((status.refused, status.failed), (0, 0));
    let mut longest = Duration::ZERO;
    for round in 1..=60 {
        let began = Instant::now();
        insert(&world, &["payment"], 1).await?;
        until_published(&world, "payment", round).await?;
        longest = longest.max(began.elapsed());
        if round % 20 == 0 {
            // A new relay finds the batch that the last one left open.
            relay.stop().await?;
            relay = world.relay()?;
            until_it_waits(&relay, &["WRONGTYPE"]).await?;
        }
    }
    println!("longest wait of the other stream: {longest:?}");
    assert_eq!(relay.status().state, RelayState::Active);
    redis::cmd("DEL").arg(world.user_stream()).exec_async(&mut client).await?;
    world.drained().await?;
    relay.stop().await?;
    none_to_blame(&world, 10_060).await
}

/// Ids of a stream only rise, and this one has come to the last.
#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_used_up_and_strange_markers_are_waited_for() -> Result<()> {
    let world = World::new().await?;
    let mut client = world.redis().await?;
    let last = "18446744073709551615-18446744073709551615";
    redis::cmd("XADD").arg(world.user_stream()).arg(last).arg("a").arg("b").exec_async(&mut client).await?;
    // One that is used up after two entries.
    let order = world.streams.stream_of("order");
    redis::cmd("XADD")
        .arg(&order)
        .arg("18446744073709551615-18446744073709551613")
        .arg("a")
        .arg("b")
        .exec_async(&mut client)
        .await?;
    redis::cmd("XTRIM").arg(&order).arg("MAXLEN").arg("0").exec_async(&mut client).await?;
    let relay = world.relay()?;
    insert(&world, &["user"], 30).await?;
    until_it_waits(&relay, &[&world.user_stream(), "exhausted"]).await?;
    insert(&world, &["order", "payment"], 30).await?;
    until_published(&world, "payment", 30).await?;
    until_published(&world, "order", 2).await?;
    for stream in [&world.user_stream(), &order] {
        redis::cmd("DEL").arg(stream).exec_async(&mut client).await?;
    }
    world.drained().await?;
    relay.stop().await?;
    assert_eq!((relay_failures(&world).await?, world.entries(&order).await?.len()), (0, 28));
    Ok(())
}

async fn relay_failures(world: &World) -> Result<i64> {
    let blamed = "SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED' OR retry_count > 0";
    Ok(sqlx::query_scalar(blamed).fetch_one(&mut world.connect().await?).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_command_is_waited_for() -> Result<()> {
    let (redis, world) = own_redis(&[("rename-command", "XADD \"\"")]).await?;
    let relay = world.relay()?;
    insert(&world, &["user", "order"], 50).await?;
    until_it_waits(&relay, &["nknown"]).await?;
    relay.stop().await?;
    none_to_blame(&world, 0).await?;
    drop(redis);
    Ok(())
}

/// Each keeps its batch, and together they keep more than they may: batches are put down and found again.
#[tokio::test(flavor = "multi_thread")]
async fn many_stuck_streams_leave_room_for_the_others() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.batch_size = 1;
    let types: Vec<String> = (0..120).map(|n| format!("stuck{n}")).collect();
    let types: Vec<&str> = types.iter().map(String::as_str).collect();
    let mut client = world.redis().await?;
    for of in &types {
        redis::cmd("SET").arg(world.streams.stream_of(of)).arg("not a stream").exec_async(&mut client).await?;
    }
    insert(&world, &types, 5).await?;
    let relay = world.relay()?;
    until_it_waits(&relay, &["streams wait", "WRONGTYPE"]).await?;
    for round in 1..=20 {
        insert(&world, &["payment"], 1).await?;
        until_published(&world, "payment", round).await?;
    }
    for of in &types {
        redis::cmd("DEL").arg(world.streams.stream_of(of)).exec_async(&mut client).await?;
    }
    world.drained().await?;
    relay.watch().wait_for(|s| s.waiting.is_none()).await?;
    relay.stop().await?;
    none_to_blame(&world, 620).await
}

/// A master and its replica are gone: streams of the other masters go on, also with a relay that starts meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_master_holds_back_its_own_streams_only() -> Result<()> {
    let cluster = RedisCluster::start()?;
    let mut world = World::on(Sandbox::shared().database()?, &cluster.url(), "events:".into())?;
    world.settings.redis.response_timeout = Duration::from_millis(500);
    world.outbox.migrate(&mut world.connect().await?).await?;
    let types: Vec<String> = (0..12).map(|n| format!("type{n}")).collect();
    let master = cluster.master_of("events:type0")?;
    let (mut lost, mut kept) = (Vec::new(), Vec::new());
    for of in &types {
        let is_lost = cluster.master_of(&format!("events:{of}"))? == master;
        if is_lost { lost.push(of.as_str()) } else { kept.push(of.as_str()) }
    }
    ensure!(!lost.is_empty() && !kept.is_empty(), "{lost:?} {kept:?}");
    let all: Vec<&str> = types.iter().map(String::as_str).collect();
    let relay = world.relay()?;
    insert(&world, &all, 50).await?;
    world.drained().await?;
    cluster.nodes()[master + 3].kill()?;
    cluster.nodes()[master].kill()?;
    insert(&world, &all, 50).await?;
    for of in &kept {
        until_published(&world, of, 100).await?;
    }
    until_it_waits(&relay, &["events:type"]).await?;
    insert(&world, &all, 50).await?;
    for of in &kept {
        until_published(&world, of, 150).await?;
    }
    // With batches left open that cannot be resolved yet.
    relay.stop().await?;
    insert(&world, &all, 50).await?;
    let relay = world.relay()?;
    for of in &kept {
        until_published(&world, of, 200).await?;
    }
    for of in &lost {
        assert_eq!(published(&world, of).await?, 50, "{of}");
    }
    cluster.nodes()[master].restart()?;
    cluster.nodes()[master + 3].restart()?;
    insert(&world, &all, 50).await?;
    world.drained().await?;
    relay.watch().wait_for(|s| s.waiting.is_none()).await?;
    relay.stop().await?;
    none_to_blame(&world, 12 * 250).await
}

/// Failed before: the single event was published after all of the transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_does_not_keep_other_streams_waiting() -> Result<()> {
    const BULK: usize = 120_000;
    let world = World::new().await?;
    let relay = world.relay()?;
    relay.watch().wait_for(|s| s.state == RelayState::Active).await?;
    insert(&world, &["bulk"], BULK).await?;
    let mut longest = Duration::ZERO;
    let mut rounds = 0;
    let mut between = 0;
    while published(&world, "bulk").await? < i64::try_from(BULK)? {
        let began = Instant::now();
        insert(&world, &["user", "order"], 1).await?;
        rounds += 1;
        until_published(&world, "user", rounds).await?;
        until_published(&world, "order", rounds).await?;
        longest = longest.max(began.elapsed());
        between = rounds;
    }
    println!("{between} rounds beside the transaction, the longest {longest:?}");
    ensure!(between > 3, "only {between} rounds");
    world.drained().await?;
    relay.stop().await?;
    none_to_blame(&world, BULK + 2 * usize::try_from(rounds)?).await
}
