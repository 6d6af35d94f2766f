//! How many faults of which kind there were, and what was found.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// Counts by kind.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<String, u64>>);

impl Tally {
    pub fn count(&self, kind: impl Into<String>) {
        *lock(&self.0).entry(kind.into()).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<String, u64> {
        lock(&self.0).clone()
    }

    pub fn total(&self) -> u64 {
        lock(&self.0).values().sum()
    }
}

/// One sentence each.
#[derive(Debug, Default)]
pub struct Findings(Mutex<Vec<String>>);

impl Findings {
    pub fn add(&self, finding: String) {
        lock(&self.0).push(finding);
    }

    pub fn all(&self) -> Vec<String> {
        lock(&self.0).clone()
    }
}

/// Every change is one call: a panic of another thread leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One fault of a table, by weight.
pub fn choose<F: Copy>(table: &[(u32, F)], dice: &mut StdRng) -> Result<F> {
    let (_, fault) = table.choose_weighted(dice, |(weight, _)| *weight).context("no faults to choose from")?;
    Ok(*fault)
}
