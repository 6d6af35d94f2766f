//! What the producers know of their transactions.

use uuid::Uuid;

/// One transaction's events.
pub type Events = Vec<Uuid>;

#[derive(Debug, Default)]
pub struct Ledger {
    /// The commit was confirmed.
    pub committed: Vec<Events>,
    /// The commit was asked for, and no answer came.
    pub in_doubt: Vec<Events>,
    /// Rolled back on purpose, after its events had been published.
    pub rolled_back: Vec<Events>,
}

impl Ledger {
    pub fn add(&mut self, other: Self) {
        self.committed.extend(other.committed);
        self.in_doubt.extend(other.in_doubt);
        self.rolled_back.extend(other.rolled_back);
    }
}
