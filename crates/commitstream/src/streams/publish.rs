use redis::{Pipeline, Value};

use super::{Streams, StreamsError};
use crate::event::{EventEnvelope, EventError};

/// Entries in one pipeline; bounds what waits for answers at a time.
const ENTRIES_PER_PIPELINE: usize = 1_000;

impl Streams {
    /// The direct lane: appends each envelope to the stream of its aggregate type, in order, without a journal.
    ///
    /// # Errors
    /// [`StreamsError::PartlyRefused`] names each refused event; the others are in. After [`StreamsError::OutcomeUnknown`] some
    /// or all may be in.
    pub async fn publish(&self, envelopes: &[EventEnvelope]) -> Result<(), PublishToStreamsError> {
        let mut refused = Vec::new();
        for chunk in envelopes.chunks(ENTRIES_PER_PIPELINE) {
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            for envelope in chunk {
                self.add(&mut pipeline, envelope)?;
            }
            let replies: Vec<Value> = self.query_pipeline("publishing to streams", &pipeline).await?;
            for (envelope, reply) in chunk.iter().zip(replies) {
                if let Value::ServerError(error) = reply {
                    refused.push((envelope.id, error.into()));
                }
            }
        }
        self.judge_refusals(envelopes.len(), refused).map_err(Into::into)
    }

    fn add(&self, pipeline: &mut Pipeline, envelope: &EventEnvelope) -> Result<(), EventError> {
        let command = pipeline.cmd("XADD").arg(self.stream_of(&envelope.aggregate_type)).arg("*");
        command.arg("id").arg(envelope.id.hyphenated().to_string());
        command.arg("type").arg(&envelope.event_type);
        command.arg("aggregate_type").arg(&envelope.aggregate_type);
        command.arg("aggregate_id").arg(&envelope.aggregate_id);
        command.arg("occurred_at").arg(envelope.occurred_at_text());
        command.arg("payload").arg(envelope.payload.get());
        if let Some(headers) = envelope.headers_json()? {
            command.arg("headers").arg(headers);
        }
        Ok(())
    }

    /// One refusal alone keeps its type: when Redis lacks memory, that is an outage and not a fault of the events.
    fn judge_refusals(&self, total: usize, refused: Vec<(uuid::Uuid, redis::RedisError)>) -> Result<(), StreamsError> {
        let doing = "publishing to streams";
        match refused.into_iter().map(|(id, error)| (id, error.to_string(), error)).collect::<Vec<_>>() {
            none if none.is_empty() => Ok(()),
            all if all.len() == total => match all.into_iter().next() {
                Some((_, _, source)) => Err(self.refused(doing, source)),
                None => Ok(()),
            },
            some => Err(StreamsError::PartlyRefused { total, refused: some.into_iter().map(|(id, why, _)| (id, why)).collect() }),
        }
    }
}

/// Why events did not go straight to streams.
#[derive(Debug, thiserror::Error)]
pub enum PublishToStreamsError {
    #[error(transparent)]
    Event(#[from] EventError),
    #[error(transparent)]
    Streams(#[from] StreamsError),
}
