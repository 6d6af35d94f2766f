//! What a member finds in Redis that it does not know of: after a lost answer, and from the dead whose place it has taken.

use std::time::Duration;

use tokio::time::Instant;

use super::lanes::{Item, What};
use super::session::{Session, failures_in};
use super::suspects::is_suspect;
use crate::streams::{EntryId, StreamsError, Sweep, TakenOver};

/// Ids that are listed, and entries that are described, in one call.
const LISTED: usize = 1_000;
const DESCRIBED: usize = 200;
/// Between two sweeps. A sweep looks at all aggregates that the group has in hand.
const REST: Duration = Duration::from_secs(5);

/// What a session remembers from one exchange with Redis to the next.
pub(super) struct Round {
    /// When it looks for dead members again.
    pub beat: Instant,
    /// An answer was lost: behind this entry there may be some that the member does not know of.
    pub unsure: Option<EntryId>,
    pub sweeping: Sweeping,
    /// With that answer, what is owned in vain may have been lost: the next sweep says all that is owned.
    pub owed: bool,
}

pub(super) enum Sweeping {
    /// Not before.
    Idle(Instant),
    Going(Sweep),
}

impl Round {
    pub fn new() -> Self {
        let now = Instant::now();
        Self { beat: now, unsure: None, sweeping: Sweeping::Idle(now), owed: false }
    }

    /// Nobody knows what the last call has done.
    pub fn lost(&mut self) {
        self.unsure = Some(EntryId::default());
        self.owed = true;
        self.sweeping = Sweeping::Idle(Instant::now());
    }
}

impl Session {
    /// An answer was lost: what Redis has given to this member and it does not know of is taken in hand, without payloads, which are read
    /// when there is room. Each call is a heartbeat. Where there is more than may wait here, it goes on at the next exchange.
    pub(super) async fn find_what_is_in_hand(&self, round: &mut Round) -> Result<Result<(), TakenOver>, StreamsError> {
        while let Some(after) = round.unsure {
            let page = match self.streams.pending_of(&self.member, after, LISTED).await? {
                Ok(page) => page,
                Err(gone) => return Ok(Err(gone)),
            };
            let Some((last, _)) = page.last().copied() else {
                round.unsure = None;
                break;
            };
            let unknown: Vec<(EntryId, u32)> = {
                let lanes = self.lanes();
                page.into_iter().filter(|(id, _)| !lanes.knows(*id)).collect()
            };
            for some in unknown.chunks(DESCRIBED) {
                if self.lanes().is_full() {
                    // These are looked for again.
                    round.unsure = Some(before(some[0].0));
                    return Ok(Ok(()));
                }
                if let Err(gone) = self.take_in_hand(some).await? {
                    return Ok(Err(gone));
                }
            }
            round.unsure = Some(last);
        }
        Ok(Ok(()))
    }

    async fn take_in_hand(&self, some: &[(EntryId, u32)]) -> Result<Result<(), TakenOver>, StreamsError> {
        let ids: Vec<EntryId> = some.iter().map(|(id, _)| *id).collect();
        let described = match self.streams.describe(&self.member, &ids).await? {
            Ok(described) => described,
            Err(gone) => return Ok(Err(gone)),
        };
        let mut lanes = self.lanes();
        for ((id, aggregate, history), (_, deliveries)) in described.into_iter().zip(some) {
            let failures = failures_in(&history);
            let suspect = is_suspect(*deliveries, failures);
            let item = Item {
                id,
                what: What::Unread,
                history,
                failures,
                deliveries: *deliveries,
                alone: false,
                suspect,
                // Whether it was in hand when a consumer died was in the answer that was lost.
                careful: true,
            };
            lanes.offer(&aggregate, item);
        }
        Ok(Ok(()))
    }

    /// One step of forgetting the dead whose place this member has taken; `forwarded` of them are remembered by the whole group.
    pub(super) async fn sweep(&self, round: &mut Round, forwarded: u64) -> Result<Result<(), TakenOver>, StreamsError> {
        let from = match &round.sweeping {
            Sweeping::Idle(since) if (forwarded == 0 && !round.owed) || Instant::now() < *since => return Ok(Ok(())),
            Sweeping::Idle(_) => None,
            Sweeping::Going(sweep) => Some(sweep),
        };
        let (sweep, own) = match self.streams.sweep(&self.member, from, round.owed).await {
            Ok(Ok(step)) => step,
            Ok(Err(gone)) => return Ok(Err(gone)),
            // It may be done later as well, and an event must not wait for it.
            Err(error) if !error.is_outage() => {
                tracing::debug!(stream = %self.stream, %error, "could not forget dead consumers");
                round.sweeping = Sweeping::Idle(Instant::now() + REST);
                return Ok(Ok(()));
            }
            Err(error) => return Err(error),
        };
        self.lanes().own(own);
        round.owed &= !sweep.is_over();
        round.sweeping = if sweep.is_over() { Sweeping::Idle(Instant::now() + REST) } else { Sweeping::Going(sweep) };
        Ok(Ok(()))
    }
}

/// The id before this one.
fn before(id: EntryId) -> EntryId {
    match (id.millis, id.sequence) {
        (0, 0) => id,
        (millis, 0) => EntryId { millis: millis - 1, sequence: u64::MAX },
        (millis, sequence) => EntryId { millis, sequence: sequence - 1 },
    }
}
