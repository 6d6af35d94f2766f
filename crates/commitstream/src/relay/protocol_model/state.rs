//! What there is: the tables, Redis, the relays and what is on its way between them. Sets are bit sets: of events by `seq`, of batches by
//! number, of partitions.

use std::fmt::{Display, Formatter, Result};

/// Decides which steps are left out or mended; the protocol as it is has all of them.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// An append looks for its own marker first.
    pub marker: bool,
    /// A claim looks whether the relay is the owner.
    pub owner: bool,
    /// A claim looks whether it is of the last takeover.
    pub epoch: bool,
    /// Recovery writes `aborted` where there is no marker.
    pub abort: bool,
    /// An append looks for the batches before it.
    pub predecessors: bool,
    /// A new owner looks up what was settled.
    pub look_up: bool,
    /// A new owner resolves open batches before it claims.
    pub recovery: bool,
    /// Where a batch that was appended is looked for, a marker that says `aborted` means that it is lost.
    pub aborted_is_lost: bool,
    /// After a look-up that found some batches lost, the next append stands behind the last that was not.
    pub behind_rest: bool,
    /// Lost events are made unsent again once per partition.
    pub once: bool,
    /// A relay that was taken over sends nothing to a server of Redis that took over later. This is assumed, not enforced.
    pub shut_out: bool,
}

impl Rules {
    pub const PROTOCOL: Self = Self {
        marker: true,
        owner: true,
        epoch: true,
        abort: true,
        predecessors: true,
        look_up: true,
        recovery: true,
        aborted_is_lost: true,
        behind_rest: true,
        once: true,
        shut_out: true,
    };
}

/// How much may still go wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// A relay dies, at any time.
    pub crashes: u8,
    /// A relay takes partitions from a living one that it thinks dead.
    pub takeovers: u8,
    /// A session ends while its claim or settle is still running in PostgreSQL.
    pub lates: u8,
    /// An answer of Redis is lost, or comes too late, and the batch is sent again.
    pub resends: u8,
    /// Redis refuses an entry.
    pub refusals: u8,
    /// Another server of Redis takes over and lacks any number of the last writes.
    pub failovers: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Marker {
    Appended(u8),
    Aborted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Batch {
    pub relay: u8,
    pub epoch: u8,
    pub events: u8,
    pub settled: Option<u8>,
    /// Partitions whose events were made unsent again.
    pub lost: u8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Lease {
    pub owner: Option<u8>,
    pub epoch: u8,
}

/// On its way to a server; may arrive whenever, whatever has become of the sender.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    Append { relay: u8, epoch: u8, batch: u8, behind: u32 },
    Claim { relay: u8, epoch: u8, partitions: u8, open: u32 },
    Settle(Vec<(u8, u8)>),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Dead, or without a partition.
    #[default]
    Out,
    /// Has open batches to resolve; of the first, Redis may have said how many events of it are in the stream.
    Recovering {
        open: u32,
        said: Option<u8>,
    },
    /// Has batches to look up, and of those looked up, some to publish again.
    LookingUp {
        left: u32,
        lost: u32,
    },
    Active,
}

/// A session of a relay; all of it is lost when that ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Relay {
    pub phase: Phase,
    pub epoch: u8,
    pub partitions: u8,
    /// Batches that must be there before another one is appended.
    pub behind: u32,
    pub queue: u32,
    pub appending: Option<u8>,
    /// Batches to settle, with the number of events that were appended.
    pub ended: Vec<(u8, u8)>,
    /// A batch ended short: nothing is claimed until that is settled.
    pub held: bool,
    /// It was taken over, and Redis since.
    pub is_shut_out: bool,
}

impl Relay {
    pub fn open(&self) -> u32 {
        self.queue | self.appending.map_or(0, one) | self.ended.iter().map(|(batch, _)| one(*batch)).sum::<u32>()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// The partition of each event, one aggregate each.
    pub events: &'static [u8],
    pub published: u8,
    pub journal: Vec<Batch>,
    pub leases: Vec<Lease>,
    /// All writes that the server of Redis has, in order.
    pub redis: Vec<(u8, Marker)>,
    pub network: Vec<Message>,
    pub relays: [Relay; 2],
    pub faults: Faults,
}

impl State {
    pub fn new(events: &'static [u8], faults: Faults) -> Self {
        let partitions = usize::from(events.iter().max().map_or(0, |last| last + 1));
        Self {
            events,
            published: 0,
            journal: Vec::new(),
            leases: vec![Lease::default(); partitions],
            redis: Vec::new(),
            network: Vec::new(),
            relays: Default::default(),
            faults,
        }
    }

    pub fn relay(&mut self, relay: u8) -> &mut Relay {
        &mut self.relays[usize::from(relay)]
    }

    pub fn batch(&self, batch: u8) -> Batch {
        self.journal[usize::from(batch)]
    }

    pub fn all_partitions(&self) -> u8 {
        (1 << self.leases.len()) - 1
    }

    pub fn partitions_of(&self, events: u8) -> u8 {
        each(events.into()).fold(0, |set, event| set | 1 << self.events[usize::from(event)])
    }

    /// Those of the events that are of these partitions.
    pub fn of_partitions(&self, events: u8, partitions: u8) -> u8 {
        each(events.into()).filter(|event| partitions >> self.events[usize::from(*event)] & 1 == 1).fold(0, |set, e| set | 1 << e)
    }

    pub fn owned(&self, relay: u8, epoch: Option<u8>) -> u8 {
        let is_owned = |lease: &Lease| lease.owner == Some(relay) && epoch.is_none_or(|epoch| lease.epoch == epoch);
        (0..).zip(&self.leases).filter(|(_, lease)| is_owned(lease)).fold(0, |set, (at, _): (u8, _)| set | 1 << at)
    }

    pub fn marker(&self, batch: u8) -> Option<Marker> {
        self.redis.iter().rev().find(|(of, _)| *of == batch).map(|(_, marker)| *marker)
    }

    pub fn stream(&self) -> Vec<u8> {
        let written = self.redis.iter().map(|(batch, marker)| match marker {
            Marker::Appended(count) => first(self.batch(*batch).events, *count),
            Marker::Aborted => 0,
        });
        written.flat_map(|events| each(events.into())).collect()
    }

    /// What no state may be: an event twice in the stream, or behind a later one of its aggregate.
    pub fn disorder(&self) -> Option<String> {
        let stream = self.stream();
        let is_wrong = |(at, event): (usize, &u8)| {
            stream[..at]
                .iter()
                .any(|e| e == event || e > event && self.events[usize::from(*e)] == self.events[usize::from(*event)])
        };
        stream.iter().enumerate().any(|(at, event)| is_wrong((at, event))).then(|| format!("the stream is {stream:?}"))
    }

    /// What is missing at the end.
    pub fn missing(&self) -> Option<String> {
        let stream = self.stream().into_iter().fold(0, |set, event| set | 1 << event);
        let all = (1 << self.events.len()) - 1;
        if self.published != all || stream != all {
            return Some("nothing more happens, and not all events are published and in the stream".to_owned());
        }
        self.journal.iter().position(|b| b.settled.is_none()).map(|b| format!("nothing more happens, and B{b} is open"))
    }
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "stream {:?}", self.stream())?;
        for (number, batch) in self.journal.iter().enumerate() {
            let (events, settled) = (each(batch.events.into()).collect::<Vec<_>>(), batch.settled);
            write!(f, ", B{number} of {}@{} {events:?}", batch.relay, batch.epoch)?;
            settled.map_or(Ok(()), |count| write!(f, " settled {count}"))?;
            match self.marker(u8::try_from(number).unwrap()) {
                Some(Marker::Appended(count)) => write!(f, " marked {count}")?,
                Some(Marker::Aborted) => write!(f, " aborted")?,
                None => {}
            }
        }
        Ok(())
    }
}

pub fn one(batch: u8) -> u32 {
    1 << batch
}

/// The members of a set, in ascending order.
pub fn each(set: u32) -> impl DoubleEndedIterator<Item = u8> {
    (0..32).filter(move |at| set >> at & 1 == 1)
}

/// The first `count` of a set.
pub fn first(events: u8, count: u8) -> u8 {
    each(events.into()).take(count.into()).fold(0, |set, event| set | 1 << event)
}
