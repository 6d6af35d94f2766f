//! Somebody who looks at the web console, without a browser.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest wait for an answer, or for its next part.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Visitor {
    address: SocketAddr,
    cookie: String,
}

pub struct Answer {
    pub head: String,
    pub body: String,
}

impl Visitor {
    pub async fn log_in(address: SocketAddr, password: &str) -> anyhow::Result<Self> {
        let mut visitor = Self { address, cookie: String::new() };
        let form = serde_urlencoded::to_string([("name", "bench"), ("password", password)])?;
        let answer = visitor.send("POST", "/console/login", &form, |_| false).await?;
        let cookie =
            answer.head.lines().find_map(|line| line.strip_prefix("set-cookie: ")).context("no cookie after the login")?;
        cookie.split(';').next().unwrap_or_default().clone_into(&mut visitor.cookie);
        Ok(visitor)
    }

    /// Asks on a connection of its own, and reads the answer to its end or until `is_enough`.
    pub async fn send(&self, method: &str, path: &str, form: &str, is_enough: impl Fn(&[u8]) -> bool) -> anyhow::Result<Answer> {
        let Self { address, cookie } = self;
        let length = form.len();
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nCookie: {cookie}\r\nConnection: close\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {length}\r\n\r\n{form}"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        while timeout(PATIENCE, stream.read_buf(&mut answer)).await.context("no answer in time")?? > 0 {
            if is_enough(&answer) {
                break;
            }
        }
        let answer = String::from_utf8(answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer of HTTP")?;
        if !head.starts_with("HTTP/1.1 200") && !head.starts_with("HTTP/1.1 303") {
            bail!("{path} is answered with {}: {body}", head.lines().next().unwrap_or_default());
        }
        Ok(Answer { head: head.to_owned(), body: body.to_owned() })
    }
}
