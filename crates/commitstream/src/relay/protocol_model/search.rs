//! Breadth-first search through all states that can be reached, so that the first violation found has the shortest trace.

use std::collections::{HashMap, VecDeque};
use std::fmt::{Debug, Display};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What went wrong, and the shortest way there.
#[derive(Debug)]
pub struct Violation {
    pub what: String,
    pub trace: String,
}

/// Visits every state once. States are remembered by 64 bits of hash: among a million, two that collide are a matter of one in tens of
/// millions. Returns how many there are.
pub fn search<S: Hash + Clone + Display, A: Debug>(
    start: S,
    steps: impl Fn(&S) -> Vec<(A, S)>,
    wrong: impl Fn(&S, &[(A, S)]) -> Option<String>,
) -> Result<usize, Violation> {
    let mut before = HashMap::from([(fingerprint(&start), None)]);
    let mut queue = VecDeque::from([start.clone()]);
    while let Some(state) = queue.pop_front() {
        let here = fingerprint(&state);
        let next = steps(&state);
        if let Some(what) = wrong(&state, &next) {
            return Err(Violation { what, trace: trace(start, here, &before, steps) });
        }
        for (_, state) in next {
            before.entry(fingerprint(&state)).or_insert_with(|| {
                queue.push_back(state);
                Some(here)
            });
        }
    }
    Ok(before.len())
}

fn trace<S: Hash + Display, A: Debug>(
    start: S,
    end: u64,
    before: &HashMap<u64, Option<u64>>,
    steps: impl Fn(&S) -> Vec<(A, S)>,
) -> String {
    let mut way: Vec<u64> = std::iter::successors(Some(end), |at| before[at]).collect();
    way.pop();
    let (mut state, mut text) = (start, String::new());
    while let Some(at) = way.pop() {
        let (step, next) = steps(&state).into_iter().find(|(_, next)| fingerprint(next) == at).unwrap();
        text += &format!("  {:<56} {next}\n", format!("{step:?}"));
        state = next;
    }
    text
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}
