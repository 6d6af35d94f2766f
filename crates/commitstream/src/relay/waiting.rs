//! Streams that cannot get on: since when, why, and when each is tried again. Pure but for the dice.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::append::Trouble;
use crate::backoff::Backoff;

/// Streams that are named in the log, one line for each; of more, only how many there are.
const NAMED: usize = 10;
/// Beyond so many, to look at all of them takes time.
const MANY: usize = 100;

#[derive(Default)]
pub struct Waiting {
    streams: BTreeMap<String, Stuck>,
    due: BTreeSet<(Instant, String)>,
    /// Named since all streams moved.
    named: usize,
    most: usize,
}

struct Stuck {
    trouble: Trouble,
    since: Instant,
    backoff: Backoff,
    due: Option<Instant>,
    /// It keeps no batch and may be claimed again, which will show whether it gets on.
    trying: bool,
}

impl Waiting {
    /// A stream cannot get on, and is to be tried again after a while.
    pub fn waits(&mut self, stream: &str, trouble: Trouble, now: Instant) {
        let known = self.streams.get_mut(stream).map(|stuck| std::mem::replace(&mut stuck.trouble, trouble.clone()));
        let is_new = known.is_none();
        let stuck = self.streams.entry(stream.to_owned()).or_insert_with(|| Stuck {
            trouble,
            since: now,
            backoff: Backoff::default(),
            due: None,
            trying: false,
        });
        stuck.trying = false;
        let due = now + stuck.backoff.next();
        if let Some(before) = stuck.due.replace(due) {
            self.due.remove(&(before, stream.to_owned()));
        }
        self.due.insert((due, stream.to_owned()));
        if is_new {
            self.log(stream);
        }
    }

    fn log(&mut self, stream: &str) {
        self.most = self.most.max(self.streams.len());
        let Some(Stuck { trouble, .. }) = self.streams.get(stream) else { return };
        self.named += 1;
        let reason = &trouble.reason;
        if self.named <= NAMED {
            tracing::warn!(stream, reason, "stream waits: its events are tried again until they can be appended");
        } else if self.named == NAMED + 1 {
            tracing::warn!(stream, reason, "more streams wait: `commitstream relays` says how many");
        }
    }

    /// A stuck stream may be claimed again.
    pub fn tries(&mut self, stream: &str) {
        if let Some(stuck) = self.streams.get_mut(stream) {
            stuck.trying = true;
        }
    }

    /// A stream gets on.
    pub fn moves(&mut self, stream: &str) {
        let Some(since) = self.streams.get(stream).map(|stuck| stuck.since) else { return };
        self.forget(stream);
        if self.named <= NAMED {
            tracing::info!(stream, after = ?since.elapsed(), "stream gets on");
        } else if self.streams.is_empty() {
            tracing::info!(most = self.most, "all streams get on");
        }
        if self.streams.is_empty() {
            (self.named, self.most) = (0, 0);
        }
    }

    /// Somebody else looks after this stream from now on.
    pub fn forget(&mut self, stream: &str) -> Option<Trouble> {
        let stuck = self.streams.remove(stream)?;
        if let Some(due) = stuck.due {
            self.due.remove(&(due, stream.to_owned()));
        }
        Some(stuck.trouble)
    }

    pub fn is_stuck(&self, stream: &str) -> bool {
        self.streams.get(stream).is_some_and(|stuck| !stuck.trying)
    }

    pub fn len(&self) -> usize {
        self.stuck().count()
    }

    pub fn are_many(&self) -> bool {
        self.streams.len() > MANY
    }

    fn stuck(&self) -> impl Iterator<Item = (&String, &Stuck)> {
        self.streams.iter().filter(|(_, stuck)| !stuck.trying)
    }

    /// When the next one is to be tried again.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// A stream whose time has come. It is stuck until it is said to get on.
    pub fn pop_due(&mut self, now: Instant) -> Option<String> {
        if self.next().is_none_or(|due| due > now) {
            return None;
        }
        let (_, stream) = self.due.pop_first()?;
        if let Some(stuck) = self.streams.get_mut(&stream) {
            stuck.due = None;
        }
        Some(stream)
    }

    /// Of those that wait for a server, since when the first does.
    pub fn without_server_since(&self) -> Option<Instant> {
        self.stuck().filter(|(_, stuck)| stuck.trouble.of_server).map(|(_, stuck)| stuck.since).min()
    }

    /// For people: the one that has waited for longest.
    pub fn first(&self) -> Option<(&str, &Trouble)> {
        let first = self.stuck().min_by_key(|(_, stuck)| stuck.since);
        first.map(|(stream, stuck)| (stream.as_str(), &stuck.trouble))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stream_that_waits_is_due_after_its_backoff_and_stuck_until_it_moves() {
        let start = Instant::now();
        let trouble = |of_server| Trouble { reason: "no".to_owned(), of_server };
        let mut waiting = Waiting::default();
        waiting.waits("a", trouble(true), start);
        waiting.waits("a", trouble(false), start);
        waiting.waits("b", trouble(true), start + Duration::from_secs(1));
        assert_eq!((waiting.len(), waiting.first().map(|(stream, _)| stream)), (2, Some("a")));
        assert_eq!(waiting.without_server_since(), Some(start + Duration::from_secs(1)));
        assert_eq!(waiting.pop_due(start), None);
        assert_eq!(waiting.pop_due(start + Duration::from_millis(100)), Some("a".to_owned()));
        assert_eq!(waiting.pop_due(start + Duration::from_millis(100)), None);
        assert!(waiting.is_stuck("a"));
        waiting.tries("a");
        assert!(!waiting.is_stuck("a"));
        waiting.waits("a", trouble(false), start);
        assert!(waiting.is_stuck("a"));
        waiting.moves("a");
        assert!(!waiting.is_stuck("a"));
        assert_eq!(waiting.forget("b"), Some(trouble(true)));
        assert_eq!((waiting.next(), waiting.len()), (None, 0));
    }
}
