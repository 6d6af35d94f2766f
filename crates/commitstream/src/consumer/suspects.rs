//! Which event ends the process: what is said before a handler begins, and who runs alone.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{MutexGuard as AsyncGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::lanes::Item;
use crate::streams::EntryId;

/// Deaths of consumers while an entry was at work, after which it may be the cause.
const SUSPICIOUS: u32 = 3;
/// Most entries in one call that were in hand when a consumer died: each death then concerns as few.
pub(super) const FEW: usize = 32;
/// How long a suspect waits for the other handlers of the process to end, while none begins.
const ALONE: Duration = Duration::from_secs(10);

/// Held by all handlers of this process, of whichever consumer; alone by a suspect.
static AT_WORK: RwLock<()> = RwLock::const_new(());
/// Held by a suspect: there is one at a time.
static SUSPECT: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Leave to call a handler.
pub(super) struct Leave {
    _shared: Option<RwLockReadGuard<'static, ()>>,
    _alone: Option<RwLockWriteGuard<'static, ()>>,
    _suspect: Option<AsyncGuard<'static, ()>>,
}

/// Waits until a handler may begin. A suspect is the only one of its process, so that if the process ends, it was that; unless another
/// handler goes on for so long that all others would wait for it.
pub(super) async fn leave(is_suspect: bool) -> Leave {
    if !is_suspect {
        return Leave { _shared: Some(AT_WORK.read().await), _alone: None, _suspect: None };
    }
    let suspect = SUSPECT.lock().await;
    let alone = tokio::time::timeout(ALONE, AT_WORK.write()).await.ok();
    Leave { _shared: None, _alone: alone, _suspect: Some(suspect) }
}

/// `deliveries` counts the deaths, from 1, and begins anew where a handler has come back with a failure.
pub(super) fn is_suspect(deliveries: u32, failures: u32) -> bool {
    deliveries.saturating_sub(failures.max(1)) >= SUSPICIOUS
}

/// The entries at work that were in hand before, when a consumer died. Only of these it is said in Redis that they are at work: to say it
/// of each event would cost a call for each.
#[derive(Debug, Default)]
pub(super) struct Started {
    state: Mutex<State>,
    /// One call at a time, each with all that is at work.
    pub call: tokio::sync::Mutex<()>,
}

/// Each entry with its deliveries.
#[derive(Debug, Default)]
struct State {
    at_work: HashMap<EntryId, u32>,
    /// What Redis knows, less what has ended since.
    said: HashMap<EntryId, u32>,
    /// What Redis knows.
    noted: HashMap<EntryId, u32>,
}

/// These are at work until it is dropped.
pub(super) struct AtWork<'a> {
    started: &'a Started,
    ids: Vec<EntryId>,
}

impl Started {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each call leaves it consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin<'i>(&self, items: impl Iterator<Item = &'i Item>) -> AtWork<'_> {
        let items: Vec<(EntryId, u32)> = items.map(|item| (item.id, item.deliveries)).collect();
        let ids = items.iter().map(|(id, _)| *id).collect();
        self.lock().at_work.extend(items);
        AtWork { started: self, ids }
    }

    /// All that is at work, to be said; `None` if it was said already of these.
    pub fn unsaid(&self, of: &AtWork<'_>) -> Option<HashMap<EntryId, u32>> {
        let state = self.lock();
        let is_said = of.ids.iter().all(|id| state.said.contains_key(id));
        (!is_said).then(|| state.at_work.clone())
    }

    /// It was said. What has ended meanwhile is not to be taken for said when it begins again.
    pub fn was_said(&self, what: HashMap<EntryId, u32>) {
        let mut state = self.lock();
        let State { at_work, said, noted } = &mut *state;
        *said = what.iter().filter(|(id, _)| at_work.contains_key(id)).map(|(id, deliveries)| (*id, *deliveries)).collect();
        *noted = what;
    }

    /// What Redis has noted.
    pub fn noted(&self) -> Vec<(EntryId, u32)> {
        self.lock().noted.iter().map(|(id, deliveries)| (*id, *deliveries)).collect()
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        let mut state = self.started.lock();
        for id in &self.ids {
            state.at_work.remove(id);
            state.said.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consumer::lanes::What;

    fn item(millis: u64) -> Item {
        let id = EntryId { millis, sequence: 0 };
        Item {
            id,
            what: What::Pass,
            history: String::new(),
            failures: 0,
            deliveries: 1,
            alone: false,
            suspect: false,
            careful: true,
        }
    }

    #[test]
    fn three_deaths_make_a_suspect_and_failures_do_not() {
        assert!(!is_suspect(1, 0) && !is_suspect(3, 0) && is_suspect(4, 0));
        // A handler that comes back sets both alike.
        assert!(!is_suspect(4, 4) && !is_suspect(6, 4) && is_suspect(7, 4));
        // The note before a suspect counts one of each, so that it stays one.
        assert!(is_suspect(5, 1) && is_suspect(6, 2));
    }

    #[test]
    fn what_is_at_work_is_said_once_and_again_when_it_begins_again() {
        let started = Started::default();
        let (one, two) = ([item(1)], [item(2)]);
        let first = started.begin(one.iter());
        let second = started.begin(two.iter());
        let both = started.unsaid(&first).unwrap();
        assert_eq!(both.len(), 2);
        started.was_said(both);
        assert!(started.unsaid(&second).is_none(), "the first call said it");
        drop(second);
        let again = started.begin(two.iter());
        assert!(started.unsaid(&again).is_some());
        assert_eq!(started.noted().len(), 2);
        drop(first);
        drop(again);
        assert!(started.lock().at_work.is_empty());
    }
}
