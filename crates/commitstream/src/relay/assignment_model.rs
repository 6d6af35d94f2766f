//! Relays that come, go and look at different times: whatever happens, every partition soon has one living owner, shares are even, and
//! then nothing moves.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn id(relay: u8) -> Uuid {
    Uuid::from_u128(u128::from(relay) + 1)
}

/// As the table of leases has it.
fn apply(owners: &mut [Option<Uuid>], me: Uuid, plan: &Plan) -> usize {
    let mut moved = 0;
    for partition in plan.give.iter() {
        assert_eq!(owners[partition].replace(Uuid::nil()), Some(me), "a relay gives what is its own");
        owners[partition] = None;
        moved += 1;
    }
    for (partition, seen) in &plan.take {
        if owners[*partition] == *seen {
            owners[*partition] = Some(me);
            moved += 1;
        }
    }
    moved
}

fn members(me: Uuid, alive: &[Uuid], owners: &[Option<Uuid>]) -> Members {
    let others = alive.iter().copied().filter(|relay| *relay != me).collect();
    Members { others, others_able: true, owners: owners.to_vec(), is_paused: false, table: None }
}

/// Each looks once, one after the other, and does what it should. Returns how many partitions changed their owner.
fn round(alive: &[Uuid], owners: &mut [Option<Uuid>]) -> usize {
    let mut look = |me: &Uuid| {
        let plan = plan(*me, &members(*me, alive, owners));
        apply(owners, *me, &plan)
    };
    alive.iter().map(&mut look).sum()
}

fn counts(alive: &[Uuid], owners: &[Option<Uuid>]) -> Vec<usize> {
    alive.iter().map(|relay| owners.iter().filter(|owner| **owner == Some(*relay)).count()).collect()
}

proptest! {
    /// From any state, with relays that look one after the other in any order, some from an old list.
    #[test]
    fn shares_become_even_and_then_stay(
        start in prop::collection::vec(prop::option::of(0_u8..8), PARTITIONS),
        alive in prop::collection::btree_set(0_u8..8, 1..8),
        turns in prop::collection::vec((any::<Index>(), any::<bool>()), 0..40),
    ) {
        let alive: Vec<Uuid> = alive.into_iter().map(id).collect();
        let mut owners: Vec<Option<Uuid>> = start.into_iter().map(|owner| owner.map(id)).collect();
        let mut stale = owners.clone();
        for (who, sees_old_list) in turns {
            let me = *who.get(&alive);
            let mut seen = members(me, &alive, if sees_old_list { &stale } else { &owners });
            // What is its own a relay knows at first hand.
            for (at, owner) in seen.owners.iter_mut().enumerate() {
                if owners[at] == Some(me) || *owner == Some(me) {
                    *owner = owners[at];
                }
            }
            stale.clone_from(&owners);
            let plan = plan(me, &seen);
            apply(&mut owners, me, &plan);
        }
        // Two rounds: in the first, what is too much is given; in the second, all that is free is taken.
        for _ in 0..2 {
            round(&alive, &mut owners);
        }
        let shares = counts(&alive, &owners);
        prop_assert_eq!(shares.iter().sum::<usize>(), PARTITIONS);
        prop_assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{:?}", shares);
        for me in &alive {
            prop_assert!(plan(*me, &members(*me, &alive, &owners)).is_empty(), "{:?}", shares);
        }
    }

    /// A relay that joins gets its share and no partition moves between the others; one that dies leaves its own behind and no other moves.
    #[test]
    fn no_more_moves_than_must(relays in 1_u8..9, leaver in any::<Index>()) {
        let alive: Vec<Uuid> = (0..relays).map(id).collect();
        let mut owners = vec![None; PARTITIONS];
        round(&alive, &mut owners);
        let joined: Vec<Uuid> = (0..=relays).map(id).collect();
        let moved: usize = (0..4).map(|_| round(&joined, &mut owners)).sum();
        prop_assert_eq!(moved, 2 * (PARTITIONS / joined.len()), "given once and taken once");

        let dead = *leaver.get(&joined);
        let left: Vec<Uuid> = joined.into_iter().filter(|relay| *relay != dead).collect();
        let before = counts(&[dead], &owners)[0];
        prop_assert_eq!(round(&left, &mut owners), before);
    }

    /// Relays that look at the same moment never reach for the same partition.
    #[test]
    fn what_is_free_is_dealt_out_once(
        start in prop::collection::vec(prop::option::of(0_u8..8), PARTITIONS),
        alive in prop::collection::btree_set(0_u8..8, 1..8),
    ) {
        let alive: Vec<Uuid> = alive.into_iter().map(id).collect();
        let owners: Vec<Option<Uuid>> = start.into_iter().map(|owner| owner.map(id)).collect();
        let mut taken = Partitions::default();
        for me in &alive {
            for (partition, _) in plan(*me, &members(*me, &alive, &owners)).take {
                prop_assert!(!taken.contains(partition), "partition {} is taken twice", partition);
                taken.insert(partition);
            }
        }
    }
}
