//! What a relay says of itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;

use crate::chain::chain;
use crate::metrics::RelayMetrics;
use crate::outbox::OutboxError;

/// Reasons of one outage that are logged: some texts differ each time.
const MOST_REASONS: usize = 8;

/// What the relay is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RelayState {
    /// Opening its sessions.
    Connecting,
    /// Has no partition now: others have them all, or have yet to give some.
    Standby,
    /// Has partitions, and finds out what became of the batches that an earlier owner left open.
    Recovering,
    /// Claims nothing until an operator lets relays go on.
    Paused,
    /// Publishing, or asleep until there is something to publish.
    Active,
    /// Cannot work now, and keeps trying. The reason is for people.
    Unable { reason: String },
    /// Ended.
    Stopped,
}

impl RelayState {
    /// One word, as `commitstream relays` shows it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Standby => "standby",
            Self::Recovering => "recovering",
            Self::Paused => "paused",
            Self::Active => "active",
            Self::Unable { .. } => "unable",
            Self::Stopped => "stopped",
        }
    }
}

/// The relay's state, and what it did since it was started.
#[derive(Debug, Clone)]
pub struct RelayStatus {
    /// Changes with every start.
    pub relay_id: Uuid,
    pub state: RelayState,
    /// Of the 64 partitions, how many this relay works on.
    pub partitions: u32,
    /// Events marked `PUBLISHED`.
    pub published: u64,
    /// Refused attempts.
    pub refused: u64,
    /// Events marked `FAILED`.
    pub failed: u64,
    /// Events that Redis had acknowledged and lost, and that were made unsent again.
    pub republished: u64,
    /// Why PostgreSQL does not let some events be settled, while the relay goes on with others.
    pub unsettled: Option<String>,
    /// Streams that cannot get on, and why, for people. The others go on, and so do these when the cause is gone.
    pub waiting: Option<String>,
}

/// How long a session's failure is told while the next one works.
const TOLD_FOR: Duration = Duration::from_secs(20);

/// Publishes the status, and logs each change of state once.
#[derive(Debug, Clone)]
pub(super) struct Reporter {
    status: Arc<watch::Sender<RelayStatus>>,
    /// The state of a relay that can work is not active but paused.
    is_paused: Arc<AtomicBool>,
    last_failure: Arc<Mutex<Option<(Instant, String)>>>,
    /// Reasons of the outage under way that the log has.
    logged: Arc<Mutex<Vec<String>>>,
    pub metrics: Arc<RelayMetrics>,
}

impl Reporter {
    pub fn new(relay_id: Uuid) -> Self {
        let status = RelayStatus {
            relay_id,
            state: RelayState::Connecting,
            partitions: 0,
            published: 0,
            refused: 0,
            failed: 0,
            republished: 0,
            unsettled: None,
            waiting: None,
        };
        let metrics = Arc::new(RelayMetrics::new());
        metrics.state(&status.state);
        metrics.partitions.set(0);
        Self {
            status: Arc::new(watch::Sender::new(status)),
            is_paused: Arc::default(),
            last_failure: Arc::default(),
            logged: Arc::default(),
            metrics,
        }
    }

    pub fn subscribe(&self) -> watch::Receiver<RelayStatus> {
        self.status.subscribe()
    }

    pub fn state(&self, state: RelayState) {
        self.status.send_if_modified(|status| {
            let changed = status.state != state;
            self.metrics.state(&state);
            if self.is_news(&status.state, &state) {
                log(&status.relay_id, &state);
            }
            status.state = state;
            changed
        });
    }

    /// Attempts of one outage fail for several reasons in turn: the log has each of them once, and no more than it has room for.
    fn is_news(&self, before: &RelayState, now: &RelayState) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = std::mem::discriminant(before) != std::mem::discriminant(now);
        if changed {
            logged.clear();
        }
        let RelayState::Unable { reason } = now else { return changed };
        if logged.len() >= MOST_REASONS || logged.contains(reason) {
            return false;
        }
        logged.push(reason.clone());
        true
    }

    /// A new session begins. After a failure the relay stays unable until the session has come somewhere.
    pub fn connecting(&self) {
        if !matches!(self.status.borrow().state, RelayState::Unable { .. }) {
            self.state(RelayState::Connecting);
        }
    }

    /// The relay works, or does all but claim.
    pub fn working(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::Relaxed);
        self.state(if is_paused { RelayState::Paused } else { RelayState::Active });
    }

    /// So many streams cannot get on; the text says which and why.
    pub fn waiting(&self, streams: usize, text: Option<String>) {
        self.metrics.waiting.set(u32::try_from(streams).unwrap_or(u32::MAX));
        // Who looks at the status may hold it for a while: it is locked only where there is something to say.
        if self.status.borrow().waiting == text {
            return;
        }
        self.status.send_if_modified(|status| {
            let changed = status.waiting != text;
            status.waiting = text;
            changed
        });
    }

    /// The servers answer again.
    pub fn able(&self) {
        if matches!(self.status.borrow().state, RelayState::Unable { .. }) {
            self.working(self.is_paused.load(Ordering::Relaxed));
        }
    }

    pub fn unable(&self, error: &(dyn std::error::Error + 'static)) {
        self.unable_for(&chain(error));
    }

    pub fn unable_for(&self, reason: &str) {
        self.state(RelayState::Unable { reason: reason.to_owned() });
    }

    /// Some events cannot be settled, for this reason, or all can.
    pub fn unsettled(&self, error: Option<&OutboxError>) {
        let reason = error.map(|error| chain(error));
        self.status.send_if_modified(|status| {
            let changed = status.unsettled != reason;
            if let Some(reason) = reason.as_ref().filter(|_| changed) {
                tracing::error!(relay = %status.relay_id, reason, "events are published and cannot be settled");
            }
            status.unsettled = reason;
            changed
        });
    }

    /// The session has failed. What it failed of is told until another one has worked for a while.
    pub fn failed(&self, error: &(dyn std::error::Error + 'static)) {
        let failure = Some((Instant::now(), chain(error)));
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
        self.unable(error);
    }

    /// Why the relay cannot work, or not wholly, or could not until lately.
    pub fn reason(&self) -> Option<String> {
        let status = self.status.borrow();
        if let RelayState::Unable { reason } = &status.state {
            return Some(reason.clone());
        }
        let last_failure = self.last_failure.lock().unwrap_or_else(PoisonError::into_inner);
        let lately = || last_failure.as_ref().filter(|(at, _)| at.elapsed() < TOLD_FOR);
        status
            .unsettled
            .clone()
            .or_else(|| status.waiting.clone())
            .or_else(|| lately().map(|(_, reason)| format!("until lately: {reason}")))
    }

    pub fn status(&self) -> RelayStatus {
        self.status.borrow().clone()
    }

    pub fn partitions(&self, partitions: u32) {
        self.status.send_if_modified(|status| {
            let changed = status.partitions != partitions;
            if changed {
                tracing::info!(relay = %status.relay_id, partitions, before = status.partitions, "share of the 64 partitions changed");
            }
            status.partitions = partitions;
            self.metrics.partitions.set(partitions);
            changed
        });
    }

    pub fn republished(&self, events: u64) {
        self.metrics.republished.increment(events);
        self.status.send_modify(|status| status.republished += events);
    }

    pub fn count(&self, published: u64, refused: u64, failed: u64) {
        self.status.send_modify(|status| {
            status.published += published;
            status.refused += refused;
            status.failed += failed;
        });
    }
}

fn log(relay: &Uuid, state: &RelayState) {
    match state {
        RelayState::Unable { reason } => tracing::warn!(%relay, reason, "relay cannot work, and keeps trying"),
        RelayState::Connecting => tracing::debug!(%relay, "relay connects"),
        RelayState::Standby => tracing::info!(%relay, "relay stands by: it has no partition"),
        RelayState::Recovering => tracing::info!(%relay, "relay has partitions and resolves open batches"),
        RelayState::Paused => tracing::warn!(%relay, "relay is paused by an operator, and claims nothing"),
        RelayState::Active => tracing::info!(%relay, "relay is active"),
        RelayState::Stopped => tracing::info!(%relay, "relay has stopped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unable(reason: &str) -> RelayState {
        RelayState::Unable { reason: reason.to_owned() }
    }

    #[test]
    fn each_reason_of_an_outage_is_news_once_and_many_are_not() {
        let reporter = Reporter::new(Uuid::nil());
        let (active, lost, refused) = (RelayState::Active, unable("terminated"), unable("password refused"));
        assert!(reporter.is_news(&active, &lost));
        assert!(!reporter.is_news(&lost, &lost));
        assert!(reporter.is_news(&lost, &refused));
        assert!(!reporter.is_news(&refused, &lost), "it is in the log");
        let others = (0..100).filter(|n| reporter.is_news(&refused, &unable(&n.to_string()))).count();
        assert_eq!(others, MOST_REASONS - 2);
        assert!(reporter.is_news(&refused, &active));
        assert!(reporter.is_news(&active, &refused), "another outage");
    }
}
