//! Looks after the relay from outside: reads the backlog and the lag of consumer groups on connections of its own, notices when nothing gets
//! on, tells systemd.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use commitstream::config::Settings;
use commitstream::doctor::Verdict;
use commitstream::metrics::{ConsumerLags, set_backlog};
use commitstream::outbox::Backlog;
use commitstream::relay::{RelayState, RelayStatus};
use commitstream::streams::{GroupLag, Streams, StreamsError};
use metrics_exporter_prometheus::PrometheusHandle;
use sd_notify::NotifyState;
use sqlx::PgConnection;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Progress;
use crate::context;
use crate::flow;
use crate::names::StreamNames;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(5);
/// At most, where systemd does not wait for a sign of life.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A look takes one part in so many of the time at most, however long the backlog is.
const SHARE: u32 = 50;
/// Longest look; one that takes longer says nothing.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at the whole flow of events.
const VERDICT_EVERY: Duration = Duration::from_secs(30);
/// Streams whose consumer groups are looked at, the first by name.
const MOST_STREAMS: usize = 100;

/// Ends when it is dropped.
pub struct Monitor {
    progress: watch::Receiver<Progress>,
    verdict: watch::Receiver<Option<Verdict>>,
    _tasks: JoinSet<Infallible>,
}

impl Monitor {
    /// Starts it where somebody wants to know: with metrics, or under systemd.
    pub fn start(
        settings: &Settings,
        relay: watch::Receiver<RelayStatus>,
        metrics: Option<PrometheusHandle>,
    ) -> anyhow::Result<Option<Self>> {
        let has_supervisor = std::env::var_os("NOTIFY_SOCKET").is_some();
        if metrics.is_none() && !has_supervisor {
            return Ok(None);
        }
        // A relay that waits for a server is up: a restart would bring that server no sooner.
        tell(&[NotifyState::Ready]);
        let (sender, progress) = watch::channel(Progress::new(Instant::now()));
        let (say, verdict) = watch::channel(None);
        let mut tasks = JoinSet::new();
        if metrics.is_some() {
            tasks.spawn(watch_flow(settings.clone(), say));
            let streams = Streams::new(context::redis_url(settings)?, &settings.redis)?;
            tasks.spawn(watch_groups(streams, PAUSE.min(settings.http.stalled_after / 4)));
        }
        tasks.spawn(look_after(settings.clone(), relay, metrics, sender));
        Ok(Some(Self { progress, verdict, _tasks: tasks }))
    }

    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    pub fn verdict(&self) -> watch::Receiver<Option<Verdict>> {
        self.verdict.clone()
    }

    pub fn stopping(&self) {
        tell(&[NotifyState::Stopping]);
    }
}

async fn look_after(
    settings: Settings,
    relay: watch::Receiver<RelayStatus>,
    metrics: Option<PrometheusHandle>,
    progress: watch::Sender<Progress>,
) -> Infallible {
    let stalled_after = settings.http.stalled_after;
    // What was done is noticed in time, however long a look takes.
    let longest = sd_notify::watchdog_enabled().map_or(LONGEST_PAUSE, |limit| limit / 3).min(stalled_after / 3);
    let pause = PAUSE.min(stalled_after / 4).min(longest);
    let mut session = None;
    loop {
        let looked = Instant::now();
        let backlog = look(&settings, &relay, &mut session, pause.max(Duration::from_millis(500))).await;
        if let Some(backlog) = &backlog {
            set_backlog(backlog);
        }
        let status = relay.borrow().clone();
        // A restart does not help against rows that PostgreSQL does not let anybody settle.
        let is_active = status.state == RelayState::Active && status.unsettled.is_none();
        let done = status.published + status.refused + status.failed + status.republished;
        let due = backlog.is_some_and(|backlog| backlog.oldest_due.is_some());
        progress.send_modify(|progress| progress.observe(Instant::now(), is_active, done, due));
        if progress.borrow().stalled(Instant::now(), stalled_after).is_none() {
            tell(&[NotifyState::Watchdog, NotifyState::Status(status.state.name())]);
        }
        if let Some(metrics) = &metrics {
            metrics.run_upkeep();
        }
        sleep(pause.max((looked.elapsed() * SHARE).min(longest))).await;
    }
}

/// `None` when PostgreSQL does not say.
async fn look(
    settings: &Settings,
    relay: &watch::Receiver<RelayStatus>,
    session: &mut Option<PgConnection>,
    limit: Duration,
) -> Option<Backlog> {
    let relay_id = relay.borrow().relay_id;
    let read = async {
        let mut connection = match session.take() {
            Some(connection) => connection,
            None => context::own_session(settings, "relay: monitor").await?,
        };
        let backlog = context::repository(settings).backlog(&mut connection, relay_id).await?;
        *session = Some(connection);
        anyhow::Ok(backlog)
    };
    match timeout(limit.min(PATIENCE), read).await {
        Ok(Ok(backlog)) => Some(backlog),
        Ok(Err(error)) => {
            tracing::debug!("cannot read the backlog: {error:#}");
            None
        }
        Err(_) => {
            tracing::debug!("the backlog took too long to read");
            None
        }
    }
}

/// The daemon sees how far groups are behind also when no consumer is alive. While Redis does not answer, the last numbers stand.
async fn watch_groups(streams: Streams, pause: Duration) -> Infallible {
    let (mut lags, mut names) = (ConsumerLags::default(), StreamNames::default());
    loop {
        let looked = Instant::now();
        match timeout(PATIENCE, read_lags(&streams, &mut names)).await {
            Ok(Ok(found)) => lags.set(&found),
            Ok(Err(error)) => tracing::debug!("cannot look at consumer groups: {error}"),
            Err(_) => tracing::debug!("to look at consumer groups took too long"),
        }
        sleep(pause.max(looked.elapsed() * SHARE)).await;
    }
}

/// Says whether events flow. What cannot be asked within the time is not said.
async fn watch_flow(settings: Settings, verdict: watch::Sender<Option<Verdict>>) -> Infallible {
    loop {
        let looked = Instant::now();
        let look = async {
            let mut connection = context::own_migrated(&settings, "relay: verdict").await?;
            flow::verdict(&settings, &context::repository(&settings), &mut connection).await
        };
        match timeout(2 * PATIENCE, look).await {
            Ok(Ok(found)) => verdict.send_modify(|verdict| *verdict = Some(found)),
            Ok(Err(error)) => {
                tracing::debug!("cannot tell whether events flow: {error:#}");
                verdict.send_modify(|verdict| *verdict = None);
            }
            Err(_) => verdict.send_modify(|verdict| *verdict = None),
        }
        sleep(VERDICT_EVERY.max(looked.elapsed() * SHARE)).await;
    }
}

async fn read_lags(streams: &Streams, names: &mut StreamNames) -> Result<Vec<GroupLag>, StreamsError> {
    let mut lags = Vec::new();
    for stream in names.list(streams, MOST_STREAMS).await? {
        lags.extend(streams.lags(stream).await?);
    }
    Ok(lags)
}

/// Does nothing where systemd has not started us.
fn tell(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("cannot notify systemd: {error}");
    }
}
