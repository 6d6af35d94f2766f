use axum::extract::State;
use axum::response::Redirect;
use commitstream::streams::DeadLetter;
use maud::{Markup, html};

use super::Console;
use super::page::{Query, Refusal, beginning, link, nothing, page, time, token};
use super::session::{Act, Viewer};
use crate::dead_letters::{Audit, Change, carry_out};
use crate::output::plural;

/// Dead letters of all streams on one page.
const PAGE: usize = 25;

/// Streams that one page looks into.
const MOST_STREAMS: usize = 50;

/// Characters of a payload.
const SHOWN: usize = 4_000;

#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct Asked {
    stream: String,
    after: String,
}

pub async fn list(viewer: Viewer, State(console): State<Console>, Query(asked): Query<Asked>) -> Result<Markup, Refusal> {
    let streams = &console.servers.streams;
    let mut names = streams.dead_streams().await?;
    names.retain(|name| asked.stream.is_empty() || asked.stream == *name);
    let others = names.split_off(names.len().min(MOST_STREAMS));
    let (mut found, mut room) = (Vec::new(), PAGE);
    for stream in names {
        let after = if asked.after.is_empty() { "0" } else { &asked.after };
        let mut letters = streams.dead_letters(&stream, after, room + 1).await?;
        if letters.is_empty() {
            continue;
        }
        let has_more = letters.len() > room;
        letters.truncate(room);
        room -= letters.len();
        found.push((stream, letters, has_more));
    }
    Ok(page(
        "Dead letters",
        &viewer,
        &html! {
            @if found.is_empty() && others.is_empty() { (nothing("No dead letters: no consumer has given up an event.")) }
            @for (stream, letters, has_more) in &found {
                h2 { (stream) }
                @if !letters.is_empty() { div.wide { table data-test="dead" {
                    thead { tr { th { "Given up" } th { "Group" } th { "Type" } th { "Aggregate" } th { "Reason" } th {} } }
                    tbody { @for letter in letters { (row(&viewer, letter)) } }
                } } }
                @if *has_more {
                    @let after = letters.last().map_or("", |last| last.dead_id.as_str());
                    p { a href=(link("/console/dead", &[("stream", stream), ("after", after)])) { "More of " (stream) } }
                }
            }
            @if !others.is_empty() {
                h2 { "More streams" }
                ul { @for stream in others.iter().take(MOST_STREAMS) { li { a href=(link("/console/dead", &[("stream", stream)])) { (stream) } } } }
                @if others.len() > MOST_STREAMS { p.quiet { "And " (others.len() - MOST_STREAMS) " more: `commitstream dead list` lists all." } }
            }
        },
    ))
}

fn row(viewer: &Viewer, letter: &DeadLetter) -> Markup {
    let text = |field: &Option<String>| field.clone().unwrap_or_else(|| "?".to_owned());
    html! {
        tr {
            td { @if let Some(at) = letter.dead_at { (time(at)) } }
            td.name { (letter.group) }
            td.text { (text(&letter.event_type)) }
            td.text { (text(&letter.aggregate_type)) " " (text(&letter.aggregate_id)) }
            td.error {
                (letter.reason) " " span.quiet { "after " (plural(letter.attempts.into(), "attempt")) }
                @if let Some(payload) = &letter.payload { details { summary { "Payload" } (beginning(payload.get(), SHOWN)) } }
            }
            td.deeds {
                @if viewer.may_act() {
                    form.acts method="post" action="/console/dead/act" {
                        (token(viewer))
                        input type="hidden" name="stream" value=(letter.stream);
                        input type="hidden" name="dead_id" value=(letter.dead_id);
                        button name="action" value="retry" data-test="retry-dead" { "Retry" } " "
                        details { summary { "Discard …" } button.danger name="action" value="discard" data-test="discard-dead" { "Delete for good" } }
                    }
                }
            }
        }
    }
}

pub async fn act(State(console): State<Console>, act: Act) -> Result<Redirect, Refusal> {
    let streams = &console.servers.streams;
    let (stream, dead_id) = (act.field("stream").unwrap_or_default(), act.field("dead_id").unwrap_or_default());
    let change = match act.field("action") {
        Some("retry") => Change::Retry,
        Some("discard") => Change::Discard,
        _ => return Err(Refusal::wrong("retry, or discard?")),
    };
    let known = streams.dead_streams().await?.iter().any(|known| known == stream);
    let letter = if known { streams.dead_letter(stream, dead_id).await? } else { None };
    let letter = letter.ok_or_else(|| Refusal::not_found("there is no such dead letter any more"))?;
    let mut session = console.servers.session().await?;
    let audit = Audit { outbox: &console.servers.outbox, connection: &mut session.connection, who: &act.viewer.who };
    let letters = [letter];
    let left = carry_out(streams, Some(audit), change, &letters).await?;
    session.done();
    let (tone, outcome) = match (left.first(), change) {
        (Some((_, why)), _) => ("warn", format!("Left as it was: {why}.")),
        (None, Change::Retry) => {
            ("good", "Delivered again, to the same group only: a running consumer takes over within about a second.".to_owned())
        }
        (None, Change::Discard) => ("good", "Deleted.".to_owned()),
    };
    let outcome = html! {
        p #outcome .{ "verdict " (tone) } role="status" { (outcome) }
        p { a href="/console/dead" { "To the dead letters" } }
    };
    Ok(act.ended(&console, "Dead letters", outcome))
}
