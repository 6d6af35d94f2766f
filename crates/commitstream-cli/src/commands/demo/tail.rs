//! The tail: entries as they arrive in the streams.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use commitstream::Lane;
use commitstream::streams::Streams;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::events::{AGGREGATES, lane_of};

/// Entries of one stream in one read.
const ENTRIES_PER_READ: usize = 1_000;
/// Longest wait of one read; a stop is noticed after it.
const READ_PATIENCE: Duration = Duration::from_millis(200);

/// What one read of the tail brought.
pub struct Arrivals {
    pub at: Instant,
    pub events: Vec<(Uuid, Lane)>,
}

/// Reads the streams on a connection of its own, until told to stop.
pub async fn follow(streams: Streams, arrivals: mpsc::Sender<Arrivals>, stop: watch::Receiver<bool>) {
    let start: BTreeMap<String, String> = AGGREGATES.iter().map(|name| (streams.stream_of(name), "0".to_owned())).collect();
    let mut tail = streams.tail(start);
    while !*stop.borrow() {
        let entries = match tail.next(ENTRIES_PER_READ, READ_PATIENCE).await {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(%error, "the streams cannot be followed, trying again");
                tokio::time::sleep(READ_PATIENCE).await;
                continue;
            }
        };
        let at = Instant::now();
        let known = entries.iter().filter_map(|entry| Some((entry.field("id")?.parse().ok()?, lane_of(entry.field("type")?)?)));
        let events: Vec<_> = known.collect();
        if !events.is_empty() && arrivals.send(Arrivals { at, events }).await.is_err() {
            return;
        }
    }
}
