//! The audit: what stands in the streams, read back entry by entry, against what the service committed.

use std::collections::{HashMap, HashSet};

use commitstream::Lane;
use commitstream::streams::{Entry, Streams};
use serde::Deserialize;
use uuid::Uuid;

use super::events::lane_of;

/// Entries of one XRANGE.
const PAGE: usize = 5_000;
/// Findings that are named; the others are counted.
const NAMED: usize = 5;

/// What the service knows of its events.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Must be in the streams, once.
    pub committed: HashMap<Uuid, Lane>,
    /// Must not be there.
    pub rolled_back: HashSet<Uuid>,
    /// High-frequency events of calls that failed, as `aggregate type/aggregate` and number: may be there or not.
    pub in_doubt: HashSet<(String, i64)>,
}

/// One entry, as far as the audit looks at it.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where it stands, for people: stream and entry id.
    place: String,
    event: Option<Uuid>,
    lane: Lane,
    /// `aggregate type/aggregate`.
    aggregate: String,
    sequence: Option<i64>,
}

impl Found {
    fn new(entry: &Entry) -> Self {
        let field = |name| entry.field(name).unwrap_or_default();
        Self {
            place: format!("{} {}", entry.stream, entry.id),
            event: field("id").parse().ok(),
            lane: lane_of(field("type")).unwrap_or(Lane::Critical),
            aggregate: format!("{}/{}", field("aggregate_type"), field("aggregate_id")),
            sequence: sequence_of(field("payload")),
        }
    }
}

/// The number of an event within its aggregate and lane.
pub fn sequence_of(payload: &str) -> Option<i64> {
    #[derive(Deserialize)]
    struct Payload {
        sequence: i64,
    }
    serde_json::from_str::<Payload>(payload).ok().map(|payload| payload.sequence)
}

/// How many, and the first few by name.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Findings {
    pub count: u64,
    pub first: Vec<String>,
}

impl Findings {
    fn add(&mut self, name: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < NAMED {
            self.first.push(name());
        }
    }
}

/// What the audit found in one lane.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct LaneVerdict {
    /// Entries in the streams.
    pub entries: u64,
    pub lost: Findings,
    pub duplicated: Findings,
    pub out_of_order: Findings,
    /// In a stream, though its transaction rolled back or never was.
    pub invented: Findings,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub critical: LaneVerdict,
    pub high_frequency: LaneVerdict,
}

impl Verdict {
    pub fn lane(&mut self, lane: Lane) -> &mut LaneVerdict {
        match lane {
            Lane::Critical => &mut self.critical,
            Lane::HighFrequency => &mut self.high_frequency,
        }
    }

    /// Something was published, and all of it as promised.
    pub fn is_clean(&self) -> bool {
        let lanes = [&self.critical, &self.high_frequency];
        let faults = |lane: &LaneVerdict| lane.lost.count + lane.duplicated.count + lane.out_of_order.count + lane.invented.count;
        lanes.iter().any(|lane| lane.entries > 0) && lanes.iter().all(|lane| faults(lane) == 0)
    }
}

/// Compares entries, in the order of their streams, with the ledger.
pub struct Audit<'a> {
    ledger: &'a Ledger,
    seen: HashSet<Uuid>,
    /// Last number of each aggregate.
    last: HashMap<String, i64>,
    verdict: Verdict,
}

impl<'a> Audit<'a> {
    pub fn new(ledger: &'a Ledger) -> Self {
        Self { ledger, seen: HashSet::new(), last: HashMap::new(), verdict: Verdict::default() }
    }

    pub fn entry(&mut self, found: Found) {
        let verdict = self.verdict.lane(found.lane);
        verdict.entries += 1;
        let name = |event: Uuid| format!("{event} at {}", found.place);
        let Some(event) = found.event else { return verdict.invented.add(|| format!("no event id at {}", found.place)) };
        if !self.seen.insert(event) {
            return verdict.duplicated.add(|| name(event));
        }
        let Some(sequence) = found.sequence else { return verdict.invented.add(|| name(event)) };
        let in_doubt = || self.ledger.in_doubt.contains(&(found.aggregate.clone(), sequence));
        if self.ledger.rolled_back.contains(&event) || !(self.ledger.committed.contains_key(&event) || in_doubt()) {
            return verdict.invented.add(|| name(event));
        }
        // An aggregate has events of one lane only.
        let last = self.last.entry(found.aggregate.clone()).or_default();
        if sequence <= *last {
            verdict.out_of_order.add(|| format!("{} (number {sequence} after {last})", name(event)));
        }
        *last = sequence.max(*last);
    }

    pub fn finish(mut self) -> Verdict {
        for (event, lane) in &self.ledger.committed {
            if !self.seen.contains(event) {
                self.verdict.lane(*lane).lost.add(|| event.to_string());
            }
        }
        self.verdict
    }
}

/// Reads every entry of every stream under the prefix.
pub async fn read(streams: &Streams, ledger: &Ledger) -> anyhow::Result<Verdict> {
    let mut audit = Audit::new(ledger);
    for stream in streams.list().await? {
        let mut after = "0".to_owned();
        loop {
            let page = streams.range(&stream, &after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.id);
            page.iter().for_each(|entry| audit.entry(Found::new(entry)));
        }
    }
    Ok(audit.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);
    const C: Uuid = Uuid::from_u128(3);

    fn found(event: Uuid, sequence: i64) -> Found {
        let (place, aggregate) = ("events:user 1-0".to_owned(), "user/7".to_owned());
        Found { place, event: Some(event), lane: Lane::Critical, aggregate, sequence: Some(sequence) }
    }

    /// A and B are committed, C is rolled back.
    fn audit(entries: &[Found]) -> Verdict {
        let ledger = Ledger {
            committed: HashMap::from([(A, Lane::Critical), (B, Lane::Critical)]),
            rolled_back: HashSet::from([C]),
            in_doubt: HashSet::from([("metric/1".to_owned(), 9)]),
        };
        let mut audit = Audit::new(&ledger);
        entries.iter().cloned().for_each(|entry| audit.entry(entry));
        audit.finish()
    }

    fn counts(verdict: &Verdict) -> [u64; 4] {
        let lane = &verdict.critical;
        [lane.lost.count, lane.duplicated.count, lane.out_of_order.count, lane.invented.count]
    }

    #[test]
    fn all_once_and_in_order_is_clean() {
        let verdict = audit(&[found(A, 1), found(B, 2)]);
        assert_eq!((counts(&verdict), verdict.critical.entries, verdict.is_clean()), ([0; 4], 2, true));
    }

    #[test]
    fn nothing_at_all_is_not_clean() {
        assert!(!Audit::new(&Ledger::default()).finish().is_clean());
    }

    #[test]
    fn a_missing_event_is_lost() {
        let verdict = audit(&[found(A, 1)]);
        assert_eq!((counts(&verdict), verdict.is_clean()), ([1, 0, 0, 0], false));
        assert_eq!(verdict.critical.lost.first, [B.to_string()]);
    }

    #[test]
    fn a_second_entry_is_duplicated_and_not_out_of_order_too() {
        let verdict = audit(&[found(A, 1), found(B, 2), found(A, 1)]);
        assert_eq!((counts(&verdict), verdict.is_clean()), ([0, 1, 0, 0], false));
    }

    #[test]
    fn a_later_number_first_is_out_of_order() {
        let verdict = audit(&[found(B, 2), found(A, 1)]);
        assert_eq!((counts(&verdict), verdict.is_clean()), ([0, 0, 1, 0], false));
        assert_eq!(verdict.critical.out_of_order.first, [format!("{A} at events:user 1-0 (number 1 after 2)")]);
    }

    #[test]
    fn aggregates_do_not_wait_for_each_other() {
        let other = Found { aggregate: "user/8".to_owned(), ..found(A, 1) };
        assert_eq!(counts(&audit(&[found(B, 2), other])), [0; 4]);
    }

    #[test]
    fn an_event_of_a_rolled_back_transaction_is_invented() {
        assert_eq!(counts(&audit(&[found(A, 1), found(C, 2), found(B, 2)])), [0, 0, 0, 1]);
    }

    #[test]
    fn what_nobody_published_is_invented() {
        let unknown = found(Uuid::from_u128(9), 3);
        let nameless = Found { event: None, ..found(A, 1) };
        let numberless = Found { sequence: None, ..found(B, 2) };
        assert_eq!(counts(&audit(&[found(A, 1), unknown, nameless, numberless])), [0, 0, 0, 3]);
    }

    #[test]
    fn what_is_in_doubt_may_be_there_or_not() {
        let metric = Found { aggregate: "metric/1".to_owned(), lane: Lane::HighFrequency, ..found(Uuid::from_u128(9), 9) };
        assert!(audit(&[found(A, 1), found(B, 2), metric]).is_clean());
    }

    #[test]
    fn findings_are_counted_beyond_those_named() {
        let many: Vec<_> = (10..30).map(|n| found(Uuid::from_u128(n), 3)).collect();
        let invented = audit(&many).critical.invented;
        assert_eq!((invented.count, invented.first.len()), (20, NAMED));
    }
}
