//! Whether events flow, from producers to consumers: collects the facts for the one verdict of `stats`, `/readyz` and the console.

use std::time::Duration;

use commitstream::config::Settings;
use commitstream::doctor::{Consumers, Flow, Verdict, judge_flow};
use commitstream::outbox::OutboxRepository;
use commitstream::streams::{GroupInfo, Streams, StreamsError};
use sqlx::PgConnection;
use tokio::time::timeout;

use crate::failure::on_one_line;
use crate::names::StreamNames;

/// Streams whose consumer groups are looked at, the first by name.
const MOST_STREAMS: usize = 50;

/// How long Redis may take for all of them.
pub const LONGEST: Duration = Duration::from_secs(5);

/// How the consumer groups stand.
pub async fn consumers(streams: &Streams, names: &mut StreamNames) -> Consumers {
    match timeout(LONGEST, groups(streams, names)).await {
        Ok(Ok(groups)) => Consumers::Known(groups),
        Ok(Err(error)) => Consumers::Unreachable(on_one_line(&error.into())),
        Err(_) => Consumers::Unreachable(format!("it has not answered within {} seconds", LONGEST.as_secs())),
    }
}

async fn groups(streams: &Streams, names: &mut StreamNames) -> Result<Vec<GroupInfo>, StreamsError> {
    let mut groups = Vec::new();
    for stream in names.list(streams, MOST_STREAMS).await? {
        groups.extend(streams.groups(stream).await?);
    }
    Ok(groups)
}

/// The verdict of a moment. Without a URL of Redis it is about the outbox alone.
pub async fn verdict(settings: &Settings, outbox: &OutboxRepository, connection: &mut PgConnection) -> anyhow::Result<Verdict> {
    let consumers = match &settings.redis.url {
        Some(url) => consumers(&Streams::new(url, &settings.redis)?, &mut StreamNames::default()).await,
        None => Consumers::Unknown,
    };
    let flow = Flow { outbox: outbox.flow(connection).await, consumers };
    Ok(judge_flow(settings, &flow).verdict())
}
