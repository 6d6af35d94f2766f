//! Which dead letters are meant.

use std::fmt;
use std::str::FromStr;

use commitstream::streams::{DeadLetter, Streams, dead_stream};
use uuid::Uuid;

use crate::commands::tail::key_of;
use crate::dead_letters::position;

/// Dead letters that are read at once; each may have a payload of a megabyte.
const PAGE: usize = 100;

#[derive(clap::Args)]
pub struct Filter {
    /// Only events of this type
    #[arg(long = "type", value_name = "EVENT_TYPE", visible_alias = "event-type")]
    event_type: Option<String>,
    /// Only what this consumer group gave up
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
}

impl Filter {
    pub fn is_empty(&self) -> bool {
        self.event_type.is_none() && self.group.is_none()
    }

    fn takes(&self, letter: &DeadLetter) -> bool {
        (self.event_type.is_none() || self.event_type == letter.event_type)
            && self.group.as_ref().is_none_or(|group| *group == letter.group)
    }
}

/// How somebody names dead letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Id {
    /// Those of this event: one for each group that gave it up.
    Event(Uuid),
    /// The stream, or its aggregate type, and the id of the dead letter in it.
    Letter(String, String),
}

impl FromStr for Id {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(event) = text.parse() {
            return Ok(Self::Event(event));
        }
        match text.rsplit_once('/') {
            Some((stream, id)) if !stream.is_empty() && position(id).is_some() => Ok(Self::Letter(stream.into(), id.into())),
            _ => Err("an id is that of a dead letter, such as user/1769860800000-0, as `commitstream dead list` shows it, \
                      or the UUID of an event"),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(id) => id.fmt(f),
            Self::Letter(stream, id) => write!(f, "{stream}/{id}"),
        }
    }
}

/// Hands out the dead letters of one stream that are there now, oldest first. What comes meanwhile is left for another time: a retried
/// one may come back at once. Ends where `look` answers `false`, and answers that then.
pub async fn visit(
    streams: &Streams,
    stream: &str,
    filter: &Filter,
    mut look: impl AsyncFnMut(DeadLetter) -> anyhow::Result<bool>,
) -> anyhow::Result<bool> {
    let Some(last) = streams.newest(&dead_stream(stream), 1).await?.pop() else { return Ok(true) };
    let mut after = "0".to_owned();
    loop {
        let page = streams.dead_letters(stream, &after, PAGE).await?;
        let Some(end) = page.last() else { return Ok(true) };
        after.clone_from(&end.dead_id);
        for letter in page {
            if position(&letter.dead_id) > position(&last.id) {
                return Ok(true);
            }
            if filter.takes(&letter) && !look(letter).await? {
                return Ok(false);
            }
        }
    }
}

/// The same, stream by stream.
pub async fn visit_all(
    streams: &Streams,
    filter: &Filter,
    mut look: impl AsyncFnMut(DeadLetter) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    for stream in streams.dead_streams().await? {
        if !visit(streams, &stream, filter, &mut look).await? {
            break;
        }
    }
    Ok(())
}

/// The dead letters of these ids, and the ids that have none.
pub async fn named<'a>(
    streams: &Streams,
    prefix: &str,
    ids: &'a [Id],
    filter: &Filter,
) -> anyhow::Result<(Vec<DeadLetter>, Vec<&'a Id>)> {
    let (mut letters, mut missing) = (Vec::new(), Vec::new());
    for id in ids {
        let before = letters.len();
        match id {
            Id::Letter(stream, dead_id) => {
                let found = streams.dead_letter(&key_of(streams, prefix, stream), dead_id).await?;
                letters.extend(found.filter(|letter| filter.takes(letter)));
            }
            Id::Event(event) => {
                let event = event.hyphenated().to_string();
                let take = async |letter: DeadLetter| {
                    if letter.event_id.as_ref() == Some(&event) {
                        letters.push(letter);
                    }
                    Ok(true)
                };
                visit_all(streams, filter, take).await?;
            }
        }
        if letters.len() == before {
            missing.push(id);
        }
    }
    Ok((letters, missing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_dead_letters_or_of_events() {
        let letter = |stream: &str, id: &str| Ok(Id::Letter(stream.into(), id.into()));
        assert_eq!("user/17-0".parse(), letter("user", "17-0"));
        assert_eq!("events:a/b/17-12".parse(), letter("events:a/b", "17-12"));
        assert_eq!(Uuid::nil().to_string().parse(), Ok(Id::Event(Uuid::nil())));
        for wrong in ["17-0", "/17-0", "user", "user/", "user/17", "user/17-0x", ""] {
            assert!(wrong.parse::<Id>().is_err(), "{wrong}");
        }
    }
}
