//! What becomes of an error: its exit code, and what a person reads on standard error.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use commitstream::config::{ConfigError, redact_url};
use commitstream::event::EventError;
use commitstream::outbox::OutboxError;
use commitstream::publisher::PublishError;
use commitstream::relay::RelayError;
use commitstream::streams::StreamsError;
use commitstream::verify::VerifyError;
use sqlx::postgres::PgDatabaseError;

use crate::cli::Color;
use crate::http::ListenError;
use crate::output::{Style, color_is_wanted, paint, printable};

/// A mistake of whoever typed the command.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct WrongUse {
    message: String,
    hint: Option<&'static str>,
}

impl WrongUse {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    pub fn with_hint(message: impl Into<String>, hint: &'static str) -> Self {
        Self { message: message.into(), hint: Some(hint) }
    }
}

/// Prints what clap says. Help and version are no errors, but help that nobody asked for is.
pub fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Neither is a reader that has read enough, as in `commitstream --help | head`.
        error.print().ok();
    } else {
        // clap quotes an argument that it does not expect, and that may be a URL.
        let text = hide_passwords(&error.render().to_string());
        io::stderr().write_all(text.as_bytes()).ok();
    }
    if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
}

/// Prints the error with its causes and what to do, and decides the exit code.
pub fn report(error: &anyhow::Error, color: Color) -> ExitCode {
    if error.chain().any(is_closed_pipe) {
        return ExitCode::SUCCESS;
    }
    let text = explain(error, color_is_wanted(color, io::stderr().is_terminal()));
    // Standard error may be closed; then there is nobody to tell.
    io::stderr().write_all(text.as_bytes()).ok();
    if error.chain().any(is_wrong_use) { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// `error: …`, a line `because: …` for each cause that says something new, and a hint.
fn explain(error: &anyhow::Error, colored: bool) -> String {
    let messages = messages(error);
    let Some((first, causes)) = messages.split_first() else { return String::new() };
    // Only the first message may have lines of its own, such as an excerpt.
    let mut text = format!("{} {first}\n", paint(Style::Error, "error:", colored));
    for cause in causes {
        text += &format!("  because: {}\n", printable(cause));
    }
    if let Some(hint) = error.chain().find_map(hint) {
        text += &format!("{} {hint}\n", paint(Style::Label, "hint:", colored));
    }
    text
}

/// The error and its causes, for a remark or a log.
pub fn on_one_line(error: &anyhow::Error) -> String {
    printable(&messages(error).join(": "))
}

/// What the error and each cause that says something new say.
fn messages(error: &anyhow::Error) -> Vec<String> {
    let mut messages: Vec<String> = Vec::new();
    for cause in error.chain() {
        let message = hide_passwords(&message_of(cause));
        if !messages.iter().any(|said| said.contains(&message)) {
            messages.push(message);
        }
        // The reason is in the message; what a parser or the driver says about it adds nothing.
        if matches!(cause.downcast_ref(), Some(ConfigError::Value { .. }))
            || matches!(cause.downcast_ref(), Some(sqlx::Error::Database(_)))
        {
            break;
        }
    }
    messages
}

/// What PostgreSQL said, in its own words: the driver adds the line of the server's source code.
fn message_of(cause: &(dyn std::error::Error + 'static)) -> String {
    if let Some(sqlx::Error::Database(error)) = cause.downcast_ref() {
        let detail = error.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::detail);
        return error.message().to_owned() + &detail.map_or_else(String::new, |detail| format!(": {detail}"));
    }
    match cause.downcast_ref::<io::Error>() {
        Some(error) if error.kind() == io::ErrorKind::NotFound => "there is no such file or directory".to_owned(),
        _ => cause.to_string(),
    }
}

fn is_closed_pipe(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn is_wrong_use(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<WrongUse>()
        || cause.is::<ConfigError>()
        || cause.is::<EventError>()
        || matches!(cause.downcast_ref(), Some(PublishError::Event(_) | PublishError::MissingUrl(_)))
        || matches!(cause.downcast_ref(), Some(RelayError::Config(_) | RelayError::OutboxDisabled | RelayError::MissingUrl(_)))
        || outbox_error(cause)
            .is_some_and(|error| matches!(error, OutboxError::Url(_) | OutboxError::UrlOption { .. }) || refuses_value(error))
        || matches!(streams_error(cause), Some(StreamsError::Url(_) | StreamsError::Tls(_)))
}

fn outbox_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a OutboxError> {
    let published = || if let PublishError::Outbox(error) = cause.downcast_ref()? { Some(error) } else { None };
    let relayed = || if let RelayError::Outbox(error) = cause.downcast_ref()? { Some(error) } else { None };
    let verified = || if let VerifyError::Outbox(error) = cause.downcast_ref()? { Some(error) } else { None };
    cause.downcast_ref().or_else(published).or_else(relayed).or_else(verified)
}

fn streams_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a StreamsError> {
    let published = || if let PublishError::Streams(error) = cause.downcast_ref()? { Some(error) } else { None };
    let relayed = || if let RelayError::Streams(error) = cause.downcast_ref()? { Some(error) } else { None };
    let verified = || if let VerifyError::Streams(error) = cause.downcast_ref()? { Some(error) } else { None };
    cause.downcast_ref().or_else(published).or_else(relayed).or_else(verified)
}

/// SQLSTATE of what PostgreSQL answered.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn sqlstate(error: &OutboxError) -> Option<String> {
    let OutboxError::Database { source, .. } = error else { return None };
    Some(source.as_database_error()?.code()?.into_owned())
}

/// PostgreSQL understood the insert and does not take a value of the event: data exceptions and violated constraints.
fn refuses_value(error: &OutboxError) -> bool {
    sqlstate(error).is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
}

/// The user, the password or the database is wrong, which waiting does not mend.
pub fn is_refused_login(error: &OutboxError) -> bool {
    sqlstate(error).is_some_and(|code| code.starts_with("28") || code == "3D000")
}

/// Redis wants another password.
pub fn is_refused_by_redis(error: &StreamsError) -> bool {
    let StreamsError::Unavailable { source, .. } = error else { return false };
    matches!(source.code(), Some("NOAUTH" | "WRONGPASS")) || source.to_string().contains("authentication failed")
}

/// What to do, where the messages do not say it.
fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    if let Some(wrong) = cause.downcast_ref::<WrongUse>() {
        return wrong.hint;
    }
    if cause.is::<ListenError>() {
        return Some("end what listens there, or set HTTP_LISTEN (app.http.listen) to another address of this host, or to off");
    }
    if matches!(cause.downcast_ref(), Some(RelayError::MissingUrl(_))) {
        return Some(
            "set DATABASE_URL=postgres://user:password@host:5432/database and REDIS_URL=redis://:password@host:6379, or app.database.url and app.redis.url in application.conf, or give --database-url and --redis-url",
        );
    }
    match (outbox_error(cause), streams_error(cause)) {
        (Some(OutboxError::Url(_)), _) | (_, Some(StreamsError::Url(_))) => {
            Some("in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25")
        }
        (Some(error), _) if is_refused_login(error) => {
            Some("check the user, the password and the name of the database in DATABASE_URL")
        }
        (Some(error), _) if error.is_denied() => Some(
            "`commitstream doctor` says which rights this user lacks and how to give them; or connect as the user that owns the tables",
        ),
        (_, Some(StreamsError::Refused { source, .. })) if source.code() == Some("WRONGTYPE") => Some(
            "a key of that name is there and is no stream: `commitstream doctor` says how to move it, or set STREAM_PREFIX to a prefix of its own",
        ),
        (_, Some(StreamsError::Unavailable { source, .. })) if source.to_string().contains("invalid peer certificate") => Some(
            "give the CA that signed the server's certificate: REDIS_CA_FILE (app.redis.tls.caFile), and connect to a name that stands in it",
        ),
        (_, Some(error)) if is_refused_by_redis(error) => Some("check the user and the password in REDIS_URL"),
        _ => None,
    }
}

/// URLs in messages of ours, whose password is the word "password".
const EXAMPLES: [&str; 5] = [
    "unix:///path/of/socket[?db=0&user=..&pass=..]",
    "postgres://user:password@host:5432/database",
    "redis://[user:password@]host:port[/db]",
    "redis-sentinel://[user:password@]host:port,host:port/[db]#master",
    "redis-cluster://[user:password@]host:port,host:port",
];

/// Replaces the password of every URL in a text.
fn hide_passwords(text: &str) -> String {
    let mut hidden = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let start = rest[..at].rfind(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c))).map_or(0, |i| i + 1);
        let end = rest[at..].find(|c: char| c.is_whitespace() || "'\"`)".contains(c)).map_or(rest.len(), |i| at + i);
        hidden += &rest[..start];
        let url = &rest[start..end];
        hidden += &if EXAMPLES.contains(&url.trim_end_matches(',')) { url.to_owned() } else { redact_url(url) };
        rest = &rest[end..];
    }
    hidden + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let error = anyhow::anyhow!("refused").context("the append: refused").context("cannot publish");
        assert_eq!(explain(&error, false), "error: cannot publish\n  because: the append: refused\n");
    }

    #[test]
    fn passwords_of_urls_are_hidden_wherever_they_stand() {
        let cases = [
            ("unexpected argument 'postgres://u:hunter2@h/d' found", "unexpected argument 'postgres://u:***@h/d' found"),
            ("two: redis://:a@h and rediss://b:c@h:1/0.", "two: redis://:***@h and rediss://b:***@h:1/0."),
            ("write redis://[user:password@]host:port[/db] or", "write redis://[user:password@]host:port[/db] or"),
            (
                "or redis-cluster://[user:password@]host:port,host:port, or",
                "or redis-cluster://[user:password@]host:port,host:port, or",
            ),
            ("at redis-sentinel://:a@h,i:1/0#m.", "at redis-sentinel://:***@h,i:1/0#m."),
            ("nothing here :// or so", "nothing here *** or so"),
        ];
        for (text, expected) in cases {
            assert_eq!(hide_passwords(text), expected);
        }
    }
}
