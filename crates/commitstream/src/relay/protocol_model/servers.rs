//! The statements of PostgreSQL and the scripts of Redis, as far as they matter here.

use super::state::{Batch, Marker, Rules, State, each, first, one};

/// The statement of the claim: the first unsent events of the relay's partitions that are not on its own way.
pub fn claim(state: &State, relay: u8, epoch: u8, partitions: u8, open: u32, rules: Rules, most: u32) -> Option<(State, u8)> {
    let held = state.owned(relay, rules.epoch.then_some(epoch));
    if rules.owner && held.count_ones() != partitions.count_ones() {
        return None;
    }
    let on_its_way = each(open).filter(|b| state.batch(*b).settled.is_none()).fold(0, |set, b| set | state.batch(b).events);
    let all = u8::try_from((1_u32 << state.events.len()) - 1).unwrap();
    let unsent = state.of_partitions(all & !state.published & !on_its_way, partitions);
    let events = first(unsent, u8::try_from(most).unwrap());
    let batch = Batch { relay, epoch, events, settled: None, lost: 0 };
    let mut next = state.clone();
    next.journal.push(batch);
    (events != 0).then_some((next, events))
}

/// The script of the append.
pub fn append(state: &mut State, batch: u8, behind: u32, count: u8, rules: Rules) -> Option<Marker> {
    if let Some(marker) = state.marker(batch).filter(|_| rules.marker) {
        return Some(marker);
    }
    if rules.predecessors && each(behind).any(|before| !is_there(state, before, rules)) {
        return None;
    }
    state.redis.push((batch, Marker::Appended(count)));
    Some(Marker::Appended(count))
}

/// The script of recovery: how many events of the batch are in the stream.
pub fn resolve(state: &mut State, batch: u8, rules: Rules) -> u8 {
    match state.marker(batch) {
        Some(Marker::Appended(count)) => return count,
        None if rules.abort => state.redis.push((batch, Marker::Aborted)),
        _ => {}
    }
    0
}

/// The statement of the settle. False when some were settled already.
pub fn settle(state: &mut State, batches: &[(u8, u8)]) -> bool {
    let mut all = true;
    for (batch, count) in batches {
        let row = &mut state.journal[usize::from(*batch)];
        all &= row.settled.is_none();
        if row.settled.is_none() {
            row.settled = Some(*count);
            state.published |= first(row.events, *count);
        }
    }
    all
}

/// A batch that was appended is looked for.
pub fn is_there(state: &State, batch: u8, rules: Rules) -> bool {
    state.marker(batch).is_some_and(|marker| !rules.aborted_is_lost || marker != Marker::Aborted)
}

/// The statement that makes lost events unsent again.
pub fn publish_again(state: &mut State, batch: u8, partitions: u8, rules: Rules) {
    let Batch { events, settled, lost, .. } = state.batch(batch);
    let again = state.partitions_of(events) & partitions & !lost;
    if again != 0 {
        state.journal[usize::from(batch)].lost |= again;
        let whose = if rules.once { again } else { partitions };
        state.published &= !state.of_partitions(first(events, settled.unwrap_or(0)), whose);
    }
}

/// By number.
pub fn batches(state: &State) -> impl DoubleEndedIterator<Item = u8> + use<> {
    0..u8::try_from(state.journal.len()).unwrap()
}

/// Was settled as appended, and not all of these partitions' events in it were published again.
pub fn is_recent(state: &State, batch: u8, partitions: u8) -> bool {
    let Batch { events, settled, lost, .. } = state.batch(batch);
    settled.is_some_and(|count| count > 0) && state.partitions_of(events) & partitions & !lost != 0
}

/// The last appended batch of each relay and epoch.
pub fn last_batches(state: &State, partitions: u8) -> u32 {
    let of = |b: u8| (state.batch(b).relay, state.batch(b).epoch);
    let recent: Vec<u8> = batches(state).filter(|b| is_recent(state, *b, partitions)).collect();
    let is_last = |at: usize| !recent[at + 1..].iter().any(|later| of(*later) == of(recent[at]));
    (0..recent.len()).filter(|at| is_last(*at)).fold(0, |set, at| set | one(recent[at]))
}
