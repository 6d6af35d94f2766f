use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{DomainEvent, EventError, json};
use crate::streams::DEAD;

/// The one wire form of an event: a row of the outbox and an entry of a stream carry exactly this.
///
/// An envelope is itself a [`DomainEvent`] (critical), so one with headers, or one made by hand, is published like any other. To give
/// an event headers and keep its lane, use [`DomainEvent::with_header`].
#[derive(Debug, Clone)]
pub struct EventEnvelope {
    /// UUIDv7; the same in the outbox row and in the stream entry.
    pub id: Uuid,
    pub event_type: String,
    pub aggregate_type: String,
    pub aggregate_id: String,
    /// When it happened; microseconds are kept.
    pub occurred_at: DateTime<Utc>,
    /// JSON text. The outbox stores `jsonb`, which normalises white space and the order of keys.
    pub payload: Box<RawValue>,
    /// Metadata such as `traceparent`; left out of the stream entry when empty.
    pub headers: Map<String, Value>,
}

impl EventEnvelope {
    /// Limit of `event_type`, `aggregate_type` and `aggregate_id`, in bytes of UTF-8; the table has the same limit.
    pub const MAX_NAME_BYTES: usize = 255;

    /// Adds a header; replaces one of the same name.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Checks what PostgreSQL, Redis or a consumer could not take.
    ///
    /// # Errors
    /// Says which field is at fault and what is allowed.
    pub fn validate(&self, max_payload_bytes: usize) -> Result<(), EventError> {
        check_name("event_type", &self.event_type)?;
        check_name("aggregate_type", &self.aggregate_type)?;
        check_name("aggregate_id", &self.aggregate_id)?;
        if self.aggregate_type.contains(['{', '}']) {
            return Err(EventError::Brace(self.aggregate_type.clone()));
        }
        if self.aggregate_type.ends_with(DEAD) {
            return Err(EventError::Dead(self.aggregate_type.clone()));
        }
        if !(first_time()..=last_time()).contains(&self.occurred_at) {
            return Err(EventError::Time(self.occurred_at));
        }
        let headers = self.headers_json().unwrap_or_default();
        let bytes = json::check("payload", self.payload.get())? + json::check("headers", &headers)?;
        if bytes > max_payload_bytes {
            return Err(EventError::TooLarge { bytes, max: max_payload_bytes });
        }
        Ok(())
    }

    /// `occurred_at` as it stands in a stream entry: RFC 3339, UTC, microseconds.
    #[must_use]
    pub fn occurred_at_text(&self) -> String {
        rfc3339(self.occurred_at)
    }

    /// The headers as JSON text, or `None` when there are none.
    #[must_use]
    pub fn headers_json(&self) -> Option<String> {
        (!self.headers.is_empty()).then(|| Value::Object(self.headers.clone()).to_string())
    }

    /// Cuts envelopes into runs of at most `rows` and about `bytes`, so that one message to a server stays bounded.
    pub(crate) fn chunks(envelopes: &[Self], rows: usize, bytes: usize) -> impl Iterator<Item = &[Self]> {
        let mut rest = envelopes;
        std::iter::from_fn(move || {
            let mut total = 0_usize;
            let fits = |e: &&Self| {
                let first = total == 0;
                let headers = e.headers_json().map_or(0, |headers| headers.len());
                total = total.saturating_add(e.payload.get().len() + headers + 1);
                first || total <= bytes
            };
            let count = rest.iter().take(rows).take_while(fits).count();
            let (chunk, later) = rest.split_at(count);
            rest = later;
            (!chunk.is_empty()).then_some(chunk)
        })
    }

    /// Reads an envelope from the fields of a stream entry.
    ///
    /// # Errors
    /// [`EventError::Decode`] names the entry and the field that is missing or malformed.
    pub fn from_fields<'a>(entry: &str, field: impl Fn(&str) -> Option<&'a str>) -> Result<Self, EventError> {
        let decode = |reason: String| EventError::Decode { entry: entry.to_owned(), reason };
        let text = |name: &str| field(name).ok_or_else(|| decode(format!("field `{name}` is missing")));
        Ok(Self {
            id: text("id")?.parse().map_err(|e| decode(format!("field `id`: {e}")))?,
            event_type: text("type")?.to_owned(),
            aggregate_type: text("aggregate_type")?.to_owned(),
            aggregate_id: text("aggregate_id")?.to_owned(),
            occurred_at: DateTime::parse_from_rfc3339(text("occurred_at")?)
                .map_err(|e| decode(format!("field `occurred_at`: {e}")))?
                .to_utc(),
            payload: RawValue::from_string(text("payload")?.to_owned()).map_err(|e| decode(format!("field `payload`: {e}")))?,
            headers: match field("headers") {
                None => Map::new(),
                Some(json) => serde_json::from_str(json).map_err(|e| decode(format!("field `headers`: {e}")))?,
            },
        })
    }
}

impl DomainEvent for EventEnvelope {
    fn event_type(&self) -> &str {
        &self.event_type
    }
    fn aggregate_type(&self) -> &str {
        &self.aggregate_type
    }
    fn aggregate_id(&self) -> String {
        self.aggregate_id.clone()
    }
    fn occurred_at(&self) -> DateTime<Utc> {
        self.occurred_at
    }
    fn payload(&self) -> Result<Box<RawValue>, serde_json::Error> {
        Ok(self.payload.clone())
    }
    fn envelope(&self) -> Result<EventEnvelope, EventError> {
        Ok(self.clone())
    }
}

/// RFC 3339, UTC, microseconds: both lanes write times in this form.
pub(crate) fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}

fn check_name(field: &'static str, value: &str) -> Result<(), EventError> {
    let max = EventEnvelope::MAX_NAME_BYTES;
    match value.len() {
        0 => Err(EventError::Empty { field }),
        bytes if bytes > max => Err(EventError::TooLong { field, bytes, max }),
        _ if value.contains('\0') => Err(EventError::Nul { field }),
        _ => Ok(()),
    }
}

/// The table's limits, in `event_outbox_times_have_four_digit_years`.
fn first_time() -> DateTime<Utc> {
    DateTime::from_timestamp(-62_135_510_400, 0).unwrap_or(DateTime::<Utc>::MIN_UTC)
}

fn last_time() -> DateTime<Utc> {
    DateTime::from_timestamp(253_402_128_000, 0).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope() -> EventEnvelope {
        EventEnvelope {
            id: Uuid::now_v7(),
            event_type: "UserCreated".into(),
            aggregate_type: "user".into(),
            aggregate_id: "42".into(),
            occurred_at: Utc::now(),
            payload: RawValue::from_string("{}".into()).unwrap(),
            headers: Map::new(),
        }
    }

    #[test]
    fn chunks_are_bounded_by_payloads_and_headers() {
        let sizes = |envelopes: &[EventEnvelope]| EventEnvelope::chunks(envelopes, 10, 100).map(<[_]>::len).collect::<Vec<_>>();
        assert_eq!(sizes(&vec![envelope(); 25]), [10, 10, 5]);
        // {"h":"xxxxx…"}: 68 bytes.
        assert_eq!(sizes(&vec![envelope().with_header("h", "x".repeat(60)); 3]), [1, 1, 1]);
        assert_eq!(sizes(&vec![envelope().with_header("h", "x".repeat(30)); 4]), [2, 2]);
        assert_eq!(sizes(&vec![envelope().with_header("h", "x".repeat(300)); 2]), [1, 1]);
    }

    #[test]
    fn bad_fields_are_named() {
        let check = |change: fn(&mut EventEnvelope)| {
            let mut e = envelope();
            change(&mut e);
            e.validate(100).unwrap_err().to_string()
        };
        assert!(check(|e| e.event_type.clear()).starts_with("event_type is empty"));
        assert!(check(|e| e.aggregate_id = "x".repeat(256)).contains("aggregate_id has 256 bytes: at most 255"));
        assert!(check(|e| e.aggregate_id = "a\0b".into()).contains("NUL"));
        assert!(check(|e| e.aggregate_type = "a{b}".into()).contains("brace"));
        assert!(check(|e| e.aggregate_type = "a:dead".into()).contains("dead letters"));
        assert!(
            check(|e| e.payload = RawValue::from_string(format!("\"{}\"", "x".repeat(99))).unwrap()).contains("maxPayloadBytes")
        );
        assert!(check(|e| e.payload = RawValue::from_string(r#""\\\u0000""#.into()).unwrap()).contains("payload contains a NUL"));
        assert!(check(|e| drop(e.headers.insert("a".into(), "\0".into()))).contains("headers contains a NUL"));
    }
}
