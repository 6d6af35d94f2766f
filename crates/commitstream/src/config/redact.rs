//! Passwords do not leave the process: every URL that is printed, logged or put into an error goes through here.

pub(super) const HIDDEN: &str = "***";

/// The URL with its password, and every query parameter that may hold a secret, replaced by `***`.
/// A text that is not a URL yields `***` alone, since there is no telling what it holds. Where a
/// password contains characters that should have been percent-encoded, more is hidden, never less.
pub fn redact_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return HIDDEN.to_owned() };
    let is_scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    if !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.chars().all(is_scheme) {
        return HIDDEN.to_owned();
    }
    let (before_query, query) = rest.find('?').map_or((rest, ""), |at| rest.split_at(at));
    // A raw `?` in a password and a raw `@` in a query look the same.
    if query.contains('@') {
        return format!("{scheme}://{HIDDEN}");
    }
    // The last `@`: a raw `@` or `/` in a password is common.
    let shown = match before_query.rsplit_once('@') {
        Some((user_info, location)) => match user_info.split_once(':') {
            Some((user, _)) => format!("{user}:{HIDDEN}@{location}"),
            None => before_query.to_owned(),
        },
        None if has_odd_port(before_query) => HIDDEN.to_owned(),
        None => before_query.to_owned(),
    };
    format!("{scheme}://{shown}{}", redact_query(query))
}

/// `user:password` whose `@host` was forgotten reads as a host with a port that is no number.
fn has_odd_port(location: &str) -> bool {
    let hosts = location.split('/').next().unwrap_or_default();
    hosts.split(',').any(|host| {
        let after_address = host.rsplit_once(']').map_or(host, |(_, port)| port);
        after_address.split_once(':').is_some_and(|(_, port)| !port.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// `query` begins with `?`, or is empty.
fn redact_query(query: &str) -> String {
    let Some(query) = query.strip_prefix('?') else { return String::new() };
    let mut after_secret = false;
    let parameters: Vec<String> = query
        .split('&')
        .map(|parameter| match parameter.split_once('=') {
            Some((name, _)) if is_secret(name) => {
                after_secret = true;
                format!("{name}={HIDDEN}")
            }
            Some(_) => {
                after_secret = false;
                parameter.to_owned()
            }
            // The rest of a secret that itself contains a raw `&`.
            None if after_secret => HIDDEN.to_owned(),
            None => parameter.to_owned(),
        })
        .collect();
    format!("?{}", parameters.join("&"))
}

fn is_secret(name: &str) -> bool {
    let name = percent_decoded(name).to_ascii_lowercase();
    ["pass", "pwd", "secret", "token", "credential"].iter().any(|part| name.contains(part))
}

/// Enough decoding to recognise a parameter name: `p%61ssword` is `password`.
fn percent_decoded(text: &str) -> String {
    let mut decoded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        decoded.push_str(before);
        match after.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(char::from(byte));
                rest = &after[2..];
            }
            None => {
                decoded.push('%');
                rest = after;
            }
        }
    }
    decoded + rest
}
