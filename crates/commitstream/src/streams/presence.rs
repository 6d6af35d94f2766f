use redis::Value;
use redis::streams::StreamRangeReply;
use uuid::Uuid;

use super::node::Request;
use super::{Streams, StreamsError, marker_key};
use crate::outbox::JournalBatch;

/// Whether Redis still has a batch that it had acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Its marker is there.
    Marked,
    /// Its last entry is there, and its marker is not: that was evicted or deleted.
    Unmarked,
    /// Neither is there.
    Lost,
}

impl Streams {
    /// Looks batches of one stream up, settled not longer ago than markers of settled batches live.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn presence(&self, stream: &str, batches: &[JournalBatch]) -> Result<Vec<Presence>, StreamsError> {
        let doing = "looking for recent batches";
        if batches.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = redis::pipe();
        for batch in batches {
            pipeline.cmd("EXISTS").arg(marker_key(stream, batch.batch_id));
        }
        let marked: Vec<bool> = self.send(doing, stream, Request::Pipeline(&pipeline)).await?;
        let mut found = Vec::with_capacity(batches.len());
        for (batch, marked) in batches.iter().zip(marked) {
            found.push(match (marked, &batch.last_entry) {
                (true, _) => Presence::Marked,
                (false, Some(entry)) if self.has_entry(stream, entry, batch).await? => Presence::Unmarked,
                (false, _) => Presence::Lost,
            });
        }
        Ok(found)
    }

    /// A sign of life, and whether these batches are still there, stream by stream.
    ///
    /// # Errors
    /// [`StreamsError::Lost`] names the first that is not; else Redis is not reachable or refuses.
    pub async fn check(&self, batches: &[(String, Vec<Uuid>)]) -> Result<(), StreamsError> {
        if batches.is_empty() {
            return self.ping().await;
        }
        for (stream, batches) in batches {
            let mut pipeline = redis::pipe();
            let markers: Vec<String> = batches.iter().map(|batch| marker_key(stream, *batch)).collect();
            for marker in &markers {
                pipeline.cmd("EXISTS").arg(marker);
            }
            let there: Vec<bool> = self.send("looking for recent batches", stream, Request::Pipeline(&pipeline)).await?;
            if let Some((marker, _)) = markers.into_iter().zip(there).find(|(_, there)| !there) {
                return Err(StreamsError::Lost { stream: stream.clone(), marker });
            }
        }
        Ok(())
    }

    /// The id of an entry is a time and a number: after a failover another event may have got it.
    async fn has_entry(&self, stream: &str, entry: &str, batch: &JournalBatch) -> Result<bool, StreamsError> {
        let mut command = redis::cmd("XRANGE");
        command.arg(stream).arg(entry).arg(entry);
        let reply: StreamRangeReply = self.query("looking for recent batches", stream, &command).await?;
        let event = batch.last_event.hyphenated().to_string();
        let is_it = |value: &Value| matches!(value, Value::BulkString(bytes) if *bytes == event.as_bytes());
        Ok(reply.ids.iter().any(|entry| entry.map.get("id").is_some_and(is_it)))
    }
}
