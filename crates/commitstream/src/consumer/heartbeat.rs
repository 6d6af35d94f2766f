//! Says for the members of a consumer that they live, from a thread of its own: handlers may hold every other thread of the process, and a
//! slow consumer is no dead one. Handlers that do so are named, and the time of a stop is kept here.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::pulse::Pulse;
use crate::streams::{Member, Streams};

/// Longest time between two heartbeats.
const LONGEST_BEAT: Duration = Duration::from_secs(1);
/// How often handlers are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How often the end of the last member is looked for, once its consumer has ended.
const LAST_LOOK: Duration = Duration::from_millis(20);

/// Time between two heartbeats of a member with this life.
pub(super) fn beat(life: Duration) -> Duration {
    LONGEST_BEAT.min(life / 4)
}

/// The thread. When this is dropped it ends, as soon as none of its members has a handler at work.
#[derive(Debug)]
pub(super) struct Heartbeat {
    shared: Arc<Shared>,
    overdue: watch::Receiver<bool>,
    ended: watch::Receiver<()>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Where members are entered.
#[derive(Debug)]
pub(super) struct Shared {
    pulses: Mutex<Vec<Entered>>,
    news: Notify,
    phase: watch::Sender<Phase>,
}

#[derive(Debug)]
struct Entered {
    pulse: Weak<Pulse>,
    /// It has its task.
    beats: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Over after so long.
    Stopping(Duration),
    /// Nobody waits any more.
    Left,
}

impl Heartbeat {
    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system has no thread for it.
    pub fn start(streams: &Streams, life: Duration) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let phase = watch::Sender::new(Phase::Running);
        let shared = Arc::new(Shared { pulses: Mutex::default(), news: Notify::new(), phase });
        let (is_overdue, overdue) = watch::channel(false);
        let (is_ended, ended) = watch::channel(());
        let (of_thread, streams) = (Arc::clone(&shared), streams.for_heartbeats(life));
        let thread = thread::Builder::new().name("commitstream-heartbeat".to_owned());
        let thread = thread.spawn(move || {
            run(runtime, &of_thread, &streams, &is_overdue);
            drop(is_ended);
        })?;
        Ok(Self { shared, overdue, ended, thread: Some(thread) })
    }

    /// Whether a handler is still at work.
    pub fn has_members(&self) -> bool {
        !self.shared.living().is_empty()
    }

    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// From now on, [`overdue`](Self::overdue) comes after so long.
    pub fn stop_within(&self, limit: Duration) {
        self.shared.phase.send_replace(Phase::Stopping(limit));
    }

    pub async fn overdue(&self) {
        // An error means that the thread has ended; then nothing is overdue.
        if self.overdue.clone().wait_for(|overdue| *overdue).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until the thread has ended. No member may be left.
    pub async fn end(mut self) {
        self.shared.phase.send_replace(Phase::Left);
        while self.ended.changed().await.is_ok() {}
        if let Some(Err(_)) = self.thread.take().map(thread::JoinHandle::join) {
            tracing::error!("the thread of the heartbeat panicked; this is a defect of the consumer");
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.phase.send_replace(Phase::Left);
    }
}

impl Shared {
    /// From now on, this member is heard of.
    pub fn enter(&self, member: &Member, workers: u32) -> Arc<Pulse> {
        let pulse = Arc::new(Pulse::new(member.clone(), workers));
        self.lock().push(Entered { pulse: Arc::downgrade(&pulse), beats: false });
        self.news.notify_one();
        pulse
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entered>> {
        // Each call leaves it consistent.
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn living(&self) -> Vec<Arc<Pulse>> {
        let mut pulses = self.lock();
        pulses.retain(|entered| entered.pulse.strong_count() > 0);
        pulses.iter().filter_map(|entered| entered.pulse.upgrade()).filter(|pulse| !pulse.is_ended()).collect()
    }

    /// A task for each member, so that none waits for a server that another needs.
    async fn keep(&self, streams: &Streams) {
        let mut tasks = JoinSet::new();
        loop {
            for entered in self.lock().iter_mut().filter(|entered| !entered.beats) {
                entered.beats = true;
                tasks.spawn(heartbeats(entered.pulse.clone(), streams.clone()));
            }
            tokio::select! {
                () = self.news.notified() => {}
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "heartbeats of a member ended; this is a defect of the consumer");
                    }
                }
            }
        }
    }

    async fn look(&self) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.living().iter().for_each(|pulse| pulse.look());
        }
    }

    /// Ends when the consumer has been left and has no member any more.
    async fn until_left(&self, overdue: &watch::Sender<bool>) {
        let mut phase = self.phase.subscribe();
        let limit = phase.wait_for(|phase| *phase != Phase::Running).await.map(|phase| *phase);
        if let Ok(Phase::Stopping(limit)) = limit {
            tokio::select! {
                () = tokio::time::sleep(limit) => drop(overdue.send_replace(true)),
                _ = phase.wait_for(|phase| *phase == Phase::Left) => {}
            }
        }
        // The sender is in `self`.
        phase.wait_for(|phase| *phase == Phase::Left).await.map(drop).ok();
        while !self.living().is_empty() {
            tokio::time::sleep(LAST_LOOK).await;
        }
    }
}

fn run(runtime: Runtime, shared: &Shared, streams: &Streams, overdue: &watch::Sender<bool>) {
    runtime.block_on(async {
        tokio::select! {
            () = shared.until_left(overdue) => {}
            () = shared.keep(streams) => {}
            () = shared.look() => {}
        }
    });
    // The look-up of a name may hold a thread of it.
    runtime.shutdown_background();
}

async fn heartbeats(pulse: Weak<Pulse>, streams: Streams) {
    loop {
        let Some(living) = pulse.upgrade() else { return };
        if !living.beat(&streams).await {
            return;
        }
        let pause = beat(living.life());
        drop(living);
        tokio::time::sleep(pause).await;
    }
}
