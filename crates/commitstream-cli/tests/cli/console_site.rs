//! A console that a test has started, and a visitor of it.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};

use crate::support::{PATIENCE, Running, World};

pub const PASSWORD: &str = "correct horse";
pub const READ_ONLY: &str = "battery staple";

pub struct Site {
    pub server: Running,
    pub address: String,
}

pub struct Page {
    pub code: u16,
    pub head: String,
    pub body: String,
}

impl Page {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|line| line.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v)
    }

    /// The value of the hidden field that every form has.
    pub fn token(&self) -> Result<String> {
        self.field("token")
    }

    /// The value of a hidden field.
    pub fn field(&self, name: &str) -> Result<String> {
        let (_, rest) =
            self.body.split_once(&format!("name=\"{name}\" value=\"")).with_context(|| format!("a form with a {name}"))?;
        Ok(rest.split('"').next().unwrap_or_default().to_owned())
    }
}

impl Site {
    /// The live numbers, as they come.
    pub fn live(&self, cookie: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET /console/live HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nCookie: {cookie}\r\n\r\n", self.address)?;
        Ok(stream)
    }

    pub fn start(world: &World) -> Result<Self> {
        Self::with(world, &[])
    }

    pub fn with(world: &World, args: &[&str]) -> Result<Self> {
        let mut command = world.command(&[&["console", "--listen", "127.0.0.1:0"], args].concat());
        command.env("CONSOLE_PASSWORD", PASSWORD).env("CONSOLE_READ_ONLY_PASSWORD", READ_ONLY);
        Self::of(Running::new(command)?)
    }

    /// A console that was started otherwise.
    pub fn of(mut server: Running) -> Result<Self> {
        let line = server.prints("console on http://")?;
        let address = line.trim_start_matches("console on http://").split('/').next().unwrap_or_default().to_owned();
        Ok(Self { server, address })
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Page> {
        self.request(method, &format!("/console{path}"), headers, body)
    }

    /// Of a path that may be outside of `/console`.
    pub fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Result<Page> {
        self.request(method, path, headers, "")
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Page> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            request += &format!("Host: {}\r\n", self.address);
        }
        headers.iter().for_each(|(name, value)| request += &format!("{name}: {value}\r\n"));
        if method == "POST" {
            request += &format!("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n", body.len());
        }
        stream.write_all(format!("{request}\r\n{body}").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer")?;
        let code = head.split(' ').nth(1).context("a code")?.parse()?;
        Ok(Page { code, head: head.to_owned(), body: body.to_owned() })
    }

    pub fn login(&self, password: &str) -> Result<Page> {
        self.send("POST", "/login", &[], &form(&[("name", "Ada"), ("password", password)]))
    }

    /// The cookie of a session.
    pub fn enter(&self, password: &str) -> Result<String> {
        let page = self.login(password)?;
        ensure!(page.code == 303, "{}", page.body);
        Ok(page.header("set-cookie").context("a cookie")?.split(';').next().unwrap_or_default().to_owned())
    }

    pub fn get(&self, cookie: &str, path: &str) -> Result<Page> {
        self.send("GET", path, &[("Cookie", cookie)], "")
    }

    pub fn post(&self, cookie: &str, path: &str, fields: &[(&str, &str)]) -> Result<Page> {
        let origin = format!("http://{}", self.address);
        self.send("POST", path, &[("Cookie", cookie), ("Origin", &origin)], &form(fields))
    }

    /// An act and where it leads: the page of its outcome.
    pub fn act(&self, cookie: &str, path: &str, fields: &[(&str, &str)]) -> Result<Page> {
        let led = self.post(cookie, path, fields)?;
        ensure!(led.code == 303, "{}", led.body);
        let outcome = led.header("location").context("a place")?.strip_prefix("/console").context("here")?;
        let page = self.get(cookie, outcome)?;
        ensure!(page.code == 200, "{}", page.body);
        Ok(page)
    }
}

pub fn first_figures(live: &mut TcpStream) -> Result<String> {
    let mut seen = String::new();
    while !(seen.contains("event: figures") && seen.contains("\"rate\"")) {
        let mut bytes = [0; 4096];
        let read = live.read(&mut bytes)?;
        ensure!(read > 0, "it ended: {seen}");
        seen += &String::from_utf8_lossy(&bytes[..read]);
    }
    Ok(seen)
}

pub fn form(fields: &[(&str, &str)]) -> String {
    let escaped = |text: &str| -> String {
        text.bytes().map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
    };
    let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{}={}", escaped(name), escaped(value))).collect();
    fields.join("&")
}
