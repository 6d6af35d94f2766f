use std::time::Duration;

use axum::extract::State;
use commitstream::streams::{GroupInfo, StreamFigures};
use maud::{Markup, html};

use super::Console;
use super::page::{Refusal, nothing, page};
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
            thead { tr { th { "Stream" } th.number { "Entries" } th.number { "Memory" } th { "Trimmed up to" } th { "Last entry" } } }
            tbody { @for stream in figures { tr {
                td { (stream.stream) }
                td.number { (count(stream.entries)) }
                td.number { (stream.memory.map_or_else(|| "?".to_owned(), size)) }
                td { code { (stream.first_id.as_deref().unwrap_or("–")) } }
                td { code { (stream.last_id) } }
            } } }
        } }
    }
}

fn group_table(groups: &[GroupInfo]) -> Markup {
    let more = || format!("> {}", count(GroupInfo::COUNTED as u64));
    let known = |number: Option<u64>| number.map_or_else(more, count);
    html! {
        div.wide { table #groups {
            thead { tr { th { "Stream" } th { "Group" } th.number { "Consumers alive" } th.number { "Lag" } th.number { "Pending" } th.number { "Oldest pending" } th.number { "Dead letters" } } }
            tbody { @for group in groups { tr {
                td { (group.stream) }
                td { (group.group) }
                td.number { (group.consumers.iter().filter(|consumer| consumer.alive == Some(true)).count()) }
                td.number { (known(group.behind)) }
                td.number { (count(group.pending)) }
                td.number { (group.oldest_pending_age_ms.map_or_else(|| "–".to_owned(), |ms| age(Duration::from_millis(ms)))) }
                td.number { (known(group.dead)) }
            } } }
        } }
    }
}
