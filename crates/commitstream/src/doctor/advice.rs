//! How findings write commands, ages and numbers.

use std::time::Duration;

use crate::streams::examine::Place;

/// A word of a command line, such that a shell takes it as it is.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Statements, each in a transaction of its own.
pub fn psql(statements: &[&str]) -> String {
    let commands: String = statements.iter().map(|sql| format!(" -c {}", quoted(sql))).collect();
    format!("psql \"$DATABASE_URL\"{commands}")
}

/// Changes a server setting that takes effect at once.
pub fn alter_system(setting: &str) -> String {
    psql(&[&format!("ALTER SYSTEM SET {setting}"), "SELECT pg_reload_conf()"])
}

/// A name in SQL.
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text in SQL.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Commands for a server, as the user of the URL. Where the URL does not lead there, its password has to be given as well.
pub fn redis_cli(place: Option<&Place>, commands: &[&[&str]]) -> String {
    let way = place.map_or_else(|| " -u \"$REDIS_URL\"".to_owned(), way);
    let password = if place.is_some_and(|place| place.has_password) { "with its password in REDISCLI_AUTH: " } else { "" };
    let words = |words: &&[&str]| words.iter().map(|word| format!(" {}", quoted(word))).collect::<String>();
    let commands: Vec<String> = commands.iter().map(|command| format!("redis-cli{way}{}", words(command))).collect();
    format!("{password}{}", commands.join(" && "))
}

fn way(place: &Place) -> String {
    let user = place.user.as_ref().map_or_else(String::new, |user| format!(" --user {}", quoted(user)));
    let tls = if place.tls { " --tls" } else { "" };
    // It follows keys to the node that has them.
    let cluster = if place.of_cluster { " -c" } else { "" };
    format!(" -h {} -p {}{user}{tls}{cluster}", quoted(&place.host), place.port)
}

/// Changes a setting of a server, now and in its file.
pub fn config_set(place: Option<&Place>, name: &str, value: &str) -> String {
    redis_cli(place, &[&["CONFIG", "SET", name, value], &["CONFIG", "REWRITE"]])
}

/// `2h 10m`, `1day 3h`: two units at most.
pub fn age(millis: i64) -> String {
    let duration = Duration::from_millis(millis.max(0).unsigned_abs());
    let whole = if duration.as_secs() > 0 { Duration::from_secs(duration.as_secs()) } else { duration };
    let text = humantime::format_duration(whole).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// `1 event`, `7 events`, `more than 10000 events`.
pub fn counted(number: i64, noun: &str, most: i64) -> String {
    match number {
        1 => format!("1 {noun}"),
        number if number > most => format!("more than {most} {noun}s"),
        number => format!("{number} {noun}s"),
    }
}

/// Bytes as `1.5 GiB` or `300 MiB`.
pub fn size(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{} KiB", bytes >> 10),
        mib @ 1..1024 => format!("{mib} MiB"),
        mib => format!("{:.1} GiB", mib as f64 / 1024.0),
    }
}
