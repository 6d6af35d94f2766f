//! Effects outside PostgreSQL: a note in Redis that one was begun, and that it is done.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::{Delivery, HandlerError};
use crate::streams::{Streams, StreamsError};

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
    Memory(Arc<Mutex<HashMap<Uuid, Known>>>),
}

impl Effects {
    async fn begin(&self, delivery: &Delivery) -> Result<Known, StreamsError> {
        match self {
            Self::Redis(streams) => {
                streams.begin_effect(&delivery.stream, &delivery.group, delivery.event_id(), REMEMBERED).await
            }
            Self::Memory(notes) => {
                let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
                let note = notes.entry(delivery.event_id()).or_insert(Known::Nothing);
                Ok(std::mem::replace(note, if *note == Known::Done { Known::Done } else { Known::Begun }))
            }
        }
    }

    async fn end(&self, delivery: &Delivery, known: Known) -> Result<(), StreamsError> {
        match self {
            Self::Redis(streams) => {
                streams.note_effect(&delivery.stream, &delivery.group, delivery.event_id(), known, REMEMBERED).await
            }
            Self::Memory(notes) => {
                notes.lock().unwrap_or_else(PoisonError::into_inner).insert(delivery.event_id(), known);
                Ok(())
            }
        }
    }
}

impl Delivery {
    /// Has an effect outside PostgreSQL (a mail, a call of another service) happen once for this event and group, as far as that is
    /// possible.
    ///
    /// Before the effect a note is written to Redis that it begins, afterwards one that it is done; a later delivery finds it. Notes live for 30 days. An `effect` that returns an error has not happened: the note is taken back and
    /// the error returned.
    ///
    /// What cannot be promised: when the process dies between the effect and the second note, nobody knows whether it
    /// happened. Then `when_unknown` decides between twice and not at all. If the other side can tell a repetition by itself, give it the
    /// [`event_id`](Self::event_id): as idempotency key, as Message-ID of a mail.
    ///
    /// Returns whether this very call did it.
    ///
    /// # Errors
    /// The error of the effect. When Redis cannot be asked, the event is tried again later.
    pub async fn once<F>(&self, when_unknown: WhenUnknown, effect: impl FnOnce() -> F + Send) -> Result<bool, HandlerError>
    where
        F: Future<Output = Result<(), HandlerError>> + Send,
    {
        match (self.effects.begin(self).await.map_err(later)?, when_unknown) {
            (Known::Done, _) | (Known::Begun, WhenUnknown::Skip) => return Ok(false),
            (Known::Begun, WhenUnknown::GiveUp) => {
                return Err(HandlerError::give_up("an earlier delivery began the effect, and whether it happened is unknown"));
            }
            (Known::Nothing, _) | (Known::Begun, WhenUnknown::Repeat) => {}
        }
        if let Err(error) = effect().await {
            self.effects.end(self, Known::Nothing).await.map_err(later)?;
            return Err(error);
        }
        self.effects.end(self, Known::Done).await.map_err(later)?;
        Ok(true)
    }
}

fn later(error: StreamsError) -> HandlerError {
    HandlerError::retry_later(Duration::from_secs(1), error)
}
