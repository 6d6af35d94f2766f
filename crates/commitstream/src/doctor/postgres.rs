//! The server of the outbox.

use super::advice::{age, alter_system, identifier, literal, psql};
use super::{EXAMINING, Finding, Report, error, note, outbox, schema, warning};
use crate::chain::chain;
use crate::config::{Settings, redact_url};
use crate::outbox::OutboxError;
use crate::outbox::examine::{DirectFacts, Holder, HolderKind, PostgresFacts, Recorded, ServerFacts, SizeFacts};

const OLDEST_VERSION: i32 = 14;

/// A transaction may be so old.
const OLD_TRANSACTION_MS: i64 = 5 * 60 * 1_000;

/// Where only transactions can be counted, so many may have begun since.
const OLD_TRANSACTIONS: i64 = 100_000;

pub(super) fn judge(report: &mut Report, settings: &Settings, facts: Option<&Result<PostgresFacts, OutboxError>>) {
    let facts = match facts {
        None => return report.check("postgres-reachable", [no_url()]),
        Some(Err(error)) if is_pooler(error) => return report.check("postgres-pooler", [pooler()]),
        Some(Err(error)) => return report.check("postgres-reachable", [unreachable(settings, error)]),
        Some(Ok(facts)) => facts,
    };
    report.check("postgres-reachable", []);
    let PostgresFacts::Direct(facts) = facts else { return report.check("postgres-pooler", [pooler()]) };
    report.check("postgres-pooler", []);
    match &facts.server {
        Ok(server) => server_checks(report, server),
        Err(error) => report.unknown("postgres-version", error),
    }
    autovacuum(report, settings, facts);
    match &facts.horizon {
        Ok(holders) => report.check("vacuum-held-back", holders.iter().filter_map(held_back)),
        Err(error) => report.unknown("vacuum-held-back", error),
    }
    match &facts.rights {
        // Without tables of ours there is nothing to have rights on.
        Ok(_) if matches!(facts.recorded, Ok(Recorded::Nothing | Recorded::Foreign)) => {}
        Ok(rights) => report.check("privileges", schema::privileges(settings, rights)),
        Err(error) => report.unknown("privileges", error),
    }
    match &facts.recorded {
        Ok(recorded) => report.check("migration", schema::migration(settings, *recorded)),
        Err(error) => report.unknown("migration", error),
    }
    if let Some(outbox) = &facts.outbox {
        schema::judge(report, settings, is_of_this_build(&facts.recorded), outbox);
        outbox::judge(report, settings, outbox);
        match (&facts.server, &outbox.is_two_phase) {
            (Ok(server), Ok(is_two_phase)) => report.check("two-phase", two_phase(server, *is_two_phase)),
            (_, Err(error)) => report.unknown("two-phase", error),
            (Err(_), Ok(_)) => {}
        }
    }
}

fn no_url() -> Finding {
    error(
        "app.database.url (DATABASE_URL) is not set",
        "the outbox was not examined; a relay needs it",
        "export DATABASE_URL=postgres://user:password@host:5432/database",
    )
}

fn unreachable(settings: &Settings, why: &OutboxError) -> Finding {
    let url = redact_url(settings.database.url.as_deref().unwrap_or_default());
    if let OutboxError::Timeout { doing: EXAMINING, .. } = why {
        let busy = "SELECT pid, state, wait_event_type, wait_event, left(query, 80) AS query FROM pg_stat_activity WHERE state <> 'idle'";
        return error(
            format!("{url}: not all questions were answered within a minute"),
            "producers and relays wait as long; nothing else of PostgreSQL was examined",
            format!("see what it is busy with: {}", psql(&[busy])),
        );
    }
    let mend = match why {
        OutboxError::Url(_) => "export DATABASE_URL=postgres://user:password@host:5432/database".to_owned(),
        OutboxError::UrlOption { instead, .. } => format!("change DATABASE_URL: {instead}"),
        OutboxError::Database { source, .. }
            if source.as_database_error().is_some_and(|e| e.code().as_deref() == Some("53300")) =>
        {
            alter_system("max_connections = 300") + ", then restart PostgreSQL; or end sessions that nobody needs"
        }
        OutboxError::Database { .. } => {
            "check the user, the password and the name of the database in DATABASE_URL: psql \"$DATABASE_URL\" -c 'SELECT 1'"
                .to_owned()
        }
        _ => "see whether it runs and where: pg_isready -d \"$DATABASE_URL\"".to_owned(),
    };
    error(format!("{url}: {}", chain(why)), "no event can be written or published; nothing else of PostgreSQL was examined", mend)
}

/// PgBouncer refuses a parameter that the driver sends, unless it is told to ignore it.
fn is_pooler(error: &OutboxError) -> bool {
    matches!(error, OutboxError::Database { source, .. } if source.to_string().contains("unsupported startup parameter"))
}

fn pooler() -> Finding {
    error(
        "a pooler (such as PgBouncer in transaction mode) stands between this URL and PostgreSQL",
        "a relay needs a session of its own: it waits in one, listens, and holds locks; behind a pooler it is not woken and its settings leak \
         into sessions of others. Publishing works through it. Nothing else of PostgreSQL was examined",
        "give the relay, and doctor, the address of PostgreSQL itself: DATABASE_URL=postgres://user:password@host:5432/database",
    )
}

fn encoding(server: &ServerFacts) -> Option<Finding> {
    let ServerFacts { encoding, database, .. } = server;
    let mend = format!(
        "createdb --encoding=UTF8 --template=template0 NEW; then load a dump of {database}, made with pg_dump --encoding of what its texts are"
    );
    match encoding.as_str() {
        "UTF8" => None,
        "SQL_ASCII" => Some(warning(
            format!("the database {database} has the encoding SQL_ASCII: PostgreSQL checks and converts nothing"),
            "an event whose texts are not UTF-8 cannot be published: a relay makes it FAILED, and all others go on",
            mend,
        )),
        other => Some(note(
            format!("the database {database} has the encoding {other}"),
            "events are sent as UTF-8; what this encoding does not have cannot be stored, so such an insert fails",
            mend,
        )),
    }
}

fn server_checks(report: &mut Report, server: &ServerFacts) {
    let major = server.version / 10_000;
    let old = (major < OLDEST_VERSION).then(|| {
        error(
            format!("this is PostgreSQL {major}"),
            format!("the outbox needs PostgreSQL {OLDEST_VERSION} or newer"),
            "pg_upgrade, or move the database to a newer server",
        )
    });
    report.check("postgres-version", old);
    report.check("postgres-writable", writable(server));
    report.check("postgres-encoding", encoding(server));
    report.check("postgres-durability", durability(server));
    let used = server.connections.saturating_mul(100) / server.max_connections.max(1);
    let full = (used >= 90).then(|| {
        warning(
            format!("{} of {} sessions are in use", server.connections, server.max_connections),
            "when there is none left, a relay that has to connect anew cannot work",
            alter_system(&format!("max_connections = {}", server.max_connections * 2)) + ", then restart PostgreSQL",
        )
    });
    report.check("postgres-connections", full);
    report.check("postgres-wraparound", wraparound(server.frozen_age));
    let blind = (!server.sees_sessions).then(|| {
        note(
            format!("the user {} sees only its own sessions", server.user),
            "of old transactions of others, neither age nor query is known",
            psql(&[&format!("GRANT pg_read_all_stats TO {}", identifier(&server.user))]) + " (as a superuser)",
        )
    });
    report.check("postgres-visibility", blind);
}

fn writable(server: &ServerFacts) -> Option<Finding> {
    let why = "neither producers nor relays can write there";
    if server.in_recovery {
        return Some(error(
            "this URL leads to a standby",
            why,
            format!("give the URL of the primary, or make this one the primary: {}", psql(&["SELECT pg_promote()"])),
        ));
    }
    server.read_only.then(|| {
        let seen = format!("transactions are read-only (default_transaction_read_only, set by: {})", server.read_only_source);
        error(seen, why, switched(server, "default_transaction_read_only", "off", &server.read_only_source))
    })
}

fn durability(server: &ServerFacts) -> Vec<Finding> {
    let mut found = Vec::new();
    if !server.fsync {
        let why = "a crash of the machine may corrupt the database, or lose the journal of batches that Redis already has: their events would be published twice";
        found.push(error("fsync is off", why, alter_system("fsync = on")));
    }
    if !server.full_page_writes {
        let why = "a crash of the machine may corrupt the database";
        found.push(error("full_page_writes is off", why, alter_system("full_page_writes = on")));
    }
    if server.synchronous_commit == "off" {
        found.push(note(
            "synchronous_commit is off for new sessions",
            "a crash may undo the last commits of producers, data and events alike; relays set it on for themselves",
            switched(server, "synchronous_commit", "on", &server.synchronous_commit_source),
        ));
    }
    found
}

/// Gives a setting of sessions another value where it has its present one from.
fn switched(server: &ServerFacts, setting: &str, value: &str, source: &str) -> String {
    let (user, database) = (identifier(&server.user), identifier(&server.database));
    let whose = match source {
        "user" => format!("ROLE {user}"),
        "database user" => format!("ROLE {user} IN DATABASE {database}"),
        "database" => format!("DATABASE {database}"),
        "client" => return format!("take {setting} out of the options in DATABASE_URL or PGOPTIONS"),
        _ => "SYSTEM".to_owned(),
    };
    // The first one lets the others write where that is what is off.
    psql(&[&format!("SET {setting} = {value}"), &format!("ALTER {whose} SET {setting} = {value}"), "SELECT pg_reload_conf()"])
        + " (as a superuser or the owner)"
}

fn wraparound(age: i32) -> Option<Finding> {
    let seen = format!("the oldest transaction that this database must remember was {age} transactions ago");
    let why = "at 2,100,000,000 PostgreSQL takes no more writes; autovacuum does not get on";
    let mend = "end what holds vacuum back (see vacuum-held-back), then: vacuumdb --freeze \"$DATABASE_URL\"";
    match age {
        1_500_000_000.. => Some(error(seen, why, mend)),
        1_000_000_000.. => Some(warning(seen, why, mend)),
        _ => None,
    }
}

fn autovacuum(report: &mut Report, settings: &Settings, facts: &DirectFacts) {
    let why = "published rows and settled batches stay in tables and indexes, and every look gets slower";
    let mut found = Vec::new();
    if let Ok(server) = &facts.server {
        for (name, is_on) in [("autovacuum", server.autovacuum), ("track_counts", server.track_counts)] {
            if !is_on {
                found.push(warning(
                    format!("{name} is off: no table is vacuumed by itself"),
                    why,
                    alter_system(&format!("{name} = on")),
                ));
            }
        }
    }
    let sizes = facts.outbox.as_ref().and_then(|outbox| outbox.sizes.as_ref().ok());
    for table in sizes.into_iter().flat_map(|SizeFacts { tables, .. }| tables).filter(|table| table.autovacuum_off) {
        let name = format!("{}.{}", identifier(&settings.database.schema), identifier(&table.name));
        let mend = psql(&[&format!("ALTER TABLE {name} RESET (autovacuum_enabled)")]);
        found.push(warning(format!("autovacuum is off for the table {}", table.name), why, mend));
    }
    report.check("autovacuum", found);
}

fn two_phase(server: &ServerFacts, is_two_phase: bool) -> Option<Finding> {
    match (server.max_prepared > 0, is_two_phase) {
        (true, false) => Some(note(
            format!(
                "transactions may be prepared here (max_prepared_transactions = {}), and the insert trigger notifies",
                server.max_prepared
            ),
            "PREPARE TRANSACTION (XA, JTA) fails after an event was written while a relay sleeps, and works while it is busy",
            "for producers that commit in two phases: commitstream migrate --two-phase",
        )),
        (false, true) => Some(note(
            "the table is one for two-phase commit, and no transaction can be prepared here (max_prepared_transactions = 0)",
            "events wait for the next look of the relay (pollInterval) for nothing",
            "commitstream migrate --one-phase",
        )),
        _ => None,
    }
}

const END_QUERIES: &str = "end the old queries: SELECT pid, xact_start, query FROM pg_stat_activity ORDER BY xact_start";

fn held_back(holder: &Holder) -> Option<Finding> {
    let is_old = holder.age_ms.map_or(holder.transactions >= OLD_TRANSACTIONS, |age| age >= OLD_TRANSACTION_MS);
    if !is_old {
        return None;
    }
    let since = match holder.age_ms {
        Some(millis) => format!("for {}", age(millis)),
        None => format!("for {} transactions", holder.transactions),
    };
    let user = holder.user.as_deref().unwrap_or("somebody");
    let name = &holder.name;
    let (seen, mend) = match holder.kind {
        HolderKind::Session => {
            // Who may not see how old it is may not end it either.
            let as_whom = if holder.age_ms.is_some() { "" } else { " (as a superuser)" };
            (session(holder, user, &since), psql(&[&format!("SELECT pg_terminate_backend({name})")]) + as_whom)
        }
        HolderKind::Prepared => (
            format!("the prepared transaction {name} of {user} holds vacuum back {since}"),
            psql(&[&format!("ROLLBACK PREPARED {}", literal(name))]) + " (or COMMIT PREPARED)",
        ),
        HolderKind::Slot => {
            let state = holder.state.as_deref().unwrap_or_default();
            let drop = psql(&[&format!("SELECT pg_drop_replication_slot({})", literal(name))]);
            let mend = if state == "active" {
                format!("on the standby that uses it, {END_QUERIES}; if nobody needs that standby, stop it, then: {drop}")
            } else {
                format!("if nobody needs it: {drop}")
            };
            (format!("the {state} replication slot {name} holds vacuum back {since}"), mend)
        }
        HolderKind::Standby => (
            format!("queries on the standby {name} hold vacuum back {since} (hot_standby_feedback)"),
            format!("there, {END_QUERIES}"),
        ),
    };
    let why = "vacuum removes nothing that was deleted or changed since: tables and indexes grow, and looks for work get slower";
    Some(warning(seen, why, mend))
}

fn session(holder: &Holder, user: &str, since: &str) -> String {
    let application = holder.application.as_deref().filter(|name| !name.is_empty());
    let application = application.map_or_else(String::new, |name| format!(", {name}"));
    let state = holder.state.as_deref().unwrap_or("in a transaction");
    let query = holder.query.as_deref().filter(|query| !query.is_empty());
    let query = query.map_or_else(String::new, |query| format!("; its last query: {query}"));
    format!("the session {} of {user}{application} is {state} and holds vacuum back {since}{query}", holder.name)
}

/// A version that a newer build made is not compared.
fn is_of_this_build(recorded: &Result<Recorded, OutboxError>) -> bool {
    matches!(recorded, Ok(Recorded::Version(version)) if *version == crate::outbox::LATEST_VERSION)
}
