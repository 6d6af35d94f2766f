//! Dead letters by cause and one by one, and what is done about them.

use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::Redirect;
use commitstream::streams::{DeadGroup, DeadGroups, DeadLetter, Streams, StreamsError, cause_of};
use maud::{Markup, html};

use super::Console;
use super::page::{Query, Refusal, at, beginning, cause_text, link, nothing, page, time, token};
use super::session::{Act, Viewer};
use crate::dead_letters::{Audit, Change, carry_out, position};
use crate::output::{count, plural};

/// Dead letters of all streams on one page.
const PAGE: usize = 25;

/// Streams that one page looks into.
const MOST_STREAMS: usize = 50;

/// Groups by cause on one page.
const MOST_GROUPS: usize = 50;

/// Dead letters that are read at a time where only some are wanted, and how often for one page.
const STEP: usize = 100;
const MOST_STEPS: usize = 20;

/// How long one request goes on with many letters; then the page asks whether to go on.
const LONGEST: Duration = Duration::from_secs(5);

/// Characters of a payload.
const SHOWN: usize = 4_000;

/// Which dead letters are meant; what is not said is any. A group or type that is empty is that of letters that have none.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(default)]
pub struct Asked {
    stream: String,
    group: Option<String>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    cause: Option<String>,
    /// One dead letter.
    id: String,
    after: String,
    /// The last that was shown.
    until: String,
    action: String,
}

impl Asked {
    fn of(act: &Act) -> Self {
        let field = |name: &str| act.field(name).unwrap_or_default().to_owned();
        let given = |name: &str| act.fields.get(name).cloned();
        Self {
            stream: field("stream"),
            group: given("group"),
            event_type: given("type"),
            cause: given("cause"),
            id: String::new(),
            after: field("after"),
            until: field("until"),
            action: field("action"),
        }
    }

    fn of_group(group: &DeadGroup) -> Self {
        Self {
            stream: group.stream.clone(),
            group: Some(group.group.clone()),
            event_type: Some(group.event_type.clone()),
            cause: Some(group.cause.clone()),
            until: group.last_id.clone(),
            ..Self::default()
        }
    }

    /// Whether some letters of a stream are wanted and others not.
    fn is_narrow(&self) -> bool {
        self.group.is_some() || self.event_type.is_some() || self.cause.is_some()
    }

    fn takes(&self, letter: &DeadLetter) -> bool {
        self.group.as_ref().is_none_or(|group| *group == letter.group)
            && self.event_type.as_deref().is_none_or(|event_type| event_type == letter.event_type.as_deref().unwrap_or_default())
            && self.cause.as_ref().is_none_or(|cause| *cause == cause_of(&letter.reason))
    }

    fn query(&self) -> Vec<(&str, &str)> {
        let stream = Some(self.stream.as_str()).filter(|stream| !stream.is_empty());
        let given = [("stream", stream), ("group", self.group.as_deref())];
        let given = given.into_iter().chain([("type", self.event_type.as_deref()), ("cause", self.cause.as_deref())]);
        given.filter_map(|(name, value)| Some((name, value?))).collect()
    }

    fn fields(&self) -> Markup {
        html! {
            @for (name, value) in self.query() { input type="hidden" name=(name) value=(value); }
            @if !self.until.is_empty() { input type="hidden" name="until" value=(self.until); }
        }
    }
}

/// Dead letters of one stream, and where to go on, if there may be more.
struct Found {
    stream: String,
    letters: Vec<DeadLetter>,
    next: Option<String>,
}

pub async fn list(viewer: Viewer, State(console): State<Console>, Query(asked): Query<Asked>) -> Result<Markup, Refusal> {
    let streams = &console.servers.streams;
    let mut names = streams.dead_streams().await?;
    names.retain(|name| asked.stream.is_empty() || asked.stream == *name);
    let is_all = asked.query().is_empty() && asked.after.is_empty() && asked.id.is_empty();
    let groups = if is_all { streams.dead_groups(&names).await? } else { DeadGroups::default() };
    let mut others = names.split_off(names.len().min(MOST_STREAMS));
    let (mut found, mut room) = (Vec::new(), PAGE);
    for stream in names {
        // A heading without anything below it says nothing.
        if room == 0 {
            others.push(stream);
            continue;
        }
        let of = read(streams, stream, &asked, room).await?;
        room -= of.letters.len();
        if !of.letters.is_empty() || of.next.is_some() {
            found.push(of);
        }
    }
    others.sort();
    Ok(page(
        "Dead letters",
        &viewer,
        &html! {
            @if found.is_empty() && others.is_empty() { (none(&asked)) }
            @if !is_all { p { a #all href=(at("/dead")) { "All dead letters" } } }
            @if !groups.groups.is_empty() { (by_cause(&viewer, &groups)) }
            @for of in &found { (letters(&viewer, &asked, of)) }
            (more_streams(&others))
        },
    ))
}

fn none(asked: &Asked) -> Markup {
    if asked.query().is_empty() && asked.id.is_empty() {
        return nothing("No dead letters: no consumer has given up an event.");
    }
    nothing("There is no such dead letter any more: it was retried or discarded.")
}

async fn read(streams: &Streams, stream: String, asked: &Asked, room: usize) -> Result<Found, StreamsError> {
    if !asked.id.is_empty() {
        let letters = streams.dead_letter(&stream, &asked.id).await?.into_iter().collect();
        return Ok(Found { stream, letters, next: None });
    }
    let mut after = if asked.after.is_empty() { "0".to_owned() } else { asked.after.clone() };
    let mut letters = Vec::new();
    for _ in 0..MOST_STEPS {
        let wanted = if asked.is_narrow() { STEP } else { room + 1 };
        let page = streams.dead_letters(&stream, &after, wanted).await?;
        let is_last = page.len() < wanted;
        for letter in page {
            if letters.len() == room {
                return Ok(Found { stream, letters, next: Some(after) });
            }
            after.clone_from(&letter.dead_id);
            if asked.takes(&letter) {
                letters.push(letter);
            }
        }
        if is_last {
            return Ok(Found { stream, letters, next: None });
        }
    }
    Ok(Found { stream, letters, next: Some(after) })
}

fn by_cause(viewer: &Viewer, DeadGroups { groups, at_least }: &DeadGroups) -> Markup {
    let all: u64 = groups.iter().map(|group| group.letters).sum();
    html! {
        p { @if *at_least { "At least " } b { (count(all)) } " given up, by stream, consumer group, type and cause."
            @if *at_least { " Only 10,000 were looked at: each number is the least that it can be." } }
        div.wide { table #groups {
            thead { tr { th { "Stream" } th { "Group" } th { "Type" } th { "Cause" } th.number { "Letters" } th { "Oldest" } th { "Newest" } th {} } }
            tbody { @for group in groups.iter().take(MOST_GROUPS) { (cause(viewer, group)) } }
        } }
        @if groups.len() > MOST_GROUPS { p.quiet #more-groups { "And " (plural((groups.len() - MOST_GROUPS) as u64, "more group")) ", none of them larger." } }
    }
}

fn cause(viewer: &Viewer, group: &DeadGroup) -> Markup {
    let asked = Asked::of_group(group);
    html! { tr {
        td.text { (group.stream) }
        td.name { (group.group) }
        td.text { (group.event_type) }
        td.error title=(group.cause) { (cause_text(&group.example)) }
        td.number { (count(group.letters)) }
        td { @if let Some(at) = group.oldest { (time(at)) } }
        td { @if let Some(at) = group.newest { (time(at)) } }
        td.deeds {
            a href=(link("/dead", &asked.query())) { "Show" }
            @if viewer.may_act() { div.acts { form method="get" action=(at("/dead/confirm")) {
                (asked.fields())
                button name="action" value="retry" data-test="retry-group" { "Retry …" }
                button.danger name="action" value="discard" data-test="discard-group" { "Discard …" }
            } } }
        }
    } }
}

fn letters(viewer: &Viewer, asked: &Asked, of: &Found) -> Markup {
    html! {
        h2 { (of.stream) }
        @if of.letters.is_empty() { p.quiet { "None of those that were looked at." } } @else { div.wide { table data-test="dead" {
            thead { tr { th { "Given up" } th { "Group" } th { "Type" } th { "Aggregate" } th { "Reason" } th {} } }
            tbody { @for letter in &of.letters { (row(viewer, letter)) } }
        } } }
        @if let Some(next) = &of.next {
            @let narrowed = Asked { stream: of.stream.clone(), ..asked.clone() };
            p { a href=(link("/dead", &[narrowed.query(), vec![("after", next)]].concat())) { "More of " (of.stream) } }
        }
    }
}

fn more_streams(others: &[String]) -> Markup {
    html! { @if !others.is_empty() {
        h2 { "More streams" }
        ul { @for stream in others.iter().take(MOST_STREAMS) { li { a href=(link("/dead", &[("stream", stream)])) { (stream) } } } }
        @if others.len() > MOST_STREAMS { p.quiet { "And " (others.len() - MOST_STREAMS) " more: `commitstream dead list` lists all." } }
    } }
}

fn row(viewer: &Viewer, letter: &DeadLetter) -> Markup {
    let text = |field: &Option<String>| field.clone().unwrap_or_else(|| "?".to_owned());
    html! {
        tr {
            td { @if let Some(at) = letter.dead_at { (time(at)) } }
            td.name { (letter.group) }
            td.text { @match &letter.event_id {
                Some(id) => { a data-test="event" href=(at(&format!("/events/{id}"))) { (text(&letter.event_type)) } }
                None => (text(&letter.event_type)),
            } }
            td.text { (text(&letter.aggregate_type)) " " (text(&letter.aggregate_id)) }
            td.error {
                (letter.reason) " " span.quiet { "after " (plural(letter.attempts.into(), "attempt")) }
                @if let Some(payload) = &letter.payload { details { summary { "Payload" } (beginning(payload.get(), SHOWN)) } }
            }
            td.deeds {
                @if viewer.may_act() {
                    form.acts method="post" action=(at("/dead/act")) {
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

fn change(name: &str) -> Result<Change, Refusal> {
    match name {
        "retry" => Ok(Change::Retry),
        "discard" => Ok(Change::Discard),
        _ => Err(Refusal::wrong("retry, or discard?")),
    }
}

/// What is meant, how many that are, and the button that does it.
pub async fn confirm(viewer: Viewer, State(console): State<Console>, Query(asked): Query<Asked>) -> Result<Markup, Refusal> {
    let change = change(&asked.action)?;
    let DeadGroups { groups, at_least } = console.servers.streams.dead_groups(std::slice::from_ref(&asked.stream)).await?;
    let is_meant = |group: &&DeadGroup| {
        let of = [&asked.group, &asked.event_type, &asked.cause].map(Option::as_ref);
        of == [Some(&group.group), Some(&group.event_type), Some(&group.cause)]
    };
    let group = groups.iter().find(is_meant);
    let group = group.ok_or_else(|| Refusal::not_found("there are no such dead letters any more"))?;
    let letters = format!("{}{}", if at_least { "at least " } else { "" }, plural(group.letters, "dead letter"));
    let question = match change {
        Change::Retry => format!("Deliver {letters} again?"),
        Change::Discard => format!("Delete {letters} for good?"),
    };
    let asked = Asked::of_group(group);
    Ok(page(
        "Dead letters",
        &viewer,
        &html! {
            p.verdict.warn #question { (question) }
            dl {
                dt { "Stream" } dd { (group.stream) }
                dt { "Group" } dd { (group.group) }
                dt { "Type" } dd { (group.event_type) }
                dt { "Cause" } dd { (cause_text(&group.cause)) }
            }
            div.acts {
                @if viewer.may_act() { form method="post" action=(at("/dead/act")) {
                    (token(&viewer)) (asked.fields())
                    @match change {
                        Change::Retry => { button.main #confirm name="action" value="retry" { "Deliver again" } }
                        Change::Discard => { button.danger #confirm name="action" value="discard" { "Delete for good" } }
                    }
                } }
                a #back href=(at("/dead")) { "Back" }
            }
        },
    ))
}

/// Retries or discards one dead letter, or those that were shown.
pub async fn act(State(console): State<Console>, act: Act) -> Result<Redirect, Refusal> {
    let asked = Asked::of(&act);
    let change = change(&asked.action)?;
    let known = console.servers.streams.dead_streams().await?.contains(&asked.stream);
    if !known {
        return Err(Refusal::not_found("there is no such dead letter any more"));
    }
    let outcome = match act.field("dead_id") {
        Some(dead_id) => one(&console, &act, change, &asked.stream, dead_id).await?,
        None => many(&console, &act, change, asked).await?,
    };
    Ok(act.ended(&console, "Dead letters", outcome))
}

async fn one(console: &Console, act: &Act, change: Change, stream: &str, dead_id: &str) -> Result<Markup, Refusal> {
    let letter = console.servers.streams.dead_letter(stream, dead_id).await?;
    let letter = letter.ok_or_else(|| Refusal::not_found("there is no such dead letter any more"))?;
    let left = apply(console, act, change, &[letter]).await?;
    Ok(match (left.first(), change) {
        (Some(why), _) => outcome("warn", &html! { "Left as it was: " (why) "." }, &html! {}),
        (None, Change::Retry) => {
            let again = "Delivered again, to the same group only: a running consumer takes over within about a second.";
            outcome("good", &html! { (again) }, &html! {})
        }
        (None, Change::Discard) => outcome("good", &html! { "Deleted." }, &html! {}),
    })
}

/// Why each letter was left as it was that was not changed.
async fn apply(console: &Console, act: &Act, change: Change, letters: &[DeadLetter]) -> Result<Vec<String>, Refusal> {
    let mut session = console.servers.session().await?;
    let audit = Audit { outbox: &console.servers.outbox, connection: &mut session.connection, who: &act.viewer.who };
    let left = carry_out(&console.servers.streams, Some(audit), change, letters).await?;
    session.done();
    Ok(left.into_iter().map(|(_, why)| why).collect())
}

/// In steps; after some seconds it comes back and says how far it is. What came after the last that was shown is left alone.
async fn many(console: &Console, act: &Act, change: Change, mut asked: Asked) -> Result<Markup, Refusal> {
    let until = position(&asked.until).ok_or_else(|| Refusal::wrong("not a place: begin anew"))?;
    let (begun, mut done, mut left) = (Instant::now(), act.number("before").unsigned_abs(), Vec::new());
    let mut left_before = act.number("left").unsigned_abs();
    let has_more = loop {
        let after = if asked.after.is_empty() { "0" } else { &asked.after };
        let page = console.servers.streams.dead_letters(&asked.stream, after, STEP).await?;
        let is_shown = |letter: &&DeadLetter| position(&letter.dead_id).is_some_and(|place| place <= until);
        let shown = page.iter().take_while(is_shown).count();
        let Some(last) = page[..shown].last().map(|letter| letter.dead_id.clone()) else { break false };
        let letters: Vec<DeadLetter> = page.into_iter().take(shown).filter(|letter| asked.takes(letter)).collect();
        if !letters.is_empty() {
            let left_now = apply(console, act, change, &letters).await?;
            done += (letters.len() - left_now.len()) as u64;
            left_before += left_now.len() as u64;
            left = left_now;
        }
        asked.after = last;
        if begun.elapsed() > LONGEST {
            break true;
        }
    };
    let what = match change {
        Change::Retry => "delivered again, to the same group only",
        Change::Discard => "deleted",
    };
    let more = html! {
        @if left_before > 0 { p #left { (plural(left_before, "letter")) " left as they were" @if let Some(why) = left.first() { ", for example: " (why) } "." } }
        @if has_more {
            p { "There are more. Each step is done and written down; it goes on from here." }
            form method="post" action=(at("/dead/act")) {
                (token(&act.viewer)) (asked.fields())
                input type="hidden" name="after" value=(asked.after);
                input type="hidden" name="before" value=(done);
                input type="hidden" name="left" value=(left_before);
                button #go-on name="action" value=(asked.action) { "Go on" }
            }
        }
    };
    let tone = if done > 0 { "good" } else { "warn" };
    Ok(outcome(tone, &html! { (plural(done, "dead letter")) " " (what) "." }, &more))
}

fn outcome(tone: &str, said: &Markup, more: &Markup) -> Markup {
    html! {
        p #outcome .{ "verdict " (tone) } role="status" { (said) }
        (more)
        p { a href=(at("/dead")) { "To the dead letters" } " · " a href=(at("/audit")) { "To the audit" } }
    }
}
