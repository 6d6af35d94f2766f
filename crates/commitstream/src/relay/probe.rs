//! Asks sessions that have nothing to do whether they are still there.
//!
//! A NAT, a load balancer or a host that vanishes can drop a connection without a word. Who only waits on it never learns of that, and
//! who uses it next waits for the longest time that a statement may take. So each idle session is asked in the rhythm of the heartbeat.

use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, timeout};

use super::engine::Connections;
use crate::outbox::OutboxError;

/// How often an idle session is asked.
pub(super) const PROBE_EVERY: Duration = Duration::from_secs(1);
/// The answer takes no lock, no disk and no snapshot: only the connection and the server's processor.
pub(super) const LONGEST_ANSWER: Duration = Duration::from_secs(2);

/// One message of the protocol and its answer; no statement, so statistics do not show it.
pub(super) async fn probe(connection: &mut PgConnection) -> Result<(), OutboxError> {
    let silent = |_| OutboxError::Silent { limit: LONGEST_ANSWER };
    let lost = |source| OutboxError::Unreachable { doing: "asking whether a session is alive", source };
    timeout(LONGEST_ANSWER, connection.ping()).await.map_err(silent)?.map_err(lost)
}

/// All sessions of an engine that does not run.
pub(super) async fn probe_all(connections: &mut Connections) -> Result<(), OutboxError> {
    let Connections { claims, settles, sleep, .. } = connections;
    let ((), (), ()) = tokio::try_join!(probe(claims), probe(settles), sleep.probe())?;
    Ok(())
}

/// The sessions of claims and of settles, where they are idle.
pub(super) type Idle = (Option<PgConnection>, Option<PgConnection>);

/// Asks what is idle of two sessions, and gives both back.
pub(super) async fn probe_idle((mut claims, mut settles): Idle) -> Result<Idle, OutboxError> {
    let ask = async |idle: &mut Option<PgConnection>| match idle {
        Some(connection) => probe(connection).await,
        None => Ok(()),
    };
    tokio::try_join!(ask(&mut claims), ask(&mut settles))?;
    Ok((claims, settles))
}

/// When the next question is due.
pub(super) fn next_probe() -> Instant {
    Instant::now() + PROBE_EVERY
}
