//! What must stand in each stream before the next batch may. Pure.
//!
//! Every append names the relay's last batch in that stream, and Redis refuses it, in the same script, when that batch's marker is gone. So
//! a server that has lost the end of a stream is noticed before anything newer is written to it.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::repair::Predecessors;

/// The batches that must be there before another one. Their markers may expire after `until`.
pub struct Behind {
    batches: Vec<Uuid>,
    until: Instant,
}

impl Behind {
    pub fn at(&self, now: Instant) -> &[Uuid] {
        if now < self.until { &self.batches } else { &[] }
    }
}

#[derive(Debug)]
pub struct Chains {
    /// How long a batch must be there; after that its marker may expire.
    window: Duration,
    streams: HashMap<String, (Vec<Uuid>, Instant)>,
}

impl Chains {
    pub fn new(window: Duration) -> Self {
        Self { window, streams: HashMap::new() }
    }

    /// What was settled lately, by whichever relay, was looked up at `at`: the next batch stands behind that too.
    pub fn found(&mut self, predecessors: Predecessors, at: Instant) {
        for (stream, found) in predecessors.into_iter().filter(|(_, batches)| !batches.is_empty()) {
            // The earlier of the two times, so that no marker is asked for that may have expired.
            let (batches, since) = self.streams.entry(stream).or_insert_with(|| (Vec::new(), at));
            *since = at.min(*since);
            batches.extend(found);
            batches.sort_unstable();
            batches.dedup();
        }
    }

    /// What must be there before another batch of this stream, and until when it can be asked for.
    pub fn behind(&self, stream: &str, now: Instant) -> Behind {
        match self.streams.get(stream) {
            Some((batches, at)) => Behind { batches: batches.clone(), until: *at + self.window },
            None => Behind { batches: Vec::new(), until: now },
        }
    }

    /// All that must be there now, stream by stream. Forgets what need not be any more.
    pub fn all(&mut self, now: Instant) -> Vec<(String, Vec<Uuid>)> {
        self.streams.retain(|_, (_, at)| now - *at < self.window);
        self.streams.iter().map(|(stream, (batches, _))| (stream.clone(), batches.clone())).collect()
    }

    pub fn appended(&mut self, stream: &str, batch: Uuid, now: Instant) {
        self.streams.insert(stream.to_owned(), (vec![batch], now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_batch_stands_behind_the_last_one_while_its_marker_lives() {
        let (start, window) = (Instant::now(), Duration::from_secs(60));
        let [others, first, second] = [1, 2, 3].map(Uuid::from_u128);
        let mut chains = Chains::new(window);
        chains.found(Predecessors::from([("a".to_owned(), vec![others])]), start);
        chains.found(Predecessors::from([("a".to_owned(), vec![others, first])]), start + Duration::from_secs(1));
        assert_eq!(chains.behind("a", start).at(start), [others, first]);
        assert!(chains.behind("b", start).at(start).is_empty());
        let later = start + Duration::from_secs(30);
        chains.appended("a", second, later);
        assert_eq!(chains.behind("a", start + window).at(start + window), [second]);
        assert_eq!(chains.all(start + window), [("a".to_owned(), vec![second])]);
        assert!(chains.behind("a", start).at(later + window).is_empty() && chains.all(later + window).is_empty());
    }
}
