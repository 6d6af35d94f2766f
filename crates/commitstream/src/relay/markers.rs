//! Markers of settled batches, whose life is to be shortened. A settle need not be on disk when it returns, and a crash of PostgreSQL that
//! undoes it opens its batch again, for whose recovery the marker is needed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::streams::Streams;

/// More are left to expire by themselves.
const MOST: usize = 10_000;

/// Those of one session: it ends when PostgreSQL crashes.
#[derive(Debug, Clone, Default)]
pub(super) struct Markers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// With when the settle had returned.
    settled: VecDeque<(Instant, (String, Uuid))>,
    due: Vec<(String, Uuid)>,
}

impl Markers {
    /// Streams and ids of batches whose settle has returned by `now`.
    pub fn settled(&self, markers: Vec<(String, Uuid)>, now: Instant) {
        let mut state = self.state();
        let room = MOST.saturating_sub(state.settled.len() + state.due.len());
        state.settled.extend(markers.into_iter().take(room).map(|marker| (now, marker)));
    }

    /// A commit that began then is on disk, and with it all that was committed before.
    pub fn on_disk(&self, began: Instant) {
        let State { settled, due } = &mut *self.state();
        let before = settled.partition_point(|(at, _)| *at <= began);
        due.extend(settled.drain(..before).map(|(_, marker)| marker));
    }

    /// Those whose life may be shortened; they are gone from here.
    pub fn take_due(&self) -> Vec<(String, Uuid)> {
        std::mem::take(&mut self.state().due)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each call leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shortens the life of markers that are due. What cannot be shortened costs room in Redis and nothing else.
pub(super) async fn shorten(markers: &[(String, Uuid)], streams: &Streams, life: Duration) {
    if let Err(error) = streams.expire_markers(markers, life).await {
        tracing::debug!(%error, "markers of settled batches keep their full life");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_due_when_a_later_commit_is_on_disk() {
        let (markers, stream) = (Markers::default(), || ("s".to_owned(), Uuid::nil()));
        let before = Instant::now();
        let settled = before + Duration::from_millis(1);
        markers.settled(vec![stream()], settled);
        markers.on_disk(before);
        assert_eq!(markers.take_due(), []);
        markers.on_disk(settled);
        assert_eq!((markers.take_due(), markers.take_due()), (vec![stream()], vec![]));
        markers.settled(vec![stream(); MOST + 1], settled);
        markers.on_disk(settled);
        assert_eq!(markers.take_due().len(), MOST);
    }
}
