//! Failed events by cause, and what is done about them.

use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::Redirect;
use commitstream::outbox::{Counted, Deed, FailureFilter, FailureGroups, FailurePlace, Remedy, Shown};
use maud::{Markup, html};
use uuid::Uuid;

use super::Console;
use super::page::{Query, Refusal, at, cause_text, counted, link, nothing, number, page, time, token};
use super::session::{Act, Viewer};
use crate::output::plural;

/// How long one request goes on with a large deed; then the page asks whether to go on.
const LONGEST: Duration = Duration::from_secs(5);

/// Nobody has seen how many would be deleted.
const NOT_COUNTED: &str = "so many have failed that they are not all counted yet: count them first, discard single events, or use \
    `commitstream failed discard --all --type TYPE`";

pub async fn list(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let mut session = console.servers.session().await?;
    let FailureGroups { groups, more, events } = console.servers.outbox.failure_groups(&mut session.connection).await?;
    session.done();
    Ok(page(
        "Failures",
        &viewer,
        &html! {
            @if groups.is_empty() {
                (nothing("No event has failed. One that Redis refuses more often than maxRetries allows comes here."))
            } @else {
                p { b { (counted(events)) } " failed."
                    @if events.at_least { " Only the newest are grouped: each number is the least that it can be." } }
                @if viewer.may_act() { (buttons(&FailureFilter::default(), "all")) }
                div.wide { table #groups {
                    thead { tr { th { "Type" } th { "Cause" } th.number { "Events" } th { "Oldest" } th { "Newest" } th {} } }
                    tbody { @for group in &groups { tr {
                        td.text { (group.event_type) }
                        td.error title=(group.cause) { (cause_text(&group.example)) }
                        td.number { (number(group.events)) }
                        td { (time(group.oldest)) }
                        td { (time(group.newest)) }
                        td.deeds {
                            a href=(link("/events", &[("type", &group.event_type), ("status", "FAILED"), ("cause", &group.cause)])) { "Show" }
                            @if viewer.may_act() {
                                (buttons(&FailureFilter { event_type: Some(group.event_type.clone()), cause: Some(group.cause.clone()) }, "group"))
                            }
                        }
                    } } }
                } }
                @if more > 0 { p.quiet #more-groups { "And " (plural(more.unsigned_abs(), "more group")) ", none of them larger." } }
            }
        },
    ))
}

fn fields(filter: &FailureFilter) -> Markup {
    html! {
        @if let Some(event_type) = &filter.event_type { input type="hidden" name="type" value=(event_type); }
        @if let Some(cause) = &filter.cause { input type="hidden" name="cause" value=(cause); }
    }
}

fn buttons(filter: &FailureFilter, which: &str) -> Markup {
    html! {
        div.acts {
            form method="get" action=(at("/failures/confirm")) {
                (fields(filter))
                button name="remedy" value="retry" data-test={ "retry-" (which) } { @if which == "all" { "Retry all …" } @else { "Retry …" } }
                button.danger name="remedy" value="discard" data-test={ "discard-" (which) } { @if which == "all" { "Discard all …" } @else { "Discard …" } }
            }
        }
    }
}

#[derive(serde::Deserialize)]
pub struct Asked {
    remedy: String,
    id: Option<Uuid>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    cause: Option<String>,
    /// Count all that match, however many have failed.
    #[serde(default)]
    count_all: bool,
}

/// What is asked about many events, and what their form brings along.
struct Question {
    filter: FailureFilter,
    shown: Shown,
}

impl Question {
    async fn ask(console: &Console, filter: FailureFilter, count_all: bool) -> Result<Self, Refusal> {
        let outbox = &console.servers.outbox;
        let mut session = console.servers.session().await?;
        let shown = match count_all {
            true => outbox.count_all_failed(&mut session.connection, &filter).await?,
            false => outbox.count_failed(&mut session.connection, &filter).await?,
        };
        session.done();
        Ok(Self { filter, shown })
    }

    fn of(act: &Act) -> Result<Self, Refusal> {
        let filter = FailureFilter { event_type: act.field("type").map(str::to_owned), cause: act.fields.get("cause").cloned() };
        let snapshot = act.field("snapshot").unwrap_or_default().parse().map_err(Refusal::wrong)?;
        let events = Counted { events: act.number("shown"), at_least: act.field("at_least").is_some() };
        Ok(Self { filter, shown: Shown { events, snapshot } })
    }

    fn fields(&self) -> Markup {
        html! {
            (fields(&self.filter))
            input type="hidden" name="snapshot" value=(self.shown.snapshot);
            input type="hidden" name="shown" value=(self.shown.events.events);
            @if self.shown.events.at_least { input type="hidden" name="at_least" value="true"; }
        }
    }
}

/// What is meant, how many that are, and the button that does it.
pub async fn confirm(viewer: Viewer, State(console): State<Console>, Query(asked): Query<Asked>) -> Result<Markup, Refusal> {
    let remedy = remedy(&asked.remedy)?;
    let filter = FailureFilter { event_type: asked.event_type, cause: asked.cause };
    let (found, brings) = match asked.id {
        Some(id) => (Counted { events: 1, at_least: false }, html! { input type="hidden" name="id" value=(id); }),
        None => {
            let question = Question::ask(&console, filter.clone(), asked.count_all).await?;
            (question.shown.events, question.fields())
        }
    };
    let events = if found.events == 1 && !found.at_least { "1 event".to_owned() } else { format!("{} events", counted(found)) };
    let is_refused = remedy == Remedy::Discard && found.at_least;
    let question = match remedy {
        Remedy::Retry => format!("Retry {events}?"),
        Remedy::Discard => format!("Delete {events} for good?"),
    };
    Ok(page(
        "Failures",
        &viewer,
        &html! {
            p.verdict.warn #question { (question) }
            dl {
                @if let Some(id) = asked.id { dt { "Event" } dd { code { (id) } } }
                @if let Some(event_type) = &filter.event_type { dt { "Type" } dd { (event_type) } }
                @if let Some(cause) = &filter.cause { dt { "Cause" } dd { (cause_text(cause)) } }
            }
            div.acts {
                @if is_refused {
                    form method="get" action=(at("/failures/confirm")) {
                        (fields(&filter))
                        input type="hidden" name="count_all" value="true";
                        button #count-all name="remedy" value=(remedy.name()) { "Count them all" }
                    }
                    p.quiet { "Not yet: " (NOT_COUNTED) "." }
                } @else if viewer.may_act() {
                    form method="post" action=(at("/failures/act")) {
                        (token(&viewer)) (brings)
                        @match remedy {
                            Remedy::Retry => { button.main #confirm name="remedy" value="retry" { "Retry" } }
                            Remedy::Discard => { button.danger #confirm name="remedy" value="discard" { "Delete for good" } }
                        }
                    }
                }
                a #back href=(at("/failures")) { "Back" }
            }
        },
    ))
}

fn remedy(name: &str) -> Result<Remedy, Refusal> {
    [Remedy::Retry, Remedy::Discard]
        .into_iter()
        .find(|remedy| remedy.name() == name)
        .ok_or_else(|| Refusal::wrong("retry, or discard?"))
}

/// Retries or discards one event, or those that were shown.
pub async fn act(State(console): State<Console>, act: Act) -> Result<Redirect, Refusal> {
    let remedy = remedy(act.field("remedy").unwrap_or_default())?;
    let outcome = match act.field("id") {
        Some(id) => {
            let id = id.parse().map_err(|_| Refusal::wrong("an event's id is a UUID"))?;
            let deed = Deed { who: &act.viewer.who, about: "one event" };
            let mut session = console.servers.session().await?;
            let step = console.servers.outbox.remedy_events(&mut session.connection, deed, remedy, &[id]).await?;
            session.done();
            outcome(remedy, step.changed, &html! {})
        }
        None => many(&console, &act, remedy).await?,
    };
    Ok(act.ended(&console, "Failures", outcome))
}

/// In steps; after some seconds it comes back and says how far it is.
async fn many(console: &Console, act: &Act, remedy: Remedy) -> Result<Markup, Refusal> {
    let question = Question::of(act)?;
    let place = act.field("place").map(serde_json::from_str).transpose();
    let mut place: FailurePlace = place.map_err(|_| Refusal::wrong("not a place: begin anew"))?.unwrap_or_default();
    let about = question.filter.to_string();
    let deed = Deed { who: &act.viewer.who, about: &about };
    let Shown { events: shown, snapshot } = &question.shown;
    let mut session = console.servers.session().await?;
    let begun = Instant::now();
    let mut changed = act.number("before");
    let has_more = loop {
        let outbox = &console.servers.outbox;
        let step = outbox.remedy_step(&mut session.connection, deed, remedy, &question.filter, &place, Some(snapshot)).await?;
        changed += step.changed;
        let Some(next) = step.next else { break false };
        place = next;
        if begun.elapsed() > LONGEST {
            break true;
        }
    };
    session.done();
    let left = if has_more || shown.at_least { 0 } else { shown.events - changed };
    let more = html! {
        @if left > 0 { p #left { (events(left)) " of those that were shown had been changed meanwhile, and what has failed since was not shown: these are left alone." } }
        @if has_more {
            p { "There are more. Each step is done and written down; it goes on from here." }
            form method="post" action=(at("/failures/act")) {
                (token(&act.viewer)) (question.fields())
                input type="hidden" name="place" value=(serde_json::to_string(&place).map_err(anyhow::Error::from)?);
                input type="hidden" name="before" value=(changed);
                button #go-on name="remedy" value=(remedy.name()) { "Go on" }
            }
        }
    };
    Ok(outcome(remedy, changed, &more))
}

fn events(number: i64) -> String {
    plural(number.unsigned_abs(), "event")
}

fn outcome(remedy: Remedy, changed: i64, more: &Markup) -> Markup {
    let done = match remedy {
        Remedy::Retry => "made PENDING again: the relay publishes what can be published",
        Remedy::Discard => "deleted",
    };
    html! {
        p #outcome .{ "verdict " (if changed > 0 { "good" } else { "warn" }) } role="status" {
            @if changed == 0 { "Nothing was done: no failed event is as it was shown." } @else { (events(changed)) " " (done) "." }
        }
        (more)
        p { a href=(at("/failures")) { "To the failures" } " · " a href=(at("/audit")) { "To the audit" } }
    }
}
