//! The figures of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::consumers::Effects;
use crate::history::Ledger;
use crate::judge::Judgement;
use crate::watch::Watched;
use crate::words::{age, count};

pub struct Report {
    pub took: Duration,
    pub ledger: Ledger,
    pub judgement: Judgement,
    pub effects: Effects,
    pub watched: Watched,
    pub longest_truce: Duration,
    /// Started, all in all.
    pub relays: u64,
    pub consumers: u64,
    /// After each kill, ascending.
    pub recoveries: Vec<Duration>,
    pub faults: BTreeMap<String, u64>,
    /// Entries that failovers lost, at least.
    pub redis_lost: u64,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.judgement.is_clean() && self.effects.is_clean()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: String| writeln!(f, "  {name:<40}{value:>12}");
        let Self { ledger, judgement, watched, recoveries, .. } = self;
        writeln!(f, "\nFaults:")?;
        for (kind, number) in &self.faults {
            row(f, kind, count(*number))?;
        }
        row(f, "all", count(self.faults.values().sum()))?;

        writeln!(f, "\nWhat went on for {}:", age(self.took))?;
        row(f, "events", count(judgement.events))?;
        row(f, "transactions", count(ledger.committed.len() as u64 + judgement.in_doubt_committed))?;
        row(f, "rolled back on purpose", count(ledger.rolled_back.len() as u64))?;
        row(f, "commits without an answer", count(ledger.in_doubt.len() as u64))?;
        row(f, "of these carried out", count(judgement.in_doubt_committed))?;
        row(f, "relays started", count(self.relays))?;
        row(f, "consumers started", count(self.consumers))?;
        row(f, "entries lost by Redis, at least", count(self.redis_lost))?;
        row(f, "events published again for that", count(judgement.republished))?;
        row(f, "longest without progress", age(watched.longest))?;
        row(f, "the same, all servers being there", age(watched.longest_without_outage))?;
        row(f, "longest truce to catch up", age(self.longest_truce))?;
        let recovery = |index: usize| recoveries.get(index).map_or_else(|| "-".to_owned(), |recovery| age(*recovery));
        row(f, "recovery after a kill, median", recovery(recoveries.len() / 2))?;
        row(f, "recovery after a kill, longest", recovery(recoveries.len().saturating_sub(1)))?;

        writeln!(f, "\nRead back from the streams, entry by entry:")?;
        row(f, "entries", count(judgement.entries))?;
        for (kind, events) in judgement.faulty.kinds() {
            row(f, kind, count(events.len() as u64))?;
        }
        writeln!(f, "\nWhat the consumers made of them:")?;
        for (kind, number) in self.effects.kinds() {
            row(f, kind, count(number))?;
        }
        for finding in &judgement.findings {
            writeln!(f, "  {finding}")?;
        }
        Ok(())
    }
}
