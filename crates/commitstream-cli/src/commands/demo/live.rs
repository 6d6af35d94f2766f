//! The line that shows what is happening.

use std::io;
use std::time::Duration;

use crate::commands::latency::Summary;
use crate::output::{Output, Style, count};

/// On a terminal the line is rewritten in place; elsewhere each is a line of its own.
const IN_PLACE_EVERY: Duration = Duration::from_secs(1);
const PLAIN_EVERY: Duration = Duration::from_secs(2);

const HEADINGS: [&str; 2] = [
    "        critical: outbox, relay, stream        high-frequency: to the stream",
    "  time  events/s       p50       p99  backlog  events/s       p50       p99",
];

/// What the last moments brought.
pub struct Sample {
    pub running: Duration,
    pub critical: LaneSample,
    pub high_frequency: LaneSample,
}

pub struct LaneSample {
    pub per_second: f64,
    pub latency: Option<Summary>,
    pub backlog: u64,
}

pub struct Live {
    output: Output,
    headed: bool,
    /// A line without line break stands on the terminal.
    open: bool,
}

impl Live {
    pub fn new(output: Output) -> Self {
        Self { output, headed: false, open: false }
    }

    pub fn interval(&self) -> Duration {
        if self.output.width.is_some() { IN_PLACE_EVERY } else { PLAIN_EVERY }
    }

    pub fn show(&mut self, sample: &Sample) -> io::Result<()> {
        if self.output.json {
            return Ok(());
        }
        if !self.headed {
            self.headed = true;
            HEADINGS.iter().try_for_each(|heading| self.output.line(&self.output.paint(Style::Label, heading)))?;
        }
        let line = line(sample);
        match self.output.width {
            // A line that wraps could not be rewritten.
            Some(width) => {
                self.open = true;
                let fitting: String = line.chars().take(width.saturating_sub(1)).collect();
                // The cursor goes back to the margin: a message of the log then replaces the line instead of continuing it.
                self.output.write(&format!("\r{fitting}\x1b[K\r"))
            }
            None => self.output.line(&line),
        }
    }

    /// Leaves the last line where it stands.
    pub fn end(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open) { self.output.write("\n") } else { Ok(()) }
    }
}

fn line(sample: &Sample) -> String {
    let (critical, fast) = (&sample.critical, &sample.high_frequency);
    let lane = |lane: &LaneSample| {
        let (p50, p99) = (millis(lane.latency.map(|l| l.p50_ms)), millis(lane.latency.map(|l| l.p99_ms)));
        (per_second(lane.per_second), p50, p99)
    };
    let ((rate, p50, p99), (fast_rate, fast_p50, fast_p99)) = (lane(critical), lane(fast));
    let (seconds, backlog) = (sample.running.as_secs_f64().round(), count(critical.backlog));
    format!("{seconds:>4} s  {rate:>8}  {p50:>8}  {p99:>8}  {backlog:>7}  {fast_rate:>8}  {fast_p50:>8}  {fast_p99:>8}")
}

pub fn per_second(rate: f64) -> String {
    // A rate is neither negative nor beyond what fits.
    count(rate.round() as u64)
}

/// Milliseconds with two to three digits: `0.42 ms`, `4.2 ms`, `42 ms`, `4.2 s`.
pub fn millis(millis: Option<f64>) -> String {
    match millis {
        None => "-".to_owned(),
        Some(ms) if ms < 0.995 => format!("{ms:.2} ms"),
        Some(ms) if ms < 9.95 => format!("{ms:.1} ms"),
        Some(ms) if ms < 999.5 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_under_their_headings() {
        let latency = |p50_ms, p99_ms| Some(Summary { p50_ms, p99_ms, max_ms: p99_ms });
        let sample = Sample {
            running: Duration::from_millis(11_990),
            critical: LaneSample { per_second: 503.4, latency: latency(2.13, 15.9), backlog: 1_003 },
            high_frequency: LaneSample { per_second: 1_501.7, latency: None, backlog: 0 },
        };
        let text = format!("{}\n{}", HEADINGS[1], line(&sample));
        insta::assert_snapshot!(text, @r"
          time  events/s       p50       p99  backlog  events/s       p50       p99
          12 s       503    2.1 ms     16 ms    1,003     1,502         -         -
        ");
    }

    #[test]
    fn a_line_fits_a_small_terminal() {
        assert!(HEADINGS.iter().all(|heading| heading.len() < 80));
    }

    #[test]
    fn latencies_have_few_digits() {
        let texts = [0.0, 0.4213, 0.9949, 0.999, 9.94, 9.96, 421.7, 999.6].map(|ms| millis(Some(ms)));
        assert_eq!(texts, ["0.00 ms", "0.42 ms", "0.99 ms", "1.0 ms", "9.9 ms", "10 ms", "422 ms", "1.0 s"]);
    }
}
