//! Who works on which partitions. Pure: every relay decides for itself from the same list, and because it only gives what it has too much
//! and takes what nobody alive has, they come to an even share without anybody in charge.

use uuid::Uuid;

use crate::outbox::{Members, PARTITIONS, Partitions};

/// What one relay should change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub give: Partitions,
    /// With the owner that each was seen with: whoever comes first gets it.
    pub take: Vec<(usize, Option<Uuid>)>,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.give.is_empty() && self.take.is_empty()
    }
}

/// The partitions of one relay.
pub fn owned(relay: Uuid, members: &Members) -> Partitions {
    let mine = members.owners.iter().enumerate().filter(|(_, owner)| **owner == Some(relay));
    mine.map(|(partition, _)| partition).collect()
}

/// What `me` has to change so that the living relays come to own the same number, give or take one. Those that own most get the one
/// more, so that no more moves than must. What is free is dealt out in one order that all relays compute alike.
pub fn plan(me: Uuid, members: &Members) -> Plan {
    let mut relays: Vec<(u32, Uuid)> =
        members.others.iter().chain([&me]).map(|relay| (owned(*relay, members).len(), *relay)).collect();
    relays.sort_by_key(|(count, relay)| (std::cmp::Reverse(*count), *relay));
    let lives = |owner: &Option<Uuid>| owner.is_some_and(|owner| relays.iter().any(|(_, relay)| *relay == owner));
    let mut free = members.owners.iter().enumerate().filter(|(_, owner)| !lives(owner)).map(|(at, owner)| (at, *owner));
    let (share, more) = (PARTITIONS / relays.len(), PARTITIONS % relays.len());
    let mut plan = Plan::default();
    for (rank, (count, relay)) in relays.iter().enumerate() {
        let count = usize::try_from(*count).unwrap_or(PARTITIONS);
        let quota = share + usize::from(rank < more);
        let dealt: Vec<_> = free.by_ref().take(quota.saturating_sub(count)).collect();
        if *relay == me {
            plan.give = owned(me, members).iter().skip(quota).collect();
            plan.take = dealt;
        }
    }
    plan
}

#[cfg(test)]
#[path = "assignment_model.rs"]
mod model;
