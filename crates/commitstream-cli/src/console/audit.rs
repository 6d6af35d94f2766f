use axum::extract::State;
use maud::{Markup, html};

use super::Console;
use super::page::{Query, Refusal, at, link, nothing, number, page, time};
use super::session::Viewer;

const PAGE: usize = 50;

/// Ids that a row shows at once.
const SHOWN: usize = 3;

#[derive(serde::Deserialize)]
pub struct Asked {
    before: Option<i64>,
}

pub async fn list(viewer: Viewer, State(console): State<Console>, Query(asked): Query<Asked>) -> Result<Markup, Refusal> {
    let mut session = console.servers.session().await?;
    let mut deeds = console.servers.outbox.deeds(&mut session.connection, asked.before, PAGE as i64 + 1).await?;
    session.done();
    let has_more = deeds.len() > PAGE;
    deeds.truncate(PAGE);
    Ok(page(
        "Audit",
        &viewer,
        &html! {
            @if deeds.is_empty() { (nothing("Nobody has done anything here yet. What operators retry, discard, pause and resume is written down.")) } @else {
                div.wide { table #audit {
                    thead { tr { th { "When" } th { "Who" } th { "What" } th { "To what" } th.number { "Events" } th { "Their ids" } } }
                    tbody { @for deed in &deeds { tr {
                        td { (time(deed.done_at)) }
                        td.text { (deed.who) }
                        td { (deed.action) }
                        td.error { (deed.about) }
                        td.number { @if deed.events > 0 { (number(deed.events)) } }
                        td {
                            @for id in deed.event_ids.iter().take(SHOWN) { a href={ (at("/events/")) (id) } { code { (id) } } " " }
                            @if deed.event_ids.len() > SHOWN { "and " (deed.event_ids.len() - SHOWN) " more" }
                        }
                    } } }
                } }
                @if has_more && let Some(last) = deeds.last() {
                    p { a href=(link("/audit", &[("before", &last.audit_id.to_string())])) { "Older" } }
                }
            }
        },
    ))
}
