//! Streams of which nobody knows yet what became of their batches, since Redis could not be asked. They are left out of claims. Pure but for
//! the dice.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::append::Trouble;
use crate::backoff::Backoff;

pub struct Unready {
    streams: BTreeMap<String, (Trouble, Instant)>,
    /// Of those, what is being repaired, or can be.
    reachable: BTreeSet<String>,
    under_way: BTreeSet<String>,
    backoff: Backoff,
    next: Instant,
}

impl Unready {
    pub fn new(streams: BTreeMap<String, Trouble>, now: Instant) -> Self {
        let mut unready = Self {
            streams: BTreeMap::new(),
            reachable: BTreeSet::new(),
            under_way: BTreeSet::new(),
            backoff: Backoff::default(),
            next: now,
        };
        if let Some((stream, Trouble { reason, .. })) = streams.first_key_value() {
            let streams = streams.len();
            tracing::warn!(streams, stream, reason, "streams wait: what became of their open batches cannot be found out yet");
            unready.next = now + unready.backoff.next();
        }
        unready.streams.extend(streams.into_iter().map(|(stream, trouble)| (stream, (trouble, now))));
        unready
    }

    /// A stream whose batch was put down.
    pub fn insert(&mut self, stream: String, trouble: Trouble, now: Instant) {
        if self.streams.is_empty() {
            self.next = now + self.backoff.next();
        }
        self.streams.insert(stream, (trouble, now));
    }

    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    pub fn len(&self) -> usize {
        self.streams.len()
    }

    pub fn streams(&self) -> Vec<String> {
        self.streams.keys().cloned().collect()
    }

    pub fn aggregate_types(&self, prefix: &str) -> impl Iterator<Item = String> {
        self.streams.keys().map(move |stream| stream.strip_prefix(prefix).unwrap_or(stream).to_owned())
    }

    /// When Redis is to be asked whether it answers for them.
    pub fn next(&self) -> Option<Instant> {
        (!self.streams.is_empty() && self.reachable.is_empty()).then_some(self.next)
    }

    pub fn is_due(&self, now: Instant) -> bool {
        self.next().is_some_and(|next| next <= now)
    }

    /// Redis answers for these.
    pub fn probed(&mut self, reachable: Vec<String>, now: Instant) {
        self.reachable = reachable.into_iter().filter(|stream| self.streams.contains_key(stream)).collect();
        self.next = now + self.backoff.next();
    }

    pub fn has_reachable(&self) -> bool {
        !self.reachable.is_empty()
    }

    pub fn take_reachable(&mut self) -> BTreeSet<String> {
        self.under_way = std::mem::take(&mut self.reachable);
        self.under_way.clone()
    }

    /// Those that were under way are ready now, but for these.
    pub fn repaired(&mut self, still: BTreeMap<String, Trouble>, now: Instant) {
        for stream in std::mem::take(&mut self.under_way) {
            match still.get(&stream) {
                Some(trouble) => {
                    if let Some(known) = self.streams.get_mut(&stream) {
                        known.0 = trouble.clone();
                    }
                }
                None => drop(self.streams.remove(&stream)),
            }
        }
        if self.streams.is_empty() {
            tracing::info!("all streams get on: what became of their open batches is found out");
            self.backoff = Backoff::default();
        }
        self.next = now + self.backoff.next();
    }

    /// Of those that wait for a server, since when the first does.
    pub fn without_server_since(&self) -> Option<Instant> {
        self.streams.values().filter(|(trouble, _)| trouble.of_server).map(|(_, since)| *since).min()
    }

    pub fn first(&self) -> Option<(&str, &Trouble)> {
        self.streams.iter().min_by_key(|(_, (_, since))| *since).map(|(stream, (trouble, _))| (stream.as_str(), trouble))
    }
}
