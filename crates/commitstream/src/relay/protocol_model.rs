//! A model of the batch protocol: every interleaving of two relays with their crashes, takeovers and late messages, and with a
//! failover of Redis, is explored for a few events. Nothing is timed and nothing is random.
//!
//! Left out: what a claim finds (the cursor's model), what a relay has in flight of several streams (the pipeline's model), markers that
//! expire, rows that are cleaned up or changed by hand, and retries that wait.

mod search;
mod servers;
mod state;
mod steps;

use search::{Violation, search};
use state::{Faults, Rules, State};

/// The partitions of events of one aggregate each.
const ONE_AGGREGATE: &[u8] = &[0, 0, 0];
const TWO_EVENTS: &[u8] = &[0, 0];
/// A batch may hold events of both, and each may get an owner of its own.
const TWO_AGGREGATES: &[u8] = &[0, 1];

const NONE: Faults = Faults { crashes: 0, takeovers: 0, lates: 0, resends: 0, refusals: 0, failovers: 0 };

/// In every state each event is in the stream once at most, and in order; where nothing more needs to happen, all are there and settled.
fn explore(events: &'static [u8], faults: Faults, rules: Rules) -> Result<usize, Violation> {
    let wrong = |state: &State, steps: &[(steps::Step, State)]| {
        let is_over = steps.iter().all(|(step, _)| step.is_fault());
        state.disorder().or_else(|| state.missing().filter(|_| is_over))
    };
    search(State::new(events, faults), |state| steps::steps(state, rules), wrong)
}

fn holds(events: &'static [u8], faults: Faults) {
    match explore(events, faults, Rules::PROTOCOL) {
        Ok(states) => println!("{states} states: {} events, {faults:?}", events.len()),
        Err(Violation { what, trace }) => panic!("{what}, with {faults:?}:\n{trace}"),
    }
}

/// A test of the model: without this rule it must find something.
fn fails(events: &'static [u8], faults: Faults, rules: Rules, expected: &str) {
    let Violation { what, trace } = explore(events, faults, rules).unwrap_err();
    println!("{what}, with {faults:?}:\n{trace}");
    assert!(what.contains(expected), "{what}");
}

#[test]
fn a_crash_and_a_takeover_and_what_arrives_late_do_no_harm() {
    holds(ONE_AGGREGATE, Faults { crashes: 1, takeovers: 1, lates: 1, resends: 1, ..NONE });
    holds(TWO_EVENTS, Faults { crashes: 1, takeovers: 1, resends: 1, refusals: 1, ..NONE });
}

#[test]
fn a_batch_of_two_partitions_is_resolved_by_two_new_owners() {
    holds(TWO_AGGREGATES, Faults { crashes: 1, takeovers: 1, resends: 1, ..NONE });
}

#[test]
fn what_a_failover_lost_is_published_again_before_anything_newer() {
    holds(ONE_AGGREGATE, Faults { crashes: 1, failovers: 1, ..NONE });
    holds(TWO_EVENTS, Faults { takeovers: 1, lates: 1, resends: 1, failovers: 1, ..NONE });
    holds(TWO_EVENTS, Faults { crashes: 1, lates: 1, resends: 1, failovers: 1, ..NONE });
    holds(TWO_EVENTS, Faults { crashes: 1, failovers: 2, ..NONE });
}

#[test]
fn what_a_failover_lost_of_two_partitions_is_published_again_by_each_owner() {
    holds(TWO_AGGREGATES, Faults { crashes: 1, failovers: 1, ..NONE });
    holds(TWO_AGGREGATES, Faults { takeovers: 1, failovers: 1, ..NONE });
}

#[test]
fn without_the_marker_a_batch_that_is_sent_again_is_appended_again() {
    fails(TWO_EVENTS, Faults { resends: 1, ..NONE }, Rules { marker: false, ..Rules::PROTOCOL }, "the stream is [0, 0]");
}

#[test]
fn without_the_lease_both_relays_claim_the_same_events() {
    fails(TWO_EVENTS, Faults { takeovers: 1, ..NONE }, Rules { owner: false, ..Rules::PROTOCOL }, "the stream is [0, 0]");
}

#[test]
fn without_the_epoch_a_late_claim_leaves_a_batch_open() {
    let faults = Faults { crashes: 1, lates: 1, ..NONE };
    fails(TWO_EVENTS, faults, Rules { epoch: false, ..Rules::PROTOCOL }, "is open");
}

#[test]
fn without_aborted_a_late_append_is_carried_out_after_its_batch_was_resolved() {
    fails(TWO_EVENTS, Faults { crashes: 1, ..NONE }, Rules { abort: false, ..Rules::PROTOCOL }, "the stream is [0, 0]");
}

#[test]
fn without_recovery_a_new_owner_sends_again_what_was_appended() {
    fails(TWO_EVENTS, Faults { crashes: 1, ..NONE }, Rules { recovery: false, ..Rules::PROTOCOL }, "the stream is [0, 0]");
}

#[test]
fn without_predecessors_newer_events_come_before_those_that_a_failover_lost() {
    fails(TWO_EVENTS, Faults { failovers: 1, ..NONE }, Rules { predecessors: false, ..Rules::PROTOCOL }, "not all events");
}

#[test]
fn without_a_look_up_events_that_a_failover_lost_stay_lost() {
    fails(TWO_EVENTS, Faults { failovers: 1, ..NONE }, Rules { look_up: false, ..Rules::PROTOCOL }, "not all events");
}

#[test]
fn where_aborted_counts_as_appended_a_failover_is_not_noticed() {
    let rules = Rules { aborted_is_lost: false, ..Rules::PROTOCOL };
    fails(TWO_EVENTS, Faults { crashes: 1, failovers: 1, ..NONE }, rules, "the stream is [1");
    fails(TWO_EVENTS, Faults { lates: 1, failovers: 1, ..NONE }, rules, "not all events");
}

#[test]
fn where_a_lost_batch_is_made_unsent_whole_its_second_owner_sends_again_what_the_first_did() {
    let faults = Faults { crashes: 1, failovers: 1, ..NONE };
    fails(TWO_AGGREGATES, faults, Rules { once: false, ..Rules::PROTOCOL }, "the stream is [0, 0]");
}

#[test]
fn where_the_next_batch_does_not_stand_behind_what_was_left_a_second_failover_is_not_noticed() {
    let faults = Faults { crashes: 1, failovers: 2, ..NONE };
    fails(TWO_EVENTS, faults, Rules { behind_rest: false, ..Rules::PROTOCOL }, "not all events");
}

/// Not a mutation but a limit: the failover has lost the `aborted` that would have stopped this relay.
#[test]
fn a_relay_that_was_taken_over_and_goes_on_sending_after_a_failover_sends_twice() {
    let faults = Faults { takeovers: 1, failovers: 1, ..NONE };
    fails(TWO_EVENTS, faults, Rules { shut_out: false, ..Rules::PROTOCOL }, "the stream is [0, 0]");
}
