//! Speaking SQL through `psql`, so that this crate needs no database driver and no async runtime.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::SandboxError;
use crate::guard::forget_postgres_variables;

/// Runs SQL and returns what it selected: one row a line, columns parted by `|`. The first error ends it.
pub(crate) fn run(psql: &Path, url: &str, sql: &str) -> Result<String, SandboxError> {
    let (url, password) = without_password(url);
    let mut command = Command::new(psql);
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d"]).arg(url);
    forget_postgres_variables(&mut command);
    if let Some(password) = password {
        command.env("PGPASSWORD", password); // arguments can be read by every user of the machine
    }
    command.env("PGCLIENTENCODING", "UTF8").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(SandboxError::io(format!("start {}", psql.display())))?;

    // The input is written on the side: psql may print more than a pipe holds before it has read everything.
    let input = child.stdin.take();
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || input.map_or(Ok(()), |mut input| input.write_all(sql.as_bytes())));
        let output = child.wait_with_output();
        // Not being read to the end is what happens to the input of a psql that stopped at an error.
        let written = writer.join().unwrap_or(Ok(()));
        output.map(|output| (output, written))
    });
    let (output, written) = output.map_err(SandboxError::io("wait for psql"))?;
    if !output.status.success() {
        return Err(SandboxError::Psql { message: String::from_utf8_lossy(&output.stderr).trim_end().to_owned() });
    }
    written.map_err(SandboxError::io("write to psql"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The same URL with another database name.
pub(crate) fn with_database(url: &str, database: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let (address, query) = rest.split_once('?').map_or((rest, None), |(address, query)| (address, Some(query)));
    let server = address.split_once('/').map_or(address, |(server, _)| server);
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    Some(format!("{scheme}://{server}/{database}{query}"))
}

/// The URL without its password, and the password.
fn without_password(url: &str) -> (String, Option<String>) {
    let split = || {
        let (scheme, rest) = url.split_once("://")?;
        let server_end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (credentials, host) = rest[..server_end].rsplit_once('@')?;
        let (user, password) = credentials.split_once(':')?;
        Some((format!("{scheme}://{user}@{host}{}", &rest[server_end..]), percent_decoded(password)))
    };
    split().map_or((url.to_owned(), None), |(url, password)| (url, Some(password)))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(code) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_database_in_a_url_is_replaced() {
        let replaced = |url| with_database(url, "t_1").unwrap();
        assert_eq!(replaced("postgres://u:p@h:1/postgres"), "postgres://u:p@h:1/t_1");
        assert_eq!(replaced("postgres://u:p@h:1"), "postgres://u:p@h:1/t_1");
        assert_eq!(replaced("postgresql://h/?sslmode=disable"), "postgresql://h/t_1?sslmode=disable");
        assert_eq!(with_database("localhost", "t_1"), None);
    }

    #[test]
    fn the_password_is_taken_out_of_a_url() {
        let taken = without_password("postgres://u:p%40%2Fs@h:1/d?x=y");
        assert_eq!(taken, ("postgres://u@h:1/d?x=y".to_owned(), Some("p@/s".to_owned())));
        assert_eq!(without_password("postgres://u@h/d"), ("postgres://u@h/d".to_owned(), None));
        assert_eq!(percent_decoded("100%"), "100%");
    }
}
