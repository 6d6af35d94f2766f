//! What is in the streams already, in the order of arrival over all streams.

use std::collections::{BTreeMap, VecDeque};

use anyhow::Context as _;
use commitstream::streams::{Entry, Streams};

/// Entries of one stream that are read at once.
const PAGE: usize = 500;

/// A merge of streams, each of which is in order. Bounded by a page for each stream.
pub struct History {
    streams: Streams,
    sources: Vec<Source>,
}

struct Source {
    stream: String,
    /// Entry id of the last entry that was read or passed over.
    position: String,
    page: VecDeque<Entry>,
    /// Nothing was left when it was read last.
    exhausted: bool,
}

impl History {
    /// Everything.
    pub fn from_start(streams: &Streams, names: Vec<String>) -> Self {
        let source = |stream| Source { stream, position: "0".to_owned(), page: VecDeque::new(), exhausted: false };
        Self { streams: streams.clone(), sources: names.into_iter().map(source).collect() }
    }

    /// The newest `count` entries over all streams.
    pub async fn newest(streams: &Streams, names: Vec<String>, count: usize) -> anyhow::Result<Self> {
        let mut sources = Vec::new();
        for stream in names {
            // One at least, to know where to go on.
            let page = VecDeque::from(streams.newest(&stream, count.max(1)).await.with_context(|| cannot_read(&stream))?);
            let position = page.back().map_or_else(|| "0".to_owned(), |entry| entry.id.clone());
            sources.push(Source { stream, position, page, exhausted: true });
        }
        let mut order: Vec<_> = sources.iter().flat_map(|source| source.page.iter().map(|entry| order_of(&entry.id))).collect();
        order.sort_unstable();
        let first = order.len().checked_sub(count).and_then(|surplus| order.get(surplus));
        for source in &mut sources {
            source.page.retain(|entry| first.is_some_and(|first| order_of(&entry.id) >= *first) || order.len() < count);
        }
        Ok(Self { streams: streams.clone(), sources })
    }

    /// The next entries; none when all was read.
    pub async fn next(&mut self) -> anyhow::Result<Vec<Entry>> {
        for source in self.sources.iter_mut().filter(|source| source.page.is_empty() && !source.exhausted) {
            let page = self.streams.range(&source.stream, &source.position, PAGE).await;
            source.page = page.with_context(|| cannot_read(&source.stream))?.into();
            source.exhausted = source.page.is_empty();
            if let Some(last) = source.page.back() {
                source.position.clone_from(&last.id);
            }
        }
        let mut entries = Vec::new();
        // When a page runs out, what comes next in its stream may be older than the others' heads.
        while self.sources.iter().all(|source| source.exhausted || !source.page.is_empty()) {
            let oldest = |source: &&mut Source| source.page.front().map(|entry| order_of(&entry.id));
            let next = self.sources.iter_mut().filter(|source| !source.page.is_empty()).min_by_key(oldest);
            match next.and_then(|source| source.page.pop_front()) {
                Some(entry) => entries.push(entry),
                None => break,
            }
        }
        Ok(entries)
    }

    /// Each stream, and the entry id after which to go on.
    pub fn into_positions(self) -> BTreeMap<String, String> {
        self.sources.into_iter().map(|source| (source.stream, source.position)).collect()
    }
}

fn cannot_read(stream: &str) -> String {
    format!("cannot read {stream}")
}

/// An entry id `<milliseconds>-<sequence>` as numbers.
pub fn order_of(id: &str) -> (u64, u64) {
    let (millis, sequence) = id.split_once('-').unwrap_or((id, "0"));
    (millis.parse().unwrap_or(0), sequence.parse().unwrap_or(0))
}
