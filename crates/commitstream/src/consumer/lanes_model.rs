//! Random offers, handlers and failures: each entry is handed out in the order of its aggregate, never two of one aggregate at once, and none
//! is forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::value::RawValue;

use super::lanes::*;
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Offer {
        aggregate: u8,
        /// Its payload is not there: it was found after a lost answer.
        unread: bool,
        careful: bool,
    },
    Take,
    /// The oldest work ends so.
    End(Ending),
    Wake,
    Report {
        heard: bool,
    },
}

#[derive(Debug, Clone, Copy)]
enum Ending {
    Done,
    Wait,
    Again,
    Gone,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6_u8, prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(aggregate, unread, careful)| Step::Offer { aggregate, unread, careful }),
        4 => Just(Step::Take),
        1 => Just(Step::End(Ending::Wait)),
        1 => Just(Step::End(Ending::Again)),
        1 => Just(Step::End(Ending::Gone)),
        4 => Just(Step::End(Ending::Done)),
        2 => Just(Step::Wake),
        1 => any::<bool>().prop_map(|heard| Step::Report { heard }),
    ]
}

fn event() -> What {
    let envelope = EventEnvelope {
        id: Uuid::nil(),
        event_type: "Happened".into(),
        aggregate_type: "user".into(),
        aggregate_id: "1".into(),
        occurred_at: chrono::DateTime::UNIX_EPOCH,
        payload: RawValue::from_string("{}".into()).unwrap(),
        headers: serde_json::Map::new(),
    };
    What::Handle(0, Arc::new(envelope))
}

fn item(id: u64) -> Item {
    let id = crate::streams::EntryId { millis: id, sequence: 0 };
    Item { id, what: event(), history: String::new(), failures: 0, deliveries: 1, alone: false, suspect: false, careful: false }
}

#[derive(Default)]
struct Model {
    lanes: Lanes,
    next: u64,
    aggregate_of: BTreeMap<u64, String>,
    /// Not over yet, by aggregate.
    open: BTreeMap<String, BTreeSet<u64>>,
    works: Vec<Work>,
    busy: BTreeSet<String>,
    reported: BTreeSet<u64>,
    done: BTreeSet<u64>,
}

impl Model {
    fn step(&mut self, step: &Step, most: usize) {
        match step {
            Step::Offer { aggregate, unread, careful } => {
                self.next += 1;
                let what = if *unread { What::Unread } else { event() };
                let aggregate = format!("a{aggregate}");
                self.lanes.offer(&aggregate, Item { what, careful: *careful, ..item(self.next) });
                self.aggregate_of.insert(self.next, aggregate.clone());
                self.open.entry(aggregate).or_default().insert(self.next);
            }
            Step::Take => {
                let Some(work) = self.lanes.take(|_| most) else { return };
                assert!(work.items().all(|item| matches!(item.what, What::Handle(..))), "an entry that was not read is handled");
                assert!(work.items().all(|item| item.careful == work.parts[0].1[0].careful), "not all are said to be at work");
                for (aggregate, items) in &work.parts {
                    assert!(self.busy.insert(aggregate.to_string()), "{aggregate} is at work twice");
                    let taken: Vec<u64> = items.iter().map(|item| item.id.millis).collect();
                    let first: Vec<u64> = self.open[&**aggregate].iter().copied().take(taken.len()).collect();
                    assert_eq!(taken, first, "out of order");
                }
                self.works.push(work);
            }
            Step::End(ending) => {
                if !self.works.is_empty() {
                    let work = self.works.remove(0);
                    work.parts.into_iter().for_each(|(aggregate, items)| self.end(&aggregate, items, *ending));
                }
            }
            Step::Wake => {
                self.lanes.wake(tokio::time::Instant::now() + Duration::from_secs(1_000));
                while let Some((aggregate, ids)) = self.lanes.next_unread(3) {
                    self.lanes.read(&aggregate, ids.iter().map(|_| event()).collect());
                }
            }
            Step::Report { heard } => {
                let (done, idle) = self.lanes.report(5);
                for aggregate in &idle {
                    let open = self.open.get(&**aggregate).is_none_or(BTreeSet::is_empty);
                    assert!(open, "{aggregate} is given back with something in hand");
                }
                if *heard {
                    self.lanes.heard(&done);
                    self.reported.extend(done.iter().map(|id| id.millis));
                } else {
                    self.lanes.report_again(done, idle);
                }
            }
        }
    }

    fn end(&mut self, aggregate: &Arc<str>, items: Vec<Item>, ending: Ending) {
        self.busy.remove(&**aggregate);
        let taken = sizes(&items);
        let ids = items.iter().map(|item| item.id);
        let mut outcome = Outcome::default();
        match ending {
            Ending::Done => {
                self.done.extend(ids.clone().map(|id| id.millis));
                outcome.done.extend(ids);
            }
            Ending::Gone => outcome.gone.extend(ids),
            Ending::Again => outcome.back.clone_from(&items),
            Ending::Wait => {
                outcome.back.clone_from(&items);
                outcome.wait = Some(tokio::time::Instant::now());
            }
        }
        if matches!(ending, Ending::Done | Ending::Gone) {
            let open = self.open.get_mut(&**aggregate).unwrap();
            items.iter().for_each(|item| assert!(open.remove(&item.id.millis)));
        }
        self.lanes.settle(aggregate, &taken, outcome);
    }
}

proptest! {
    #[test]
    fn each_entry_is_handed_out_in_order_and_none_is_forgotten(steps in prop::collection::vec(step(), 1..200), most in 1_usize..5) {
        let mut model = Model::default();
        steps.iter().for_each(|step| model.step(step, most));
        for _ in 0..2_000 {
            model.step(&Step::Wake, most);
            model.step(&Step::Take, most);
            model.step(&Step::End(Ending::Done), most);
            model.step(&Step::Report { heard: true }, most);
        }
        prop_assert!(model.open.values().all(BTreeSet::is_empty), "{:?}", model.open);
        prop_assert_eq!(&model.reported, &model.done);
        prop_assert_eq!(model.lanes.in_hand(), (0, 0));
        prop_assert_eq!(model.lanes.room(10, 1 << 20), 10);
    }
}
