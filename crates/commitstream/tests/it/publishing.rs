//! Publishers inside transactions, with servers that work: what commits is published, what does not is not.

use std::sync::Arc;

use anyhow::{Context, Result};
use commitstream::config::{Route, Strategy};
use commitstream::publisher::{
    DomainEventPublisher, HybridEventPublisher, PostgresOutboxPublisher, PublishError, RedisStreamsPublisher,
};
use commitstream::streams::StreamsError;
use commitstream::{DomainEvent, EventEnvelope};
use serde_json::{Value, json};
use sqlx::Connection;
use uuid::Uuid;

use crate::events::{Training, envelope, session, user};
use crate::support::World;

#[tokio::test(flavor = "multi_thread")]
async fn an_event_commits_and_rolls_back_with_its_transaction() -> Result<()> {
    let world = World::new().await?;
    world.database.psql("CREATE TABLE users (id int);")?;
    let publisher = PostgresOutboxPublisher::new(&world.settings);
    let mut connection = world.connect().await?;
    for (id, commit) in [(1, true), (2, false), (3, true)] {
        let mut tx = connection.begin().await?;
        sqlx::query("INSERT INTO users VALUES ($1)").bind(id).execute(&mut *tx).await?;
        publisher.publish(&mut tx, &user(u64::try_from(id)?)).await?;
        // Injected on its own it takes any event, whatever its lane.
        publisher.publish(&mut tx, &session(u64::try_from(id)?)).await?;
        assert_eq!(world.rows().await?.len(), if id == 1 { 0 } else { 2 }, "not visible to others before the commit");
        if commit { tx.commit().await? } else { tx.rollback().await? }
    }
    assert_eq!(world.database.psql("SELECT id FROM users ORDER BY id;")?, "1\n3\n");
    let rows = ["UserCreated user/1", "SessionStarted session/1", "UserCreated user/3", "SessionStarted session/3"];
    assert_eq!(world.rows().await?, rows);
    assert!(world.streams.list().await?.is_empty(), "without a relay nothing is sent");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn publish_all_keeps_the_order_of_any_number_of_events() -> Result<()> {
    let world = World::new().await?;
    let mut connection = world.connect().await?;
    let outbox: Arc<dyn DomainEventPublisher> = Arc::new(PostgresOutboxPublisher::new(&world.settings));
    let streams: Arc<dyn DomainEventPublisher> = Arc::new(RedisStreamsPublisher::new(&world.settings)?);
    for count in [0, 1, 2, 5_001] {
        let events: Vec<_> = (0..count).map(user).collect();
        let events: Vec<&dyn DomainEvent> = events.iter().map(|e| e as &dyn DomainEvent).collect();
        sqlx::query("TRUNCATE event_outbox").execute(&mut connection).await?;
        let ids = outbox.publish_all(&mut connection, &events).await?;
        let stored: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM event_outbox ORDER BY seq").fetch_all(&mut connection).await?;
        assert_eq!(stored, ids);
        let expected: Vec<_> = (0..count).map(|n| format!("UserCreated user/{n}")).collect();
        assert_eq!(world.rows().await?, expected);

        redis::cmd("DEL").arg(world.user_stream()).query_async::<()>(&mut world.redis().await?).await?;
        let ids = streams.publish_all(&mut connection, &events).await?;
        assert_eq!(world.streamed().await?, expected);
        let sent = world.entries(&world.user_stream()).await?;
        let sent: Vec<_> = sent.iter().map(|e| e.field("id").unwrap_or_default().to_owned()).collect();
        assert_eq!(sent, ids.iter().map(Uuid::to_string).collect::<Vec<_>>());
    }
    Ok(())
}

/// A service that knows only the interface is given each publisher in turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_can_be_given_any_publisher() -> Result<()> {
    async fn register(publisher: Arc<dyn DomainEventPublisher>, world: &World, commit: bool) -> Result<()> {
        let mut connection = world.connect().await?;
        let mut tx = connection.begin().await?;
        publisher.publish(&mut tx, &user(1)).await?;
        publisher.publish(&mut tx, &session(1)).await?;
        if commit {
            tx.commit().await?
        } else {
            tx.rollback().await?
        }
        Ok(())
    }
    let (critical, frequent) = ("UserCreated user/1", "SessionStarted session/1");
    for commit in [true, false] {
        let world = World::new().await?;
        register(Arc::new(world.publisher()?), &world, commit).await?;
        assert_eq!(world.rows().await?, if commit { vec![critical] } else { vec![] });
        assert_eq!(world.streamed().await?, [frequent]);

        let world = World::new().await?;
        register(Arc::new(PostgresOutboxPublisher::new(&world.settings)), &world, commit).await?;
        assert_eq!(world.rows().await?, if commit { vec![critical, frequent] } else { vec![] });
        assert!(world.streamed().await?.is_empty());

        let world = World::new().await?;
        register(Arc::new(RedisStreamsPublisher::new(&world.settings)?), &world, commit).await?;
        assert!(world.rows().await?.is_empty());
        assert_eq!(world.streamed().await?, [frequent, critical]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_settings_decide_the_way() -> Result<()> {
    type Change = fn(&mut commitstream::config::Settings);
    let (critical, frequent) = ("UserCreated user/1", "SessionStarted session/1");
    let cases: [(&str, Change, &[&str], &[&str]); 6] = [
        ("hybrid", |_| (), &[critical], &[frequent]),
        ("outbox", |s| s.publishing.default_strategy = Strategy::Outbox, &[critical, frequent], &[]),
        ("streams", |s| s.publishing.default_strategy = Strategy::Streams, &[], &[frequent, critical]),
        (
            "overrides",
            |s| {
                s.publishing.overrides.insert("UserCreated".into(), Route::Streams);
                s.publishing.overrides.insert("SessionStarted".into(), Route::Outbox);
            },
            &[frequent],
            &[critical],
        ),
        (
            "an override beats the strategy",
            |s| {
                s.publishing.default_strategy = Strategy::Streams;
                s.publishing.overrides.insert("UserCreated".into(), Route::Outbox);
            },
            &[critical],
            &[frequent],
        ),
        (
            "OUTBOX_ENABLED=false beats all",
            |s| {
                s.outbox.enabled = false;
                s.publishing.default_strategy = Strategy::Outbox;
                s.publishing.overrides.insert("UserCreated".into(), Route::Outbox);
            },
            &[],
            &[frequent, critical],
        ),
    ];
    for (what, change, in_outbox, in_streams) in cases {
        let mut world = World::new().await?;
        change(&mut world.settings);
        let publisher = world.publisher()?;
        let mut connection = world.connect().await?;
        publisher.publish_all(&mut connection, &[&user(1), &session(1)]).await?;
        assert_eq!(world.rows().await?, in_outbox, "{what}");
        assert_eq!(world.streamed().await?, in_streams, "{what}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_goes_to_streams_no_redis_is_needed() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.redis.url = None;
    assert!(matches!(HybridEventPublisher::new(&world.settings), Err(PublishError::MissingUrl(_))), "hybrid");
    world.settings.publishing.default_strategy = Strategy::Outbox;
    world.settings.publishing.overrides.insert("UserCreated".into(), Route::Outbox);
    let (publisher, pool) = (world.publisher()?, world.pool().await?);
    publisher.publish_all(&mut world.connect().await?, &[&user(1), &session(1)]).await?;
    let mut work = publisher.begin(&pool).await?;
    work.publish_all(&[&user(2), &session(2)]).await?;
    work.commit().await?;
    let rows = ["UserCreated user/1", "SessionStarted session/1", "UserCreated user/2", "SessionStarted session/2"];
    assert_eq!(world.rows().await?, rows);
    world.settings.publishing.overrides.insert("SessionStarted".into(), Route::Streams);
    assert!(matches!(HybridEventPublisher::new(&world.settings), Err(PublishError::MissingUrl(_))), "an override");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_of_work_publishes_both_lanes_at_its_commit_only() -> Result<()> {
    let world = World::new().await?;
    world.database.psql("CREATE TABLE users (id int);")?;
    let (publisher, pool) = (world.publisher()?, world.pool().await?);
    for (id, end) in [(1, "rollback"), (2, "drop"), (3, "commit")] {
        let mut work = publisher.begin(&pool).await?;
        sqlx::query("INSERT INTO users VALUES ($1)").bind(id).execute(work.connection()).await?;
        let id = u64::try_from(id)?;
        work.publish_all(&[&session(id), &user(id), &session(id + 10)]).await?;
        work.publish(&user(id + 10)).await?;
        assert!(world.streamed().await?.is_empty() && world.rows().await?.is_empty(), "nothing leaves before the commit");
        match end {
            "rollback" => work.rollback().await?,
            "drop" => drop(work),
            _ => work.commit().await?,
        }
    }
    assert_eq!(world.rows().await?, ["UserCreated user/3", "UserCreated user/13"]);
    assert_eq!(world.streamed().await?, ["SessionStarted session/3", "SessionStarted session/13"]);
    assert_eq!(world.database.psql("SELECT id FROM users;")?, "3\n");
    Ok(())
}

/// PostgreSQL answers COMMIT in an aborted transaction with ROLLBACK, and that is no error to the driver.
#[tokio::test(flavor = "multi_thread")]
async fn a_unit_of_work_whose_transaction_was_aborted_does_not_commit() -> Result<()> {
    let world = World::new().await?;
    let (publisher, pool) = (world.publisher()?, world.pool().await?);
    let mut work = publisher.begin(&pool).await?;
    work.publish_all(&[&user(1), &session(1)]).await?;
    // The application takes this failure lightly.
    sqlx::query("INSERT INTO no_such_table VALUES (1)").execute(work.connection()).await.unwrap_err();
    let committed = work.commit().await;
    assert!(world.rows().await?.is_empty(), "the server has rolled back");
    assert!(committed.is_err(), "commit() claims to have committed what was rolled back");
    assert!(world.streamed().await?.is_empty(), "the held events were published although the data is gone");

    // Not even when it asked for more after the failure, whatever that needs of the transaction.
    for event in [&user(2) as &dyn DomainEvent, &session(2)] {
        let mut work = publisher.begin(&pool).await?;
        work.publish(&user(1)).await?;
        sqlx::query("INSERT INTO no_such_table VALUES (1)").execute(work.connection()).await.unwrap_err();
        let published = work.publish(event).await;
        assert_eq!(published.is_err(), event.event_type() == "UserCreated", "{published:?}");
        work.commit().await.unwrap_err();
        assert!(world.rows().await?.is_empty() && world.streamed().await?.is_empty());
    }
    Ok(())
}

/// A constraint that is checked at the commit.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_fails_publishes_nothing() -> Result<()> {
    let world = World::new().await?;
    world.database.psql("CREATE TABLE users (id int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO users VALUES (1);")?;
    let (publisher, pool) = (world.publisher()?, world.pool().await?);
    let mut work = publisher.begin(&pool).await?;
    work.publish_all(&[&user(1), &session(1)]).await?;
    sqlx::query("INSERT INTO users VALUES (1)").execute(work.connection()).await?;
    let error = work.commit().await.unwrap_err();
    assert!(matches!(error, commitstream::publisher::CommitError::Commit(_)), "{error:?}");
    assert!(world.rows().await?.is_empty() && world.streamed().await?.is_empty());
    Ok(())
}

/// A relay of the same process is woken by the commit; the poll interval is a minute and there is no other way.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_wakes_the_relay_of_the_same_process() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.outbox.processor.poll_interval = std::time::Duration::from_secs(60);
    world.database.psql("ALTER TABLE event_outbox DISABLE TRIGGER event_outbox_wake_relay;")?;
    let relay = world.relay()?;
    let mut status = relay.watch();
    status.wait_for(|s| s.state == commitstream::relay::RelayState::Active).await?;
    let publisher = world.publisher()?.with_relay(relay.waker());
    let pool = world.pool().await?;
    for n in 1..=20 {
        let mut work = publisher.begin(&pool).await?;
        work.publish(&user(n)).await?;
        work.commit().await?;
        let woken = tokio::time::timeout(std::time::Duration::from_secs(10), status.wait_for(|s| s.published >= n)).await;
        assert!(woken.is_ok(), "event {n} was not noticed");
    }
    relay.stop().await?;
    Ok(())
}

/// What stands in the stream is what serde writes, and what the event says of itself.
#[tokio::test(flavor = "multi_thread")]
async fn derived_events_arrive_whole_by_both_lanes() -> Result<()> {
    let world = World::new().await?;
    let job = Uuid::now_v7();
    let ada = user(7);
    let started = Training::Started { job, gpus: vec!["a".into(), "\u{1f600}".into()] };
    let metric = Training::Metric { job, name: "loss".into(), step: None };
    let relay = world.relay()?;
    let mut connection = world.connect().await?;
    let mut tx = connection.begin().await?;
    let ids = world.publisher()?.publish_all(&mut tx, &[&ada, &started, &metric, &session(7)]).await?;
    tx.commit().await?;
    world.drained().await?;
    relay.stop().await?;

    let mut arrived = Vec::new();
    for stream in world.streams.list().await? {
        for entry in world.entries(&stream).await? {
            arrived.push(entry.envelope()?);
        }
    }
    let expected: [(&dyn DomainEvent, Value); 4] = [
        (&ada, serde_json::to_value(&ada)?),
        (&started, json!({"job": job, "gpus": ["a", "\u{1f600}"]})),
        (&metric, json!({"job": job, "name": "loss", "step": null})),
        (&session(7), json!({"session_id": 7})),
    ];
    assert_eq!(arrived.len(), expected.len());
    for (id, (event, payload)) in ids.iter().zip(expected) {
        let found: Vec<&EventEnvelope> = arrived.iter().filter(|e| e.id == *id).collect();
        assert_eq!(found.len(), 1, "{}", event.event_type());
        assert_eq!(
            (found[0].event_type.as_str(), found[0].aggregate_type.as_str(), found[0].aggregate_id.clone()),
            (event.event_type(), event.aggregate_type(), event.aggregate_id())
        );
        assert_eq!(serde_json::from_str::<Value>(found[0].payload.get())?, payload);
        assert!(found[0].headers.is_empty());
    }
    let micros = |time: chrono::DateTime<chrono::Utc>| time.timestamp_micros();
    let arrived = arrived.iter().find(|e| e.id == ids[0]).map(|e| micros(e.occurred_at));
    assert_eq!(arrived, Some(micros(ada.occurred_at)), "the time of the event, not of its row");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_key_of_another_type_is_a_refusal() -> Result<()> {
    let world = World::new().await?;
    let mut redis = world.redis().await?;
    redis::cmd("SET").arg(world.streams.stream_of("session")).arg("in the way").query_async::<()>(&mut redis).await?;
    let publisher = RedisStreamsPublisher::new(&world.settings)?;
    let error = publisher.publish(&session(1)).await.unwrap_err();
    assert!(matches!(error, PublishError::Streams(StreamsError::Refused { .. })), "{error:?}");
    assert!(error.to_string().contains("WRONGTYPE"), "{error}");

    // One refused among many: the others are in, and the error names it.
    let mut events: Vec<EventEnvelope> = (0..2_500).map(|n| envelope("user", &n.to_string(), &n)).collect::<Result<_>>()?;
    events[1_700] = envelope("session", "1700", &())?;
    let refs: Vec<&dyn DomainEvent> = events.iter().map(|e| e as &dyn DomainEvent).collect();
    let error = publisher.publish_all(&refs).await.unwrap_err();
    let PublishError::Streams(StreamsError::PartlyRefused { total: 2_500, refused }) = &error else {
        anyhow::bail!("{error:?}");
    };
    assert_eq!(refused.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [events[1_700].id]);
    assert!(refused[0].1.contains("WRONGTYPE"), "{error}");
    assert_eq!(world.streams.len(&world.user_stream()).await?, 2_499);
    Ok(())
}

/// What a pooler in transaction mode needs: nothing of a publish stays behind in the session.
#[tokio::test(flavor = "multi_thread")]
async fn without_prepared_statements_a_publish_leaves_none_in_the_session() -> Result<()> {
    let mut world = World::new().await?;
    let mut connection = world.connect().await?;
    for (prepared, left) in [(false, 0), (true, 2)] {
        world.settings.database.prepared_statements = prepared;
        let publisher = PostgresOutboxPublisher::new(&world.settings);
        let events = (0..3).map(user).collect::<Vec<_>>();
        publisher.publish(&mut connection, &events[0]).await?;
        publisher.publish_all(&mut connection, &[&events[1], &events[2]]).await?;
        let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM pg_prepared_statements").persistent(false);
        assert_eq!(count.fetch_one(&mut connection).await?, left);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_with_headers_keeps_its_lane() -> Result<()> {
    let world = World::new().await?;
    let (publisher, mut connection) = (world.publisher()?, world.connect().await?);
    let (high, critical) = (session(1), user(1));
    publisher.publish(&mut connection, &high.with_header("traceparent", "00-a").with_header("n", 1)).await?;
    publisher.publish(&mut connection, &critical.with_header("traceparent", "00-b")).await?;
    assert_eq!(world.rows().await?, ["UserCreated user/1"]);
    assert_eq!(world.streamed().await?, ["SessionStarted session/1"]);
    let fields = world.raw_entries("session").await?.concat();
    let (_, headers) = fields.iter().find(|(name, _)| name == "headers").context("headers")?;
    // In which order they stand depends on the features of serde_json.
    assert_eq!(serde_json::from_str::<Value>(headers)?, json!({ "n": 1, "traceparent": "00-a" }));
    Ok(())
}
