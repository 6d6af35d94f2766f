//! The load: tasks that call the example service at a steady pace.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Args;
use super::service::{Devices, Outcome, Service};
use super::watch::Note;

/// Transactions that one task carries out a second, about, when each waits for the disk.
const TRANSACTIONS_PER_TASK: u32 = 100;
const HIGH_FREQUENCY_TASKS: u32 = 4;
const DEVICES_PER_TASK: usize = 16;
/// Most events of one call, when a task has fallen behind its pace.
const MOST_PER_CALL: u32 = 200;
/// After a failure: the servers may be away.
const REST: Duration = Duration::from_millis(100);

/// How much is asked for, and of how many tasks.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seconds: u32,
    pub critical_rate: u32,
    pub high_frequency_rate: u32,
    critical_tasks: u32,
}

impl Plan {
    pub fn new(args: &Args) -> Self {
        let critical_rate = (args.rate / 4).max(1);
        let critical_tasks = (critical_rate / TRANSACTIONS_PER_TASK).clamp(8, 32);
        Self { seconds: args.seconds, critical_rate, high_frequency_rate: args.rate - critical_rate, critical_tasks }
    }

    /// Database sessions that the tasks need.
    pub fn connections(&self) -> u32 {
        self.critical_tasks + HIGH_FREQUENCY_TASKS
    }
}

/// Runs the plan, or the part of it until `stop`. Returns how long that took.
pub async fn run(
    plan: Plan,
    service: &Arc<Service>,
    notes: mpsc::Sender<Note>,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let until = start + Duration::from_secs(u64::from(plan.seconds));
    let mut tasks = JoinSet::new();
    for task in 0..plan.critical_tasks {
        let pace = Pace::new(start, until, plan.critical_rate, (task, plan.critical_tasks), stop.clone());
        tasks.spawn(transact(service.clone(), pace, notes.clone(), (task, plan.critical_tasks)));
    }
    for task in 0..HIGH_FREQUENCY_TASKS {
        let pace = Pace::new(start, until, plan.high_frequency_rate, (task, HIGH_FREQUENCY_TASKS), stop.clone());
        tasks.spawn(report(service.clone(), pace, notes.clone()));
    }
    drop(notes);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(start.elapsed())
}

/// Transaction after transaction. `share` is this task's number and how many tasks there are.
async fn transact(service: Arc<Service>, mut pace: Pace, notes: mpsc::Sender<Note>, share: (u32, u32)) -> anyhow::Result<()> {
    let mut turn = u64::from(share.0);
    while pace.due(1).await > 0 {
        let note = match service.transact(turn).await {
            Ok(Outcome::Committed { event, at }) => Note::Committed { event, at },
            Ok(Outcome::RolledBack { event }) => Note::RolledBack { event },
            Ok(Outcome::InDoubt { event, row }) => Note::InDoubt { event, row },
            Err(error) => Note::Failed { reason: reason(&error), in_doubt: Vec::new() },
        };
        turn += u64::from(share.1);
        if matches!(note, Note::Failed { .. } | Note::InDoubt { .. }) {
            tokio::time::sleep(REST).await;
        }
        if notes.send(note).await.is_err() {
            break; // the watcher has ended, and says why
        }
    }
    Ok(())
}

/// Sessions and metrics, straight to their streams.
async fn report(service: Arc<Service>, mut pace: Pace, notes: mpsc::Sender<Note>) -> anyhow::Result<()> {
    let mut connection = service.connection().await?;
    let mut devices = Devices::new(DEVICES_PER_TASK);
    loop {
        let due = pace.due(MOST_PER_CALL).await;
        if due == 0 {
            return Ok(());
        }
        let sent = devices.report(&service, &mut connection, usize::try_from(due)?).await;
        let note = match sent.result {
            Ok(events) => Note::Sent { events, at: sent.at },
            Err(error) => {
                tokio::time::sleep(REST).await;
                Note::Failed { reason: reason(&error), in_doubt: sent.in_doubt }
            }
        };
        if notes.send(note).await.is_err() {
            return Ok(());
        }
    }
}

/// The error and its causes, without repeating what is said already.
fn reason(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said {
        said if said.contains(&cause) => said,
        said if said.is_empty() => cause,
        said => format!("{said}: {cause}"),
    })
}

/// When the next operations of a task are due. A task that falls behind catches up.
struct Pace {
    next: Instant,
    every: Duration,
    until: Instant,
    stop: watch::Receiver<bool>,
}

impl Pace {
    /// `rate` is that of all tasks; they take turns.
    fn new(start: Instant, until: Instant, rate: u32, (task, tasks): (u32, u32), stop: watch::Receiver<bool>) -> Self {
        let apart = Duration::from_secs(1) / rate.max(1);
        Self { next: start + apart * task, every: apart * tasks, until, stop }
    }

    /// Waits until something is due. Returns how much, `most` at most, and 0 when it is over.
    async fn due(&mut self, most: u32) -> u32 {
        let wake = self.next.min(self.until);
        tokio::select! {
            () = tokio::time::sleep_until(wake) => {}
            // An error means that nobody is left to stop this.
            _ = self.stop.wait_for(|stop| *stop) => return 0,
        }
        let now = Instant::now();
        if now >= self.until || *self.stop.borrow() {
            return 0;
        }
        let behind = (now - self.next).as_nanos() / self.every.as_nanos().max(1) + 1;
        let due = u32::try_from(behind).unwrap_or(most).min(most);
        self.next += self.every * due;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pace that one task keeps alone for a second, and the sender that keeps its stop signal alive.
    fn pace(rate: u32) -> (Pace, watch::Sender<bool>) {
        let (stop, stopped) = watch::channel(false);
        let start = Instant::now();
        (Pace::new(start, start + Duration::from_secs(1), rate, (0, 1), stopped), stop)
    }

    #[tokio::test]
    async fn the_pace_is_kept_and_ends() {
        let (mut pace, _stop) = pace(100);
        let mut total = 0;
        loop {
            match pace.due(10).await {
                0 => break,
                due => total += due,
            }
        }
        assert!((50..=100).contains(&total), "{total}");
    }

    #[tokio::test]
    async fn a_task_that_fell_behind_catches_up_within_bounds() {
        let (mut pace, _stop) = pace(1_000);
        pace.next -= Duration::from_millis(500);
        assert_eq!(pace.due(200).await, 200);
        assert_eq!(pace.due(200).await, 200);
        assert!((100..=200).contains(&pace.due(200).await));
    }

    #[tokio::test]
    async fn it_stops_when_told() {
        let (mut pace, stop) = pace(1);
        assert_eq!(pace.due(1).await, 1);
        stop.send_replace(true);
        assert_eq!(pace.due(1).await, 0);
    }
}
