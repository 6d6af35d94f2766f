use redis::{Pipeline, Value};

use super::{Streams, StreamsError};
use crate::event::EventEnvelope;

/// Bounds of one pipeline.
const ENTRIES_PER_PIPELINE: usize = 1_000;
const BYTES_PER_PIPELINE: usize = 8 << 20;

const DOING: &str = "publishing to streams";

/// Events that did not go straight to streams, or are not known to have.
#[derive(Debug)]
pub struct NotPublished {
    pub error: StreamsError,
    /// All but those that Redis has confirmed, in the caller's order.
    pub unconfirmed: Vec<EventEnvelope>,
}

impl Streams {
    /// The direct lane: appends each envelope to the stream of its aggregate type, in order, without a journal.
    ///
    /// # Errors
    /// Names what is not confirmed. After [`StreamsError::Refused`], [`StreamsError::PartlyRefused`] and
    /// [`StreamsError::Unavailable`] that is known to be in no stream; after [`StreamsError::OutcomeUnknown`] some of it may be.
    pub async fn publish(&self, envelopes: &[EventEnvelope]) -> Result<(), NotPublished> {
        let mut refused = Vec::new();
        let mut done = 0;
        for chunk in EventEnvelope::chunks(envelopes, ENTRIES_PER_PIPELINE, BYTES_PER_PIPELINE) {
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            chunk.iter().for_each(|envelope| self.add(&mut pipeline, envelope));
            let replies: Vec<Value> = match self.query_pipeline(DOING, &pipeline).await {
                Ok(replies) => replies,
                Err(error) => {
                    let error = if done == 0 { error } else { error.after_some_were_written() };
                    let refused = refused.into_iter().map(|(at, _): (usize, StreamsError)| at);
                    return Err(not_published(envelopes, refused.chain(done..envelopes.len()), error));
                }
            };
            let errors = replies.into_iter().enumerate().filter_map(|(at, reply)| match reply {
                Value::ServerError(error) => Some((done + at, self.typed(DOING, error.into()))),
                _ => None,
            });
            refused.extend(errors);
            done += chunk.len();
        }
        judge(envelopes, refused)
    }

    fn add(&self, pipeline: &mut Pipeline, envelope: &EventEnvelope) {
        let command = pipeline.cmd("XADD").arg(self.stream_of(&envelope.aggregate_type)).arg("*");
        command.arg("id").arg(envelope.id.hyphenated().to_string());
        command.arg("type").arg(&envelope.event_type);
        command.arg("aggregate_type").arg(&envelope.aggregate_type);
        command.arg("aggregate_id").arg(&envelope.aggregate_id);
        command.arg("occurred_at").arg(envelope.occurred_at_text());
        command.arg("payload").arg(envelope.payload.get());
        if let Some(headers) = envelope.headers_json() {
            command.arg("headers").arg(headers);
        }
    }
}

/// An outage among the answers (no memory, say) makes it an outage; a lone or unanimous refusal keeps its type.
fn judge(envelopes: &[EventEnvelope], refused: Vec<(usize, StreamsError)>) -> Result<(), NotPublished> {
    let at: Vec<usize> = refused.iter().map(|(at, _)| *at).collect();
    let ids = refused.iter().map(|(at, error)| (envelopes[*at].id, error.to_string())).collect();
    let all = refused.len() == envelopes.len();
    let mut errors = refused.into_iter().map(|(_, error)| error);
    let Some(first) = errors.next() else { return Ok(()) };
    let error = match std::iter::once(first).chain(errors).reduce(|a, b| {
        if a.is_outage() {
            a
        } else if b.is_outage() {
            b
        } else {
            a
        }
    }) {
        Some(outage) if outage.is_outage() => outage,
        Some(refusal) if all => refusal,
        _ => StreamsError::PartlyRefused { total: envelopes.len(), refused: ids },
    };
    Err(not_published(envelopes, at.into_iter(), error))
}

fn not_published(envelopes: &[EventEnvelope], at: impl Iterator<Item = usize>, error: StreamsError) -> NotPublished {
    NotPublished { error, unconfirmed: at.map(|at| envelopes[at].clone()).collect() }
}
