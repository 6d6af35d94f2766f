//! The names of the streams, for those who look at them all the time.

use std::time::{Duration, Instant};

use commitstream::streams::{Streams, StreamsError};

/// How long they are taken as known.
const LISTED_FOR: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct StreamNames {
    known: Vec<String>,
    listed: Option<Instant>,
}

impl StreamNames {
    /// The first `most` by name.
    pub async fn list(&mut self, streams: &Streams, most: usize) -> Result<&[String], StreamsError> {
        // The first stream is not waited for.
        if self.known.is_empty() || self.listed.is_none_or(|listed| listed.elapsed() > LISTED_FOR) {
            self.known = streams.list().await?;
            self.listed = Some(Instant::now());
        }
        Ok(&self.known[..most.min(self.known.len())])
    }
}
