//! Whether all is well, in one sentence, and the numbers behind it, live.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use commitstream::doctor::{Consumers, Finding, Flow, Report, Verdict, judge_flow};
use commitstream::outbox::{Counted, Glance, RelayRow};
use commitstream::streams::{GroupInfo, StreamFigures};
use futures_util::FutureExt;
use futures_util::stream::{self, Stream, StreamExt};
use maud::{Markup, html};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Console;
use super::page::{self, Counts, Refusal, Tone, at, counted, millis};
use super::servers::Servers;
use super::session::Viewer;
use crate::flow;
use crate::names::StreamNames;
use crate::output::{count, size};

/// Streams that are measured for the overview.
const MOST_STREAMS: usize = 50;

/// Between two pictures, at least.
const REFRESH: Duration = Duration::from_secs(1);

/// A picture is taken so much less often than it could be.
const SPARING: u32 = 20;

/// Consumer groups are looked at less often than the rest: that takes several round trips for each.
const CONSUMERS_FRESH: Duration = Duration::from_secs(10);

/// Findings on the overview; doctor has all.
const MOST_FINDINGS: usize = 8;

/// How long each server may take for a picture.
const LONGEST: Duration = Duration::from_secs(5);

/// A page shows no older picture.
const PAGE_AGE: Duration = Duration::from_secs(2);

/// Viewers of the live numbers at a time.
const MOST_VIEWERS: usize = 16;

struct Picture {
    glance: Glance,
    relays: Vec<RelayRow>,
    /// What is wrong with the flow of events, the worst first.
    report: Report,
    /// While Redis cannot be asked, why.
    streams: Result<Vec<StreamFigures>, String>,
    counts: Counts,
}

impl Picture {
    /// What does not come in time is given up, and the session of PostgreSQL with it.
    async fn take(servers: &Servers, names: &mut StreamNames, latest: &mut Option<Looked>) -> Result<Self, Refusal> {
        let late = |server| anyhow::anyhow!("{server} has not answered within {} seconds", LONGEST.as_secs());
        let rows = async {
            let mut session = servers.session().await?;
            let glance = servers.outbox.glance(&mut session.connection).await?;
            let outbox = servers.outbox.flow(&mut session.connection).await;
            session.done();
            Ok::<_, Refusal>((glance, outbox))
        };
        let (glance, outbox) = timeout(LONGEST, rows).await.map_err(|_| late("PostgreSQL"))??;
        let figures = timeout(LONGEST, figures(servers, names)).await.unwrap_or_else(|_| Err(late("Redis")));
        let streams = figures.map_err(|error| crate::failure::on_one_line(&error));
        let consumers = match &streams {
            Ok(_) => Looked::fresh(latest, servers, names).await,
            Err(why) => Consumers::Unreachable(why.clone()),
        };
        let counts = Counts { failed: positive(glance.failed), dead: dead_letters(&consumers) };
        let relays = outbox.relays.as_ref().map(Clone::clone).unwrap_or_default();
        let report = judge_flow(&servers.settings, &Flow { outbox, consumers });
        Ok(Self { glance, relays, report, streams, counts })
    }

    /// The findings but for the one that is the verdict.
    fn others(&self, verdict: &Verdict) -> Vec<Line> {
        let told = self.report.findings.iter().position(|finding| finding.check == verdict.check);
        let others = self.report.findings.iter().enumerate().filter(|(i, _)| Some(*i) != told);
        others.take(MOST_FINDINGS).map(|(_, finding)| Line::of(finding)).collect()
    }

    fn rate(&self) -> f32 {
        self.relays.iter().map(|relay| relay.events_per_second).sum()
    }

    /// All there ever were in all streams, of either lane.
    fn entries_added(&self) -> Option<u64> {
        self.streams.as_ref().ok()?.iter().map(|stream| stream.entries_added).sum()
    }

    /// The id of each place in the page, its label, the page that says more, and its text.
    fn cards(&self) -> [(&'static str, &'static str, &'static str, String); 8] {
        let glance = &self.glance;
        let alive = self.relays.iter().filter(|relay| relay.alive);
        let partitions: i64 = alive.clone().map(|relay| relay.partitions).sum();
        let ms = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |ms| format!("{ms:.1} ms"));
        let streams = self.streams.as_deref().unwrap_or_default();
        let memory = streams.iter().filter_map(|stream| stream.memory).sum();
        [
            ("unsent", "events wait", "/events?status=PENDING", counted(glance.unsent)),
            ("oldest", "the oldest waits for", "", glance.oldest_unsent_ms.map_or_else(|| "–".to_owned(), millis)),
            ("failed", "events failed", "/failures", counted(glance.failed)),
            ("rate", "events/s through the outbox", "", count(self.rate().round() as u64)),
            ("p50", "insert to published, median", "", ms(glance.latency_p50_ms)),
            ("p99", "99 % within", "", ms(glance.latency_p99_ms)),
            ("relays", "relays alive, partitions owned", "/relays", format!("{} · {partitions}/64", alive.count())),
            ("memory", "of memory in streams", "/streams", size(memory)),
        ]
    }

    fn json(&self) -> Value {
        let verdict = &self.report.verdict();
        let tone = Tone::of(verdict.severity);
        let mut texts: serde_json::Map<_, _> =
            self.cards().into_iter().map(|(id, _, _, text)| (id.to_owned(), Value::from(text))).collect();
        texts.insert("sentence".to_owned(), verdict.sentence.clone().into());
        texts.insert("sign".to_owned(), tone.sign().into());
        json!({ "tone": tone.class(), "texts": texts, "look": look(verdict), "findings": self.others(verdict), "rate": self.rate(), "entries": self.entries_added(),
                "p50": self.glance.latency_p50_ms, "p99": self.glance.latency_p99_ms })
    }
}

/// As the menu shows it: nothing where there is none.
fn positive(events: Counted) -> Option<String> {
    (events.events > 0).then(|| counted(events))
}

fn dead_letters(consumers: &Consumers) -> Option<String> {
    let Consumers::Known(groups) = consumers else { return None };
    let is_counted = groups.iter().all(|group| group.dead.is_some());
    let known: u64 = groups.iter().filter_map(|group| group.dead).sum();
    match (known, is_counted) {
        (0, true) => None,
        (known, true) => Some(count(known)),
        (known, false) => Some(format!("over {}", count(known.max(GroupInfo::COUNTED as u64)))),
    }
}

/// The consumer groups, and when they were looked at.
struct Looked {
    at: Instant,
    took: Duration,
    consumers: Consumers,
}

impl Looked {
    async fn fresh(latest: &mut Option<Self>, servers: &Servers, names: &mut StreamNames) -> Consumers {
        if let Some(latest) = latest
            && latest.at.elapsed() < CONSUMERS_FRESH.max(latest.took * SPARING)
        {
            return latest.consumers.clone();
        }
        let begun = Instant::now();
        let consumers = flow::consumers(&servers.streams, names).boxed().await;
        *latest = Some(Self { at: Instant::now(), took: begun.elapsed(), consumers: consumers.clone() });
        consumers
    }
}

/// The page that says more; none where all is well.
fn look(verdict: &Verdict) -> Option<String> {
    verdict.severity.map(|_| at(page::page_of(verdict.check).unwrap_or("/doctor")))
}

/// A finding in one line, with the page that says more.
#[derive(Serialize)]
struct Line {
    tone: &'static str,
    sign: &'static str,
    text: String,
    href: String,
}

impl Line {
    fn of(finding: &Finding) -> Self {
        let (tone, path) = page::look(finding);
        Self { tone: tone.class(), sign: tone.sign(), text: finding.seen.clone(), href: at(path) }
    }
}

async fn figures(servers: &Servers, names: &mut StreamNames) -> anyhow::Result<Vec<StreamFigures>> {
    let mut figures = Vec::new();
    for stream in names.list(&servers.streams, MOST_STREAMS).await? {
        figures.extend(servers.streams.figures(stream).await?);
    }
    Ok(figures)
}

/// A picture, or why there is none.
struct Sample {
    picture: Result<Picture, String>,
    at: Instant,
    /// Until the next one, for those who look on.
    pause: Duration,
    /// Seconds since 1970.
    t: f64,
}

impl Sample {
    fn json(&self) -> Value {
        let mut json = match &self.picture {
            Ok(picture) => picture.json(),
            Err(why) => json!({ "tone": "bad", "texts": { "sentence": why, "sign": Tone::Bad.sign() }, "findings": [],
                                "rate": null, "entries": null, "p50": null, "p99": null }),
        };
        json["t"] = self.t.into();
        json
    }
}

/// Takes one picture for all who look, and none while nobody does: whoever finds the latest too old takes the next, and the others wait
/// for that one.
pub struct Sampler {
    state: Mutex<Sampled>,
    viewers: Arc<Semaphore>,
}

#[derive(Default)]
struct Sampled {
    latest: Option<Arc<Sample>>,
    names: StreamNames,
    consumers: Option<Looked>,
}

impl Default for Sampler {
    fn default() -> Self {
        Self { state: Mutex::default(), viewers: Arc::new(Semaphore::new(MOST_VIEWERS)) }
    }
}

impl Sampler {
    /// The latest sample, if it is not older than this, or than its pause; otherwise a new one.
    async fn sample(&self, servers: &Servers, oldest: Option<Duration>) -> Arc<Sample> {
        let mut state = self.state.lock().await;
        let Sampled { latest, names, consumers } = &mut *state;
        if let Some(latest) = latest
            && latest.at.elapsed() < oldest.unwrap_or(latest.pause)
        {
            return Arc::clone(latest);
        }
        let begun = Instant::now();
        // Boxed: what is Send of a type so deep is more than the compiler looks into.
        let picture = Picture::take(servers, names, consumers).boxed().await.map_err(|refusal| refusal.why().to_owned());
        let pause = REFRESH.max(begun.elapsed() * SPARING);
        servers.frame.count(picture.as_ref().ok().map(|picture| picture.counts.clone()));
        let t = chrono::Utc::now().timestamp_millis() as f64 / 1_000.0;
        let sample = Arc::new(Sample { picture, at: Instant::now(), pause, t });
        *latest = Some(Arc::clone(&sample));
        sample
    }
}

pub async fn page(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let sample = console.servers.sampler.sample(&console.servers, Some(PAGE_AGE)).await;
    let picture = sample.picture.as_ref().map_err(|why| anyhow::anyhow!("{why}"))?;
    let verdict = picture.report.verdict();
    let tone = Tone::of(verdict.severity);
    Ok(page::page(
        "Overview",
        &viewer,
        &html! {
            p #verdict .{ "verdict " (tone.class()) } role="status" {
                span #sign .sign { (tone.sign()) } " " span #sentence { (verdict.sentence) }
                " " a #look href=[look(&verdict)] hidden[verdict.severity.is_none()] { "Look" }
            }
            (console.servers.examiner.line())
            ul #findings { @for finding in picture.others(&verdict) {
                li .(finding.tone) { span.sign { (finding.sign) } " " (finding.text) " " a href=(finding.href) { "Look" } }
            } }
            div .cards {
                @for (id, label, path, text) in picture.cards() {
                    div.card { b id=(id) { (text) } @if path.is_empty() { span { (label) } } @else { a href=(at(path)) { (label) } } }
                }
            }
            div #live .charts data-source=(at("/live")) {
                div.chart #chart-rates { h2 { "Events per second" } }
                div.chart #chart-latency { h2 { "Insert to published, in ms" } }
            }
            p.quiet { "All entries include the streams lane; Redis counts them from version 7 on. "
                "Latency is of the events published last, at most 200 of the last minute." }
        },
    ))
}

/// Somebody who looks on.
struct Onlooker {
    console: Console,
    /// What the session is known by.
    parts: Parts,
    seen: Option<Arc<Sample>>,
    _permit: OwnedSemaphorePermit,
}

impl Onlooker {
    /// The next sample, as long as the session is valid.
    async fn next(mut self) -> Option<(Event, Self)> {
        let servers = Arc::clone(&self.console.servers);
        loop {
            if self.seen.is_some() {
                tokio::time::sleep(REFRESH).await;
            }
            Viewer::from_request_parts(&mut self.parts, &self.console).await.ok()?;
            let sample = servers.sampler.sample(&servers, None).await;
            if self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &sample)) {
                continue;
            }
            let event = Event::default().event("figures").data(sample.json().to_string());
            self.seen = Some(sample);
            return Some((event, self));
        }
    }
}

/// nginx, as a proxy in front of this, passes each event on at once then.
const UNBUFFERED: (&str, &str) = ("x-accel-buffering", "no");

/// A picture a second, or less often where taking one is not quick, for as long as the page is open and its viewer is logged in. A picture
/// that cannot be taken is told as such.
pub async fn live(
    _: Viewer,
    State(console): State<Console>,
    parts: Parts,
) -> Result<([(&'static str, &'static str); 1], Sse<impl Stream<Item = Result<Event, Infallible>>>), Refusal> {
    let permit = Arc::clone(&console.servers.sampler.viewers).try_acquire_owned();
    let _permit = permit.map_err(|_| anyhow::anyhow!("{MOST_VIEWERS} overviews are open already: close one"))?;
    let onlooker = Onlooker { console, parts, seen: None, _permit };
    let events = stream::unfold(onlooker, Onlooker::next);
    Ok(([UNBUFFERED], Sse::new(events.map(Ok)).keep_alive(KeepAlive::default())))
}
