//! A relay among relays: its heartbeat, and the partitions that it has. Everything here runs on one connection, whose session is the
//! relay's sign of life: when the process dies the session is gone, and the others see that with their next heartbeat.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::assignment::{self, Plan};
use super::markers::Markers;
use super::probe::probe;
use super::session::{SessionError, bounded};
use super::status::{RelayState, Reporter};
use crate::config::Settings;
use crate::outbox::{Heartbeat, Lease, Members, OutboxError, OutboxRepository, Partitions};

/// How often a relay looks after the others, at least. What a killed relay had is taken over within this and one round trip.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often one that is alone says that it is alive: there is nobody to take over from, and whoever joins says so.
const LOOK_ALONE_EVERY: Duration = Duration::from_secs(2);
/// The rate is that of the last so many seconds.
const RATE_OVER: Duration = Duration::from_secs(10);

pub(super) struct Membership {
    outbox: OutboxRepository,
    settings: Arc<Settings>,
    reporter: Reporter,
    markers: Markers,
    connection: PgConnection,
    /// Somebody came, left or gave partitions back.
    news: Arc<Notify>,
    lease: Lease,
    /// The table whose inserts are heard of, if that is known.
    table: Option<i64>,
    /// Nobody else was there at the last look.
    alone: bool,
    /// An operator wanted nothing to be claimed at the last look.
    is_paused: bool,
    /// Since when the relay cannot work.
    unable_since: Option<Instant>,
    counts: VecDeque<(Instant, u64)>,
}

impl Membership {
    pub fn new(
        outbox: OutboxRepository,
        settings: Arc<Settings>,
        reporter: Reporter,
        markers: Markers,
        connection: PgConnection,
        news: Arc<Notify>,
    ) -> Self {
        let lease = Lease { relay_id: reporter.status().relay_id, epoch: 0, partitions: Partitions::default() };
        Self {
            outbox,
            settings,
            reporter,
            markers,
            connection,
            news,
            lease,
            table: None,
            alone: false,
            is_paused: false,
            unable_since: None,
            counts: VecDeque::new(),
        }
    }

    /// From now on, another table in the place of this one ends the session: its inserts would not be heard of.
    pub fn watch_table(&mut self, table: i64) {
        self.table = Some(table);
    }

    /// What the relay may claim now.
    pub fn lease(&self) -> Lease {
        self.lease
    }

    /// Whether nothing may be claimed, as an operator has it.
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Puts the relay on the list without a claim to partitions: nobody leaves any to it.
    pub async fn announce(&mut self) -> Result<(), OutboxError> {
        let members = self.beat(false).await?;
        // What an earlier session of this relay had is for others, until this one can work.
        let mine = assignment::owned(self.lease.relay_id, &members);
        if !mine.is_empty() && !members.others.is_empty() {
            self.give(mine).await?;
        }
        Ok(())
    }

    /// Joins: takes what is free of the relay's share, and all that an earlier session of it has left, under a new epoch.
    pub async fn join(&mut self) -> Result<(), OutboxError> {
        let members = self.beat(true).await?;
        bounded("forgetting dead relays", self.timeout(), self.outbox.forget_relays(&mut self.connection)).await?;
        self.take(&assignment::plan(self.lease.relay_id, &members)).await?;
        self.tell().await
    }

    /// Gives what is too much and takes what is free. Nothing of the relay's may be on its way.
    pub async fn rebalance(&mut self) -> Result<(), SessionError> {
        let plan = self.look().await?;
        if !plan.give.is_empty() {
            self.give(plan.give).await?;
        }
        if !plan.take.is_empty() {
            self.take(&plan).await?;
        }
        Ok(())
    }

    /// Sends heartbeats until something fails, and says so whenever there is something to give or to take, or a pause begins or ends.
    pub async fn keep(&mut self, change: &Notify) -> SessionError {
        let was_paused = self.is_paused;
        loop {
            self.wait().await;
            match self.look().await {
                Ok(plan) if plan.is_empty() && self.is_paused == was_paused => {}
                Ok(_) => change.notify_one(),
                Err(error) => return error,
            }
        }
    }

    /// Waits until it is time to look again.
    pub async fn wait(&self) {
        let every = if self.alone { LOOK_ALONE_EVERY } else { LOOK_EVERY };
        let interval = every.min(self.settings.outbox.processor.lease_duration / 4);
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = self.news.notified() => {}
        }
    }

    /// Takes the relay off the list and gives all it has back.
    pub async fn leave(&mut self) -> Result<(), OutboxError> {
        let began = Instant::now();
        let leave = self.outbox.leave(&mut self.connection, self.lease.relay_id);
        bounded("leaving the list of relays", self.settings.database.timeout, leave).await?;
        self.markers.on_disk(began);
        self.reporter.partitions(0);
        self.tell().await
    }

    /// One heartbeat: renews the relay's life, and compares what it has with what it should have.
    async fn look(&mut self) -> Result<Plan, SessionError> {
        let members = self.beat(true).await?;
        if assignment::owned(self.lease.relay_id, &members) != self.lease.partitions {
            return Err(SessionError::LeaseLost);
        }
        if members.others_able && self.is_unable_for_long() {
            return Err(SessionError::SteppedDown);
        }
        Ok(assignment::plan(self.lease.relay_id, &members))
    }

    async fn beat(&mut self, shares: bool) -> Result<Members, OutboxError> {
        let heartbeat = self.heartbeat(shares);
        // A heartbeat may have to wait for a disk or a lock; a session that is there answers this at once.
        probe(&mut self.connection).await?;
        let (limit, began) = (self.timeout(), Instant::now());
        let beat = self.outbox.beat(&mut self.connection, &heartbeat);
        let members = bounded("sending a heartbeat", limit, beat).await?;
        self.markers.on_disk(began);
        if self.table.is_some_and(|table| members.table != Some(table)) {
            return Err(OutboxError::Replaced);
        }
        self.alone = members.others.is_empty();
        self.is_paused = members.is_paused;
        Ok(members)
    }

    async fn give(&mut self, partitions: Partitions) -> Result<(), OutboxError> {
        let give = self.outbox.give_partitions(&mut self.connection, self.lease.relay_id, partitions);
        self.lease = bounded("giving partitions back", self.settings.database.timeout, give).await?;
        crash_window!("after-give");
        self.reporter.partitions(self.lease.partitions.len());
        self.tell().await
    }

    async fn take(&mut self, plan: &Plan) -> Result<(), OutboxError> {
        let take = self.outbox.take_partitions(&mut self.connection, self.lease.relay_id, &plan.take);
        self.lease = bounded("taking partitions", self.settings.database.timeout, take).await?;
        crash_window!("after-take");
        self.reporter.partitions(self.lease.partitions.len());
        Ok(())
    }

    /// Lets the other relays look at once.
    async fn tell(&mut self) -> Result<(), OutboxError> {
        let tell = self.outbox.tell_relays(&mut self.connection);
        bounded("telling the other relays", self.settings.database.timeout, tell).await
    }

    fn is_unable_for_long(&mut self) -> bool {
        if !matches!(self.reporter.status().state, RelayState::Unable { .. }) {
            self.unable_since = None;
            return false;
        }
        let since = *self.unable_since.get_or_insert_with(Instant::now);
        since.elapsed() > self.settings.outbox.processor.lease_duration
    }

    fn heartbeat(&mut self, shares: bool) -> Heartbeat {
        let status = self.reporter.status();
        let reason = self.reporter.reason();
        Heartbeat {
            relay_id: status.relay_id,
            host: whoami::hostname().unwrap_or_else(|_| "unknown".to_owned()),
            pid: i32::try_from(std::process::id()).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION"),
            life: self.settings.outbox.processor.lease_duration,
            shares,
            state: status.state.name(),
            reason,
            published: count(status.published),
            failed: count(status.failed),
            republished: count(status.republished),
            events_per_second: self.rate(status.published),
        }
    }

    fn rate(&mut self, published: u64) -> f32 {
        let now = Instant::now();
        self.counts.push_back((now, published));
        while self.counts.len() > 1 && self.counts.front().is_some_and(|(at, _)| now - *at > RATE_OVER) {
            self.counts.pop_front();
        }
        let Some((at, before)) = self.counts.front() else { return 0.0 };
        let seconds = (now - *at).as_secs_f32();
        if seconds > 0.0 { u32::try_from(published - before).map_or(f32::MAX, |events| events as f32) / seconds } else { 0.0 }
    }

    /// A heartbeat that takes longer than the relay's life is none.
    fn timeout(&self) -> Duration {
        self.settings.outbox.processor.lease_duration.min(self.settings.database.timeout)
    }
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
