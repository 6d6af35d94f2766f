//! One trace from the publisher over the relay to the consumer, and receivers of spans that are not there.

use std::net::TcpListener;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use commitstream::config::Settings;
use commitstream::consumer::{Consumer, Delivery, Handler, HandlerError};
use commitstream::publisher::{DomainEventPublisher, HybridEventPublisher};
use commitstream::{DomainEvent, EventEnvelope};
use opentelemetry::trace::{FutureExt, Span as _, SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, Tracer};
use opentelemetry::{Context, global};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use serde_json::{Value, json};

use crate::otlp::{Received, Receiver, SpanKind, StatusCode};
use crate::support::{PATIENCE, Running, World, eventually, finish};

#[derive(serde::Serialize, DomainEvent)]
#[event(aggregate = "user")]
struct UserCreated {
    #[event(key)]
    user: u32,
}

#[derive(serde::Serialize, DomainEvent)]
#[event(aggregate = "user", lane = "high-frequency")]
struct UserSeen {
    #[event(key)]
    user: u32,
}

/// A handler with a span of its own; it tells which events it saw, and under which trace.
struct Tells(Sender<(EventEnvelope, TraceId)>);

impl Handler<EventEnvelope> for Tells {
    async fn handle(&self, event: EventEnvelope, _delivery: &Delivery) -> Result<(), HandlerError> {
        let mut work = global::tracer("application").start("send mail");
        let trace = work.span_context().trace_id();
        work.end();
        self.0.send((event, trace))?;
        Ok(())
    }
}

/// The spans of this process, which is the application in these tests; of all tests, so each looks for its own trace.
fn application() -> &'static InMemorySpanExporter {
    static APPLICATION: OnceLock<InMemorySpanExporter> = OnceLock::new();
    APPLICATION.get_or_init(|| {
        let exporter = InMemorySpanExporter::default();
        global::set_tracer_provider(SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build());
        exporter
    })
}

fn settings(world: &World) -> Settings {
    let mut settings = Settings::default();
    settings.database.url = Some(world.database.url().to_owned());
    settings.redis.url = Some(world.redis_url.clone());
    settings.redis.stream_prefix = world.prefix.clone();
    settings
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// A trace that began elsewhere, as with a request of HTTP.
fn request() -> SpanContext {
    application();
    let (trace, span) = (TraceId::from(rand::random::<u128>() | 1), SpanId::from(rand::random::<u64>() | 1));
    SpanContext::new(trace, span, TraceFlags::SAMPLED, true, "vendor=1".parse().unwrap_or_default())
}

/// Publishes one event on each lane inside a span of this name.
async fn publish_inside(world: &World, parent: SpanContext) -> Result<()> {
    let span = global::tracer("application").start_with_context("register", &Context::new().with_remote_span_context(parent));
    let publish = async {
        let publisher = HybridEventPublisher::new(&settings(world))?;
        let pool = sqlx::PgPool::connect(world.database.url()).await?;
        let mut transaction = pool.begin().await?;
        publisher.publish_all(&mut transaction, &[&UserCreated { user: 1 }, &UserSeen { user: 2 }]).await?;
        transaction.commit().await?;
        Ok(())
    };
    publish.with_context(Context::new().with_span(span)).await
}

/// Handles so many events.
async fn consume(world: &World, events: usize) -> Result<Vec<(EventEnvelope, TraceId)>> {
    let (sender, handled) = channel();
    let consumer = Consumer::new("mailer", &settings(world))?.on_any("user", Tells(sender)).start()?;
    let handled =
        tokio::task::spawn_blocking(move || (0..events).map(|_| handled.recv_timeout(PATIENCE)).collect::<Result<_, _>>());
    let handled: Vec<_> = handled.await??;
    consumer.stop().await?;
    Ok(handled)
}

/// The relay, with its spans sent to `endpoint`, until all is published.
fn relay(world: &World, endpoint: &str) -> Result<crate::support::Answer> {
    let mut relay = world.command(&["relay", "--until-empty", "--json"]);
    let answer = finish({
        relay.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint).env("OTEL_SERVICE_NAME", "the relay");
        relay
    })?;
    assert_eq!(answer.code, Some(0), "{answer:?}");
    Ok(answer)
}

fn find<'a>(spans: &'a [SpanData], name: &str) -> Result<&'a SpanData> {
    spans.iter().find(|span| span.name == name).ok_or_else(|| anyhow::anyhow!("no span {name:?} in {spans:?}"))
}

#[test]
fn one_trace_goes_from_the_publisher_over_the_relay_to_the_handler() -> Result<()> {
    let (world, receiver, request) = (World::new()?, Receiver::start()?, request());
    let trace = request.trace_id();
    runtime()?.block_on(publish_inside(&world, request.clone()))?;
    relay(&world, &receiver.endpoint)?;
    let handled = runtime()?.block_on(consume(&world, 2))?;

    let of_application = application().get_finished_spans()?;
    let of_application: Vec<SpanData> = of_application.into_iter().filter(|span| span.span_context.trace_id() == trace).collect();
    let (register, publish) = (find(&of_application, "register")?, find(&of_application, "publish user")?);
    assert_eq!(register.parent_span_id, request.span_id());
    assert_eq!(publish.parent_span_id, register.span_context.span_id());
    assert_eq!(publish.span_kind, opentelemetry::trace::SpanKind::Producer);

    // Both events carry the span that published them.
    let published_by = publish.span_context.span_id();
    for (event, seen) in &handled {
        assert_eq!(event.headers["traceparent"], format!("00-{trace}-{published_by}-01"), "{event:?}");
        assert_eq!(event.headers["tracestate"], "vendor=1");
        assert_eq!(*seen, trace, "{event:?}");
    }

    // Of the two, one went through the relay.
    let (created, _) = handled.iter().find(|(event, _)| event.event_type == "UserCreated").context("it was handled")?;
    let spans = receiver.take();
    let [Received { service, span }] = spans.as_slice() else { panic!("the relay sent {} spans", spans.len()) };
    assert_eq!((service.as_str(), span.name.as_str()), ("the relay", format!("send {}", world.user_stream()).as_str()));
    assert_eq!((span.trace_id.as_slice(), span.parent_span_id.as_slice()), (&trace.to_bytes()[..], &published_by.to_bytes()[..]));
    assert_eq!((span.kind(), span.trace_state.as_str()), (SpanKind::Client, "vendor=1"));
    assert!(span.status.as_ref().is_none_or(|status| status.code() == StatusCode::Unset), "{span:?}");
    assert!(span.start_time_unix_nano < span.end_time_unix_nano, "{span:?}");
    let partition = world.database.psql("SELECT partition_no FROM event_outbox")?;
    for (name, value) in [
        ("messaging.system", "redis"),
        ("messaging.operation.type", "send"),
        ("messaging.destination.name", &world.user_stream()),
        ("messaging.destination.partition.id", partition.trim_end()),
        ("messaging.message.id", &created.id.to_string()),
        ("commitstream.aggregate.id", "1"),
    ] {
        assert_eq!(spans[0].attribute(name).as_deref(), Some(value), "{name}");
    }

    // Each was handled in a span of its own, and what the handler did is inside.
    let process: Vec<&SpanData> = of_application.iter().filter(|span| span.name.starts_with("process ")).collect();
    let mails: Vec<&SpanData> = of_application.iter().filter(|span| span.name == "send mail").collect();
    assert_eq!((process.len(), mails.len()), (2, 2), "{of_application:?}");
    for span in &process {
        assert_eq!((span.parent_span_id, &span.span_kind), (published_by, &opentelemetry::trace::SpanKind::Consumer));
        assert!(mails.iter().any(|mail| mail.parent_span_id == span.span_context.span_id()), "{of_application:?}");
    }
    Ok(())
}

#[test]
fn a_command_begins_a_trace_of_its_own_where_the_ratio_says_so() -> Result<()> {
    let (world, receiver) = (World::new()?, Receiver::start()?);
    let publish = ["publish", "--type", "UserCreated", "--aggregate-type", "user", "--aggregate-id", "1"];
    for ratio in ["1", "0"] {
        let mut command = world.command(&publish);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint).env("OTEL_TRACES_SAMPLER_ARG", ratio);
        assert_eq!(finish(command)?.code, Some(0));
    }
    let begun = receiver.take();
    let [Received { service, span }] = begun.as_slice() else { panic!("{} spans", begun.len()) };
    assert_eq!((service.as_str(), span.name.as_str()), ("commitstream", "publish user"));
    assert_eq!((span.kind(), span.parent_span_id.is_empty()), (SpanKind::Producer, true));

    // What is not sampled carries its trace all the same, so that nobody begins another.
    let headers = world.database.psql("SELECT headers->>'traceparent' FROM event_outbox ORDER BY seq")?;
    let parents: Vec<&str> = headers.lines().collect();
    assert!(parents.len() == 2 && parents[0].ends_with("-01") && parents[1].ends_with("-00"), "{headers}");
    relay(&world, &receiver.endpoint)?;
    let sent = receiver.take();
    let [Received { span: send, .. }] = sent.as_slice() else { panic!("{} spans", sent.len()) };
    assert_eq!((&send.trace_id, &send.parent_span_id), (&span.trace_id, &span.span_id));
    Ok(())
}

#[test]
fn a_refused_event_shows_in_the_log() -> Result<()> {
    let (world, receiver) = (World::new()?, Receiver::start()?);
    let parent = "traceparent=00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    world.ok(&["publish", "--type", "UserCreated", "--aggregate-type", "user", "--aggregate-id", "u7", "--header", parent])?;
    world.database.psql("UPDATE event_outbox SET payload = jsonb_build_object('fill', repeat('x', 2000000));")?;
    let mut command = world.command(&["relay", "--until-empty", "--json"]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint).env("OUTBOX_MAX_RETRIES", "0");
    let answer = finish(command)?;
    assert_eq!(answer.code, Some(0), "{answer:?}");

    // What is too large is not read, and neither are its headers: it has no span.
    assert!(receiver.take().is_empty());
    let line = answer.stderr.lines().find(|line| line.contains("event FAILED")).context("the log says so")?;
    let entry: Value = serde_json::from_str(line)?;
    let partition: i64 = world.database.psql("SELECT partition_no FROM event_outbox")?.trim_end().parse()?;
    assert_eq!([&entry["aggregate"], &entry["partition"]], [&json!("u7"), &json!(partition)], "{line}");
    assert!(entry["batch"].is_string() && entry["event"].is_string(), "{line}");
    Ok(())
}

#[test]
fn a_malformed_traceparent_harms_nothing() -> Result<()> {
    let (world, receiver) = (World::new()?, Receiver::start()?);
    let parents =
        ["", "00", "00-zz-zz-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "\"traceparent\": \"", "\u{1f426}"];
    for parent in parents {
        let header = format!("traceparent={parent}");
        world.ok(&["publish", "--type", "A", "--aggregate-type", "user", "--aggregate-id", "1", "--header", &header])?;
    }
    // Other programs may write anything that is an object.
    for headers in [
        r#"{"traceparent": 7}"#,
        r#"{"traceparent": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}"#,
    ] {
        world.database.psql(&format!(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers) VALUES ('A', 'user', '1', '{{}}', '{headers}')"
        ))?;
    }
    let answer = relay(&world, &receiver.endpoint)?;
    assert!(!answer.stderr.contains("ERROR") && !answer.stderr.contains("WARN"), "{answer:?}");
    assert_eq!(receiver.take().len(), 0);
    let handled = runtime()?.block_on(consume(&world, parents.len() + 2))?;
    assert!(handled.iter().zip(parents).all(|((event, _), parent)| event.headers["traceparent"] == parent), "{handled:?}");
    Ok(())
}

/// Events in traces that are sampled, for a relay to publish.
fn sampled_events(world: &World, events: u32) -> Result<()> {
    world.database.psql(&format!(
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
         SELECT 'A', 'user', n::text, '{{}}', jsonb_build_object('traceparent', '00-' || lpad(to_hex(n), 32, '0') || '-b7ad6b7169203331-01')
         FROM generate_series(1, {events}) AS n"
    ))?;
    Ok(())
}

#[test]
fn a_receiver_that_is_down_costs_the_relay_nothing_and_is_logged_once() -> Result<()> {
    const EVENTS: u32 = 5_000;
    let world = World::new()?;
    let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut command = world.command(&["relay"]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://user:hunter2@{free}/")).env("OTEL_BSP_SCHEDULE_DELAY", "10");
    let mut relay = Running::new(command)?;
    relay.says("relay is active")?;
    let unsent = || Ok(world.database.psql("SELECT count(*) FROM event_outbox WHERE status <> 'PUBLISHED'")? == "0\n");
    sampled_events(&world, EVENTS)?;
    let said = relay.says("receiver of spans")?;
    assert!(said.contains("fails") && said.contains(&format!("http://user:***@{free}/")), "{said}");
    eventually("all to be published", unsent)?;

    // It comes up, and spans of what is published then arrive.
    let receiver = Receiver::start_at(free)?;
    eventually("a span to arrive", || {
        sampled_events(&world, 1)?;
        Ok(!receiver.take().is_empty())
    })?;
    relay.says("works again")?;
    relay.signal("TERM")?;
    let answer = relay.ended()?;
    assert_eq!(answer.code, Some(0));
    assert_eq!(answer.stderr.matches("receiver of spans").count(), 2, "{answer:?}");
    assert!(!answer.stderr.contains("hunter2"));
    Ok(())
}

#[test]
fn a_receiver_that_never_answers_holds_up_the_end_for_a_moment_only() -> Result<()> {
    let world = World::new()?;
    let silent = TcpListener::bind("127.0.0.1:0")?;
    sampled_events(&world, 3_000)?;
    let start = Instant::now();
    let answer = relay(&world, &format!("http://{}", silent.local_addr()?))?;
    assert!(answer.stdout.contains("\"published\":3000"), "{answer:?}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    Ok(())
}

#[test]
fn without_a_receiver_nothing_is_traced() -> Result<()> {
    let world = World::new()?;
    world.publish_user("1")?;
    assert_eq!(world.database.psql("SELECT headers FROM event_outbox")?, "{}\n");
    Ok(())
}
