//! Effects outside PostgreSQL: a note in Redis that one was begun, and that it is done.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::{Delivery, HandlerError};
use crate::streams::{Effect, Streams, StreamsError};

/// How long an effect is remembered: longer than any event may wait to be delivered again.
const REMEMBERED: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// What to do when an earlier delivery began the effect and nobody knows whether it happened: the process died, or lost Redis, in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenUnknown {
    /// Do it again: at least once.
    Repeat,
    /// Leave it: at most once. The event counts as handled.
    Skip,
    /// Give up: a dead letter, so that a person looks.
    GiveUp,
}

/// What is known of an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Nothing,
    Begun,
    Done,
}

/// Where effects are noted.
#[derive(Debug, Clone)]
pub(super) enum Effects {
    Redis(Streams),
    /// Of the test kit.
    Memory(Arc<Mutex<HashMap<(Uuid, String), Known>>>),
}

impl Effects {
    async fn begin(&self, delivery: &Delivery, name: &str) -> Result<Known, StreamsError> {
        match self {
            Self::Redis(streams) => streams.begin_effect(delivery.effect(name), REMEMBERED).await,
            Self::Memory(notes) => {
                let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
                let note = notes.entry((delivery.event_id(), name.to_owned())).or_insert(Known::Nothing);
                Ok(std::mem::replace(note, if *note == Known::Done { Known::Done } else { Known::Begun }))
            }
        }
    }

    async fn end(&self, delivery: &Delivery, name: &str, known: Known) -> Result<(), StreamsError> {
        match self {
            Self::Redis(streams) => streams.note_effect(delivery.effect(name), known, REMEMBERED).await,
            Self::Memory(notes) => {
                let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
                notes.insert((delivery.event_id(), name.to_owned()), known);
                Ok(())
            }
        }
    }
}

impl Delivery {
    /// Has an effect outside PostgreSQL (a mail, a call of another service) happen once for this event and group, as far as that is
    /// possible. Each effect of a handler has a `name` of its own, such as `"mail"`; a second call with the same name does nothing.
    ///
    /// Before the effect a note is written to Redis that it begins, afterwards one that it is done; a later delivery finds it. Notes live
    /// for 30 days. An `effect` that returns an error has not happened: the note is taken back and the error returned. Unless nobody
    /// knows: after [`HandlerError::OutcomeUnknown`], a time-out of tokio, and an `io::Error` of a connection that broke, the note stays.
    ///
    /// What cannot be promised: when the process dies between the effect and the second note, or the answer of the other side is lost,
    /// nobody knows whether the effect happened. Then `when_unknown` decides at the next delivery between twice and not at all. If the
    /// other side can tell a repetition by itself, give it the [`event_id`](Self::event_id): as idempotency key, as Message-ID of a mail.
    ///
    /// Returns whether this very call did it.
    ///
    /// # Errors
    /// The error of the effect. When Redis cannot be asked, the event is tried again later.
    pub async fn once<F>(
        &self,
        name: &str,
        when_unknown: WhenUnknown,
        effect: impl FnOnce() -> F + Send,
    ) -> Result<bool, HandlerError>
    where
        F: Future<Output = Result<(), HandlerError>> + Send,
    {
        match (self.effects.begin(self, name).await.map_err(later)?, when_unknown) {
            (Known::Done, _) | (Known::Begun, WhenUnknown::Skip) => return Ok(false),
            (Known::Begun, WhenUnknown::GiveUp) => {
                let why = format!("an earlier delivery began the effect {name:?}, and whether it happened is unknown");
                return Err(HandlerError::give_up(why));
            }
            (Known::Nothing, _) | (Known::Begun, WhenUnknown::Repeat) => {}
        }
        if let Err(error) = effect().await {
            if !is_unknown(&error) {
                self.effects.end(self, name, Known::Nothing).await.map_err(later)?;
            }
            return Err(error);
        }
        self.effects.end(self, name, Known::Done).await.map_err(later)?;
        Ok(true)
    }

    fn effect<'a>(&'a self, name: &'a str) -> Effect<'a> {
        Effect { stream: &self.stream, group: &self.group, event_id: self.event_id(), name }
    }
}

/// Whether the effect may have happened although it returned this error.
fn is_unknown(error: &HandlerError) -> bool {
    match error {
        HandlerError::OutcomeUnknown { .. } => true,
        HandlerError::Failed(error) => is_lost_answer(error.as_ref()),
        HandlerError::RetryLater { .. } | HandlerError::GiveUp { .. } => false,
    }
}

/// A time-out, or a connection that broke: what was sent on it may have arrived.
fn is_lost_answer(error: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof};
    let mut cause = Some(error);
    while let Some(error) = cause {
        let is_lost = |kind| matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | TimedOut | UnexpectedEof);
        if error.is::<tokio::time::error::Elapsed>()
            || error.downcast_ref::<io::Error>().is_some_and(|error| is_lost(error.kind()))
            || error.downcast_ref().is_some_and(|error| matches!(error, StreamsError::OutcomeUnknown { .. }))
        {
            return true;
        }
        // An `io::Error` shows the error that it was made of as itself, and not as its source.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = inner.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source());
    }
    false
}

fn later(error: StreamsError) -> HandlerError {
    HandlerError::retry_later(Duration::from_secs(1), error)
}
