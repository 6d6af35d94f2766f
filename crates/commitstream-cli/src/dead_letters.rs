//! What is done to dead letters, and what the audit says of it.

use std::collections::BTreeSet;

use commitstream::outbox::{self, Deed, OutboxRepository};
use commitstream::streams::{DeadLetter, RetriedAs, Streams, StreamsError};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::failure::on_one_line;
use crate::output::plural;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Retry,
    Discard,
}

impl Change {
    /// As the audit has it.
    fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry dead letter",
            Self::Discard => "discard dead letter",
        }
    }
}

/// Where it is written down, and as whose act.
pub struct Audit<'a> {
    pub outbox: &'a OutboxRepository,
    pub connection: &'a mut PgConnection,
    pub who: &'a str,
}

/// Does it to each of these dead letters. Redis knows no common transaction with the audit: its row is written before, and completed after.
/// Answers which were left as they are, and why. An outage ends the work, and the row says that its outcome is unknown.
pub async fn carry_out<'a>(
    streams: &Streams,
    audit: Option<Audit<'_>>,
    change: Change,
    letters: &'a [DeadLetter],
) -> anyhow::Result<Vec<(&'a DeadLetter, String)>> {
    let about = about(letters);
    let noted = match audit {
        Some(Audit { outbox, connection, who }) if !letters.is_empty() => {
            let deed = Deed { who, about: &about };
            let mut transaction = outbox::begin(connection).await?;
            let row = outbox.note(&mut transaction, deed, change.name(), &event_ids(letters.iter())).await?;
            transaction.commit().await?;
            Some((outbox, connection, row))
        }
        _ => None,
    };
    let (mut done, mut left) = (Vec::new(), Vec::new());
    for (letter, why) in letters.iter().zip(apply(streams, change, letters).await?) {
        match why {
            None => done.push(letter),
            Some(why) => left.push((letter, why)),
        }
    }
    if let Some((outbox, connection, row)) = noted {
        let about = match left.as_slice() {
            [] => about,
            [(_, why)] if letters.len() == 1 => format!("{about}: left as it was: {why}"),
            left => format!("{about}: {} left alone", left.len()),
        };
        let (ids, events) = (event_ids(done.iter().copied()), i64::try_from(done.len())?);
        let note = async {
            let mut transaction = outbox::begin(connection).await?;
            outbox.note_outcome(&mut transaction, row, &about, &ids, events).await?;
            anyhow::Ok(transaction.commit().await?)
        };
        if let Err(error) = note.await {
            tracing::warn!("it is done, and the audit says that its outcome is unknown: {}", on_one_line(&error));
        }
    }
    Ok(left)
}

fn about(letters: &[DeadLetter]) -> String {
    if let [DeadLetter { stream, dead_id, group, .. }] = letters {
        return format!("{stream}/{dead_id} of the group {group}");
    }
    let groups: BTreeSet<_> = letters.iter().map(|letter| letter.group.as_str()).collect();
    let groups: Vec<_> = groups.into_iter().collect();
    format!(
        "{} of the {} {}",
        plural(letters.len() as u64, "dead letter"),
        if groups.len() == 1 { "group" } else { "groups" },
        groups.join(", ")
    )
}

/// An entry that was not written by a publisher may have none.
fn event_ids<'a>(letters: impl Iterator<Item = &'a DeadLetter>) -> Vec<Uuid> {
    letters.filter_map(|letter| letter.event_id.as_ref()?.parse().ok()).collect()
}

/// Why each dead letter was left as it was, if it was.
async fn apply(streams: &Streams, change: Change, letters: &[DeadLetter]) -> anyhow::Result<Vec<Option<String>>> {
    match change {
        Change::Retry => {
            let answers = streams.retry_dead_letters(letters).await?;
            let left = |answer| match answer {
                Ok(RetriedAs::Pending(consumer)) => Some(format!("{consumer} has its entry in hand: try again in a moment")),
                Ok(RetriedAs::Entry | RetriedAs::Copy(_) | RetriedAs::Before) => None,
                Err(error) => Some(refused(error)),
            };
            Ok(answers.into_iter().map(left).collect())
        }
        Change::Discard => {
            let mut why = vec![None; letters.len()];
            let mut from = 0;
            for letters in letters.chunk_by(|a, b| a.stream == b.stream) {
                let ids: Vec<_> = letters.iter().map(|letter| letter.dead_id.as_str()).collect();
                match streams.discard_dead_letters(&letters[0].stream, &ids).await {
                    Err(error) if !error.is_outage() => why[from..from + letters.len()].fill(Some(refused(error))),
                    answer => answer?,
                }
                from += letters.len();
            }
            Ok(why)
        }
    }
}

fn refused(error: StreamsError) -> String {
    on_one_line(&error.into())
}

/// An entry id, `<milliseconds>-<sequence>`, as numbers.
pub fn position(id: &str) -> Option<(u64, u64)> {
    let (millis, sequence) = id.split_once('-')?;
    Some((millis.parse().ok()?, sequence.parse().ok()?))
}
