//! `commitstream publish`

mod payload;

use std::process::ExitCode;

use chrono::{DateTime, Utc};
use clap::ValueEnum;
use commitstream::config::{Route, Settings, redact_url};
use commitstream::outbox::{self, OutboxError};
use commitstream::publisher::{DomainEventPublisher, PostgresOutboxPublisher, PublishError, RedisStreamsPublisher, route};
use commitstream::{EventEnvelope, Lane};
use serde_json::json;
use sqlx::Connection;

use crate::context::{self, Context};
use crate::spans::Spans;

/// Publish one event
///
/// The event takes the way that its lane and the settings (app.eventPublishing) give it: through the outbox, in a
/// transaction of its own, or straight to its stream. Prints the event's id.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream publish --type UserCreated --aggregate-type user \\
    --aggregate-id 42 --payload '{\"name\":\"Ada\"}'
  jq -c .order order.json | commitstream publish --type OrderPlaced \\
    --aggregate-type order --aggregate-id 7 --payload -
  commitstream publish --type PageViewed --aggregate-type page \\
    --aggregate-id home --lane high-frequency --header source=shell")]
pub struct Args {
    /// Name of the event, for example UserCreated
    #[arg(long = "type", value_name = "EVENT_TYPE", visible_alias = "event-type")]
    event_type: String,
    /// Kind of aggregate, for example user; names the stream
    #[arg(long, value_name = "TYPE")]
    aggregate_type: String,
    /// Which aggregate; events of one aggregate stay in order
    #[arg(long, value_name = "ID", allow_hyphen_values = true)]
    aggregate_id: String,
    /// The event's data as JSON; `-` reads standard input [default: {}]
    #[arg(long, value_name = "JSON", allow_hyphen_values = true, conflicts_with = "payload_file")]
    payload: Option<String>,
    /// File with the event's data as JSON; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    payload_file: Option<std::path::PathBuf>,
    /// Metadata, for example traceparent=00-…; may be given more than once
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// When it happened, for example 2026-01-31T12:00:00Z [default: now]
    #[arg(long, value_name = "RFC3339", value_parser = time)]
    occurred_at: Option<DateTime<Utc>>,
    /// The event's lane, as its DomainEvent would have it [default: high-frequency for SessionStarted and MetricUpdated,
    /// critical for every other type]
    #[arg(long)]
    lane: Option<LaneName>,
}

#[derive(ValueEnum, Clone, Copy)]
enum LaneName {
    Critical,
    HighFrequency,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    let lane = match args.lane {
        Some(LaneName::Critical) => Lane::Critical,
        Some(LaneName::HighFrequency) => Lane::HighFrequency,
        None => usual_lane(&args.event_type),
    };
    let event = envelope(args, &settings)?;
    // Before anything is connected: a mistake in the event is not a matter of servers.
    event.validate(settings.publishing.max_payload_bytes)?;
    let spans = Spans::start(&settings)?;
    let published = match route(&settings, &event.event_type, lane) {
        Route::Outbox => through_outbox(&settings, &event).await,
        Route::Streams => to_streams(&settings, &event).await,
    };
    spans.stop();
    let way = published?;
    let name = match way {
        Route::Outbox => "outbox",
        Route::Streams => "streams",
    };
    if context.output.json {
        context.output.json(&json!({ "id": event.id, "route": name }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let stream = format!("{}{}", settings.redis.stream_prefix, event.aggregate_type);
    context.output.line(&match way {
        Route::Outbox => format!("{} is in the outbox: a relay publishes it to the stream {stream}", event.id),
        Route::Streams => format!("{} went straight to the stream {stream}", event.id),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn envelope(args: Args, settings: &Settings) -> anyhow::Result<EventEnvelope> {
    let payload = payload::read(args.payload, args.payload_file.as_deref(), settings.publishing.max_payload_bytes)?;
    let envelope = EventEnvelope {
        id: uuid::Uuid::now_v7(),
        event_type: args.event_type,
        aggregate_type: args.aggregate_type,
        aggregate_id: args.aggregate_id,
        occurred_at: args.occurred_at.unwrap_or_else(Utc::now),
        payload,
        headers: serde_json::Map::new(),
    };
    Ok(args.headers.into_iter().fold(envelope, |envelope, (name, value)| envelope.with_header(name, value)))
}

/// Sessions start and metrics change hundreds of times a second.
fn usual_lane(event_type: &str) -> Lane {
    match event_type {
        "SessionStarted" | "MetricUpdated" => Lane::HighFrequency,
        _ => Lane::Critical,
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

fn time(text: &str) -> Result<DateTime<Utc>, String> {
    let example = "write a date, a time and an offset, such as 2026-01-31T12:00:00Z";
    DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).map_err(|error| format!("{error}: {example}"))
}

/// Inserts the event in a transaction of its own.
async fn through_outbox(settings: &Settings, event: &EventEnvelope) -> anyhow::Result<Route> {
    let url = &context::database_url(settings)?;
    let limit = settings.database.timeout;
    let doing = "publishing to the outbox";
    let unreachable = |source| OutboxError::Unreachable { doing, source };
    // A pooler may share the session.
    let mut settings = settings.clone();
    settings.database.prepared_statements = false;
    let insert = async {
        let mut connection = outbox::connect_plain(url, "commitstream publish", limit).await?;
        let mut transaction = connection.begin().await.map_err(unreachable)?;
        PostgresOutboxPublisher::new(&settings).publish(&mut transaction, event).await?;
        transaction.commit().await.map_err(unreachable)?;
        Ok(Route::Outbox)
    };
    let timed_out = |_| Err(OutboxError::Timeout { doing, limit }.into());
    let inserted: Result<_, PublishError> = tokio::time::timeout(limit, insert).await.unwrap_or_else(timed_out);
    inserted.map_err(|error| match error {
        PublishError::Event(_) => error.into(),
        error => anyhow::Error::new(error).context(format!("cannot publish through {}", redact_url(url))),
    })
}

/// Sends the event straight to its stream or, during an outage, into the outbox where the settings say so.
async fn to_streams(settings: &Settings, event: &EventEnvelope) -> anyhow::Result<Route> {
    let url = context::redis_url(settings)?;
    let falls_back = settings.publishing.fallback_to_outbox && settings.outbox.enabled;
    match RedisStreamsPublisher::new(settings)?.publish(event).await {
        Ok(_) => Ok(Route::Streams),
        Err(PublishError::Streams(outage)) if falls_back && outage.is_outage() => {
            tracing::warn!(error = %outage, "Redis is down: the event goes to the outbox instead");
            through_outbox(settings, event).await
        }
        Err(error) => Err(anyhow::Error::new(error).context(format!("cannot publish to {}", redact_url(url)))),
    }
}
