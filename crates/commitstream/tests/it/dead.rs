//! Dead letters: how an entry becomes one, and how its group gets it again. And what is told of consumer groups.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use commitstream::streams::{Burial, DeadLetter, GroupInfo, RETURNED, RetriedAs, StreamsError, dead_stream};
use commitstream_sandbox::{RedisCluster, Sandbox};
use redis::FromRedisValue;

use crate::events::envelope;
use crate::support::World;

const HISTORY: &str = r#"[{"at":"2026-01-31T12:00:00Z","consumer":"c1","reason":"no"},{"at":"2026-01-31T12:00:01Z","consumer":"c1","reason":"still no"}]"#;

/// A world with so many events in the stream of users, all in the hands of c1 of the group "mail".
async fn delivered(world: &World, events: u32) -> Result<Vec<String>> {
    let stream = world.user_stream();
    let events: Vec<_> = (0..events).map(|n| envelope("user", &n.to_string(), &n)).collect::<Result<_>>()?;
    world.streams.publish(&events).await.map_err(|e| e.error)?;
    send::<()>(world, &["XGROUP", "CREATE", &stream, "mail", "0"]).await?;
    read(world, "mail", "c1").await
}

async fn send<T: FromRedisValue>(world: &World, command: &[&str]) -> Result<T> {
    send_to(&mut world.redis().await?, command).await
}

async fn send_to<T: FromRedisValue>(connection: &mut redis::aio::MultiplexedConnection, command: &[&str]) -> Result<T> {
    Ok(redis::cmd(command[0]).arg(&command[1..]).query_async(connection).await?)
}

/// The ids of all entries that are new to the group.
async fn read(world: &World, group: &str, consumer: &str) -> Result<Vec<String>> {
    let stream = world.user_stream();
    let read = ["XREADGROUP", "GROUP", group, consumer, "COUNT", "100", "STREAMS", &stream, ">"];
    let reply: Option<redis::streams::StreamReadReply> = send(world, &read).await?;
    Ok(reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids).map(|entry| entry.id).collect())
}

/// Entry id and consumer of all that is pending in the group "mail".
async fn pending(world: &World) -> Result<BTreeMap<String, String>> {
    let pending: Vec<(String, String, u64, u64)> =
        send(world, &["XPENDING", &world.user_stream(), "mail", "-", "+", "100"]).await?;
    Ok(pending.into_iter().map(|(id, consumer, ..)| (id, consumer)).collect())
}

fn burial<'a>(stream: &'a str, entry: &'a str) -> Burial<'a> {
    Burial { stream, group: "mail", consumer: "c1", entry, reason: "no such user", attempts: 2, history: HISTORY }
}

fn failures_key(world: &World) -> String {
    format!("{{{}}}:group:mail:failures", world.user_stream())
}

async fn bury(world: &World, entry: &str) -> Result<DeadLetter> {
    let stream = world.user_stream();
    assert!(world.streams.bury(&burial(&stream, entry)).await?);
    world.streams.dead_letters(&stream, "0", 100).await?.pop().context("a dead letter")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_buried_entry_is_acknowledged_and_its_dead_letter_has_everything() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 2).await?;
    let stream = world.user_stream();
    let key = failures_key(&world);
    send::<()>(&world, &["HSET", &key, &ids[0], HISTORY, &ids[1], "[]"]).await?;
    assert!(world.streams.bury(&burial(&stream, &ids[0])).await?);
    assert!(!world.streams.bury(&burial(&stream, &ids[0])).await?, "a second call changes nothing");

    assert_eq!(pending(&world).await?.into_keys().collect::<Vec<_>>(), ids[1..]);
    assert_eq!(send::<Vec<String>>(&world, &["HKEYS", &key]).await?, ids[1..]);
    let dead = world.raw_entries("user:dead").await?;
    let original = &world.raw_entries("user").await?[0];
    assert_eq!(dead.len(), 1);
    assert_eq!(&dead[0][..original.len()], original.as_slice());
    let own: Vec<_> = dead[0][original.len()..].iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let (dead_at, own) = own.split_last().context("fields")?;
    let reason = ("reason", "no such user");
    assert_eq!(own, [("group", "mail"), ("entry", &ids[0]), reason, ("attempts", "2"), ("history", HISTORY)]);
    assert!(dead_at.0 == "dead_at" && chrono::DateTime::parse_from_rfc3339(dead_at.1).is_ok(), "{dead_at:?}");

    let letter = world.streams.dead_letters(&stream, "0", 10).await?.pop().context("a dead letter")?;
    assert_eq!((letter.group.as_str(), letter.entry.as_str(), letter.attempts), ("mail", ids[0].as_str(), 2));
    assert_eq!((letter.event_type.as_deref(), letter.aggregate_id.as_deref()), (Some("Happened"), Some("0")));
    assert_eq!(letter.history.as_deref().map(serde_json::value::RawValue::get), Some(HISTORY));
    assert_eq!(world.streams.list().await?, std::slice::from_ref(&stream), "dead letters are no events");
    assert_eq!(world.streams.dead_streams().await?, [stream]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_consumers_is_not_buried() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 2).await?;
    let stream = world.user_stream();
    send::<()>(&world, &["XCLAIM", &stream, "mail", "c2", "0", &ids[0]]).await?;
    send::<()>(&world, &["XACK", &stream, "mail", &ids[1]]).await?;
    for id in &ids {
        assert!(!world.streams.bury(&burial(&stream, id)).await?);
    }
    assert_eq!(pending(&world).await?, BTreeMap::from([(ids[0].clone(), "c2".to_owned())]));
    assert_eq!(world.streams.len(&dead_stream(&stream)).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burial_that_redis_refuses_changes_nothing() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 1).await?;
    let stream = world.user_stream();
    let dead = dead_stream(&stream);
    send::<()>(&world, &["SET", &dead, "in the way"]).await?;
    let error = world.streams.bury(&burial(&stream, &ids[0])).await.unwrap_err();
    assert!(error.to_string().contains("WRONGTYPE") && !error.is_outage(), "{error:?}");
    assert_eq!(pending(&world).await?.len(), 1);

    // A user who may do everything but acknowledge.
    send::<()>(&world, &["DEL", &dead]).await?;
    let user = format!("u{}", uuid::Uuid::now_v7().simple());
    send::<()>(&world, &["ACL", "SETUSER", &user, "on", ">secret", "~*", "+@all", "-xack"]).await?;
    let url = world.settings.redis.url.as_deref().context("a URL")?;
    let server = url.rsplit_once('@').map_or_else(|| url.trim_start_matches("redis://"), |(_, server)| server);
    let url = format!("redis://{user}:secret@{server}");
    let streams = commitstream::streams::Streams::new(&url, &world.settings.redis)?;
    let refused = streams.bury(&burial(&stream, &ids[0])).await.unwrap_err();
    send::<()>(&world, &["ACL", "DELUSER", &user]).await?;
    assert!(matches!(refused, StreamsError::Refused { .. }), "{refused:?}");
    assert_eq!((pending(&world).await?.len(), world.streams.len(&dead).await?), (1, 0), "{refused:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_was_trimmed_is_buried_and_can_only_be_discarded() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 1).await?;
    let stream = world.user_stream();
    send::<()>(&world, &["XTRIM", &stream, "MAXLEN", "0"]).await?;
    let letter = bury(&world, &ids[0]).await?;
    assert_eq!((letter.event_id.as_deref(), letter.reason.as_str()), (None, "no such user"));
    let error = world.streams.retry_dead(&letter).await.unwrap_err();
    assert!(matches!(error, StreamsError::EmptyDeadLetter { .. }), "{error:?}");
    assert!(world.streams.discard_dead(&stream, &letter.dead_id).await?);
    assert!(!world.streams.discard_dead(&stream, &letter.dead_id).await?);
    assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_entry_is_pending_for_returned_and_a_second_retry_is_harmless() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 1).await?;
    let stream = world.user_stream();
    let dead = dead_stream(&stream);
    let letter = bury(&world, &ids[0]).await?;
    let fields: Vec<String> = world.raw_entries("user:dead").await?.remove(0).into_iter().flat_map(|(k, v)| [k, v]).collect();
    assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Entry);
    assert_eq!(pending(&world).await?, BTreeMap::from([(ids[0].clone(), RETURNED.to_owned())]));
    assert_eq!(world.streams.len(&dead).await?, 0);
    assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Before);

    // A crash left the dead letter behind, and the event is handled before somebody retries it again.
    send::<()>(&world, &["XACK", &stream, "mail", &ids[0]]).await?;
    let restore: Vec<&str> = ["XADD", &dead, &letter.dead_id].into_iter().chain(fields.iter().map(String::as_str)).collect();
    send::<()>(&world, &["DEL", &dead]).await?;
    send::<()>(&world, &restore).await?;
    assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Before);
    assert!(pending(&world).await?.is_empty());
    assert_eq!(world.streams.len(&dead).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_entry_that_fails_again_is_buried_again() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 1).await?;
    let stream = world.user_stream();
    for round in 0..3 {
        let letter = bury(&world, &ids[0]).await?;
        assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Entry, "round {round}");
        send::<()>(&world, &["XCLAIM", &stream, "mail", "c1", "0", &ids[0]]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_consumer_has_in_hand_is_not_retried() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 1).await?;
    let stream = world.user_stream();
    let letter = bury(&world, &ids[0]).await?;
    send::<()>(&world, &["XCLAIM", &stream, "mail", "c2", "0", &ids[0], "FORCE"]).await?;
    assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Pending("c2".into()));
    assert_eq!(world.streams.len(&dead_stream(&stream)).await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_trimming_appends_a_copy_for_the_group() -> Result<()> {
    let world = World::unmigrated()?;
    let ids = delivered(&world, 1).await?;
    let stream = world.user_stream();
    let mut fields = world.raw_entries("user").await?.remove(0);
    fields.push(("group".into(), "mail".into()));
    let mut letter = bury(&world, &ids[0]).await?;
    for _ in 0..2 {
        send::<()>(&world, &["XTRIM", &stream, "MAXLEN", "0"]).await?;
        let RetriedAs::Copy(copy) = world.streams.retry_dead(&letter).await? else { anyhow::bail!("no copy") };
        assert_eq!(world.streams.retry_dead(&letter).await?, RetriedAs::Before);
        assert_eq!(world.raw_entries("user").await?, std::slice::from_ref(&fields));
        assert_eq!(read(&world, "mail", "c1").await?, std::slice::from_ref(&copy));
        // It fails again.
        letter = bury(&world, &copy).await?;
    }
    send::<()>(&world, &["XGROUP", "DESTROY", &stream, "mail"]).await?;
    let error = world.streams.retry_dead(&letter).await.unwrap_err();
    assert!(error.to_string().contains("has no consumer group mail"), "{error:?}");
    assert_eq!(world.streams.len(&dead_stream(&stream)).await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_takes_no_copy_for_a_duplicate() -> Result<()> {
    let world = World::new().await?;
    world.insert(3, 1).await?;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let stream = world.user_stream();
    send::<()>(&world, &["XGROUP", "CREATE", &stream, "mail", "0"]).await?;
    let ids = read(&world, "mail", "c1").await?;
    let letter = bury(&world, &ids[0]).await?;
    send::<()>(&world, &["XTRIM", &stream, "MAXLEN", "2"]).await?;
    assert!(matches!(world.streams.retry_dead(&letter).await?, RetriedAs::Copy(_)));
    let report = commitstream::verify::run(&world.outbox, &mut world.connect().await?, &world.streams, 10, |_| ()).await?;
    let faults = [&report.missing, &report.duplicated, &report.out_of_order, &report.unsettled, &report.misplaced];
    assert!(faults.iter().all(|fault| fault.count == 0), "{report:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_told_with_their_consumers_and_their_backlog() -> Result<()> {
    let world = World::unmigrated()?;
    let stream = world.user_stream();
    assert!(world.streams.groups(&stream).await?.is_empty());
    let ids = delivered(&world, 5).await?;
    send::<()>(&world, &["XGROUP", "CREATE", &stream, "audit", "0"]).await?;
    send::<()>(&world, &["XACK", &stream, "mail", &ids[0], &ids[1]]).await?;
    bury(&world, &ids[2]).await?;
    send::<()>(&world, &["XCLAIM", &stream, "mail", "c2", "0", &ids[4]]).await?;
    let members = format!("{{{stream}}}:group:mail:members");
    send::<()>(&world, &["ZADD", &members, "99999999999999", "c1", "1", "c2"]).await?;
    world.streams.publish(&[envelope("user", "6", &6)?, envelope("user", "7", &7)?]).await.map_err(|e| e.error)?;

    let groups = world.streams.groups(&stream).await?;
    let [audit, mail] = groups.as_slice() else { anyhow::bail!("{groups:?}") };
    let figures = |group: &GroupInfo| (group.group.clone(), group.pending, group.behind, group.dead);
    assert_eq!(figures(audit), ("audit".to_owned(), 0, Some(7), Some(0)));
    assert_eq!(figures(mail), ("mail".to_owned(), 2, Some(2), Some(1)));
    assert_eq!((audit.oldest_pending_age_ms, mail.last_delivered.as_str()), (None, ids[4].as_str()));
    let consumers: Vec<_> = mail.consumers.iter().map(|c| (c.name.as_str(), c.pending, c.alive)).collect();
    assert_eq!(consumers, [("c1", 1, Some(true)), ("c2", 1, Some(false))]);
    let ages = mail.consumers.iter().map(|c| c.oldest_pending_age_ms.context("an age")).collect::<Result<Vec<_>>>()?;
    assert!(mail.oldest_pending_age_ms == Some(ages[0]) && ages[1] <= ages[0] && ages[0] < 60_000, "{mail:?}");

    // Redis does not know how far behind a group is where an entry was deleted: they are counted.
    send::<()>(&world, &["XDEL", &stream, &ids[3]]).await?;
    assert_eq!(world.streams.groups(&stream).await?[0].behind, Some(6));
    Ok(())
}

/// A retry of many is a pipeline: what comes of each is told, and copies keep the order.
#[tokio::test(flavor = "multi_thread")]
async fn many_dead_letters_are_retried_at_once_and_in_order() -> Result<()> {
    const MANY: usize = 3_000;
    let world = World::unmigrated()?;
    let (stream, mut redis) = (world.user_stream(), world.redis().await?);
    let ids = delivered(&world, 1).await?;
    let own = ["reason", "no", "attempts", "1", "history", "[]", "dead_at", "2026-01-31T12:00:00Z"];
    let mut lay = redis::pipe();
    for n in 0..MANY {
        // The first is in the hand of c1, and each hundredth of a group that is gone.
        let group = if n % 100 == 99 { "gone" } else { "mail" };
        let entry = if n == 0 { ids[0].clone() } else { format!("1-{n}") };
        lay.cmd("XADD").arg(dead_stream(&stream)).arg(format!("1-{}", n + 1)).arg(&["id", "x", "aggregate_id"]).arg(n);
        lay.arg(&["group", group, "entry", &entry]).arg(&own);
    }
    lay.exec_async(&mut redis).await?;
    let letters = world.streams.dead_letters(&stream, "0", MANY).await?;
    let started = std::time::Instant::now();
    let answers = world.streams.retry_dead_letters(&letters).await?;
    println!("retried {MANY} dead letters in {:?}", started.elapsed());
    for (n, answer) in answers.iter().enumerate() {
        let is_right = match answer {
            Ok(RetriedAs::Pending(consumer)) => n == 0 && consumer == "c1",
            Ok(RetriedAs::Copy(_)) => n > 0 && n % 100 != 99,
            Err(StreamsError::NoGroup { group, .. }) => n % 100 == 99 && group == "gone",
            _ => false,
        };
        assert!(is_right, "{n}: {answer:?}");
    }
    assert_eq!((answers.len(), world.streams.len(&dead_stream(&stream)).await?), (MANY, 31));
    let copies = world.entries(&stream).await?;
    let order: Vec<usize> = copies[1..].iter().filter_map(|copy| copy.field("aggregate_id")?.parse().ok()).collect();
    assert_eq!(order, (1..MANY).filter(|n| n % 100 != 99).collect::<Vec<_>>());
    assert!(copies[1..].iter().all(|copy| copy.field("group") == Some("mail") && copy.field("reason").is_none()));
    // A second time, nothing more comes of it.
    assert!(matches!(world.streams.retry_dead_letters(&letters[1..2]).await?.as_slice(), [Ok(RetriedAs::Before)]));
    world.streams.discard_dead_letters(&stream, &[&letters[0].dead_id, "1-100"]).await?;
    assert_eq!(world.streams.len(&dead_stream(&stream)).await?, 29);
    Ok(())
}

/// The dead letters are on another node than their stream.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_cluster_entries_are_buried_and_retried_across_nodes() -> Result<()> {
    let cluster = RedisCluster::start()?;
    let world = World::on(Sandbox::shared().database()?, &cluster.url(), "events:".into())?;
    let mut apart = None;
    for n in 0..100 {
        let stream = format!("events:type{n}");
        if cluster.master_of(&stream)? != cluster.master_of(&dead_stream(&stream))? {
            apart = Some((format!("type{n}"), stream));
            break;
        }
    }
    let (aggregate_type, stream) = apart.context("streams on different nodes")?;
    let url = cluster.nodes()[cluster.master_of(&stream)?].url();
    let mut redis = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    world.streams.publish(&[envelope(&aggregate_type, "1", &1)?]).await.map_err(|e| e.error)?;
    send_to::<()>(&mut redis, &["XGROUP", "CREATE", &stream, "mail", "0"]).await?;
    let take = ["XREADGROUP", "GROUP", "mail", "c1", "STREAMS", &stream, ">"];
    let reply: redis::streams::StreamReadReply = send_to(&mut redis, &take).await?;
    let id = reply.keys.first().and_then(|key| key.ids.first()).context("an entry")?.id.clone();
    for round in 0..3 {
        assert!(world.streams.bury(&burial(&stream, &id)).await?, "round {round}");
        assert!(!world.streams.bury(&burial(&stream, &id)).await?, "round {round}");
        let letters = world.streams.dead_letters(&stream, "0", 10).await?;
        assert_eq!(letters.len(), 1, "round {round}");
        assert_eq!((letters[0].aggregate_id.as_deref(), letters[0].entry.as_str()), (Some("1"), id.as_str()));
        // As if the acknowledgement had not arrived: the dead letter is not written twice.
        send_to::<()>(&mut redis, &["XCLAIM", &stream, "mail", "c1", "0", &id, "FORCE"]).await?;
        assert!(world.streams.bury(&burial(&stream, &id)).await?, "round {round}");
        assert_eq!(world.streams.dead_letters(&stream, "0", 10).await?.len(), 1, "round {round}");

        assert_eq!(world.streams.retry_dead(&letters[0]).await?, RetriedAs::Entry, "round {round}");
        assert_eq!(world.streams.retry_dead(&letters[0]).await?, RetriedAs::Before, "round {round}");
        let pending: Vec<(String, String, u64, u64)> =
            send_to(&mut redis, &["XPENDING", &stream, "mail", "-", "+", "10"]).await?;
        assert_eq!(pending.iter().map(|(_, consumer, ..)| consumer.as_str()).collect::<Vec<_>>(), [RETURNED]);
        send_to::<()>(&mut redis, &["XCLAIM", &stream, "mail", "c1", "0", &id]).await?;
    }
    assert_eq!(world.streams.dead_streams().await?, [stream]);
    Ok(())
}
