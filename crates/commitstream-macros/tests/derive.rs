//! What `#[derive(DomainEvent)]` makes of right inputs.

use std::time::{Duration, SystemTime};

use chrono::{DateTime, TimeZone, Utc};
use commitstream::event::EventKind;
use commitstream::{DecodeEvent, DomainEvent, Lane};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

fn noon() -> DateTime<Utc> {
    Utc.timestamp_micros(1_767_268_800_123_456).single().unwrap_or_default()
}

#[track_caller]
fn assert_event(event: &dyn DomainEvent, event_type: &str, aggregate: (&str, &str), lane: Lane, payload: &Value) {
    assert_eq!(event.event_type(), event_type);
    assert_eq!((event.aggregate_type(), event.aggregate_id().as_str()), aggregate);
    assert_eq!(event.lane(), lane);
    assert_eq!(&json_payload(event), payload);
}

#[track_caller]
fn json_payload(event: &dyn DomainEvent) -> Value {
    let payload = event.payload().map(|payload| serde_json::from_str(payload.get()));
    match payload {
        Ok(Ok(payload)) => payload,
        other => panic!("no payload: {other:?}"),
    }
}

#[track_caller]
fn assert_now(event: &dyn DomainEvent) {
    let before = Utc::now();
    let time = event.occurred_at();
    assert!((before..=Utc::now()).contains(&time), "{time} is not now");
}

#[test]
fn a_struct_with_all_options() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "user", lane = "high-frequency", name = "user.created")]
    #[serde(rename_all = "camelCase")]
    struct UserCreated {
        #[event(key)]
        user_id: Uuid,
        display_name: String,
        #[event(time)]
        created_at: DateTime<Utc>,
    }
    let event = UserCreated { user_id: Uuid::from_u128(7), display_name: "Ada".into(), created_at: noon() };
    let id = "00000000-0000-0000-0000-000000000007";
    let payload = json!({"userId": id, "displayName": "Ada", "createdAt": "2026-01-01T12:00:00.123456Z"});
    assert_event(&event, "user.created", ("user", id), Lane::HighFrequency, &payload);
    assert_eq!(event.occurred_at(), noon());
}

#[test]
fn a_struct_with_the_defaults() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "user")]
    struct UserDeleted {
        #[event(key)]
        id: i64,
    }
    let event = UserDeleted { id: -3 };
    assert_event(&event, "UserDeleted", ("user", "-3"), Lane::Critical, &json!({"id": -3}));
    assert_now(&event);
}

#[test]
fn a_tuple_struct() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "order")]
    struct OrderPaid(u32, #[event(key)] String, #[event(time)] SystemTime);
    let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_767_268_800_123_456);
    let event = OrderPaid(5, "A-1".into(), at);
    let time = json!({"secs_since_epoch": 1_767_268_800_u64, "nanos_since_epoch": 123_456_000});
    assert_event(&event, "OrderPaid", ("order", "A-1"), Lane::Critical, &json!([5, "A-1", time]));
    assert_eq!(event.occurred_at(), noon());
}

#[test]
fn a_newtype() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "order")]
    struct OrderSeen(#[event(key)] u8);
    assert_event(&OrderSeen(5), "OrderSeen", ("order", "5"), Lane::Critical, &json!(5));
}

#[derive(Serialize, DomainEvent)]
#[event(aggregate = "training", lane = "high-frequency")]
enum Training {
    #[event(name = "TrainingStarted", lane = "critical")]
    Started {
        #[event(key)]
        job: Uuid,
        #[event(time)]
        at: DateTime<Utc>,
    },
    Progress(#[event(key)] String, u8),
    #[event(aggregate = "model", lane = "critical")]
    ModelReady(#[event(key)] i64),
    Stopped {
        #[event(key)]
        #[serde(skip)]
        job: i64,
    },
}

#[test]
fn an_enum_with_overrides_loses_the_tag() {
    let job = Uuid::from_u128(1);
    let started = Training::Started { job, at: noon() };
    let payload = json!({"job": job, "at": "2026-01-01T12:00:00.123456Z"});
    assert_event(&started, "TrainingStarted", ("training", &job.to_string()), Lane::Critical, &payload);
    assert_eq!(started.occurred_at(), noon());

    let progress = Training::Progress("j{1}".into(), 40);
    assert_event(&progress, "Progress", ("training", "j{1}"), Lane::HighFrequency, &json!(["j{1}", 40]));
    assert_now(&progress);

    assert_event(&Training::ModelReady(9), "ModelReady", ("model", "9"), Lane::Critical, &json!(9));
    assert_event(&Training::Stopped { job: 9 }, "Stopped", ("training", "9"), Lane::HighFrequency, &json!({}));
}

#[test]
fn tags_with_escaped_characters_are_stripped() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    #[serde(rename_all = "kebab-case")]
    enum Odd {
        #[serde(rename = "quo\"te\\ \n\u{1} {\":")]
        Quoted {
            #[event(key)]
            id: i64,
        },
        #[serde(rename = "")]
        Empty(#[event(key)] i64),
        TwoWords {
            #[event(key)]
            id: i64,
            text: String,
        },
    }
    assert_event(&Odd::Quoted { id: 1 }, "Quoted", ("a", "1"), Lane::Critical, &json!({"id": 1}));
    assert_event(&Odd::Empty(1), "Empty", ("a", "1"), Lane::Critical, &json!(1));
    let text = "\"}{:\\";
    let event = Odd::TwoWords { id: 1, text: text.into() };
    assert_event(&event, "TwoWords", ("a", "1"), Lane::Critical, &json!({"id": 1, "text": text}));
}

#[test]
fn other_tagging_keeps_what_serde_writes() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    #[serde(rename_all = "camelCase", tag = "type")]
    enum Internal {
        JobDone {
            #[event(key)]
            id: i64,
        },
    }
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    #[serde(tag = "type", content = "data")]
    enum Adjacent {
        Done(#[event(key)] i64),
    }
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    #[serde(untagged)]
    enum Untagged {
        Done {
            #[event(key)]
            id: i64,
            other: i64,
        },
    }
    #[derive(Clone, Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    #[serde(into = "String")]
    enum Into {
        Done(#[event(key)] i64),
    }
    impl From<Into> for String {
        fn from(Into::Done(id): Into) -> Self {
            format!("done {id}")
        }
    }
    assert_eq!(json_payload(&Internal::JobDone { id: 1 }), json!({"type": "jobDone", "id": 1}));
    assert_eq!(json_payload(&Adjacent::Done(1)), json!({"type": "Done", "data": 1}));
    assert_eq!(json_payload(&Untagged::Done { id: 1, other: 2 }), json!({"id": 1, "other": 2}));
    assert_eq!(json_payload(&Into::Done(1)), json!("done 1"));
}

#[test]
fn an_untagged_variant_beside_tagged_ones() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    enum Mixed {
        Tagged(#[event(key)] i64),
        #[serde(untagged)]
        Untagged {
            #[event(key)]
            id: i64,
            other: i64,
        },
    }
    assert_eq!(json_payload(&Mixed::Tagged(1)), json!(1));
    assert_eq!(json_payload(&Mixed::Untagged { id: 1, other: 2 }), json!({"id": 1, "other": 2}));
}

#[test]
fn generic_types_use_their_own_bounds() {
    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    struct Changed<'a, K, T>
    where
        K: ToString + Serialize + Send + Sync,
        T: Serialize + Send + Sync,
    {
        #[event(key)]
        id: K,
        old: &'a T,
        new: T,
    }
    let event = Changed { id: "x", old: &1, new: 2 };
    assert_event(&event, "Changed", ("a", "x"), Lane::Critical, &json!({"id": "x", "old": 1, "new": 2}));
}

/// Names that shadow what the generated code uses, raw identifiers, and types made by other macros.
mod unusual_names {
    use super::*;

    #[allow(dead_code)]
    struct String;
    #[allow(dead_code)]
    struct Box;
    #[allow(dead_code)]
    enum Result {}

    #[derive(Serialize, DomainEvent)]
    #[event(aggregate = "a")]
    #[allow(non_camel_case_types)]
    enum r#Names {
        r#type {
            #[event(key)]
            r#fn: i64,
        },
        #[deprecated]
        #[allow(dead_code)]
        Old(#[event(key)] i64),
    }

    macro_rules! event {
        ($name:ident, $field:ident: $key:ty, $time:ty) => {
            #[derive(Serialize, DomainEvent)]
            #[event(aggregate = "a")]
            struct $name {
                #[event(key)]
                $field: $key,
                #[event(time)]
                at: $time,
            }
        };
    }
    event!(Made, id: i64, DateTime<Utc>);

    #[test]
    fn unusual_names_work() {
        assert_event(&Names::r#type { r#fn: 1 }, "type", ("a", "1"), Lane::Critical, &json!({"fn": 1}));
        let event = Made { id: 1, at: noon() };
        assert_eq!((event.event_type(), event.occurred_at()), ("Made", noon()));
    }
}

/// As a consumer has it, after the way through the stream.
#[allow(clippy::unwrap_used)]
fn back<E: DomainEvent + DecodeEvent>(event: &E) -> E {
    E::decode(&event.envelope().unwrap()).unwrap()
}

#[test]
fn a_struct_comes_back() {
    #[derive(Debug, PartialEq, Serialize, Deserialize, DomainEvent)]
    #[event(aggregate = "user", name = "user.created")]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct UserCreated {
        #[event(key)]
        user_id: u64,
        extra: Vec<u8>,
        #[serde(default)]
        added_later: Option<String>,
    }
    let event = UserCreated { user_id: 7, extra: vec![1, 2], added_later: None };
    assert_eq!(back(&event), event);
    assert_eq!(UserCreated::KINDS, [EventKind { aggregate_type: "user", event_type: "user.created" }]);

    let mut envelope = event.envelope().unwrap();
    envelope.payload = serde_json::value::to_raw_value(&json!({"userId": 7, "extra": [3]})).unwrap();
    assert_eq!(UserCreated::decode(&envelope).unwrap().extra, [3]);
    envelope.payload = serde_json::value::to_raw_value(&json!({"userId": "seven"})).unwrap();
    let error = UserCreated::decode(&envelope).unwrap_err();
    assert_eq!(error.to_string(), "the payload is not that of user.created");
    envelope.event_type = "user.deleted".into();
    let error = UserCreated::decode(&envelope).unwrap_err();
    assert!(error.to_string().contains("user.deleted of user is none of UserCreated"), "{error}");
}

#[test]
fn every_kind_of_variant_comes_back() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Details {
        job: u64,
        note: String,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize, DomainEvent)]
    #[event(aggregate = "training")]
    #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
    enum Training {
        #[allow(dead_code)]
        #[serde(skip)]
        NotWritten {
            #[event(key)]
            job: u64,
        },
        #[event(name = "TrainingStarted")]
        Started {
            #[event(key)]
            job: u64,
            #[serde(flatten)]
            details: Details2,
        },
        #[serde(rename = "x")]
        Progress(#[event(key)] u64, String),
        Finished(#[event(key)] u64),
        #[event(aggregate = "model")]
        Stopped {
            #[event(key)]
            #[serde(skip)]
            job: u64,
        },
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Details2 {
        inner: Details,
    }
    let details = Details2 { inner: Details { job: 3, note: "\"}".into() } };
    let events = [
        Training::Started { job: 1, details },
        Training::Progress(2, "half".into()),
        Training::Finished(3),
        Training::Stopped { job: 0 },
    ];
    for event in events {
        assert_eq!(back(&event), event);
    }
    assert_eq!(Training::KINDS.len(), 4, "what serde skips is not read");
    assert_eq!(Training::KINDS[3], EventKind { aggregate_type: "model", event_type: "Stopped" });
}

#[test]
fn an_enum_that_keeps_its_tag_comes_back() {
    #[derive(Debug, PartialEq, Serialize, Deserialize, DomainEvent)]
    #[event(aggregate = "order")]
    #[serde(tag = "kind")]
    enum Order {
        Placed {
            #[event(key)]
            id: u64,
        },
    }
    assert_eq!(back(&Order::Placed { id: 1 }), Order::Placed { id: 1 });
}
