use std::sync::Arc;

use futures_util::future::join_all;
use redis::Value;
use redis::streams::StreamRangeReply;
use uuid::Uuid;

use super::append::is_appended;
use super::node::{Node, Request};
use super::{Streams, StreamsError, marker_key};
use crate::outbox::JournalBatch;

/// Whether Redis still has a batch that it had acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Its marker is there, and does not say that the batch was aborted: who finds a lost batch open may have written that.
    Marked,
    /// Its last entry is there, and its marker is not: that was evicted or deleted.
    Unmarked,
    /// Neither is there.
    Lost,
}

/// Markers that one pipeline asks for.
const MARKERS_AT_ONCE: usize = 1_000;

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
            pipeline.cmd("GET").arg(marker_key(stream, batch.batch_id));
        }
        let markers: Vec<Option<String>> = self.send(doing, stream, Request::Pipeline(&pipeline)).await?;
        let mut found = Vec::with_capacity(batches.len());
        for (batch, marker) in batches.iter().zip(markers) {
            found.push(match (is_appended(marker.as_deref()), &batch.last_entry) {
                (true, _) => Presence::Marked,
                (false, Some(entry)) if self.has_entry(stream, entry, batch).await? => Presence::Unmarked,
                (false, _) => Presence::Lost,
            });
        }
        Ok(found)
    }

    /// A sign of life, and whether these batches are still there: one question to each node, and to all of them at once.
    ///
    /// # Errors
    /// [`StreamsError::Lost`] names one that is not. Else no node could be asked: one that answers is enough, since what is
    /// appended shows which do not.
    pub async fn check(&self, batches: &[(String, Vec<Uuid>)]) -> Result<(), StreamsError> {
        let doing = "looking for recent batches";
        if batches.is_empty() {
            return self.any_answers().await;
        }
        let (groups, mut failed) = self.nodes_of(doing, batches.to_vec(), |(stream, _)| stream).await;
        let answers = join_all(groups.iter().map(|(node, batches)| self.check_node(doing, node, batches))).await;
        let mut answered = false;
        for answer in answers {
            match answer {
                Ok(()) => answered = true,
                Err(lost @ StreamsError::Lost { .. }) => return Err(lost),
                Err(error) => failed = Some(error),
            }
        }
        failed.filter(|_| !answered).map_or(Ok(()), Err)
    }

    /// Whether a relay can do anything: of a cluster, one master that answers is enough.
    ///
    /// # Errors
    /// No master can be asked.
    pub(crate) async fn any_answers(&self) -> Result<(), StreamsError> {
        let doing = "asking for a sign of life";
        let ping = redis::cmd("PING");
        let masters = self.masters(doing).await?;
        let answers = join_all(masters.iter().map(|master| master.query::<()>(doing, &ping))).await;
        let mut failed = None;
        for answer in answers {
            match answer {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.redirected(&error).await;
                    failed = Some(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn check_node(&self, doing: &'static str, node: &Node, batches: &[(String, Vec<Uuid>)]) -> Result<(), StreamsError> {
        let mut markers = Vec::with_capacity(batches.len());
        for (stream, batches) in batches {
            markers.extend(batches.iter().map(|batch| (stream, marker_key(stream, *batch))));
        }
        for markers in markers.chunks(MARKERS_AT_ONCE) {
            let mut pipeline = redis::pipe();
            for (_, marker) in markers {
                pipeline.cmd("GET").arg(marker);
            }
            let found: Vec<Option<String>> = match node.send(doing, Request::Pipeline(&pipeline)).await {
                Ok(found) => found,
                Err(error) => {
                    // A slot may have moved: where it is, is learnt before the next look.
                    self.redirected(&error).await;
                    return Err(error);
                }
            };
            let missing = markers.iter().zip(found).find(|(_, found)| !is_appended(found.as_deref()));
            if let Some(((stream, marker), _)) = missing {
                return Err(StreamsError::Lost { stream: (*stream).clone(), marker: marker.clone() });
            }
        }
        Ok(())
    }

    /// Of these streams, those whose server answers.
    pub(crate) async fn reachable(&self, streams: Vec<String>) -> Vec<String> {
        let doing = "asking for a sign of life";
        let (nodes, _) = self.nodes_of(doing, streams, |stream| stream).await;
        let ping = redis::cmd("PING");
        let asked = nodes.into_iter().map(|(node, streams)| {
            let ping = &ping;
            async move {
                match node.query::<()>(doing, ping).await {
                    Ok(()) => streams,
                    Err(error) => {
                        // Another node may have taken its place.
                        self.redirected(&error).await;
                        Vec::new()
                    }
                }
            }
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// What goes to the same node. What has none now, since nobody knows it, is left out, and the last error says why.
    async fn nodes_of<T>(
        &self,
        doing: &'static str,
        things: Vec<T>,
        stream: fn(&T) -> &String,
    ) -> (Vec<(Arc<Node>, Vec<T>)>, Option<StreamsError>) {
        let mut groups: Vec<(Arc<Node>, Vec<T>)> = Vec::new();
        let mut failed = None;
        for thing in things {
            match self.node_of(doing, stream(&thing)).await {
                Ok(node) => match groups.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &node)) {
                    Some((_, group)) => group.push(thing),
                    None => groups.push((node, vec![thing])),
                },
                Err(error) => failed = Some(error),
            }
        }
        (groups, failed)
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
