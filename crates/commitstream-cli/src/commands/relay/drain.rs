//! Waiting until the outbox is empty.

use std::time::{Duration, Instant};

use commitstream::config::Settings;
use commitstream::relay::{RelayState, RelayStatus};
use sqlx::PgConnection;
use tokio::sync::watch;

use crate::context;

/// Shortest pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// A look may read past many rows that were sent lately, so it takes one part in so many of the time at most.
const SHARE: u32 = 5;

/// What was found at the end.
pub struct Drained {
    pub took: Duration,
    /// Events that are FAILED in the outbox, whoever tried to publish them.
    pub failed: u64,
}

/// Waits until no event is pending or processing while a relay is at work, this one or others that share the outbox with it.
/// Outages are waited for; the relay reports them.
///
/// # Errors
/// Events wait, and relays are paused.
pub async fn wait(settings: &Settings, relay: watch::Receiver<RelayStatus>) -> anyhow::Result<Drained> {
    let started = Instant::now();
    let mut session = None;
    loop {
        let looked = Instant::now();
        let state = relay.borrow().state.clone();
        if matches!(state, RelayState::Active | RelayState::Standby | RelayState::Paused) {
            match look(settings, &mut session).await {
                Ok(Some(failed)) => return Ok(Drained { took: started.elapsed(), failed }),
                Ok(None) if state == RelayState::Paused => {
                    anyhow::bail!(
                        "events wait, and relays are paused: `commitstream relays resume` lets them go on; then run this again"
                    )
                }
                Ok(None) => {}
                Err(error) => tracing::debug!("cannot look at the outbox: {error:#}"),
            }
        }
        tokio::time::sleep(PAUSE.max(looked.elapsed() * SHARE)).await;
    }
}

/// The number of failed events, once nothing is unsent.
async fn look(settings: &Settings, session: &mut Option<PgConnection>) -> anyhow::Result<Option<u64>> {
    let mut connection = match session.take() {
        Some(connection) => connection,
        None => context::own_session(settings, "relay: until empty").await?,
    };
    let outbox = context::repository(settings);
    let failed = if outbox.has_unsent(&mut connection).await? {
        None
    } else {
        Some(u64::try_from(outbox.stats(&mut connection).await?.failed)?)
    };
    *session = Some(connection);
    Ok(failed)
}
