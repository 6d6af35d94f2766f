//! What the migrations made.

use super::advice::{age, identifier, psql, size};
use super::{Finding, Report, Severity, error, finding, note, warning};
use crate::config::Settings;
use crate::outbox::examine::{Difference, OutboxFacts, Recorded, Rights, SchemaFacts, SizeFacts};
use crate::outbox::{LATEST_VERSION, PARTITIONS, SequenceFacts};

/// Fewer dead rows than this are no trouble.
const MANY_DEAD: i64 = 100_000;

/// Vacuum comes to a busy table about every minute.
const LATE_VACUUM_MS: i64 = 10 * 60 * 1_000;

/// A row takes less than this in the table itself, since more is stored out of line.
const LARGEST_ROW: i64 = 8_192;
const LARGE_TABLE: i64 = 256 << 20;

/// The longest entry of an index takes less.
const LARGEST_ENTRY: i64 = 1_024;
const LARGE_INDEX: i64 = 64 << 20;

pub(super) fn migration(settings: &Settings, recorded: Recorded) -> Option<Finding> {
    let schema = &settings.database.schema;
    match recorded {
        Recorded::Version(LATEST_VERSION) => None,
        Recorded::Nothing => Some(error(
            format!("schema {schema} has no outbox tables"),
            "there is nothing to write events into; or the setting app.database.schema (OUTBOX_SCHEMA) names another schema",
            "commitstream migrate",
        )),
        Recorded::Foreign => Some(error(
            format!("schema {schema} has an event_outbox that no migration of Commitstream made"),
            "neither producers nor relays can use it",
            psql(&["CREATE SCHEMA old", &format!("ALTER TABLE {}.event_outbox SET SCHEMA old", identifier(schema))])
                + " && commitstream migrate, then copy its unsent rows",
        )),
        Recorded::Version(version) if version < LATEST_VERSION => Some(error(
            format!("the outbox tables have version {version}, and this build needs {LATEST_VERSION}"),
            "relays of this build do not start",
            "stop the relays, then: commitstream migrate",
        )),
        Recorded::Version(version) => Some(note(
            format!("the outbox tables have version {version}, and this build knows {LATEST_VERSION}"),
            "a newer build made them; what they should look like is not known here",
            "use the newer build of commitstream for relays and doctor",
        )),
    }
}

pub(super) fn judge(report: &mut Report, settings: &Settings, is_of_this_build: bool, facts: &OutboxFacts) {
    match &facts.schema {
        Ok(found) => {
            if is_of_this_build {
                report.check("schema", changed(settings, found));
                report.check("indexes", indexes(settings, found));
            }
            report.check("leases", leases(settings, found.leases));
        }
        Err(error) => report.unknown("schema", error),
    }
    match &facts.sequences {
        Ok(found) => report.check("sequences", sequences(found)),
        Err(error) => report.unknown("sequences", error),
    }
    super::barriers::judge(report, settings, &facts.barriers);
    match &facts.sizes {
        Ok(sizes) => report.check("bloat", bloat(settings, sizes)),
        Err(error) => report.unknown("bloat", error),
    }
    match &facts.missing_days {
        Ok(days) => report.check("partitions-ahead", days.as_deref().and_then(missing_days)),
        Err(error) => report.unknown("partitions-ahead", error),
    }
}

fn qualified(settings: &Settings, name: &str) -> String {
    format!("{}.{name}", identifier(&settings.database.schema))
}

/// Everything but indexes.
fn changed(settings: &Settings, facts: &SchemaFacts) -> Vec<Finding> {
    let others = facts.differences.iter().filter(|difference| difference.kind != "index");
    others.map(|difference| part(settings, difference)).collect()
}

fn part(settings: &Settings, difference: &Difference) -> Finding {
    let Difference { kind, name, expected, found } = difference;
    let (table, short) = name.split_once('.').unwrap_or(("event_outbox", name));
    let table = qualified(settings, table);
    let seen = match found {
        None => format!("the {kind} {name} is missing"),
        Some(_) if *kind == "function" => format!("the function {name} was changed"),
        Some(found) => format!("the {kind} {name} is {found}, not {expected}"),
    };
    let mend = match (*kind, found) {
        ("trigger", Some(found)) if found.contains(" DISABLED") => psql(&[&format!("ALTER TABLE {table} ENABLE TRIGGER {name}")]),
        ("trigger", found) => {
            let drop = format!("DROP TRIGGER {name} ON {table}");
            let create = format!(
                "CREATE TRIGGER {name} AFTER INSERT ON {table} FOR EACH STATEMENT EXECUTE FUNCTION {}",
                qualified(settings, "outbox_wake_relay()")
            );
            let statements = if found.is_some() { vec![drop.as_str(), create.as_str()] } else { vec![create.as_str()] };
            psql(&statements)
        }
        ("function", _) => {
            let file = if *name == "outbox_wake_relay" { "V9__hold_under_faults.sql" } else { "V3__create_outbox_table.sql" };
            format!("apply the CREATE FUNCTION {name} of migrations/{file} again, with OR REPLACE")
        }
        ("constraint", None) => psql(&[&format!("ALTER TABLE {table} ADD CONSTRAINT {short} {expected}")]),
        ("constraint", Some(_)) => {
            psql(&[&format!("ALTER TABLE {table} DROP CONSTRAINT {short}, ADD CONSTRAINT {short} {expected}")])
        }
        _ => format!("make the column {short} of {table} again what the files of migrations/ say: {expected}"),
    };
    let why = match *kind {
        "trigger" | "function" => {
            "commits may not wake the relay, so that events wait until it looks by itself (pollInterval), or inserts fail"
        }
        "constraint" => "the table takes what cannot be published",
        _ => "statements of relays and producers may fail",
    };
    error(seen, why, mend)
}

fn indexes(settings: &Settings, facts: &SchemaFacts) -> Vec<Finding> {
    let why = "the relay's statements read whole tables instead, and get slower with every row";
    // A partitioned table takes no index CONCURRENTLY.
    let concurrently = if facts.is_partitioned { "" } else { " CONCURRENTLY" };
    let mut found = Vec::new();
    for Difference { name, expected, found: there, .. } in
        facts.differences.iter().filter(|difference| difference.kind == "index")
    {
        let schema = format!(" ON {}.", identifier(&settings.database.schema));
        let create = expected.replacen(" ON ", &schema, 1).replacen("CREATE INDEX", &format!("CREATE INDEX{concurrently}"), 1);
        let drop = format!("DROP INDEX {}", qualified(settings, name));
        found.push(match there {
            None => error(format!("the index {name} is missing"), why, psql(&[&create])),
            Some(there) => error(format!("the index {name} is another one: {there}"), why, psql(&[&drop, &create])),
        });
    }
    for name in &facts.invalid {
        let mend = psql(&[&format!("REINDEX INDEX CONCURRENTLY {name}")]);
        found.push(error(format!("the index {name} is invalid: its making was broken off"), why, mend));
    }
    found
}

fn leases(settings: &Settings, leases: i64) -> Option<Finding> {
    let missing = i64::try_from(PARTITIONS).unwrap_or(i64::MAX) - leases;
    (missing > 0).then(|| {
        let table = qualified(settings, "outbox_lease");
        error(
            format!("outbox_lease has {leases} of {PARTITIONS} rows"),
            "events of a partition without a row are never published",
            psql(&[&format!("INSERT INTO {table} (partition_no) SELECT generate_series(0, 63) ON CONFLICT DO NOTHING")]),
        )
    })
}

/// Where this user may not read a sequence, the relay finds out by itself.
fn sequences(found: &[SequenceFacts]) -> Vec<Finding> {
    let behind = found.iter().filter(|facts| facts.is_behind());
    let tell = |facts: &SequenceFacts| {
        let SequenceFacts { column, next, highest, .. } = facts;
        let why = match column.as_str() {
            "event_outbox.seq" => {
                "events that are written now get lower numbers than older ones, and overtake those of their aggregates that are unsent; a relay \
                 sets the sequence when it starts, if its user may"
            }
            "outbox_batch.batch_no" => "after a failover of Redis a relay may mistake which batch was appended last",
            _ => "actions of operators fail, because their numbers were given before",
        };
        let next = next.unwrap_or_default();
        error(
            format!("the sequence of {column} has begun anew: the next number is {next}, and the table holds {highest}"),
            why,
            psql(&[&facts.statement()]) + if facts.may_set { "" } else { " (as the owner of the table)" },
        )
    };
    behind.map(tell).collect()
}

pub(super) fn privileges(settings: &Settings, rights: &Rights) -> Vec<Finding> {
    let lacks = |severity: Severity, denied: &[String], why: &str| {
        let grant = |denied: &String| {
            let (table, privileges) = denied.split_once(": ")?;
            let on = match table {
                "schema" => format!("SCHEMA {}", identifier(&settings.database.schema)),
                table => qualified(settings, table),
            };
            Some(format!("GRANT {privileges} ON {on} TO {}", identifier(&rights.user)))
        };
        let grants: Vec<String> = denied.iter().filter_map(grant).collect();
        (!grants.is_empty()).then(|| {
            finding(
                severity,
                format!("the user {} lacks rights on the outbox tables ({})", rights.user, denied.join("; ")),
                why,
                psql(&grants.iter().map(String::as_str).collect::<Vec<_>>()) + " (as their owner)",
            )
        })
    };
    let relay = lacks(Severity::Error, &rights.denied, "a relay that connects as this user cannot work");
    // A relay by itself has no need of them.
    let severity = if settings.console.enabled { Severity::Warning } else { Severity::Note };
    let why = "operators who use this user, in the console or with commands, can neither retry, discard, pause nor see who did";
    relay.into_iter().chain(lacks(severity, &rights.denied_to_operators, why)).collect()
}

pub(super) fn bloat(settings: &Settings, sizes: &SizeFacts) -> Vec<Finding> {
    let mut found = Vec::new();
    for table in &sizes.tables {
        let name = qualified(settings, &identifier(&table.name));
        let is_late = table.vacuumed_ms_ago.is_none_or(|ago| ago > LATE_VACUUM_MS);
        if table.dead > MANY_DEAD && table.dead > table.live / 2 && is_late {
            let vacuumed = table.vacuumed_ms_ago.map_or_else(|| "never".to_owned(), |ago| format!("{} ago", age(ago)));
            found.push(warning(
                format!(
                    "the table {} has {} dead rows beside {} living ones; last vacuumed: {vacuumed}",
                    table.name, table.dead, table.live
                ),
                "looks for work pass over them, and the table grows",
                format!("end what holds vacuum back, then: {}", psql(&[&format!("VACUUM (ANALYZE) {name}")])),
            ));
        } else if table.bytes > LARGE_TABLE && table.bytes / table.live.max(1) > LARGEST_ROW {
            found.push(note(
                format!("the table {} takes {} for {} rows", table.name, size(table.bytes.unsigned_abs()), table.live),
                "the space is used again, but is not given back; with `commitstream migrate --partitioned` old days go with their space",
                psql(&[&format!("VACUUM (FULL, ANALYZE) {name}")]) + " (producers and relays wait meanwhile)",
            ));
        }
    }
    for (index, bytes, entries) in &sizes.indexes {
        if *bytes > LARGE_INDEX && bytes / entries.max(&1) > LARGEST_ENTRY {
            found.push(warning(
                format!("the index {index} takes {} for {entries} entries", size(bytes.unsigned_abs())),
                "it is mostly empty; looks that read it in full are slow",
                psql(&[&format!("REINDEX INDEX CONCURRENTLY {}", qualified(settings, &identifier(index)))]),
            ));
        }
    }
    found
}

fn missing_days(days: &[chrono::NaiveDate]) -> Option<Finding> {
    // The clean-up makes them hourly: the last one may be missing for a while after midnight.
    let first = days.first().filter(|_| days.len() > 1)?;
    Some(warning(
        format!("{} days have no partition, from {first} on", days.len()),
        "their events go to event_outbox_rest, where they are deleted row by row; no clean-up has made partitions lately",
        "commitstream cleanup (as the owner of event_outbox)",
    ))
}
