//! What may happen next. Each step is one statement of PostgreSQL, one script or pipeline of Redis, or one loss; a server's answer is
//! taken in the same step, since whatever could come between (a crash, a failover) does the same just after it.

use super::servers::{self, append, batches, claim, is_recent, is_there, last_batches, publish_again, settle};
use super::state::{Lease, Marker, Message, Phase, Relay, Rules, State, each, one};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Take {
        relay: u8,
        partitions: u8,
    },
    Resolve {
        relay: u8,
        batch: u8,
    },
    SettleResolved {
        relay: u8,
        batch: u8,
    },
    LookUp {
        relay: u8,
        batch: u8,
    },
    PublishAgain {
        relay: u8,
        batches: u32,
    },
    Claim {
        relay: u8,
        events: u8,
    },
    Send {
        relay: u8,
        batch: u8,
    },
    Settle {
        relay: u8,
    },
    /// A heartbeat or a claim finds that the lease is not what the relay thinks.
    LeaseLost {
        relay: u8,
    },
    /// The pulse finds that Redis has lost the last batch.
    Pulse {
        relay: u8,
    },
    Arrive {
        message: Message,
    },
    // What may go wrong, each as often as `Faults` allows.
    TakeFromLiving {
        relay: u8,
        partitions: u8,
    },
    AnswerLost {
        message: Message,
    },
    Refused {
        message: Message,
        at: u8,
    },
    SendAgain {
        relay: u8,
        batch: u8,
    },
    Crash {
        relay: u8,
    },
    Failover {
        keeps: usize,
    },
}

impl Step {
    /// Need not happen.
    pub fn is_fault(&self) -> bool {
        use Step::{AnswerLost, Crash, Failover, Refused, SendAgain, TakeFromLiving};
        matches!(
            self,
            TakeFromLiving { .. } | AnswerLost { .. } | Refused { .. } | SendAgain { .. } | Crash { .. } | Failover { .. }
        )
    }
}

type Steps = Vec<(Step, State)>;

/// The rest of a step: the state before it, changed.
fn then(state: &State, change: impl FnOnce(&mut State)) -> State {
    let mut next = state.clone();
    change(&mut next);
    next
}

pub fn steps(state: &State, rules: Rules) -> Steps {
    let mut steps = Vec::new();
    for relay in 0..2 {
        take(state, relay, rules, &mut steps);
        work(state, relay, rules, &mut steps);
    }
    for (at, message) in state.network.iter().enumerate() {
        arrive(state, at, message, rules, &mut steps);
    }
    if state.faults.failovers > 0 {
        // Connections to the old server are gone, and what was on its way to it.
        steps.extend((0..state.redis.len()).map(|keeps| {
            let failover = |s: &mut State| {
                s.faults.failovers -= 1;
                s.redis.truncate(keeps);
                s.network.retain(|message| !matches!(message, Message::Append { .. }));
                for relay in 0..2 {
                    let is_lost = s.owned(relay, None) != s.relay(relay).partitions;
                    s.relay(relay).is_shut_out |= is_lost && rules.shut_out;
                }
            };
            (Step::Failover { keeps }, then(state, failover))
        }));
    }
    steps.iter_mut().for_each(|(_, next)| forget(next, rules));
    steps
}

/// Leaves out of the network what can no longer change anything when it arrives, so that states differ by what matters only.
fn forget(state: &mut State, rules: Rules) {
    let mut network = std::mem::take(&mut state.network);
    network.retain(|message| match message {
        Message::Append { relay, epoch, batch, .. } => {
            let sender = state.relay(*relay);
            (sender.epoch, sender.appending) == (*epoch, Some(*batch)) || !rules.marker || state.marker(*batch).is_none()
        }
        Message::Claim { relay, epoch, partitions, .. } => {
            !rules.owner || !rules.epoch || state.owned(*relay, Some(*epoch)) & partitions == *partitions
        }
        Message::Settle(batches) => batches.iter().any(|(batch, _)| state.batch(*batch).settled.is_none()),
    });
    state.network = network;
    if state.faults.failovers == 0 {
        // No write can be lost any more: only those of entries have an order.
        state.redis.sort_by_key(|(batch, marker)| if let Marker::Appended(1..) = marker { None } else { Some(*batch) });
    }
}

/// A relay that has nothing on its way may take what is its own, free, or a dead one's; by mistake, a living one's.
fn take(state: &State, relay: u8, rules: Rules, steps: &mut Steps) {
    let me = &state.relays[usize::from(relay)];
    let other = 1 - relay;
    let is_other_out = state.relays[usize::from(other)].phase == Phase::Out;
    let (own, others) = (state.owned(relay, None), state.owned(other, None));
    // Which of two equal relays is the first makes no difference.
    let is_second = relay == 1 && state.leases.iter().all(|lease| lease.epoch == 0);
    if is_second {
        return;
    }
    if !(me.phase == Phase::Out || me.phase == Phase::Active && me.open() == 0 && own == me.partitions) {
        return;
    }
    for wanted in 0..=state.all_partitions() & !own {
        let steals = wanted & others != 0 && !is_other_out;
        let is_change = wanted != 0 || me.phase == Phase::Out && own != 0;
        if wanted & own != 0 || !is_change || steals && state.faults.takeovers == 0 {
            continue;
        }
        let partitions = own | wanted;
        let taken = then(state, |s| {
            s.faults.takeovers -= u8::from(steals);
            let epoch = s.leases.iter().map(|lease| lease.epoch).max().unwrap_or(0) + 1;
            each(partitions.into()).for_each(|p| s.leases[usize::from(p)] = Lease { owner: Some(relay), epoch });
            let is_open = |b: &u8| s.batch(*b).settled.is_none() && s.partitions_of(s.batch(*b).events) & partitions != 0;
            let open = if rules.recovery { batches(s).filter(is_open).fold(0, |set, b| set | one(b)) } else { 0 };
            *s.relay(relay) = Relay { phase: Phase::Recovering { open, said: None }, epoch, partitions, ..Relay::default() };
            prepared(s, relay, rules);
        });
        let step = if steals { Step::TakeFromLiving { relay, partitions } } else { Step::Take { relay, partitions } };
        steps.push((step, taken));
    }
}

/// Goes on to the next phase once the last has nothing left.
fn prepared(state: &mut State, relay: u8, rules: Rules) {
    let partitions = state.relay(relay).partitions;
    if let Phase::Recovering { open: 0, .. } = state.relay(relay).phase {
        let left = if rules.look_up { last_batches(state, partitions) } else { 0 };
        state.relay(relay).phase = Phase::LookingUp { left, lost: 0 };
    }
    if let Phase::LookingUp { left: 0, lost: 0 } = state.relay(relay).phase {
        state.relay(relay).phase = Phase::Active;
    }
}

fn work(state: &State, relay: u8, rules: Rules, steps: &mut Steps) {
    let me = &state.relays[usize::from(relay)];
    let mut step = |step: Step, change: &dyn Fn(&mut State)| steps.push((step, then(state, change)));
    match &me.phase {
        Phase::Out => return,
        Phase::Recovering { open, said } => {
            let batch = each(*open).next().unwrap();
            match said {
                None => step(Step::Resolve { relay, batch }, &|s| resolve(s, relay, batch, rules)),
                Some(count) => step(Step::SettleResolved { relay, batch }, &|s| {
                    settle(s, &[(batch, *count)]);
                    s.relay(relay).phase = Phase::Recovering { open: open & !one(batch), said: None };
                    prepared(s, relay, rules);
                }),
            }
        }
        Phase::LookingUp { left, lost: 0 } => {
            let batch = each(*left).next().unwrap();
            step(Step::LookUp { relay, batch }, &|s| look_up(s, relay, batch, rules));
        }
        Phase::LookingUp { left, lost } => step(Step::PublishAgain { relay, batches: *lost }, &|s| {
            each(*lost).for_each(|batch| publish_again(s, batch, me.partitions, rules));
            s.relay(relay).phase = Phase::LookingUp { left: *left, lost: 0 };
            prepared(s, relay, rules);
        }),
        Phase::Active => active(state, relay, rules, steps),
    }
    if state.owned(relay, None) != me.partitions || state.owned(relay, Some(me.epoch)) != me.partitions {
        steps.extend(endings(state, relay).into_iter().map(|next| (Step::LeaseLost { relay }, next)));
    }
    if state.faults.crashes > 0 {
        let crashed = then(state, |s| s.faults.crashes -= 1);
        steps.extend(endings(&crashed, relay).into_iter().map(|next| (Step::Crash { relay }, next)));
    }
}

fn active(state: &State, relay: u8, rules: Rules, steps: &mut Steps) {
    let me = &state.relays[usize::from(relay)];
    let (partitions, epoch, open) = (me.partitions, me.epoch, me.open());
    for most in 1..=2 {
        let claimed = claim(state, relay, epoch, partitions, open, rules, most).filter(|(_, events)| events.count_ones() == most);
        if let Some((mut next, events)) = claimed.filter(|_| !me.held) {
            let batch = u8::try_from(next.journal.len() - 1).unwrap();
            next.relay(relay).queue |= one(batch);
            start(&mut next, relay);
            steps.push((Step::Claim { relay, events }, next));
        }
    }
    if let Some(batch) = me.appending {
        let is_it = |m: &Message| matches!(m, Message::Append { relay: r, epoch: e, batch: b, .. } if (*r, *e, *b) == (relay, epoch, batch));
        // Where nothing is on its way any more, sending again is no fault but what must happen.
        let is_answered = !state.network.iter().any(is_it);
        if is_answered && me.is_shut_out {
            steps.extend(endings(state, relay).into_iter().map(|next| (Step::LeaseLost { relay }, next)));
        } else if is_answered {
            steps.push((Step::Send { relay, batch }, then(state, |s| send(s, relay, batch))));
        } else if state.faults.resends > 0 && state.network.iter().filter(|m| is_it(m)).count() == 1 {
            let again = |s: &mut State| {
                s.faults.resends -= 1;
                send(s, relay, batch);
            };
            steps.push((Step::SendAgain { relay, batch }, then(state, again)));
        }
    } else if each(me.behind).any(|batch| !is_there(state, batch, rules)) {
        steps.extend(endings(state, relay).into_iter().map(|next| (Step::Pulse { relay }, next)));
    }
    if !me.ended.is_empty() {
        let mut settled = then(state, |s| {
            s.relay(relay).ended.clear();
            s.relay(relay).held &= s.relay(relay).queue != 0 || s.relay(relay).appending.is_some();
        });
        // Fewer than all means that another relay has resolved some.
        if !settle(&mut settled, &me.ended) {
            *settled.relay(relay) = Relay::default();
        }
        steps.push((Step::Settle { relay }, settled));
    }
}

fn arrive(state: &State, at: usize, message: &Message, rules: Rules, steps: &mut Steps) {
    let mut arrived = then(state, |s| drop(s.network.remove(at)));
    let step = Step::Arrive { message: message.clone() };
    match message {
        Message::Settle(batches) => {
            settle(&mut arrived, batches);
            steps.push((step, arrived));
        }
        Message::Claim { relay, epoch, partitions, open } => {
            let claimed = claim(&arrived, *relay, *epoch, *partitions, *open, rules, 1);
            steps.push((step, claimed.map_or(arrived, |(next, _)| next)));
        }
        Message::Append { relay, epoch, batch, behind } => {
            let events = u8::try_from(state.batch(*batch).events.count_ones()).unwrap();
            let mut append = |step: Step, mut next: State, count: u8, is_heard: bool| {
                let outcome = append(&mut next, *batch, *behind, count, rules);
                let me = &next.relays[usize::from(*relay)];
                let is_waiting = me.epoch == *epoch && me.appending == Some(*batch);
                let heard = if is_heard && is_waiting { hear(next, *relay, *batch, outcome) } else { vec![next] };
                steps.extend(heard.into_iter().map(|next| (step.clone(), next)));
            };
            append(step, arrived.clone(), events, true);
            if state.faults.refusals > 0 {
                for at in 0..events {
                    let refused = then(&arrived, |s| s.faults.refusals -= 1);
                    append(Step::Refused { message: message.clone(), at }, refused, at, true);
                }
            }
            if state.faults.resends > 0 {
                let lost = then(&arrived, |s| s.faults.resends -= 1);
                append(Step::AnswerLost { message: message.clone() }, lost, events, false);
            }
        }
    }
}

/// What the relay makes of the answer to its append. `None` is that Redis has lost a batch before it.
fn hear(mut state: State, relay: u8, batch: u8, outcome: Option<Marker>) -> Vec<State> {
    let Some(Marker::Appended(count)) = outcome else { return endings(&state, relay) };
    let is_short = u32::from(count) < state.batch(batch).events.count_ones();
    let me = state.relay(relay);
    me.appending = None;
    me.ended.push((batch, count));
    if count > 0 {
        me.behind = one(batch);
    }
    if is_short {
        me.held = true;
        me.ended.extend(each(std::mem::take(&mut me.queue)).map(|later| (later, 0)));
    }
    start(&mut state, relay);
    vec![state]
}

/// The session ends. A claim or a settle of it may go on.
fn endings(state: &State, relay: u8) -> Vec<State> {
    let me = &state.relays[usize::from(relay)];
    let mut left = vec![None];
    if state.faults.lates > 0 && me.phase == Phase::Active {
        if !me.ended.is_empty() {
            left.push(Some(Message::Settle(me.ended.clone())));
        }
        if !me.held {
            left.push(Some(Message::Claim { relay, epoch: me.epoch, partitions: me.partitions, open: me.open() }));
        }
    }
    let end = |message: Option<Message>| {
        then(state, |s| {
            *s.relay(relay) = Relay::default();
            s.faults.lates -= u8::from(message.is_some());
            message.into_iter().for_each(|message| post(s, message));
        })
    };
    left.into_iter().map(end).collect()
}

fn post(state: &mut State, message: Message) {
    state.network.push(message);
    state.network.sort();
}

/// Sends the next batch if none is on its way.
fn start(state: &mut State, relay: u8) {
    let me = state.relay(relay);
    if let (None, Some(batch)) = (me.appending, each(me.queue).next()) {
        me.queue &= !one(batch);
        me.appending = Some(batch);
        if !me.is_shut_out {
            send(state, relay, batch);
        }
    }
}

fn send(state: &mut State, relay: u8, batch: u8) {
    let Relay { epoch, behind, .. } = *state.relay(relay);
    post(state, Message::Append { relay, epoch, batch, behind });
}

fn resolve(state: &mut State, relay: u8, batch: u8, rules: Rules) {
    let count = servers::resolve(state, batch, rules);
    if let Phase::Recovering { said, .. } = &mut state.relay(relay).phase {
        *said = Some(count);
    }
}

/// Finds the last batch of this sequence that is there. Those after it are gone; the next append stands behind it.
fn look_up(state: &mut State, relay: u8, batch: u8, rules: Rules) {
    let partitions = state.relay(relay).partitions;
    let of = |b: u8| (state.batch(b).relay, state.batch(b).epoch);
    let sequence = batches(state).rev().filter(|b| *b <= batch && of(*b) == of(batch) && is_recent(state, *b, partitions));
    let (mut gone, mut behind) = (0, 0);
    for b in sequence {
        if is_there(state, b, rules) {
            behind = one(b);
            break;
        }
        gone |= one(b);
    }
    if gone == 0 || rules.behind_rest {
        state.relay(relay).behind |= behind;
    }
    if let Phase::LookingUp { left, lost } = &mut state.relay(relay).phase {
        *left &= !one(batch);
        *lost = gone;
    }
    prepared(state, relay, rules);
}
