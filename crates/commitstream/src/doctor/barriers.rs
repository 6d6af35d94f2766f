//! What others set up on the tables: a statement that it keeps from changing a row is accepted all the same.

use super::advice::{identifier, psql};
use super::{Finding, Report, Severity, error, finding, note, warning};
use crate::config::Settings;
use crate::outbox::OutboxError;
use crate::outbox::examine::{Barrier, BarrierKind};

pub(super) fn judge(report: &mut Report, settings: &Settings, facts: &Result<Vec<Barrier>, OutboxError>) {
    match facts {
        Ok(barriers) => {
            report.check("row-security", row_security(settings, barriers));
            report.check("triggers", barriers.iter().filter_map(|barrier| other(settings, barrier)));
        }
        Err(error) => report.unknown("row-security", error),
    }
}

fn row_security(settings: &Settings, barriers: &[Barrier]) -> Option<Finding> {
    let secured: Vec<&Barrier> = barriers.iter().filter(|barrier| barrier.kind == BarrierKind::RowSecurity).collect();
    let first = secured.first()?;
    let names: Vec<&str> = secured.iter().map(|barrier| barrier.table.as_str()).collect();
    let disable = |name: &&str| format!("ALTER TABLE {} DISABLE ROW LEVEL SECURITY", qualified(settings, name));
    let disable: Vec<String> = names.iter().map(disable).collect();
    let is_active = first.is_direct || secured.iter().any(|barrier| barrier.is_direct);
    Some(finding(
        if is_active { Severity::Error } else { Severity::Warning },
        format!(
            "row-level security is enabled on {}, and {}",
            names.join(", "),
            if is_active { "in force for this user" } else { "in force for other users than this one" }
        ),
        "rows that a policy hides are neither published nor counted, and those that it does not let a relay change stay unsent in the table",
        psql(&disable.iter().map(String::as_str).collect::<Vec<_>>()) + " (as their owner), or give the relay's user BYPASSRLS",
    ))
}

fn other(settings: &Settings, barrier: &Barrier) -> Option<Finding> {
    let Barrier { kind, table, name, is_direct } = barrier;
    let qualified = qualified(settings, table);
    match kind {
        BarrierKind::RowSecurity => None,
        BarrierKind::Trigger => {
            let mend = psql(&[&format!("ALTER TABLE {qualified} DISABLE TRIGGER {}", identifier(name))]);
            let seen = format!("the trigger {name} of {table} is none of Commitstream's");
            Some(if *is_direct {
                let why = "where it returns NULL or raises an error, events are not written, or stay unsent though they are in their streams";
                warning(seen, why, format!("make sure that it returns the row; to switch it off: {mend}"))
            } else {
                note(
                    seen,
                    "where it raises an error, events are not written, or cannot be settled",
                    format!("to switch it off: {mend}"),
                )
            })
        }
        BarrierKind::Rule => Some(error(
            format!("the rule {name} of {table} is none of Commitstream's"),
            "a rule changes what statements do, or how many rows they say that they changed; relays and publishers then stop",
            psql(&[&format!("DROP RULE {} ON {qualified}", identifier(name))]),
        )),
        BarrierKind::Reference => Some(note(
            format!("the foreign key {name} refers to {table}"),
            "rows that it refers to cannot be deleted: they stay as PUBLISHED, and clean-up fails on them",
            "give it ON DELETE CASCADE or ON DELETE SET NULL, or drop it",
        )),
    }
}

fn qualified(settings: &Settings, name: &str) -> String {
    format!("{}.{}", identifier(&settings.database.schema), identifier(name))
}
