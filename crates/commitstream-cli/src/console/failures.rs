//! Failed events by cause, and what is done about them.

use std::time::{Duration, Instant};

use axum::extract::{Query, State};
use commitstream::outbox::{Counted, Deed, FailureFilter, FailureGroups, FailurePlace, Remedy};
use maud::{Markup, html};
use uuid::Uuid;

use super::Console;
use super::page::{Refusal, counted, link, nothing, number, page, time, token};
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
                        td.error title=(group.cause) { (group.example) }
                        td.number { (number(group.events)) }
                        td { (time(group.oldest)) }
                        td { (time(group.newest)) }
                        td.deeds {
                            a href=(link("/console/events", &[("type", &group.event_type), ("status", "FAILED"), ("cause", &group.cause)])) { "Show" }
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
            form method="get" action="/console/failures/confirm" {
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

/// What is meant, how many that are, and the button that does it.
pub async fn confirm(viewer: Viewer, State(console): State<Console>, Query(asked): Query<Asked>) -> Result<Markup, Refusal> {
    let remedy = remedy(&asked.remedy)?;
    let filter = FailureFilter { event_type: asked.event_type, cause: asked.cause };
    let mut session = console.servers.session().await?;
    let found = match asked.id {
        Some(_) => Counted { events: 1, at_least: false },
        None if asked.count_all => console.servers.outbox.count_all_failed(&mut session.connection, &filter).await?,
        None => console.servers.outbox.count_failed(&mut session.connection, &filter).await?,
    };
    session.done();
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
                @if let Some(cause) = &filter.cause { dt { "Cause" } dd { (cause) } }
            }
            div.acts {
                @if is_refused {
                    form method="get" action="/console/failures/confirm" {
                        (fields(&filter))
                        input type="hidden" name="count_all" value="true";
                        button #count-all name="remedy" value=(remedy.name()) { "Count them all" }
                    }
                    p.quiet { "Not yet: " (NOT_COUNTED) "." }
                } @else if viewer.may_act() {
                    form method="post" action="/console/failures/act" {
                        (token(&viewer)) (fields(&filter))
                        @if let Some(id) = asked.id { input type="hidden" name="id" value=(id); }
                        input type="hidden" name="shown" value=(found.events);
                        @if asked.count_all { input type="hidden" name="counted" value="all"; }
                        @match remedy {
                            Remedy::Retry => { button.main #confirm name="remedy" value="retry" { "Retry" } }
                            Remedy::Discard => { button.danger #confirm name="remedy" value="discard" { "Delete for good" } }
                        }
                    }
                }
                a #back href="/console/failures" { "Back" }
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

/// Retries or discards one event, or what matches, in steps; after some seconds it comes back and says how far it is.
pub async fn act(State(console): State<Console>, act: Act) -> Result<Markup, Refusal> {
    let remedy = remedy(act.field("remedy").unwrap_or_default())?;
    let filter = FailureFilter { event_type: act.field("type").map(str::to_owned), cause: act.fields.get("cause").cloned() };
    let place = act.field("place").map(serde_json::from_str).transpose();
    let mut place: FailurePlace = place.map_err(|_| Refusal::wrong("not a place: begin anew"))?.unwrap_or_default();
    let before: i64 = act.field("before").and_then(|number| number.parse().ok()).unwrap_or_default();
    let shown: i64 = act.field("shown").and_then(|number| number.parse().ok()).unwrap_or_default();
    let about = filter.to_string();
    let deed = Deed { who: &act.viewer.who, about: &about };
    let outbox = &console.servers.outbox;
    let mut session = console.servers.session().await?;
    let begun = Instant::now();
    let (mut changed, mut next) = (before, None);
    if let Some(id) = act.field("id") {
        let id = id.parse().map_err(|_| Refusal::wrong("an event's id is a UUID"))?;
        let deed = Deed { about: "one event", ..deed };
        changed = outbox.remedy_events(&mut session.connection, deed, remedy, &[id]).await?.changed;
    } else {
        if remedy == Remedy::Discard && act.field("counted").is_none() {
            as_shown(outbox.count_failed(&mut session.connection, &filter).await?, shown)?;
        }
        loop {
            let most = if remedy == Remedy::Discard { (shown - (changed - before)).max(0) } else { i64::MAX };
            let step = outbox.remedy_step(&mut session.connection, deed, remedy, &filter, &place, most).await?;
            changed += step.changed;
            let Some(to) = step.next.filter(|_| step.changed < most) else { break };
            place = to;
            if begun.elapsed() > LONGEST {
                next = Some(serde_json::to_string(&place).map_err(anyhow::Error::from)?);
                break;
            }
        }
    }
    session.done();
    Ok(page(
        "Failures",
        &act.viewer,
        &outcome(&act, remedy, &filter, changed, next.map(|place| (place, shown - (changed - before)))),
    ))
}

/// What is deleted for good is not more than what was shown.
fn as_shown(found: Counted, shown: i64) -> Result<(), Refusal> {
    if found.at_least {
        return Err(Refusal::wrong(NOT_COUNTED));
    }
    if found.events > shown {
        let why = format!("there are more now, {}, and you were asked about {}: look again", number(found.events), number(shown));
        return Err(Refusal::wrong(&why));
    }
    Ok(())
}

fn outcome(act: &Act, remedy: Remedy, filter: &FailureFilter, changed: i64, next: Option<(String, i64)>) -> Markup {
    let done = match remedy {
        Remedy::Retry => "made PENDING again: the relay publishes what can be published",
        Remedy::Discard => "deleted",
    };
    let events = if changed == 1 { "1 event".to_owned() } else { format!("{} events", number(changed)) };
    html! {
        p #outcome .{ "verdict " (if changed > 0 { "good" } else { "warn" }) } role="status" {
            @if changed == 0 { "Nothing to do: no failed event matches." } @else { (events) " " (done) "." }
        }
        @if let Some((place, shown)) = next {
            p { "There are more. Each step is done and written down; it goes on from here." }
            form method="post" action="/console/failures/act" {
                (token(&act.viewer)) (fields(filter))
                input type="hidden" name="place" value=(place);
                input type="hidden" name="shown" value=(shown);
                input type="hidden" name="before" value=(changed);
                @if act.field("counted").is_some() { input type="hidden" name="counted" value="all"; }
                button #go-on name="remedy" value=(remedy.name()) { "Go on" }
            }
        }
        p { a href="/console/failures" { "To the failures" } " · " a href="/console/audit" { "To the audit" } }
    }
}
