//! Distributed tracing (feature `otel`): one trace from the publisher's span over the relay to the consumer's handler.
//!
//! Spans go to the process's global tracer provider of OpenTelemetry (`opentelemetry::global::set_tracer_provider`), under the names of its
//! conventions for messaging:
//!
//! | span | kind | parent | where |
//! |---|---|---|---|
//! | `publish <aggregate type>` | producer | the caller's current span | the application, once for each call; its context is in the events' headers |
//! | `send <stream>` | client | the context in the headers | the relay, for each sampled event while its batch is appended |
//! | `process <stream>` | consumer | the context in the headers | the consumer, for each sampled event; the handler runs inside |
//!
//! An event with a `traceparent` of its own keeps it. One whose `traceparent` is malformed is handled like one without: no span, no
//! error. What is not sampled costs the relay a search in the text of the headers; a handler still runs inside that context, so
//! that its own spans are not sampled either.

mod context;

use futures_util::future::Either;
use opentelemetry::global::{self, BoxedSpan, BoxedTracer};
use opentelemetry::trace::{FutureExt as _, Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use uuid::Uuid;

use crate::chain::chain;
use crate::consumer::{Delivery, HandlerError};
use crate::event::EventEnvelope;
use crate::outbox::{Batch, OutboxEvent, Refusal};

/// Most spans for one batch: where everything is sampled, the rest of a large batch goes without.
const MAX_SPANS: usize = 128;

/// Has the events carry the context of a new `publish` span, if there is a trace.
pub(crate) fn mark(mut envelopes: Vec<EventEnvelope>) -> Vec<EventEnvelope> {
    let is_unmarked = |envelope: &&mut EventEnvelope| !envelope.headers.contains_key(context::TRACEPARENT);
    let mut unmarked = envelopes.iter_mut().filter(is_unmarked).peekable();
    if let Some(first) = unmarked.peek()
        && let Some(context) = publish(first)
    {
        unmarked.for_each(|envelope| context::write(&mut envelope.headers, &context));
    }
    envelopes
}

/// The context of a span for this event and those that are published with it. It ends at once: what becomes of the transaction is not known
/// here.
fn publish(first: &EventEnvelope) -> Option<SpanContext> {
    let attributes = operation("publish", "create")
        .into_iter()
        .chain([message_id(first.id), KeyValue::new("commitstream.event.type", first.event_type.clone())]);
    let span = child(&Context::current(), format!("publish {}", first.aggregate_type), SpanKind::Producer, attributes);
    Some(span.span_context().clone()).filter(SpanContext::is_valid)
}

/// The spans of a batch that is being appended.
pub(crate) struct Sending(Vec<(Uuid, BoxedSpan)>);

impl Sending {
    /// Starts a span for each sampled event.
    pub fn start(batch: &Batch) -> Self {
        let sampled = batch.events.iter().filter_map(|event| Some((event, context::read_sampled(&event.headers)?)));
        Self(sampled.take(MAX_SPANS).map(|(event, parent)| (event.id, send(batch, event, parent))).collect())
    }

    /// Of the batch, the first `appended` are in the stream.
    pub fn end(self, batch: &Batch, appended: usize, refusals: &[Refusal]) {
        for (id, mut span) in self.0 {
            if !batch.events.iter().take(appended).any(|event| event.id == id) {
                let refusal = refusals.iter().find(|refusal| refusal.event_id == id);
                span.set_status(Status::error(
                    refusal.map_or_else(|| "not appended".to_owned(), |refusal| refusal.error.clone()),
                ));
            }
            span.end();
        }
    }
}

fn send(batch: &Batch, event: &OutboxEvent, parent: SpanContext) -> BoxedSpan {
    let attributes = operation("send", "send").into_iter().chain([
        destination(&batch.stream),
        message_id(event.id),
        KeyValue::new("messaging.destination.partition.id", event.partition.to_string()),
        KeyValue::new("messaging.batch.message_count", i64::try_from(batch.events.len()).unwrap_or(i64::MAX)),
        KeyValue::new("commitstream.batch.id", batch.id.to_string()),
        KeyValue::new("commitstream.aggregate.id", event.aggregate_id.clone()),
        KeyValue::new("commitstream.event.type", event.event_type.clone()),
    ]);
    child(&parent_of(parent), format!("send {}", batch.stream), SpanKind::Client, attributes)
}

/// The spans of events that a handler has at hand.
pub(crate) struct Processing(Vec<Context>);

impl Processing {
    /// Starts a span for each sampled event, and puts the call of the handler inside: of several spans, inside the first.
    pub fn around<F: Future>(deliveries: &[Delivery], call: F) -> (Self, impl Future<Output = F::Output> + use<F>) {
        let (mut spans, mut unsampled) = (Vec::new(), None);
        for delivery in deliveries {
            match context::read(&delivery.envelope().headers) {
                Some(parent) if !parent.is_sampled() && deliveries.len() == 1 => unsampled = Some(parent_of(parent)),
                Some(parent) if parent.is_sampled() && spans.len() < MAX_SPANS => {
                    spans.push(Context::current_with_span(process(delivery, parent)));
                }
                _ => {}
            }
        }
        let call = match spans.first().cloned().or(unsampled) {
            Some(context) => Either::Left(call.with_context(context)),
            None => Either::Right(call),
        };
        (Self(spans), call)
    }

    pub fn end(self, result: &Result<(), HandlerError>) {
        let failure = match result {
            Ok(()) | Err(HandlerError::RetryLater { .. } | HandlerError::OutcomeUnknown { .. }) => None,
            Err(HandlerError::GiveUp { reason }) => Some(reason.clone()),
            Err(HandlerError::Failed(error)) => Some(chain(error.as_ref())),
        };
        for context in &self.0 {
            if let Some(reason) = &failure {
                context.span().set_status(Status::error(reason.clone()));
            }
            context.span().end();
        }
    }
}

fn process(delivery: &Delivery, parent: SpanContext) -> BoxedSpan {
    let envelope = delivery.envelope();
    let attributes = operation("process", "process").into_iter().chain([
        destination(delivery.stream()),
        message_id(envelope.id),
        KeyValue::new("messaging.consumer.group.name", delivery.group().to_owned()),
        KeyValue::new("commitstream.aggregate.id", envelope.aggregate_id.clone()),
        KeyValue::new("commitstream.event.type", envelope.event_type.clone()),
        KeyValue::new("commitstream.attempt", i64::from(delivery.attempt())),
    ]);
    child(&parent_of(parent), format!("process {}", delivery.stream()), SpanKind::Consumer, attributes)
}

fn tracer() -> BoxedTracer {
    global::tracer("commitstream")
}

fn parent_of(parent: SpanContext) -> Context {
    Context::new().with_remote_span_context(parent)
}

fn child(parent: &Context, name: String, kind: SpanKind, attributes: impl IntoIterator<Item = KeyValue>) -> BoxedSpan {
    let tracer = tracer();
    let mut span = tracer.build_with_context(tracer.span_builder(name).with_kind(kind), parent);
    if span.is_recording() {
        span.set_attributes(attributes);
    }
    span
}

/// The operation as people call it, and its kind in the conventions.
fn operation(name: &'static str, kind: &'static str) -> [KeyValue; 3] {
    [
        KeyValue::new("messaging.system", "redis"),
        KeyValue::new("messaging.operation.name", name),
        KeyValue::new("messaging.operation.type", kind),
    ]
}

fn destination(stream: &str) -> KeyValue {
    KeyValue::new("messaging.destination.name", stream.to_owned())
}

fn message_id(id: Uuid) -> KeyValue {
    KeyValue::new("messaging.message.id", id.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn event(headers: serde_json::Value) -> EventEnvelope {
        EventEnvelope {
            id: Uuid::now_v7(),
            event_type: "UserCreated".into(),
            aggregate_type: "user".into(),
            aggregate_id: "42".into(),
            occurred_at: chrono::Utc::now(),
            payload: serde_json::from_str("{}").unwrap(),
            headers: serde_json::from_value(headers).unwrap(),
        }
    }

    #[test]
    fn events_outside_a_trace_stay_as_they_are() {
        let events = mark(vec![event(json!({})), event(json!({ "tenant": "a" }))]);
        assert_eq!([events[0].headers.len(), events[1].headers.len()], [0, 1]);
    }

    /// No provider is set here: the caller's own span is what events carry then.
    #[test]
    fn events_inside_a_trace_carry_it_unless_they_have_one() {
        let parent = context::read(&event(json!({ "traceparent": PARENT })).headers).unwrap();
        let _inside = parent_of(parent).attach();
        let events = mark(vec![event(json!({ "traceparent": "of its own" })), event(json!({}))]);
        assert_eq!(events[0].headers["traceparent"], "of its own");
        assert_eq!(events[1].headers["traceparent"], PARENT);
    }
    /// What the guide for applications says of spans of `tracing`.
    #[test]
    fn spans_of_tracing_are_part_of_the_trace() {
        let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder().build();
        let layer =
            tracing_opentelemetry::layer().with_tracer(opentelemetry::trace::TracerProvider::tracer(&provider, "service"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let parent = context::read(&event(json!({ "traceparent": PARENT })).headers).unwrap();
            // As around a handler.
            let _inside = parent_of(parent.clone()).attach();
            let register = tracing::info_span!("register").entered();
            let current = Context::current().span().span_context().clone();
            assert_eq!(current.trace_id(), parent.trace_id());
            assert_ne!(current.span_id(), parent.span_id());
            let events = mark(vec![event(json!({}))]);
            drop(register);
            assert_eq!(context::read(&events[0].headers).map(|context| context.span_id()), Some(current.span_id()));
        });
    }
}
