//! Whether all is well, in one sentence, and the numbers behind it, live.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use commitstream::outbox::{Glance, RelayRow};
use commitstream::streams::StreamFigures;
use futures_util::stream::{self, Stream, StreamExt};
use maud::{Markup, html};
use serde_json::{Value, json};

use super::Console;
use super::page::{self, Refusal, counted, millis, number};
use super::session::Viewer;
use crate::output::{count, plural, size};

/// An unsent event that waits for longer is not usual.
const USUAL_WAIT_MS: i64 = 30_000;

/// Streams that are measured for the overview.
const MOST_STREAMS: usize = 50;

/// Between two pictures.
const REFRESH: Duration = Duration::from_secs(1);

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tone {
    Good,
    Warn,
    Bad,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }

    /// Colour is not for everybody.
    fn sign(self) -> &'static str {
        match self {
            Self::Good => "✓",
            Self::Warn => "!",
            Self::Bad => "✗",
        }
    }
}

struct Picture {
    glance: Glance,
    relays: Vec<RelayRow>,
    /// `None` while Redis cannot be asked, and why.
    streams: Result<Vec<StreamFigures>, String>,
}

impl Picture {
    async fn take(console: &Console) -> Result<Self, Refusal> {
        let servers = &console.servers;
        let mut session = servers.session().await?;
        let glance = servers.outbox.glance(&mut session.connection).await?;
        let relays = servers.outbox.relays(&mut session.connection).await?;
        session.done();
        let figures = async {
            let mut figures = Vec::new();
            for stream in servers.streams.list().await?.iter().take(MOST_STREAMS) {
                figures.extend(servers.streams.figures(stream).await?);
            }
            Ok::<_, anyhow::Error>(figures)
        };
        let streams = figures.await.map_err(|error| crate::failure::on_one_line(&error));
        Ok(Self { glance, relays, streams })
    }

    fn verdict(&self) -> (Tone, String) {
        let (glance, unsent) = (&self.glance, counted(self.glance.unsent));
        let alive: Vec<_> = self.relays.iter().filter(|relay| relay.alive).collect();
        let unable = alive.iter().find_map(|relay| Some((relay, relay.reason.as_ref()?)));
        if let Err(why) = &self.streams {
            return (Tone::Bad, format!("Redis cannot be used: {why}"));
        }
        if glance.is_paused {
            return (Tone::Warn, format!("Publishing is paused by an operator; {unsent} events wait."));
        }
        if alive.is_empty() && glance.unsent.events > 0 {
            return (Tone::Bad, format!("No relay is alive, and {unsent} events wait: start `commitstream relay`."));
        }
        if let Some((relay, why)) = unable {
            return (Tone::Bad, format!("The relay {} {} cannot work: {why}", relay.host, relay.pid));
        }
        if let Some(waits) = glance.oldest_unsent_ms.filter(|waits| *waits > USUAL_WAIT_MS) {
            return (Tone::Warn, format!("{unsent} events wait, the oldest for {}.", millis(waits)));
        }
        match (alive.len(), glance.failed.events) {
            (_, 1..) => (Tone::Warn, format!("Events flow, but {} failed and wait for a decision.", counted(glance.failed))),
            (0, _) => (Tone::Warn, "No relay is alive. Nothing waits, but nothing would be published.".to_owned()),
            _ => (Tone::Good, "All is well: events flow.".to_owned()),
        }
    }

    fn rate(&self) -> f32 {
        self.relays.iter().map(|relay| relay.events_per_second).sum()
    }

    /// All there ever were in all streams, of either lane.
    fn entries_added(&self) -> Option<u64> {
        self.streams.as_ref().ok()?.iter().map(|stream| stream.entries_added).sum()
    }

    /// The id of each place in the page, its label, and its text.
    fn cards(&self) -> [(&'static str, &'static str, String); 8] {
        let glance = &self.glance;
        let alive = self.relays.iter().filter(|relay| relay.alive);
        let partitions: i64 = alive.clone().map(|relay| relay.partitions).sum();
        let ms = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |ms| format!("{ms:.1} ms"));
        let streams = self.streams.as_deref().unwrap_or_default();
        let memory = streams.iter().filter_map(|stream| stream.memory).sum();
        [
            ("unsent", "events wait", counted(glance.unsent)),
            ("oldest", "the oldest waits for", glance.oldest_unsent_ms.map_or_else(|| "–".to_owned(), millis)),
            ("failed", "events failed", counted(glance.failed)),
            ("rate", "events/s through the outbox", count(self.rate().round() as u64)),
            ("p50", "insert to published, median", ms(glance.latency_p50_ms)),
            ("p99", "99 % within", ms(glance.latency_p99_ms)),
            ("relays", "relays alive, partitions owned", format!("{}, {partitions} of 64", alive.count())),
            ("memory", "in streams", format!("{} in {}", size(memory), plural(streams.len() as u64, "stream"))),
        ]
    }

    fn json(&self, t: f64) -> Value {
        let (tone, sentence) = self.verdict();
        let mut texts: serde_json::Map<_, _> =
            self.cards().into_iter().map(|(id, _, text)| (id.to_owned(), Value::from(text))).collect();
        texts.insert("sentence".to_owned(), sentence.into());
        texts.insert("sign".to_owned(), tone.sign().into());
        json!({ "t": t, "tone": tone.class(), "texts": texts, "rate": self.rate(), "entries": self.entries_added(),
                "p50": self.glance.latency_p50_ms, "p99": self.glance.latency_p99_ms })
    }
}

pub async fn page(viewer: Viewer, State(console): State<Console>) -> Result<Markup, Refusal> {
    let picture = Picture::take(&console).await?;
    let (tone, sentence) = picture.verdict();
    Ok(page::page(
        "Overview",
        &viewer,
        &html! {
            p #verdict .{ "verdict " (tone.class()) } role="status" {
                span #sign .sign { (tone.sign()) } " " span #sentence { (sentence) }
            }
            div .cards {
                @for (id, label, text) in picture.cards() { div.card { b id=(id) { (text) } span { (label) } } }
            }
            div #live .charts data-source="/console/live" {
                div.chart #chart-rates { h2 { "Events per second" } }
                div.chart #chart-latency { h2 { "Insert to published" } }
            }
            p.quiet { "All entries include the streams lane; Redis counts them from version 7 on. "
                "Latency is of the events published last, at most 200 of the last minute. "
                (number(picture.glance.open_batches)) " batches were open when this page was made." }
        },
    ))
}

/// One picture a second, for as long as the page is open. A picture that cannot be taken is told as such.
pub async fn live(_: Viewer, State(console): State<Console>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let pictures = stream::unfold((console, None), |(console, pause): (Console, Option<Duration>)| async move {
        if let Some(pause) = pause {
            tokio::time::sleep(pause).await;
        }
        let t = chrono::Utc::now().timestamp_millis() as f64 / 1_000.0;
        let data = match Picture::take(&console).await {
            Ok(picture) => picture.json(t),
            Err(refusal) => json!({ "t": t, "tone": "bad", "texts": { "sentence": refusal.why(), "sign": "✗" },
                                    "rate": null, "entries": null, "p50": null, "p99": null }),
        };
        Some((Event::default().event("figures").data(data.to_string()), (console, Some(REFRESH))))
    });
    Sse::new(pictures.map(Ok)).keep_alive(KeepAlive::default())
}
