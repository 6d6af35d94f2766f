//! Events as lines.

use std::ops::ControlFlow;

use commitstream::EventEnvelope;
use commitstream::streams::Entry;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use unicode_width::UnicodeWidthStr;

use crate::output::{Output, Style, padded, printable, shortened};

/// Columns that line up take at most this much; longer values push the rest of their line.
const WIDEST: usize = 40;

/// The payload gets this much of a narrow terminal at least.
const LEAST_PAYLOAD: usize = 20;

/// Prints entries, up to a limit.
pub struct Printer {
    output: Output,
    left: Option<u64>,
    printed: bool,
    /// Of stream, type and aggregate id, as far as seen.
    widths: [usize; 3],
}

/// Whether there is room for more.
pub struct Room(ControlFlow<()>);

impl Room {
    pub fn is_full(&self) -> bool {
        self.0.is_break()
    }
}

/// One entry for programs: the fields as they stand in the stream, the payload and the headers as JSON values.
#[derive(Serialize)]
struct Record<'a> {
    stream: &'a str,
    entry_id: &'a str,
    id: &'a str,
    r#type: &'a str,
    aggregate_type: &'a str,
    aggregate_id: &'a str,
    occurred_at: &'a str,
    payload: &'a RawValue,
    #[serde(skip_serializing_if = "Map::is_empty")]
    headers: &'a Map<String, Value>,
}

impl Printer {
    pub fn new(output: Output, limit: Option<u64>) -> Self {
        Self { output, left: limit, printed: false, widths: [0; 3] }
    }

    pub fn has_printed_nothing(&self) -> bool {
        !self.printed
    }

    pub fn print(&mut self, entries: &[Entry]) -> anyhow::Result<Room> {
        let room = self.left.and_then(|left| usize::try_from(left).ok()).unwrap_or(usize::MAX);
        let entries = &entries[..entries.len().min(room)];
        let mut text = String::new();
        let envelopes: Vec<_> = entries.iter().map(Entry::envelope).collect();
        for (entry, envelope) in entries.iter().zip(&envelopes) {
            if let Ok(envelope) = envelope {
                self.widen(entry, envelope);
            }
        }
        for (entry, envelope) in entries.iter().zip(&envelopes) {
            text += &match (envelope, self.output.json) {
                (Ok(envelope), true) => record(entry, envelope)?,
                (Ok(envelope), false) => self.line(entry, envelope),
                (Err(error), true) => {
                    json!({ "stream": entry.stream, "entry_id": entry.id, "error": error.to_string() }).to_string()
                }
                (Err(error), false) => self.foreign(entry, &error.to_string()),
            };
            text.push('\n');
        }
        if !text.is_empty() {
            self.printed = true;
            self.output.write(&text)?;
        }
        self.left = self.left.map(|left| left.saturating_sub(u64::try_from(entries.len()).unwrap_or(u64::MAX)));
        Ok(Room(if self.left == Some(0) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }))
    }

    fn widen(&mut self, entry: &Entry, envelope: &EventEnvelope) {
        let texts = [&entry.stream, &envelope.event_type, &envelope.aggregate_id];
        for (width, text) in self.widths.iter_mut().zip(texts) {
            *width = printable(text).width().min(WIDEST).max(*width);
        }
    }

    fn line(&self, entry: &Entry, envelope: &EventEnvelope) -> String {
        let time = envelope.occurred_at.format("%Y-%m-%d %H:%M:%S%.3f").to_string();
        let [stream, event_type, id] = [&entry.stream, &envelope.event_type, &envelope.aggregate_id];
        let [stream, event_type, id] =
            [(stream, 0), (event_type, 1), (id, 2)].map(|(text, column)| padded(&printable(text), self.widths[column]));
        let used = [&time, &stream, &event_type, &id].iter().map(|text| text.width() + 2).sum::<usize>();
        let payload = self.fitted(&printable(&one_line(envelope.payload.get())), used);
        let paint = |style, text| self.output.paint(style, text);
        format!(
            "{}  {}  {}  {id}  {payload}",
            paint(Style::Quiet, &time),
            paint(Style::Name, &stream),
            paint(Style::Label, &event_type)
        )
    }

    /// An entry that something else wrote into the stream.
    fn foreign(&self, entry: &Entry, error: &str) -> String {
        let stream = printable(&entry.stream);
        let used = stream.width() + 2;
        format!(
            "{}  {}",
            self.output.paint(Style::Name, &stream),
            self.output.paint(Style::Warning, &self.fitted(&printable(error), used))
        )
    }

    fn fitted(&self, text: &str, used: usize) -> String {
        match self.output.width {
            Some(width) => shortened(text, width.saturating_sub(used).max(LEAST_PAYLOAD)),
            None => text.to_owned(),
        }
    }
}

fn record(entry: &Entry, envelope: &EventEnvelope) -> anyhow::Result<String> {
    let field = |name: &str| entry.field(name).unwrap_or_default();
    let payload = RawValue::from_string(one_line(envelope.payload.get()))?;
    Ok(serde_json::to_string(&Record {
        stream: &entry.stream,
        entry_id: &entry.id,
        id: field("id"),
        r#type: &envelope.event_type,
        aggregate_type: &envelope.aggregate_type,
        aggregate_id: &envelope.aggregate_id,
        occurred_at: field("occurred_at"),
        payload: &payload,
        headers: &envelope.headers,
    })?)
}

/// JSON text on one line. Line breaks stand between its tokens only: inside strings they are escaped.
fn one_line(json: &str) -> String {
    let lines: Vec<&str> = json.split(['\n', '\r', '\t']).map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ")
}
