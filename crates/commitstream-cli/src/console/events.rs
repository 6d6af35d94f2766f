//! Search of events, and one event's life.

use axum::extract::{Path, State};
use chrono::{DateTime, Datelike, NaiveDateTime, Utc};
use commitstream::outbox::{EventDetail, EventPage, EventSearch, EventStatus};
use commitstream::streams::{Delivery, GroupDelivery, StreamsError};
use maud::{Markup, html};
use uuid::Uuid;

use super::Console;
use super::page::{Query, Refusal, at, beginning, cause_text, link, millis, moment, nothing, page, time, token};
use super::session::Viewer;
use crate::output::plural;

const PAGE: i64 = 50;

/// The clocks of PostgreSQL and Redis may differ by so much where an entry is looked for by time.
const CLOCKS_DIFFER_MS: i64 = 2_000;

/// A search as its form has it: empty is open.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct Form {
    id: String,
    #[serde(rename = "type")]
    event_type: String,
    aggregate_type: String,
    aggregate_id: String,
    status: String,
    /// Empty is a cause of its own.
    cause: Option<String>,
    from: String,
    until: String,
    after: String,
}

impl Form {
    fn search(&self) -> Result<EventSearch, Refusal> {
        let text = |text: &String| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        let status = text(&self.status).map(|name| {
            let known = EventStatus::ALL.into_iter().find(|status| status.name() == name);
            known.ok_or_else(|| Refusal::wrong("there is no such status"))
        });
        Ok(EventSearch {
            event_type: text(&self.event_type),
            aggregate_type: text(&self.aggregate_type),
            aggregate_id: text(&self.aggregate_id),
            status: status.transpose()?,
            // It was cut somewhere, perhaps at a space.
            cause: self.cause.clone(),
            from: text(&self.from).map(|text| read_moment(&text)).transpose()?,
            until: text(&self.until).map(|text| read_moment(&text)).transpose()?,
        })
    }

    fn link(&self, after: &str) -> String {
        let query = [
            ("type", self.event_type.as_str()),
            ("aggregate_type", &self.aggregate_type),
            ("aggregate_id", &self.aggregate_id),
            ("status", &self.status),
            ("from", &self.from),
            ("until", &self.until),
            ("after", after),
        ];
        let cause = self.cause.iter().map(|cause| ("cause", cause.as_str()));
        let query: Vec<_> = query.into_iter().filter(|(_, value)| !value.is_empty()).chain(cause).collect();
        link("/events", &query)
    }
}

/// RFC 3339, or what `<input type="datetime-local">` sends, in UTC.
fn read_moment(text: &str) -> Result<DateTime<Utc>, Refusal> {
    let local = |form| NaiveDateTime::parse_from_str(text, form).map(|time| time.and_utc());
    let read = text.parse::<DateTime<Utc>>().or_else(|_| local("%Y-%m-%dT%H:%M")).or_else(|_| local("%Y-%m-%dT%H:%M:%S"));
    let read = read.ok().filter(|time| (1970..=9999).contains(&time.year()));
    read.ok_or_else(|| Refusal::wrong("a time is written as 2026-01-31T13:45, in UTC, of the years 1970 to 9999"))
}

pub async fn list(viewer: Viewer, State(console): State<Console>, Query(form): Query<Form>) -> Result<Markup, Refusal> {
    if !form.id.trim().is_empty() {
        let id = form.id.trim().parse().map_err(|_| Refusal::wrong("an event's id is a UUID"))?;
        return show(&viewer, &console, id).await;
    }
    let search = form.search()?;
    let after = (!form.after.is_empty()).then(|| form.after.parse()).transpose().map_err(Refusal::wrong)?;
    let mut session = console.servers.session().await?;
    let found = console.servers.outbox.search(&mut session.connection, &search, after.as_ref(), PAGE).await?;
    session.done();
    Ok(page(
        "Events",
        &viewer,
        &html! {
            (search_form(&form))
            (results(&form, &found))
        },
    ))
}

fn search_form(form: &Form) -> Markup {
    let field = |name: &str, label: &str, kind: &str, value: &str| {
        html! {
            div { label for={ "search-" (name) } { (label) } input id={ "search-" (name) } name=(name) type=(kind) value=(value); }
        }
    };
    html! {
        form.search #search method="get" action=(at("/events")) role="search" {
            (field("id", "Id", "text", &form.id))
            (field("type", "Type", "text", &form.event_type))
            (field("aggregate_type", "Aggregate type", "text", &form.aggregate_type))
            (field("aggregate_id", "Aggregate id", "text", &form.aggregate_id))
            div {
                label for="search-status" { "Status" }
                select #search-status name="status" {
                    option value="" { "any" }
                    @for status in EventStatus::ALL { option value=(status.name()) selected[form.status == status.name()] { (status.name()) } }
                }
            }
            // Where a group of failures led here. Without the tick any cause will do.
            @if let Some(cause) = &form.cause {
                div.tick { label for="search-cause" { "Cause" } label { input #search-cause name="cause" type="checkbox" value=(cause) checked; " " (cause_text(cause)) } }
            }
            (field("from", "From (UTC)", "datetime-local", &form.from))
            (field("until", "Until (UTC)", "datetime-local", &form.until))
            button.main type="submit" { "Search" }
        }
    }
}

fn results(form: &Form, found: &EventPage) -> Markup {
    let is_marred = found.events.iter().any(|event| event.last_error.is_some());
    html! {
        @if !found.events.is_empty() {
            div.wide { table #events {
                thead { tr { th { "Inserted" } th { "Status" } th { "Type" } th { "Aggregate" } th { "Id" } @if is_marred { th { "Error" } } } }
                tbody { @for event in &found.events { tr {
                    td { (time(event.created_at)) }
                    td { span .{ "status " (event.status.name()) } { (event.status.name()) } }
                    td.text { (event.event_type) }
                    td.text { (event.aggregate_type) " " (event.aggregate_id) }
                    td { a href={ (at("/events/")) (event.id) } { code { (event.id) } } }
                    @if is_marred { td.error { (event.last_error.as_deref().unwrap_or_default()) } }
                } } }
            } }
        }
        @match &found.next {
            Some(next) => {
                @if found.events.is_empty() { (nothing(nothing_yet(&form.status))) }
                p { a #older href=(form.link(&next.to_string())) { "Search older events" } }
            }
            None if found.events.is_empty() => { (nothing("No event matches. An INSERT INTO event_outbox, or `commitstream publish`, puts one in.")) }
            None => {}
        }
    }
}

/// Unsent events go by `seq`, so a time leads nowhere at once.
fn nothing_yet(status: &str) -> &'static str {
    match status {
        "PENDING" => "Nothing found in the newest 20,000 waiting events that were looked at.",
        _ => "Nothing found in the newest 20,000 rows that were looked at. A time range leads there at once.",
    }
}

pub async fn one(viewer: Viewer, State(console): State<Console>, Path(id): Path<String>) -> Result<Markup, Refusal> {
    let id = id.parse().map_err(|_| Refusal::wrong("an event's id is a UUID"))?;
    show(&viewer, &console, id).await
}

/// What Redis knows of an event.
struct Whereabouts {
    entry: Option<String>,
    groups: Vec<GroupDelivery>,
}

async fn show(viewer: &Viewer, console: &Console, id: Uuid) -> Result<Markup, Refusal> {
    let mut session = console.servers.session().await?;
    let event = console.servers.outbox.event(&mut session.connection, id).await?;
    session.done();
    let gone = "there is no row of this event: its id is wrong, or it was cleaned up or discarded";
    let event = event.ok_or_else(|| Refusal::not_found(gone))?;
    let whereabouts = whereabouts(console, &event).await.map_err(|error| crate::failure::on_one_line(&error.into()));
    Ok(page(
        "Event",
        viewer,
        &html! {
            (facts(&event))
            @if event.status == EventStatus::Failed && viewer.may_act() { (acts(viewer, &event)) }
            h2 { "Its way" }
            (way(&event, &console.servers.streams.stream_of(&event.aggregate_type), &whereabouts))
            h2 { "Payload" }
            div #payload { (beginning(&event.payload, EventDetail::SHOWN)) }
            h2 { "Headers" }
            div #headers { (beginning(&event.headers, EventDetail::SHOWN)) }
        },
    ))
}

async fn whereabouts(console: &Console, event: &EventDetail) -> Result<Whereabouts, StreamsError> {
    let streams = &console.servers.streams;
    let stream = streams.stream_of(&event.aggregate_type);
    let last = event.batch.as_ref().and_then(|batch| batch.last_entry.as_deref());
    let Some(published) = event.published_at else { return Ok(Whereabouts { entry: None, groups: Vec::new() }) };
    let until = published.timestamp_millis() + CLOCKS_DIFFER_MS;
    let entry = streams.entry_of(&stream, event.id, last, until).await?;
    let groups = match &entry {
        Some(entry) => streams.deliveries(&stream, entry).await?,
        None => Vec::new(),
    };
    Ok(Whereabouts { entry, groups })
}

fn facts(event: &EventDetail) -> Markup {
    html! {
        dl {
            dt { "Id" } dd { code { (event.id) } }
            dt { "Status" } dd { span #status .{ "status " (event.status.name()) } { (event.status.name()) } }
            dt { "Type" } dd { (event.event_type) }
            dt { "Aggregate" } dd { a href=(link("/events", &[("aggregate_type", &event.aggregate_type), ("aggregate_id", &event.aggregate_id)])) {
                (event.aggregate_type) " " (event.aggregate_id) } }
            dt { "Order" } dd { "seq " (event.seq) ", partition " (event.partition) }
            dt { "Size" } dd { (plural(u64::try_from(event.bytes).unwrap_or_default(), "byte")) " of payload and headers" }
            @if let Some(trace) = &event.traceparent { dt { "Trace" } dd { code #trace { (trace) } } }
            @if event.retry_count > 0 { dt { "Retries" } dd { (event.retry_count) } }
            @if let Some(error) = &event.last_error { dt { "Last error" } dd #error { (error) } }
        }
    }
}

fn acts(viewer: &Viewer, event: &EventDetail) -> Markup {
    html! {
        div.acts {
            form method="post" action=(at("/failures/act")) {
                (token(viewer)) input type="hidden" name="id" value=(event.id);
                button.main #retry name="remedy" value="retry" { "Retry" }
            }
            form method="get" action=(at("/failures/confirm")) {
                input type="hidden" name="id" value=(event.id);
                button.danger #discard name="remedy" value="discard" { "Discard …" }
            }
        }
    }
}

fn way(event: &EventDetail, stream: &str, whereabouts: &Result<Whereabouts, String>) -> Markup {
    html! {
        dl #way {
            @if let Some(at) = event.occurred_at { dt { "Happened" } dd { (moment(at)) } }
            dt { "Inserted" } dd { (moment(event.created_at)) }
            @if event.is_parked { dt { "Next attempt" } dd #parked { "none: parked, since next_retry_at is 'infinity'" } }
            @if let Some(at) = event.next_retry_at { dt { "Next attempt" } dd { (moment(at)) } }
            @match &event.batch {
                Some(batch) => {
                    dt { "Claimed" } dd { (moment(batch.claimed_at)) " by the relay " code { (batch.relay_id) } ", as " (batch.place) " of " (batch.events) " in the batch " code { (batch.batch_id) } }
                    dt { "Settled" } dd { @match batch.settled_at { Some(at) => (moment(at)), None => { "not yet: the batch is on its way" } } }
                }
                None if event.published_at.is_some() => { dt { "Batch" } dd { "no longer in the journal" } }
                None => {}
            }
            @match event.published_at {
                Some(at) => { dt { "Published" } dd { (moment(at)) } }
                None if event.status == EventStatus::Published => { dt { "Published" } dd { "unknown when: somebody has set published_at, or left it out" } }
                None => {}
            }
            @match whereabouts {
                Err(why) => { dt { "Entry" } dd { "unknown: " (why) } }
                Ok(found) => {
                    @if event.published_at.is_some() {
                        dt { "Entry" } dd { @match &found.entry { Some(id) => { code #entry { (id) } }, None => { "not found near its time: trimmed, or too far away" } } }
                    }
                    @for group in &found.groups { dt { "Group " (group.group) } dd data-test="delivery" {
                        (delivery(&group.delivery))
                        @if let Delivery::Dead { dead_id } = &group.delivery {
                            " " a data-test="dead-letter" href=(link("/dead", &[("stream", stream), ("id", dead_id)])) { "Show" }
                        }
                    } }
                    @if found.entry.is_some() && found.groups.is_empty() { dt { "Consumers" } dd { "the stream has no consumer group" } }
                }
            }
        }
    }
}

fn delivery(delivery: &Delivery) -> String {
    match delivery {
        Delivery::NotDelivered => "not delivered yet".to_owned(),
        Delivery::Pending { consumer, deliveries, idle_ms } => {
            let idle = millis(i64::try_from(*idle_ms).unwrap_or(i64::MAX));
            format!("in hand of {consumer} for {idle}, delivered {}", plural(*deliveries, "time"))
        }
        Delivery::Acknowledged => "acknowledged (handled, skipped or given up longer ago)".to_owned(),
        Delivery::Dead { dead_id } => format!("given up: dead letter {dead_id}"),
    }
}
