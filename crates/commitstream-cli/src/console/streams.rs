use std::time::Duration;

use axum::extract::State;
use chrono::DateTime;
use commitstream::streams::{GroupInfo, StreamFigures};
use maud::{Markup, html};

use super::Console;
use super::page::{Refusal, link, nothing, page, time};
use super::session::Viewer;
use crate::output::{age, count, size};

/// Streams that one page looks at.
const MOST_STREAMS: usize = 50;

pub async fn list(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let streams = &console.servers.streams;
    let names = streams.list().await?;
    let (mut figures, mut groups) = (Vec::new(), Vec::new());
    for name in names.iter().take(MOST_STREAMS) {
        figures.extend(streams.figures(name).await?);
        groups.extend(streams.groups(name).await?);
    }
    Ok(page(
        "Streams",
        &viewer,
        &html! {
            @if figures.is_empty() { (nothing("There are no streams yet: the first event that is published makes one.")) } @else {
                (stream_table(&figures))
                @if names.len() > MOST_STREAMS { p.quiet { "The first " (MOST_STREAMS) " of " (names.len()) " streams." } }
                h2 { "Consumer groups" }
                @if groups.is_empty() { (nothing("No stream has a consumer group: a consumer makes its own when it starts.")) } @else { (group_table(&groups)) }
            }
        },
    ))
}

fn stream_table(figures: &[StreamFigures]) -> Markup {
    html! {
        div.wide { table #streams {
            thead { tr { th { "Stream" } th.number { "Entries" } th.number { "Memory" } th { "Oldest entry kept" } th { "Newest entry" } } }
            tbody { @for stream in figures { tr {
                td.text { (stream.stream) }
                td.number { (count(stream.entries)) }
                td.number { (stream.memory.map_or_else(|| "?".to_owned(), size)) }
                td { (entry(stream.first_id.as_deref())) }
                td { (entry(Some(&stream.last_id))) }
            } } }
        } }
    }
}

/// When the entry was appended, which its id tells.
fn entry(id: Option<&str>) -> Markup {
    let at = |id: &str| DateTime::from_timestamp_millis(id.split('-').next()?.parse().ok()?);
    html! {
        @match id {
            Some(id) => { @if let Some(at) = at(id) { (time(at)) br; } code.quiet { (id) } }
            None => { "–" }
        }
    }
}

fn group_table(groups: &[GroupInfo]) -> Markup {
    let more = || format!("> {}", count(GroupInfo::COUNTED as u64));
    let known = |number: Option<u64>| number.map_or_else(more, count);
    html! {
        div.wide { table #groups {
            thead { tr { th { "Stream" } th { "Group" } th.number { "Consumers alive" } th.number { "Lag" } th.number { "Pending" } th.number { "Oldest pending" } th.number { "Dead letters" } } }
            tbody { @for group in groups { tr {
                td.text { (group.stream) }
                td.name { (group.group) }
                @let alive = group.consumers.iter().filter(|consumer| consumer.alive == Some(true)).count();
                td.number { span .late[alive == 0 && group.behind != Some(0)] { (alive) } }
                td.number { (known(group.behind)) }
                td.number { (count(group.pending)) }
                td.number { (group.oldest_pending_age_ms.map_or_else(|| "–".to_owned(), |ms| age(Duration::from_millis(ms)))) }
                td.number { @if group.dead == Some(0) { "0" } @else { a href=(link("/dead", &[("stream", &group.stream)])) { (known(group.dead)) } } }
            } } }
        } }
    }
}
