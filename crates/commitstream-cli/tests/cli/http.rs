//! What the daemon serves over HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::Redis;
use serde_json::Value;

use crate::support::{PATIENCE, Running, World, eventually, finish};

/// A relay with a server on a free port.
pub struct Daemon {
    relay: Running,
    address: String,
}

impl Daemon {
    pub fn start(world: &World) -> Result<Self> {
        Self::with(world, &[])
    }

    pub fn with(world: &World, env: &[(&str, &str)]) -> Result<Self> {
        let mut command = world.command(&["relay"]);
        command.env("HTTP_LISTEN", "127.0.0.1:0").envs(env.iter().copied());
        let mut relay = Running::new(command)?;
        let said = relay.says("health and metrics on http://")?;
        let (_, rest) = said.split_once("http://").context("an address")?;
        let address = rest.split(": ").next().context("an address")?.to_owned();
        Ok(Self { relay, address })
    }

    /// Status and body.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        self.get_as(path, "*/*")
    }

    /// The same for who reads these formats.
    pub fn get_as(&self, path: &str, accept: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: relay\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
        let status = head.split(' ').nth(1).context("a status")?.parse()?;
        Ok((status, body.to_owned()))
    }

    pub fn health(&self, path: &str) -> Result<(u16, Value)> {
        let (status, body) = self.get(path)?;
        Ok((status, serde_json::from_str(&body).with_context(|| body.clone())?))
    }

    pub fn end(mut self) -> Result<()> {
        self.relay.signal("TERM")?;
        ensure!(self.relay.ended()?.code == Some(0), "it ends well");
        Ok(())
    }
}

#[test]
fn a_relay_at_work_is_ready_and_live() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world)?;
    eventually("the relay to be active", || Ok(daemon.health("/readyz")?.1["state"] == "active"))?;
    let (status, ready) = daemon.health("/readyz")?;
    assert_eq!((status, &ready["ok"], &ready["partitions"]), (200, &Value::Bool(true), &64.into()), "{ready}");
    assert_eq!(daemon.health("/livez")?.0, 200);
    assert_eq!(daemon.get("/metrics")?.0, 200);
    assert_eq!(daemon.get("/nothing")?.0, 404);
    daemon.end()
}

#[test]
fn a_relay_without_redis_is_live_but_not_ready_and_says_why() -> Result<()> {
    let redis = Redis::start()?;
    let world = World::on(&redis)?;
    redis.stop()?;
    let daemon = Daemon::start(&world)?;
    eventually("the relay to notice", || Ok(daemon.health("/readyz")?.1["state"] == "unable"))?;
    let (status, ready) = daemon.health("/readyz")?;
    assert_eq!(status, 503);
    assert!(ready["reason"].as_str().is_some_and(|reason| reason.contains("refused")), "{ready}");
    assert_eq!(daemon.health("/livez")?.0, 200, "a restart of the relay brings no Redis");
    redis.restart()?;
    eventually("the relay to be ready", || Ok(daemon.health("/readyz")?.0 == 200))?;
    daemon.end()
}

#[test]
fn a_connection_that_says_nothing_holds_no_stop_up() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world)?;
    let mut silent = TcpStream::connect(&daemon.address)?;
    silent.write_all(b"GET /livez HTTP/1.1\r\n")?;
    assert_eq!(daemon.health("/livez")?.0, 200);
    let began = Instant::now();
    daemon.end()?;
    assert!(began.elapsed() < PATIENCE / 4, "{:?}", began.elapsed());
    Ok(())
}

/// Who reaches the port needs no login to open as many connections as there are.
#[test]
fn health_is_answered_beside_connections_that_say_nothing_or_little() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world)?;
    let answers = || -> Result<()> {
        let began = Instant::now();
        assert_eq!(daemon.health("/livez")?.0, 200);
        assert_eq!(daemon.get("/metrics")?.0, 200);
        // A probe of Kubernetes waits for 5 s here.
        ensure!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
        Ok(())
    };
    let mut in_use = Keeping::alive(&daemon)?;
    let mut silent = Vec::new();
    for number in 0..200 {
        silent.push(TcpStream::connect(&daemon.address)?);
        if number % 20 == 0 {
            in_use.ask()?;
        }
    }
    in_use.ask().context("a connection that is used stays")?;
    answers()?;

    let mut slow = Vec::new();
    for number in 0..200 {
        let mut stream = TcpStream::connect(&daemon.address)?;
        let begun = if number % 2 == 0 { "GET /livez HTTP/1.1\r\nX: " } else { LOGIN };
        // One that already made room hears of it here.
        stream.write_all(begun.as_bytes()).ok();
        slow.push(stream);
    }
    for _ in 0..20 {
        slow.retain_mut(|stream| stream.write_all(b"x").is_ok());
        answers()?;
    }
    ensure!(!slow.is_empty(), "some are still there");
    daemon.end()
}

const LOGIN: &str = "POST /console/login HTTP/1.1\r\nHost: relay\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 1000\r\n\r\n";

/// A connection with one request after the other.
struct Keeping(BufReader<TcpStream>);

impl Keeping {
    fn alive(daemon: &Daemon) -> Result<Self> {
        let stream = TcpStream::connect(&daemon.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn ask(&mut self) -> Result<()> {
        self.0.get_mut().write_all(b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n")?;
        let (mut size, mut line) = (0, String::new());
        while line != "\r\n" {
            line.clear();
            ensure!(self.0.read_line(&mut line)? > 0, "it was closed");
            if let Some(length) = line.strip_prefix("content-length: ") {
                size = length.trim().parse()?;
            }
        }
        Ok(self.0.read_exact(&mut vec![0; size])?)
    }
}

#[test]
fn an_address_that_was_set_and_is_in_use_is_refused_before_the_relay_starts() -> Result<()> {
    let world = World::new()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let mut command = world.command(&["relay"]);
    command.env("HTTP_LISTEN", &address);
    let answer = finish(command)?;
    assert_eq!(answer.code, Some(1), "{answer:?}");
    for text in ["error: cannot listen on", &address, "HTTP_LISTEN", "in use", "hint: "] {
        assert!(answer.stderr.contains(text), "{text} is missing in {answer:?}");
    }
    assert!(!answer.stderr.contains("relay is active"));
    for value in ["9464", "localhost:9464", "here"] {
        let mut command = world.command(&["relay"]);
        command.env("HTTP_LISTEN", value);
        let answer = finish(command)?;
        assert!(answer.code == Some(2) && answer.stderr.contains("127.0.0.1:9464"), "{answer:?}");
    }
    Ok(())
}

#[test]
fn where_the_default_address_is_in_use_a_relay_works_without() -> Result<()> {
    let world = World::new()?;
    // Somebody else may have it already; then it is in use as well.
    let _taken = TcpListener::bind("127.0.0.1:9464");
    let mut command = world.command(&["relay"]);
    command.env_remove("HTTP_LISTEN");
    let mut relay = Running::new(command)?;
    relay.says("no health and no metrics: cannot listen on 127.0.0.1:9464")?;
    relay.says("relay is active")?;
    relay.signal("TERM")?;
    assert_eq!(relay.ended()?.code, Some(0));
    Ok(())
}

#[test]
fn a_relay_that_stands_still_while_events_are_due_is_not_live() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::with(&world, &[("HTTP_STALLED_AFTER", "1s")])?;
    eventually("the relay to be active", || Ok(daemon.health("/readyz")?.1["state"] == "active"))?;
    // Claims wait for the lease rows; everything else goes on.
    let url = world.database.url().to_owned();
    let holds = std::thread::spawn(move || psql(&url, "BEGIN; SELECT FROM outbox_lease FOR UPDATE; SELECT pg_sleep(6); COMMIT"));
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
    eventually("the lock", || Ok(world.database.psql(waits)? == "1\n"))?;
    world.publish_user("1")?;
    let mut reason = String::new();
    eventually("the relay to be found dead", || {
        let (status, live) = daemon.health("/livez")?;
        reason = live["reason"].to_string();
        Ok(status == 503)
    })?;
    assert!(reason.contains("events are due, and none was settled for"), "{reason}");
    holds.join().map_err(|_| anyhow::anyhow!("psql panicked"))??;
    eventually("the relay to live", || Ok(daemon.health("/livez")?.0 == 200))?;
    daemon.end()
}

fn psql(url: &str, sql: &str) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(url).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await?;
        Ok(())
    })
}

#[test]
fn systemd_hears_that_it_is_up_alive_and_about_to_stop() -> Result<()> {
    let world = World::new()?;
    let path = std::env::temp_dir().join(format!("commitstream-notify-{}", std::process::id()));
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let hears = |wanted: &str| -> Result<()> {
        loop {
            let mut message = [0; 1024];
            let size = socket.recv(&mut message)?;
            if std::str::from_utf8(&message[..size])?.lines().any(|line| line == wanted) {
                return Ok(());
            }
        }
    };
    let mut command = world.command(&["relay"]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "300000");
    let mut relay = Running::new(command)?;
    for wanted in ["READY=1", "WATCHDOG=1", "STATUS=active", "WATCHDOG=1"] {
        hears(wanted).with_context(|| wanted.to_owned())?;
    }
    relay.signal("TERM")?;
    hears("STOPPING=1")?;
    assert_eq!(relay.ended()?.code, Some(0));
    std::fs::remove_file(&path)?;
    Ok(())
}
