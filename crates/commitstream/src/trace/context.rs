//! W3C Trace Context in the headers of an event: read, looked for in JSON text, and written. What is malformed counts as absent.

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use serde_json::{Map, Value};

pub const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// Bytes of a `traceparent` of version 00; those of later versions begin alike.
const LENGTH: usize = 55;

/// The context that these headers carry.
pub fn read(headers: &Map<String, Value>) -> Option<SpanContext> {
    let (trace, span, flags) = parse(headers.get(TRACEPARENT)?.as_str()?)?;
    let state: Option<TraceState> = headers.get(TRACESTATE).and_then(Value::as_str).and_then(|text| text.parse().ok());
    Some(SpanContext::new(trace, span, flags, true, state.unwrap_or_default()))
}

/// The context in the JSON text of headers, if it is sampled. Any other text is only searched, not parsed: the relay asks this of
/// every event.
pub fn read_sampled(headers: &str) -> Option<SpanContext> {
    let looks_sampled = |(at, key): (usize, &str)| is_sampled(&headers[at + key.len()..]).unwrap_or(false);
    if !headers.match_indices("\"traceparent\"").any(looks_sampled) {
        return None;
    }
    // It may have been that of a header within a header.
    read(&serde_json::from_str(headers).ok()?).filter(SpanContext::is_sampled)
}

/// The last bit of what would be the flags, if this is a colon and a `traceparent`.
fn is_sampled(rest: &str) -> Option<bool> {
    let value = rest.trim_start().strip_prefix(':')?.trim_start().strip_prefix('"')?;
    let digit = char::from(*value.as_bytes().get(LENGTH - 1)?).to_digit(16)?;
    Some(digit & 1 == 1)
}

/// Makes these headers carry the context.
pub fn write(headers: &mut Map<String, Value>, context: &SpanContext) {
    let (trace, span, flags) = (context.trace_id(), context.span_id(), context.trace_flags().to_u8());
    headers.insert(TRACEPARENT.to_owned(), format!("00-{trace}-{span}-{flags:02x}").into());
    let state = context.trace_state().header();
    if !state.is_empty() {
        headers.insert(TRACESTATE.to_owned(), state.into());
    }
}

fn parse(text: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let (known, more) = text.split_at_checked(LENGTH)?;
    let mut fields = known.split('-');
    let mut hex = |digits: usize| {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        fields.next().filter(|field| field.len() == digits && field.bytes().all(is_digit))
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let is_known = match version {
        "ff" => false,
        "00" => more.is_empty(),
        _ => more.is_empty() || more.starts_with('-'),
    };
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let is_valid = is_known && trace != TraceId::INVALID && span != SpanId::INVALID;
    is_valid.then_some((trace, span, TraceFlags::new(u8::from_str_radix(flags, 16).ok()?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(value: Value) -> Map<String, Value> {
        Map::from_iter([(TRACEPARENT.to_owned(), value)])
    }

    /// As `jsonb` prints it: a space behind each colon and comma.
    fn jsonb(headers: &Map<String, Value>) -> String {
        let member = |(key, value): (&String, &Value)| {
            let value = value.as_object().map_or_else(|| value.to_string(), jsonb);
            format!("{}: {value}", json!(key))
        };
        format!("{{{}}}", headers.iter().map(member).collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn a_context_survives_the_way_through_headers() {
        let context = read(&headers(VALID.into())).unwrap();
        assert!(context.is_sampled() && context.is_remote());
        let context = SpanContext::new(
            context.trace_id(),
            context.span_id(),
            context.trace_flags(),
            true,
            "vendor=1,other=2".parse().unwrap(),
        );
        let mut written = Map::new();
        write(&mut written, &context);
        assert_eq!(written[TRACEPARENT], VALID);
        assert_eq!(written[TRACESTATE], "vendor=1,other=2");
        assert_eq!(read(&written), Some(context.clone()));
        assert_eq!(read_sampled(&jsonb(&written)), Some(context));
    }

    #[test]
    fn what_is_malformed_counts_as_absent() {
        let longer = format!("{VALID}-more");
        let later = VALID.replacen("00", "cc", 1);
        for good in [VALID, &later, &format!("{later}-more")] {
            assert!(read(&headers(good.into())).is_some(), "{good}");
        }
        let bad = [
            "",
            "00",
            "00-ab=c",
            &longer,
            &VALID.to_uppercase(),
            &VALID.replacen("00", "ff", 1),
            &VALID.replace('-', "_"),
            &VALID.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &VALID.replace("b7ad6b7169203331", &"0".repeat(16)),
            &VALID.replace("0af7", "+af7"),
            &VALID.replace("0af7", "\u{e9}\u{e9}"),
            &format!("{later}more"),
        ];
        for bad in bad.map(Value::from).into_iter().chain([json!(null), json!(1), json!([VALID]), json!({ TRACEPARENT: VALID })])
        {
            assert_eq!(read(&headers(bad.clone())), None, "{bad}");
            assert_eq!(read_sampled(&jsonb(&headers(bad.clone()))), None, "{bad}");
        }
    }

    #[test]
    fn a_tracestate_that_cannot_be_read_does_not_lose_the_trace() {
        let mut headers = headers(VALID.into());
        headers.insert(TRACESTATE.to_owned(), "no list".into());
        assert_eq!(read(&headers).map(|context| context.trace_state().header()), Some(String::new()));
    }

    fn any_headers() -> impl Strategy<Value = Map<String, Value>> {
        let key = prop_oneof![Just(TRACEPARENT.to_owned()), Just("\"traceparent\"".to_owned()), "[a-z]{0,3}"];
        let parent = prop_oneof![
            "00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]",
            "0[01]-[0-9a-f]{31,33}-[0-9a-f]{16}-[0-9a-fA-F]{2}-?",
            "\\PC{0,60}",
        ];
        let leaf = prop_oneof![
            parent.prop_map(Value::from),
            Just(Value::from("\"traceparent\": \"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\"")),
            any::<u32>().prop_map(Value::from),
        ];
        let value = leaf.prop_recursive(2, 8, 3, {
            let key = key.clone();
            move |inner| {
                prop::collection::hash_map(key.clone(), inner, 0..3).prop_map(|map| Value::Object(map.into_iter().collect()))
            }
        });
        prop::collection::hash_map(key, value, 0..4).prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn the_search_finds_what_a_parser_finds(headers in any_headers()) {
            let sampled = read(&headers).filter(SpanContext::is_sampled);
            prop_assert_eq!(read_sampled(&jsonb(&headers)), sampled.clone());
            prop_assert_eq!(read_sampled(&Value::Object(headers).to_string()), sampled);
        }

        #[test]
        fn no_text_is_an_error(text in "\\PC*") {
            read_sampled(&text);
            read(&headers(text.into()));
        }
    }
}
