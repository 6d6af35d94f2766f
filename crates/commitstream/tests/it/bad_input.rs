//! Input that something along the way could not take is refused before anything is sent; everything else arrives as it was.

use std::collections::HashMap;

use anyhow::{Context, Result};
use chrono::{DateTime, TimeZone, Utc};
use commitstream::publisher::{DomainEventPublisher, PostgresOutboxPublisher, PublishError, RedisStreamsPublisher};
use commitstream::{DomainEvent, EventEnvelope, EventError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use sqlx::Connection;

use crate::events::{envelope, user};
use crate::support::World;

/// A change that spoils an envelope.
type Spoil = fn(&mut EventEnvelope);

fn payload(json: String) -> Box<RawValue> {
    RawValue::from_string(json).unwrap_or_else(|e| panic!("not JSON: {e}"))
}

/// Publishes a spoilt event, alone and among good ones, by each publisher in a transaction: a typed error that says what is wrong,
/// nothing sent, and the transaction as usable as before.
async fn assert_refused(what: &str, spoil: Spoil, expected: &[&str]) -> Result<()> {
    let mut world = World::new().await?;
    world.settings.publishing.max_payload_bytes = 2_048;
    let mut spoilt = envelope("user", "1", &json!({}))?;
    spoil(&mut spoilt);
    let publishers: [Box<dyn DomainEventPublisher>; 3] = [
        Box::new(PostgresOutboxPublisher::new(&world.settings)),
        Box::new(RedisStreamsPublisher::new(&world.settings)?),
        Box::new(world.publisher()?),
    ];
    let mut connection = world.connect().await?;
    let mut tx = connection.begin().await?;
    for (n, publisher) in publishers.iter().enumerate() {
        for events in [vec![&spoilt as &dyn DomainEvent], vec![&user(1), &spoilt, &user(2)]] {
            let error = publisher
                .publish_all(&mut tx, &events)
                .await
                .err()
                .with_context(|| format!("{what} was taken by publisher {n}"))?;
            assert!(matches!(error, PublishError::Event(_)), "{what}, publisher {n}: {error:?}");
            let text = error.to_string();
            assert!(expected.iter().all(|part| text.contains(part)), "{what}: {text:?} does not say {expected:?}");
        }
    }
    publishers[0].publish(&mut tx, &user(3)).await.with_context(|| format!("the transaction is not usable after {what}"))?;
    tx.commit().await?;
    assert_eq!(world.rows().await?, ["UserCreated user/3"], "{what}");
    assert!(world.streams.list().await?.is_empty(), "{what}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_names_are_refused() -> Result<()> {
    let cases: [(&str, Spoil, &[&str]); 13] = [
        ("no event_type", |e| e.event_type.clear(), &["event_type", "empty", "255"]),
        ("no aggregate_type", |e| e.aggregate_type.clear(), &["aggregate_type", "empty", "255"]),
        ("no aggregate_id", |e| e.aggregate_id.clear(), &["aggregate_id", "empty", "255"]),
        ("long event_type", |e| e.event_type = "x".repeat(256), &["event_type", "256", "255"]),
        ("long aggregate_type", |e| e.aggregate_type = "\u{e4}".repeat(128), &["aggregate_type", "256", "255"]),
        ("long aggregate_id", |e| e.aggregate_id = "x".repeat(100_000), &["aggregate_id", "100000", "255"]),
        ("NUL in event_type", |e| e.event_type = "a\0".into(), &["event_type", "NUL"]),
        ("NUL in aggregate_type", |e| e.aggregate_type = "\0".into(), &["aggregate_type", "NUL"]),
        ("NUL in aggregate_id", |e| e.aggregate_id = "a\0b".into(), &["aggregate_id", "NUL"]),
        ("left brace", |e| e.aggregate_type = "a{b".into(), &["aggregate_type", "brace"]),
        ("right brace", |e| e.aggregate_type = "}".into(), &["aggregate_type", "brace"]),
        ("name of dead letters", |e| e.aggregate_type = "user:dead".into(), &["aggregate_type", ":dead"]),
        ("year 10000", |e| e.occurred_at = DateTime::<Utc>::MAX_UTC, &["occurred_at", "9999"]),
    ];
    for (what, spoil, expected) in cases {
        assert_refused(what, spoil, expected).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_payloads_and_headers_are_refused() -> Result<()> {
    let cases: [(&str, Spoil, &[&str]); 7] = [
        ("a large payload", |e| e.payload = payload(format!("\"{}\"", "x".repeat(2_047))), &["2049", "2048", "maxPayloadBytes"]),
        ("large headers", |e| drop(e.headers.insert("h".into(), "x".repeat(2_048).into())), &["2048", "maxPayloadBytes"]),
        ("NUL in the payload", |e| e.payload = payload(r#"{"a":["\u0000"]}"#.into()), &["payload", "NUL"]),
        ("NUL in a key", |e| e.payload = payload(r#"{"\u0000":1}"#.into()), &["payload", "NUL"]),
        ("NUL after a backslash", |e| e.payload = payload(r#""\\\u0000""#.into()), &["payload", "NUL"]),
        ("NUL in a header", |e| drop(e.headers.insert("h".into(), json!(["\0"]))), &["headers", "NUL"]),
        ("NUL in a header's name", |e| drop(e.headers.insert("\0".into(), Value::Null)), &["headers", "NUL"]),
    ];
    for (what, spoil, expected) in cases {
        assert_refused(what, spoil, expected).await?;
    }
    Ok(())
}

/// serde_json's `RawValue` takes these, `jsonb` does not: the INSERT fails and with it the caller's transaction.
#[tokio::test(flavor = "multi_thread")]
async fn json_that_jsonb_cannot_hold_is_refused() -> Result<()> {
    let cases: [(&str, Spoil); 5] = [
        ("a lone high surrogate", |e| e.payload = payload(r#"{"name":"\ud83d"}"#.into())),
        ("a lone low surrogate", |e| e.payload = payload(r#"["\ude00"]"#.into())),
        ("two high surrogates", |e| e.payload = payload(r#"["\ud83d\ud83d\ude00"]"#.into())),
        ("a number beyond numeric", |e| e.payload = payload("[1e200000]".into())),
        ("a number below numeric", |e| e.payload = payload("[1e-200000]".into())),
    ];
    let mut taken = Vec::new();
    for (what, spoil) in cases {
        if let Err(error) = assert_refused(what, spoil, &["payload"]).await {
            taken.push(format!("{error:#}"));
        }
    }
    assert!(taken.is_empty(), "{taken:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn json_nested_too_deeply_is_refused() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.publishing.max_payload_bytes = 1 << 20;
    let publisher = PostgresOutboxPublisher::new(&world.settings);
    let mut connection = world.connect().await?;
    let mut event = envelope("user", "1", &())?;
    event.payload = payload("[".repeat(200_000) + &"]".repeat(200_000));
    let mut tx = connection.begin().await?;
    let error = publisher.publish(&mut tx, &event).await.unwrap_err();
    assert!(matches!(error, PublishError::Event(_)), "{error:?}");
    publisher.publish(&mut tx, &user(1)).await?;
    tx.commit().await?;
    Ok(())
}

/// Both ends of the years that the table takes, and the last instant of year 9999, which many use as "for ever".
#[tokio::test(flavor = "multi_thread")]
async fn times_that_are_valid_fit_the_table() -> Result<()> {
    let world = World::new().await?;
    let publisher = PostgresOutboxPublisher::new(&world.settings);
    let mut refused = Vec::new();
    for text in [
        "0001-01-01T00:00:00Z",
        "0001-01-02T00:00:00Z",
        "1969-12-31T23:59:59.999999Z",
        "9999-12-30T00:00:00Z",
        "9999-12-31T23:59:59.999999Z",
    ] {
        let mut event = envelope("user", "1", &())?;
        event.occurred_at = DateTime::parse_from_rfc3339(text)?.to_utc();
        let mut connection = world.connect().await?;
        match publisher.publish(&mut connection, &event).await {
            // A typed refusal is fine too.
            Ok(_) | Err(PublishError::Event(EventError::Time(_))) => {}
            Err(error) => refused.push(format!("{text}: {:#}", anyhow::Error::from(error))),
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
    Ok(())
}

/// jsonb writes a space after each comma and colon and spells numbers out, so its text may be longer than what was published.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_within_the_limit_is_delivered() -> Result<()> {
    let mut world = World::new().await?;
    world.settings.publishing.max_payload_bytes = 2_048;
    world.settings.outbox.processor.max_retries = 0;
    let publisher = PostgresOutboxPublisher::new(&world.settings);
    let mut connection = world.connect().await?;
    let commas = format!("[{}0]", "0,".repeat(1_000));
    let mut accepted = 0;
    for text in [commas.as_str(), "[1e300,1e300,1e300,1e300,1e300,1e300,1e300,1e300]"] {
        let mut event = envelope("user", "1", &())?;
        event.payload = payload(text.to_owned());
        assert!(text.len() <= 2_048);
        match publisher.publish(&mut connection, &event).await {
            Ok(_) => accepted += 1,
            // Better a refusal here than a FAILED event later.
            Err(PublishError::Event(EventError::TooLarge { .. })) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    let stats = world.stats().await?;
    assert_eq!((stats.published, stats.failed), (accepted, 0), "{:#?}", stats.recent_failures);
    Ok(())
}

/// Random names, payloads, headers and times come back by both lanes as they were sent.
#[tokio::test(flavor = "multi_thread")]
async fn random_envelopes_survive_both_lanes() -> Result<()> {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let world = World::new().await?;
    let mut sent = HashMap::new();
    let mut make = || -> Result<Vec<EventEnvelope>> {
        let events: Vec<_> = (0..300).map(|_| random_envelope(&mut rng)).collect::<Result<_>>()?;
        sent.extend(events.iter().map(|e| (e.id, e.clone())));
        Ok(events)
    };
    let (through_outbox, one_by_one, direct) = (make()?, make()?, make()?);
    let relay = world.relay()?;
    let mut connection = world.connect().await?;
    let outbox = PostgresOutboxPublisher::new(&world.settings);
    let streams = RedisStreamsPublisher::new(&world.settings)?;
    outbox.publish_all(&mut connection, &refs(&through_outbox)).await.with_context(|| format!("seed {seed}"))?;
    for event in &one_by_one {
        outbox.publish(&mut connection, event).await.with_context(|| format!("seed {seed}: {event:?}"))?;
    }
    streams.publish_all(&refs(&direct)).await.with_context(|| format!("seed {seed}"))?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.stats().await?.failed, 0, "seed {seed}");

    let mut arrived = 0;
    for stream in world.streams.list().await? {
        for entry in world.entries(&stream).await? {
            let got = entry.envelope().with_context(|| format!("seed {seed}"))?;
            let was = &sent[&got.id];
            assert_eq!(whole(&got)?, whole(was)?, "seed {seed}");
            assert_eq!(stream, world.streams.stream_of(&was.aggregate_type), "seed {seed}");
            arrived += 1;
        }
    }
    assert_eq!(arrived, sent.len(), "seed {seed}");
    Ok(())
}

fn refs(events: &[EventEnvelope]) -> Vec<&dyn DomainEvent> {
    events.iter().map(|e| e as &dyn DomainEvent).collect()
}

/// Everything an envelope says, comparable.
fn whole(e: &EventEnvelope) -> Result<Value> {
    let payload: Value = serde_json::from_str(e.payload.get())?;
    Ok(json!([e.id, e.event_type, e.aggregate_type, e.aggregate_id, e.occurred_at_text(), payload, e.headers]))
}

fn random_envelope(rng: &mut StdRng) -> Result<EventEnvelope> {
    let aggregate_type = name(rng).replace(['{', '}'], "_");
    let mut event = envelope(&aggregate_type, &name(rng), &random_json(rng, 4))?;
    event.event_type = name(rng);
    // From year 1 to 9999, in microseconds.
    let micros = rng.random_range(-62_135_500_000_000_000..253_402_000_000_000_000);
    event.occurred_at = Utc.timestamp_micros(micros).single().context("a time")?;
    for _ in 0..rng.random_range(0_u32..3) {
        event.headers.insert(text(rng, 10), random_json(rng, 1));
    }
    Ok(event)
}

/// 1 to 255 bytes.
fn name(rng: &mut StdRng) -> String {
    let most = [1, 5, 80][rng.random_range(0..3)];
    let mut name = text(rng, most);
    name.push(random_char(rng));
    name.truncate(name.floor_char_boundary(EventEnvelope::MAX_NAME_BYTES));
    name
}

fn text(rng: &mut StdRng, most: usize) -> String {
    (0..rng.random_range(0..=most)).map(|_| random_char(rng)).collect()
}

/// Any character but NUL, and those that mean something somewhere more often than others.
fn random_char(rng: &mut StdRng) -> char {
    let special =
        "'\"\\`$%*?[]{}()<>:;,|&#!~^ \t\r\n\u{1}\u{7f}\u{85}\u{a0}\u{200b}\u{202e}\u{2028}\u{feff}\u{fffd}\u{ffff}\u{10ffff}";
    match rng.random_range(0..3) {
        0 => special.chars().nth(rng.random_range(0..special.chars().count())).unwrap_or('x'),
        1 => rng.random_range('a'..='z'),
        _ => rng.random_range('\u{1}'..=char::MAX),
    }
}

/// Numbers are integers: jsonb keeps more digits of a fraction than an f64 has.
fn random_json(rng: &mut StdRng, depth: u32) -> Value {
    match rng.random_range(0..if depth == 0 { 4 } else { 6 }) {
        0 => Value::Null,
        1 => rng.random::<bool>().into(),
        2 => rng.random::<i64>().into(),
        3 => text(rng, 40).into(),
        4 => (0..rng.random_range(0..5)).map(|_| random_json(rng, depth - 1)).collect::<Vec<_>>().into(),
        _ => (0..rng.random_range(0..5)).map(|_| (text(rng, 8), random_json(rng, depth - 1))).collect::<Map<_, _>>().into(),
    }
}
