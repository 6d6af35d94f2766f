//! Speaking to Redis in its own protocol, so that this crate needs no client library and no async runtime.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::SandboxError;

/// How long a server may be silent. Nothing that takes longer is asked here.
const PATIENCE: Duration = Duration::from_secs(2);
/// Far more than any reply that is asked for here.
const MAX_BYTES: u64 = 1 << 20;

/// Sends one command to the server on a port of 127.0.0.1, over a connection of its own.
///
/// Returns the strings and numbers of the reply in their order, whatever arrays they stand in. A null counts as empty.
pub(crate) fn ask(port: u16, password: Option<&str>, command: &[&str]) -> Result<Vec<String>, SandboxError> {
    let name = command.first().copied().unwrap_or_default(); // and not the rest, which may hold a password
    let refused = |message| SandboxError::Redis { command: name.to_owned(), port, message };
    let reply = exchange(port, password, command).map_err(SandboxError::io(format!("ask the Redis on port {port}: {name}")))?;
    reply.map_err(refused)
}

/// `Err` in the inner result: the server's own error.
fn exchange(port: u16, password: Option<&str>, command: &[&str]) -> io::Result<Result<Vec<String>, String>> {
    let mut connection = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), PATIENCE)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let login = password.map(|password| request(&["AUTH", password])).unwrap_or_default();
    connection.write_all(&[login, request(command)].concat())?;
    let mut replies = BufReader::new(connection.take(MAX_BYTES));
    if password.is_some()
        && let Err(error) = read_reply(&mut replies)?
    {
        return Ok(Err(error));
    }
    read_reply(&mut replies)
}

fn request(words: &[&str]) -> Vec<u8> {
    let words = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
    format!("*{}\r\n{}", words.len(), words.collect::<String>()).into_bytes()
}

fn read_reply(replies: &mut impl BufRead) -> io::Result<Result<Vec<String>, String>> {
    let mut values = Vec::new();
    let mut left: u64 = 1;
    while left > 0 {
        left -= 1;
        let line = read_line(replies)?;
        let (kind, rest) = line.split_at_checked(1).ok_or(ErrorKind::InvalidData)?;
        match kind {
            "-" => return Ok(Err(rest.to_owned())),
            "*" => left += rest.parse::<u64>().unwrap_or(0), // -1 is a null
            "$" => values.push(read_bulk(replies, rest.parse().unwrap_or(-1))?),
            _ => values.push(rest.to_owned()),
        }
    }
    Ok(Ok(values))
}

fn read_line(replies: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    replies.read_line(&mut line)?;
    line.strip_suffix("\r\n").map(str::to_owned).ok_or_else(|| ErrorKind::UnexpectedEof.into())
}

/// A text of so many bytes; a negative length stands for a null.
fn read_bulk(replies: &mut impl BufRead, length: i64) -> io::Result<String> {
    let Ok(length) = u64::try_from(length) else {
        return Ok(String::new());
    };
    let mut text = Vec::new();
    let read = replies.take(length + 2).read_to_end(&mut text)?;
    if read as u64 != length + 2 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    text.truncate(read - 2);
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A field of a reply that consists of lines `name:value`, as those of `INFO` do.
pub(crate) fn field<'a>(reply: &'a [String], name: &str) -> Option<&'a str> {
    let mut lines = reply.iter().flat_map(|text| text.lines());
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(reply: &str) -> io::Result<Result<Vec<String>, String>> {
        read_reply(&mut reply.as_bytes())
    }

    #[test]
    fn replies_are_read_whatever_their_shape() {
        assert_eq!(read("+OK\r\n").unwrap().unwrap(), ["OK"]);
        assert_eq!(read("$4\r\na\r\nb\r\n").unwrap().unwrap(), ["a\r\nb"]);
        assert_eq!(read("*3\r\n:1\r\n*2\r\n$1\r\nx\r\n$-1\r\n+z\r\n").unwrap().unwrap(), ["1", "x", "", "z"]);
        assert_eq!(read("*-1\r\n").unwrap().unwrap(), [""; 0]);
        assert_eq!(read("-ERR no\r\n").unwrap().unwrap_err(), "ERR no");
        assert!(read("$4\r\na").is_err() && read("").is_err() && read("\r\n").is_err());
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let info = ["# Replication\r\nmaster_port:7\r\nport:8\r\n".to_owned()];
        assert_eq!(field(&info, "port"), Some("8"));
        assert_eq!(field(&info, "master"), None);
    }
}
