use std::sync::Arc;

use futures_util::future::join_all;
use redis::{Cmd, Pipeline, Value};
use uuid::Uuid;

use super::connection::REDIRECTIONS;
use super::node::{Node, Request};
use super::{Streams, StreamsError};
use crate::event::EventEnvelope;

/// Bounds of one pipeline.
const ENTRIES_PER_PIPELINE: usize = 1_000;
const BYTES_PER_PIPELINE: usize = 8 << 20;

/// Bytes of an XADD besides what differs: the names of the fields, the id, the time, and room for the prefix of the key.
const FIELDS: usize = 200;

const DOING: &str = "publishing to streams";

/// Events that did not go straight to streams, or are not known to have.
#[derive(Debug)]
pub struct NotPublished {
    pub error: StreamsError,
    /// All but those that Redis has confirmed, in the caller's order.
    pub unconfirmed: Vec<EventEnvelope>,
}

/// What became of a chunk, by index; what is not named is in its stream.
#[derive(Default)]
struct Sent {
    refused: Vec<(usize, StreamsError)>,
    lost: Vec<usize>,
    /// Of what was lost; the one that says least.
    outage: Option<StreamsError>,
}

impl Sent {
    fn lose(&mut self, at: &[usize], error: StreamsError) {
        self.lost.extend(at);
        if !matches!(self.outage, Some(StreamsError::OutcomeUnknown { .. })) {
            self.outage = Some(error);
        }
    }
}

impl Streams {
    /// The direct lane: appends each envelope to the stream of its aggregate type, in order, without a journal.
    ///
    /// # Errors
    /// Names what is not confirmed. After [`StreamsError::Refused`], [`StreamsError::PartlyRefused`] and
    /// [`StreamsError::Unavailable`] that is known to be in no stream; after [`StreamsError::OutcomeUnknown`] some of it may be.
    pub async fn publish(&self, envelopes: &[EventEnvelope]) -> Result<(), NotPublished> {
        let mut refused: Vec<(usize, StreamsError)> = Vec::new();
        let mut done = 0;
        for chunk in EventEnvelope::chunks(envelopes, ENTRIES_PER_PIPELINE, BYTES_PER_PIPELINE) {
            let noted = self.note_written(chunk.iter().map(|envelope| envelope.aggregate_type.as_str()));
            let (sent, ()) = tokio::join!(self.send_chunk(chunk), noted);
            refused.extend(sent.refused.into_iter().map(|(at, error)| (done + at, error)));
            if let Some(error) = sent.outage {
                let nothing_was_written = done == 0 && sent.lost.len() == chunk.len();
                let error = if nothing_was_written { error } else { error.after_some_were_written() };
                let lost = sent.lost.into_iter().map(|at| done + at);
                let mut unconfirmed: Vec<usize> = refused.into_iter().map(|(at, _)| at).chain(lost).collect();
                unconfirmed.extend(done + chunk.len()..envelopes.len());
                unconfirmed.sort_unstable();
                return Err(not_published(envelopes, unconfirmed.into_iter(), error));
            }
            done += chunk.len();
        }
        judge(envelopes, refused)
    }

    /// One pipeline for each node, all at once. What a cluster redirected was not carried out, and is sent once more where
    /// it belongs; so is all that follows it in its stream, since that was redirected as well.
    async fn send_chunk(&self, chunk: &[EventEnvelope]) -> Sent {
        let mut sent = Sent::default();
        let mut left: Vec<usize> = (0..chunk.len()).collect();
        for round in 0..=REDIRECTIONS {
            let stream = |at: &usize| self.stream_of(&chunk[*at].aggregate_type);
            let groups = match self.by_node(DOING, left.iter().copied(), stream).await {
                Ok(groups) => groups,
                Err(error) => {
                    sent.lose(&left, error);
                    break;
                }
            };
            left.clear();
            let send = async |(node, at): &(Arc<Node>, Vec<usize>)| {
                let mut pipeline = Pipeline::with_capacity(at.len());
                pipeline.ignore_errors();
                for at in at {
                    pipeline.add_command(self.xadd(&chunk[*at]));
                }
                node.send::<Vec<Value>>(DOING, Request::Pipeline(&pipeline)).await
            };
            let answers = join_all(groups.iter().map(send)).await;
            for ((node, at), answer) in groups.iter().zip(answers) {
                let replies = match answer {
                    Ok(replies) => replies,
                    Err(error) => {
                        self.redirected(&error).await;
                        sent.lose(at, error);
                        continue;
                    }
                };
                for (at, reply) in at.iter().zip(replies) {
                    let Value::ServerError(error) = reply else { continue };
                    let stream = self.stream_of(&chunk[*at].aggregate_type);
                    let error = node.typed(DOING, error.into()).about(&stream);
                    if round < REDIRECTIONS && self.redirected(&error).await.is_some() {
                        left.push(*at);
                    } else {
                        if error.is_outage() {
                            // A former master goes on saying READONLY.
                            node.close();
                        }
                        sent.refused.push((*at, error));
                    }
                }
            }
            if left.is_empty() {
                break;
            }
            left.sort_unstable();
        }
        sent
    }

    fn xadd(&self, envelope: &EventEnvelope) -> Cmd {
        let headers = envelope.headers_json();
        let names = envelope.event_type.len() + 2 * envelope.aggregate_type.len() + envelope.aggregate_id.len();
        let bytes = names + envelope.payload.get().len() + headers.as_ref().map_or(0, String::len) + FIELDS;
        let mut command = Cmd::with_capacity(17, bytes);
        command.arg("XADD").arg(self.stream_of(&envelope.aggregate_type)).arg("*");
        command.arg("id").arg(&*envelope.id.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
        command.arg("type").arg(&envelope.event_type);
        command.arg("aggregate_type").arg(&envelope.aggregate_type);
        command.arg("aggregate_id").arg(&envelope.aggregate_id);
        command.arg("occurred_at").arg(envelope.occurred_at_text());
        command.arg("payload").arg(envelope.payload.get());
        if let Some(headers) = headers {
            command.arg("headers").arg(headers);
        }
        command
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
