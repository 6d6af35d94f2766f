use axum::extract::State;
use axum::response::Redirect;
use commitstream::outbox::{RelayBatches, RelayRow};
use maud::{Markup, html};

use super::Console;
use super::page::{Refusal, at, millis, nothing, number, page, time, token};
use super::session::{Act, Viewer};

pub async fn list(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let mut session = console.servers.session().await?;
    let relays = console.servers.outbox.relays(&mut session.connection).await?;
    let batches = console.servers.outbox.batches_of_relays(&mut session.connection).await?;
    let pause = console.servers.outbox.paused(&mut session.connection).await?;
    session.done();
    let has_reasons = relays.iter().any(|relay| relay.reason.is_some());
    Ok(page(
        "Relays",
        &viewer,
        &html! {
            @if let Some(pause) = &pause {
                p.verdict.warn #paused { "Paused by " (pause.who) " since " (time(pause.since)) ": relays claim nothing." }
            }
            @if viewer.may_act() {
                form.acts method="post" action=(at("/relays/switch")) {
                    (token(&viewer))
                    @if pause.is_some() { button.main #resume name="to" value="resume" { "Resume" } }
                    @else { details { summary { "Pause …" }
                        p { "All relays settle what is on its way, and claim nothing until somebody resumes them. Events wait in the outbox meanwhile." }
                        button.danger #pause name="to" value="pause" { "Pause all relays" } } }
                }
            }
            @if relays.is_empty() { (nothing("No relay is alive, and none was within the last hour: start `commitstream relay`.")) } @else {
                div.wide { table #relays {
                    thead { tr { th { "Host" } th.number { "Process" } th { "State" } th.number { "Partitions" } th.number { "Events/s" } th.number { "Published" } th.number { "Failed" } th.number { "Heartbeat" } th { "Started" } @if has_reasons { th { "Reason" } } } }
                    tbody { @for relay in &relays { tr {
                        td.text { (relay.host) }
                        td.number { (relay.pid) }
                        td { span.status { (relay.state) } }
                        td.number { (relay.partitions) }
                        td.number { (number(relay.events_per_second.round() as i64)) }
                        td.number { (number(relay.published)) }
                        td.number { (number(relay.failed)) }
                        td.number { (millis(relay.heartbeat_age_ms)) " ago" }
                        td { (time(relay.started_at)) }
                        @if has_reasons { td.error { (relay.reason.as_deref().unwrap_or_default()) } }
                    } } }
                } }
            }
            h2 { "Open batches" }
            (open_batches(&relays, &batches))
        },
    ))
}

fn open_batches(relays: &[RelayRow], batches: &[RelayBatches]) -> Markup {
    let relay = |of: &RelayBatches| relays.iter().find(|relay| relay.relay_id == of.relay_id);
    html! {
        @if batches.is_empty() { (nothing("No batch is open: all that was claimed is settled. At work, a batch is open for some milliseconds.")) } @else {
            div.wide { table #batches {
                thead { tr { th { "Relay" } th { "State" } th { "Its id" } th.number { "Open batches" } th.number { "The oldest" } } }
                tbody { @for of in batches { tr {
                    @match relay(of) {
                        Some(relay) => { td.text { (relay.host) " " (relay.pid) } td { span.status { (relay.state) } } }
                        None => { td {} td { span.status { "gone" } } }
                    }
                    td { code { (of.relay_id) } }
                    td.number { @if of.at_least { "≥ " } (number(of.batches)) }
                    td.number { "claimed " (millis(of.oldest_ms)) " ago" }
                } } }
            } }
            @if batches.iter().any(|of| !relay(of).is_some_and(|relay| relay.alive)) {
                p.quiet { "Those of a relay that is gone are settled, or released, by the relay that takes its partitions over." }
            }
        }
    }
}

pub async fn switch(State(console): State<Console>, act: Act) -> Result<Redirect, Refusal> {
    let outbox = &console.servers.outbox;
    let mut session = console.servers.session().await?;
    match act.field("to") {
        Some("pause") => outbox.pause(&mut session.connection, &act.viewer.who).await?,
        Some("resume") => outbox.resume(&mut session.connection, &act.viewer.who).await?,
        _ => return Err(Refusal::wrong("pause, or resume?")),
    };
    session.done();
    Ok(super::page::to("/relays"))
}
