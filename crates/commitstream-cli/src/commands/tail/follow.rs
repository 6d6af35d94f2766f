//! Following streams: entries as they come, streams as they appear, outages as they pass.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use commitstream::streams::{Entry, StreamTail, Streams, StreamsError};

use super::history::order_of;
use super::show::Printer;
use crate::failure::on_one_line;
use crate::output::Output;

/// Entries of each stream that are read at once.
const PAGE: usize = 500;

/// Longest wait for entries, and shortest pause between two looks for new streams and two tries during an outage.
const PATIENCE: Duration = Duration::from_millis(500);

/// Looking for streams reads all keys of the server, so it takes one part in so many of the time at most.
const SHARE: u32 = 20;

/// Follows until the printer is full or somebody ends the process.
pub async fn run(
    streams: Streams,
    positions: BTreeMap<String, String>,
    finds_new: bool,
    printer: &mut Printer,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let mut follower = Follower { tail: streams.tail(positions), streams, finds_new, next_look: Instant::now() };
    let mut is_down = false;
    loop {
        match follower.next().await {
            Ok(entries) => {
                if is_down {
                    output.remark("Redis answers again")?;
                }
                is_down = false;
                if printer.print(&entries)?.is_full() {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            Err(error) if error.is_outage() => {
                if !is_down {
                    output.remark(&format!("{}; waiting for it", on_one_line(&error.into())))?;
                }
                is_down = true;
                tokio::time::sleep(PATIENCE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

struct Follower {
    streams: Streams,
    tail: StreamTail,
    finds_new: bool,
    next_look: Instant,
}

impl Follower {
    async fn next(&mut self) -> Result<Vec<Entry>, StreamsError> {
        let now = Instant::now();
        if self.finds_new && now >= self.next_look {
            for stream in self.streams.list().await? {
                // It was not there before, so all that is in it is new.
                self.tail.follow(&stream, "0");
            }
            self.next_look = now + PATIENCE.max(now.elapsed() * SHARE);
        }
        let mut entries = self.tail.next(PAGE, PATIENCE).await?;
        entries.sort_by_key(|entry| order_of(&entry.id));
        Ok(entries)
    }
}
