use axum::extract::State;
use commitstream::config::AfterFailure;
use maud::{Markup, html};

use super::Console;
use super::page::{Query, Refusal, at, link, nothing, number, page, time};
use super::session::Viewer;
use crate::output::plural;

const PAGE: i64 = 50;

#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct After {
    aggregate_type: String,
    aggregate_id: String,
}

pub async fn list(viewer: Viewer, State(console): State<Console>, Query(after): Query<After>) -> Result<Markup, Refusal> {
    let mut session = console.servers.session().await?;
    let after = (after.aggregate_type.as_str(), after.aggregate_id.as_str());
    // Without that, a failed event holds nothing back.
    let holds = console.servers.settings.outbox.processor.after_failure == AfterFailure::Hold;
    let mut blocked = console.servers.outbox.blocked(&mut session.connection, after, PAGE + 1).await?;
    session.done();
    let has_more = blocked.len() > PAGE as usize || blocked.last().is_some_and(|last| last.at_least);
    blocked.truncate(PAGE as usize);
    Ok(page(
        "Blocked",
        &viewer,
        &html! {
            @if blocked.is_empty() {
                (nothing("No aggregate is blocked. Events that wait for another attempt, and those of their aggregate behind them, come here."))
            } @else {
                div.wide { table #blocked {
                    thead { tr { th { "Aggregate" } th.number { "Waiting" } th { "First of them" } th { "Held back by" } th { "Next attempt" } th { "Error" } } }
                    tbody { @for aggregate in &blocked { tr {
                        td.text { a href=(link("/events", &[("status", "PENDING"), ("aggregate_type", &aggregate.aggregate_type), ("aggregate_id", &aggregate.aggregate_id)])) {
                            (aggregate.aggregate_type) " " (aggregate.aggregate_id) } }
                        td.number { @if aggregate.at_least { "≥ " } (number(aggregate.waiting)) }
                        td.text { a href={ (at("/events/")) (aggregate.first) } { (aggregate.event_type) } br; (time(aggregate.created_at)) }
                        td { @match aggregate.failed.filter(|_| holds) {
                            Some(failed) => { "a failed event before it: " a href={ (at("/events/")) (failed) } { "decide" } }
                            None if aggregate.is_parked => { "itself: parked, since next_retry_at is 'infinity'" }
                            None if aggregate.retry_count <= 0 => { "itself, until its next attempt" }
                            None => { "itself, refused " (plural(aggregate.retry_count.unsigned_abs().into(), "time")) }
                        } }
                        td { @if aggregate.is_parked { "none" } @else if let Some(at) = aggregate.next_retry_at { (time(at)) } }
                        td.error { (aggregate.last_error.as_deref().unwrap_or_default()) }
                    } } }
                } }
                @if has_more && let Some(last) = blocked.last() {
                    p { a href=(link("/blocked", &[("aggregate_type", &last.aggregate_type), ("aggregate_id", &last.aggregate_id)])) { "More" } }
                }
            }
        },
    ))
}
