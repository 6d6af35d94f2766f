//! Whether a member lives, as far as it can know itself, and what its handlers are at.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::event::EventEnvelope;
use crate::streams::{Member, Streams, TakenOver};

/// A handler that holds its thread for so long is named.
const HELD: Duration = Duration::from_secs(1);
/// Without one for so long, it is over.
const QUIET: Duration = Duration::from_secs(60);

/// The life of one member. Others take over when its deadline in Redis is past; this one knows an earlier time: each call moves the
/// deadline, and began before that. Both clocks only have to run alike.
#[derive(Debug)]
pub(super) struct Pulse {
    member: Member,
    origin: Instant,
    /// When the last call that Redis answered had begun, in milliseconds since `origin`.
    heard: AtomicU64,
    joined: AtomicBool,
    /// It is no member any more.
    gone: AtomicBool,
    ended: Notify,
    workers: Box<[Worker]>,
    holding: Mutex<Option<Holding>>,
}

/// What one worker is at.
#[derive(Debug, Default)]
struct Worker {
    /// When its handler was called upon, in milliseconds since `origin`, and 1; 0 while it waits or there is none.
    since: AtomicU64,
    /// It was counted.
    counted: AtomicBool,
    call: Mutex<Option<Call>>,
}

/// A call of a handler.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub handler: &'static str,
    pub event: Arc<EventEnvelope>,
    pub events: usize,
}

/// A time in which handlers held their threads.
#[derive(Debug)]
struct Holding {
    last: Instant,
    calls: u64,
}

impl Pulse {
    pub fn new(member: Member, workers: u32) -> Self {
        Self {
            member,
            origin: Instant::now(),
            heard: AtomicU64::new(0),
            joined: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            ended: Notify::new(),
            workers: (0..workers).map(|_| Worker::default()).collect(),
            holding: Mutex::default(),
        }
    }

    pub fn life(&self) -> Duration {
        self.member.life
    }

    /// Whether nobody else can have what is in flight here. Once it does not hold, it never does again: a heartbeat that gets through
    /// later would keep a member alive whose workers have let go of their events.
    pub fn is_alive(&self) -> bool {
        if self.is_ended() {
            return false;
        }
        if self.left() > Duration::ZERO {
            return true;
        }
        if self.joined.load(Ordering::Acquire) {
            self.end();
        }
        false
    }

    fn left(&self) -> Duration {
        let heard = Duration::from_millis(self.heard.load(Ordering::Acquire));
        (heard + self.member.life).saturating_sub(self.origin.elapsed())
    }

    /// It has become a member, by a call that began then.
    pub fn joined(&self, begun: Instant) {
        self.heard(begun);
        self.joined.store(true, Ordering::Release);
    }

    /// Redis has answered a call that moved the deadline and began then.
    pub fn heard(&self, begun: Instant) {
        self.heard.fetch_max(self.millis(begun), Ordering::AcqRel);
    }

    /// Whether Redis has answered a call that began later.
    pub fn is_heard_since(&self, begun: Instant) -> bool {
        self.heard.load(Ordering::Acquire) > self.millis(begun)
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.origin).as_millis()).unwrap_or(u64::MAX)
    }

    pub fn is_ended(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// It is no member any more: nothing more is said for it.
    pub fn end(&self) {
        self.gone.store(true, Ordering::Release);
        self.ended.notify_waiters();
    }

    /// Waits until [`is_alive`](Self::is_alive) no longer holds.
    pub async fn over(&self) {
        loop {
            let ended = self.ended.notified();
            if !self.is_alive() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(self.left()) => {}
                () = ended => {}
            }
        }
    }

    /// Sends a heartbeat. `false`: no more are to be sent.
    pub async fn beat(&self, streams: &Streams) -> bool {
        if self.is_ended() {
            return false;
        }
        if !self.joined.load(Ordering::Acquire) {
            return true;
        }
        let begun = Instant::now();
        match streams.heartbeat(&self.member).await {
            Ok(Ok(())) => self.heard(begun),
            Ok(Err(TakenOver)) => self.end(),
            Err(error) => tracing::debug!(stream = self.member.stream, %error, "no heartbeat"),
        }
        true
    }

    /// Calls a handler, and goes on with it only as long as the member lives. `None`: it does not, and others may be at it.
    pub async fn watch<T>(&self, worker: usize, call: Call, handling: impl Future<Output = T>) -> Option<T> {
        let worker = self.workers.get(worker)?;
        *worker.lock() = Some(call);
        let mut handling = std::pin::pin!(handling);
        let result = std::future::poll_fn(|context| {
            if !self.is_alive() {
                return Poll::Ready(None);
            }
            worker.since.store(self.millis(Instant::now()) + 1, Ordering::Release);
            let polled = handling.as_mut().poll(context);
            worker.since.store(0, Ordering::Release);
            polled.map(Some)
        });
        let result = result.await;
        *worker.lock() = None;
        result.filter(|_| self.is_alive())
    }

    /// Calls that have held their thread for long now, the longest first.
    pub fn holding(&self) -> Vec<(Duration, Call)> {
        let now = self.millis(Instant::now());
        let held = self.workers.iter().filter_map(|worker| {
            let since = worker.since.load(Ordering::Acquire).checked_sub(1)?;
            let held = Duration::from_millis(now.saturating_sub(since));
            (held >= HELD).then(|| worker.lock().clone().map(|call| (held, call)))?
        });
        let mut held: Vec<_> = held.collect();
        held.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
        held
    }

    /// Says once that handlers hold their threads, and once that they no longer do.
    pub fn look(&self) {
        let held = self.holding();
        let fresh = self.count();
        let mut holding = self.holding.lock().unwrap_or_else(PoisonError::into_inner);
        let Member { stream, group, .. } = &self.member;
        match (held.first(), holding.as_mut()) {
            (Some((time, call)), None) => {
                let Call { handler, event, events } = call;
                tracing::warn!(stream, group, handler, event_type = event.event_type, aggregate = event.aggregate_id, events,
                    threads = held.len(), for_at_least = ?time,
                    "a handler holds its thread: it does not yield; move blocking work to spawn_blocking");
                *holding = Some(Holding { last: Instant::now(), calls: fresh });
            }
            (Some(_), Some(known)) => {
                known.last = Instant::now();
                known.calls += fresh;
            }
            (None, Some(known)) if known.last.elapsed() > QUIET => {
                tracing::info!(stream, group, calls = known.calls, "handlers yield again");
                *holding = None;
            }
            (None, _) => {}
        }
    }

    /// Calls that hold their thread for long and were not counted before.
    fn count(&self) -> u64 {
        let now = self.millis(Instant::now());
        let mut fresh = 0;
        for worker in &self.workers {
            let since = worker.since.load(Ordering::Acquire);
            let is_held = since > 0 && now.saturating_sub(since - 1) >= u64::try_from(HELD.as_millis()).unwrap_or(u64::MAX);
            if is_held && !worker.counted.swap(true, Ordering::AcqRel) {
                fresh += 1;
            } else if !is_held {
                worker.counted.store(false, Ordering::Release);
            }
        }
        fresh
    }
}

impl Worker {
    fn lock(&self) -> MutexGuard<'_, Option<Call>> {
        // A panic of a handler was caught.
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_was_dead_for_a_moment_stays_dead() {
        let life = Duration::from_millis(20);
        let member = Member { stream: "s".into(), group: "g".into(), name: "m".into(), life };
        let pulse = Pulse::new(member, 1);
        pulse.joined(Instant::now());
        assert!(pulse.is_alive());
        std::thread::sleep(life + Duration::from_millis(1));
        assert!(!pulse.is_alive());
        pulse.heard(Instant::now());
        assert!(!pulse.is_alive() && pulse.is_ended(), "a heartbeat that got through too late");
    }
}
