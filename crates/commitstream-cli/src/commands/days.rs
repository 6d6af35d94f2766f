//! What was done to the partitions of a table that is partitioned by day.

use commitstream::relay::days::DaysChanged;
use serde_json::{Value, json};

use crate::output::{Output, plural, size};

/// For machines.
pub fn json(days: &DaysChanged) -> Value {
    let DaysChanged { made, dropped, bytes, moved, kept, postponed } = days;
    json!({ "made": made, "dropped": dropped, "bytes": bytes, "moved": moved, "kept": kept, "postponed": postponed })
}

/// For people. What was not done is a remark.
pub fn tell(output: &Output, days: &DaysChanged) -> std::io::Result<()> {
    let DaysChanged { made, dropped, bytes, moved, kept, postponed } = days;
    if !made.is_empty() {
        output.line(&format!("made {}: {}", partitions(made), made.join(", ")))?;
    }
    if !dropped.is_empty() {
        let dropped = format!("dropped {}, {}: {}", partitions(dropped), size(*bytes), dropped.join(", "));
        output.line(&match moved {
            0 => dropped,
            moved => format!(
                "{dropped}; {} of them not published, or only lately, moved to event_outbox_rest",
                plural(*moved, "event")
            ),
        })?;
    }
    if !kept.is_empty() {
        let kept = format!("kept {}: {}", partitions(kept), kept.join(", "));
        output.remark(&format!("{kept}; too many events in each are not published, or only lately"))?;
    }
    if *postponed {
        output.remark("partitions are left as they are: a long transaction has event_outbox locked; try again later")?;
    }
    Ok(())
}

fn partitions(names: &[String]) -> String {
    plural(u64::try_from(names.len()).unwrap_or(u64::MAX), "partition")
}
