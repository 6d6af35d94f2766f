//! What the daemon serves over HTTP.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::Redis;
use serde_json::Value;

use crate::support::{PATIENCE, Running, World, eventually, finish};

/// A relay with a server on a free port.
struct Daemon {
    relay: Running,
    address: String,
}

impl Daemon {
    fn start(world: &World) -> Result<Self> {
        let mut command = world.command(&["relay"]);
        command.env("HTTP_LISTEN", "127.0.0.1:0");
        let mut relay = Running::new(command)?;
        let said = relay.says("health and metrics on http://")?;
        let (_, rest) = said.split_once("http://").context("an address")?;
        let address = rest.split(": ").next().context("an address")?.to_owned();
        Ok(Self { relay, address })
    }

    /// Status and body.
    fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
        let status = head.split(' ').nth(1).context("a status")?.parse()?;
        Ok((status, body.to_owned()))
    }

    fn health(&self, path: &str) -> Result<(u16, Value)> {
        let (status, body) = self.get(path)?;
        Ok((status, serde_json::from_str(&body).with_context(|| body.clone())?))
    }

    fn end(mut self) -> Result<()> {
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
