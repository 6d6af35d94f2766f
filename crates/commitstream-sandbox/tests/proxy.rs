//! Each fault of the proxy, between a client and a real server.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use commitstream_sandbox::{FaultProxy, Redis, Sandbox};
use support::{address, psql, redis_connection, redis_says, try_psql, wait_until};

/// A proxy before the Redis of this run, and the URL through it.
fn redis_proxy() -> (FaultProxy, String, String) {
    let direct = Sandbox::shared().redis_url();
    let proxy = FaultProxy::start(address(&direct)).unwrap();
    let url = proxy.url(&direct);
    (proxy, url, direct)
}

fn key() -> String {
    Sandbox::shared().key_prefix().unwrap()
}

/// Sends a command and reads a reply of this many bytes.
fn exchange(connection: &mut TcpStream, command: &str, length: usize) -> String {
    connection.write_all(format!("{command}\r\n").as_bytes()).unwrap();
    let mut reply = vec![0; length];
    connection.read_exact(&mut reply).unwrap();
    String::from_utf8(reply).unwrap()
}

/// All that still comes before the connection ends.
fn remainder(connection: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match connection.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => bytes,
        Err(error) => panic!("not closed: {error}"),
    }
}

#[test]
fn without_faults_everything_passes() {
    let (_proxy, url, _) = redis_proxy();
    let key = key();
    let big = "x".repeat(3 << 20); // more than all buffers on the way hold
    let mut connection = redis_connection(&url);
    let request = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n{big}", key.len(), big.len());
    assert_eq!(exchange(&mut connection, &request, 5), "+OK\r\n");
    assert!(redis_says(&url, &format!("GET {key}")).ends_with(&big));

    let postgres = Sandbox::shared().postgres_url();
    let proxy = FaultProxy::start(address(&postgres)).unwrap();
    assert_eq!(psql(&proxy.url(&postgres), "SELECT length(repeat('x', 1000000))"), "1000000");
    assert_eq!(psql(&proxy.url(&postgres), "SELECT repeat('x', 1000000)").len(), 1_000_000);
}

#[test]
fn small_messages_are_not_delayed() {
    let (_proxy, url, _) = redis_proxy();
    let mut connection = redis_connection(&url);
    let start = Instant::now();
    for _ in 0..200 {
        assert_eq!(exchange(&mut connection, "PING", 7), "+PONG\r\n");
    }
    // Without TCP_NODELAY, delayed acknowledgements would cost up to 40 ms each: 8 s.
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn a_swallowed_connection_stays_silent_for_ever_and_new_ones_are_served() {
    let (proxy, url, direct) = redis_proxy();
    let key = key();
    let mut connection = redis_connection(&url);
    assert_eq!(exchange(&mut connection, &format!("SET {key} before"), 5), "+OK\r\n");
    proxy.swallow();
    connection.write_all(format!("SET {key} after\r\n").as_bytes()).unwrap();
    connection.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let silence = connection.read(&mut [0; 1]).unwrap_err();
    assert!(matches!(silence.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{silence}");
    assert!(redis_says(&url, &format!("GET {key}")).ends_with("before"), "new connections are served");
    proxy.flow();
    assert!(redis_says(&direct, &format!("GET {key}")).ends_with("before"), "what was swallowed never arrives");
}

#[test]
fn a_cut_closes_what_is_open_and_new_connections_are_served() {
    let (proxy, url, _) = redis_proxy();
    let (mut first, mut second) = (redis_connection(&url), redis_connection(&url));
    proxy.cut();
    assert!(remainder(&mut first).is_empty() && remainder(&mut second).is_empty());
    assert_eq!(redis_says(&url, "PING"), "+PONG");
}

#[test]
fn a_cut_ends_a_running_statement_of_postgres() {
    let direct = Sandbox::shared().postgres_url();
    let proxy = FaultProxy::start(address(&direct)).unwrap();
    let url = proxy.url(&direct);
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(299)'";
    let client = std::thread::spawn(move || try_psql(&url, "SELECT pg_sleep(299)").unwrap_err());
    wait_until("the statement runs", || psql(&direct, running) == "1");
    proxy.cut();
    let message = client.join().unwrap();
    assert!(message.contains("closed the connection unexpectedly"), "{message}");
    psql(&direct, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(299)'");
}

#[test]
fn refusing_lasts_until_accepting() {
    let (proxy, url, _) = redis_proxy();
    let mut open = redis_connection(&url);
    proxy.refuse();
    assert!(remainder(&mut open).is_empty());
    for _ in 0..3 {
        assert_eq!(TcpStream::connect(address(&url)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    proxy.refuse(); // once more changes nothing
    proxy.accept().unwrap();
    proxy.accept().unwrap();
    assert_eq!(redis_says(&url, "PING"), "+PONG");
}

#[test]
fn a_stall_holds_both_directions_and_loses_nothing() {
    let (proxy, url, direct) = redis_proxy();
    let (key, other) = (key(), key());
    let mut connection = redis_connection(&url);
    // One client waits for a reply, the other has yet to send its request.
    let mut waiting = redis_connection(&url);
    waiting.write_all(format!("BLPOP {other} 0\r\n").as_bytes()).unwrap();
    wait_until("it waits", || redis_says(&direct, "CLIENT LIST TYPE normal").contains("cmd=blpop"));
    proxy.stall();
    connection.write_all(format!("INCR {key}\r\n").as_bytes()).unwrap();
    redis_says(&direct, &format!("RPUSH {other} value"));
    for silent in [&mut connection, &mut waiting] {
        silent.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let silence = silent.read(&mut [0; 1]).unwrap_err();
        assert!(matches!(silence.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{silence}");
        silent.set_read_timeout(None).unwrap();
    }
    assert_eq!(redis_says(&direct, &format!("EXISTS {key}")), ":0");
    proxy.flow();
    let mut reply = [0; 4];
    connection.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b":1\r\n");
    waiting.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"*2\r\n");
}

#[test]
fn a_stalled_connection_can_be_cut() {
    let (proxy, url, direct) = redis_proxy();
    let key = key();
    let mut connection = redis_connection(&url);
    proxy.stall();
    connection.write_all(format!("INCR {key}\r\n").as_bytes()).unwrap();
    proxy.cut();
    assert!(remainder(&mut connection).is_empty());
    proxy.flow();
    assert_eq!(redis_says(&url, "PING"), "+PONG");
    assert_eq!(redis_says(&direct, &format!("EXISTS {key}")), ":0");
}

#[test]
fn a_slow_line_delays_each_way_until_it_is_quick_again() {
    let (proxy, url, _) = redis_proxy();
    let mut connection = redis_connection(&url);
    let timed = |connection: &mut TcpStream| {
        let start = Instant::now();
        assert_eq!(exchange(connection, "PING", 7), "+PONG\r\n");
        start.elapsed()
    };
    proxy.slow(Duration::from_millis(150));
    assert!(timed(&mut connection) >= Duration::from_millis(300));
    // A chunk that waits goes on at once when the delay ends.
    proxy.slow(Duration::from_secs(3600));
    connection.write_all(b"PING\r\n").unwrap();
    proxy.slow(Duration::ZERO);
    connection.read_exact(&mut [0; 7]).unwrap();
    assert!(timed(&mut connection) < Duration::from_millis(150));
}

#[test]
fn after_a_dropped_reply_the_write_has_happened() {
    let (proxy, url, direct) = redis_proxy();
    let key = key();
    let mut connection = redis_connection(&url);
    let mut bystander = redis_connection(&url);
    assert_eq!(exchange(&mut connection, &format!("INCR {key}"), 4), ":1\r\n");
    proxy.drop_reply();
    assert_eq!(proxy.fired(), 0);
    connection.write_all(format!("INCR {key}\r\n").as_bytes()).unwrap();
    assert!(remainder(&mut connection).is_empty());
    assert_eq!(proxy.fired(), 1);
    assert_eq!(redis_says(&direct, &format!("GET {key}")), "$1 2");
    // It was for one reply only, and for one connection.
    assert_eq!(exchange(&mut bystander, "PING", 7), "+PONG\r\n");
    assert_eq!(redis_says(&url, &format!("INCR {key}")), ":3");
    assert_eq!(proxy.fired(), 1);
}

#[test]
fn after_a_dropped_reply_to_a_commit_the_transaction_is_committed() {
    let database = Sandbox::shared().database().unwrap();
    database.psql("CREATE TABLE kept (number int);").unwrap();
    let proxy = FaultProxy::start(address(database.url())).unwrap();
    // psql says what it reads and does, so that the fault can be armed between two statements.
    let script = "psql -X -q -A -t -v ON_ERROR_STOP=1 -d \"$0\"";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, &proxy.url(database.url())]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut client = command.spawn().unwrap();
    let (mut input, mut output) = (client.stdin.take().unwrap(), client.stdout.take().unwrap());
    input.write_all(b"BEGIN; INSERT INTO kept VALUES (7); SELECT 'open';\n").unwrap();
    let mut line = [0; 5];
    output.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"open\n");
    proxy.drop_reply();
    input.write_all(b"COMMIT;\n").unwrap();
    drop(input);
    let ended = client.wait_with_output().unwrap();
    assert!(!ended.status.success(), "{ended:?}");
    assert_eq!(proxy.fired(), 1);
    assert_eq!(database.psql("SELECT number FROM kept;").unwrap(), "7\n");
}

#[test]
fn a_long_reply_is_dropped_whole() {
    let (proxy, url, direct) = redis_proxy();
    let key = key();
    redis_says(&direct, &format!("SETRANGE {key} 2999999 x"));
    let mut connection = redis_connection(&url);
    proxy.drop_reply();
    connection.write_all(format!("GET {key}\r\n").as_bytes()).unwrap();
    assert!(remainder(&mut connection).is_empty());
}

#[test]
fn half_a_reply_comes_and_then_the_end() {
    let (proxy, url, _) = redis_proxy();
    let mut connection = redis_connection(&url);
    proxy.half_reply();
    connection.write_all(b"ECHO 0123456789\r\n").unwrap();
    assert_eq!(remainder(&mut connection), b"$10\r\n0123"[..8]); // of 17 bytes
    assert_eq!(proxy.fired(), 1);
    assert_eq!(redis_says(&url, "PING"), "+PONG");
}

#[test]
fn a_retargeted_proxy_leads_to_the_other_server() {
    let (proxy, url, direct) = redis_proxy();
    let key = key();
    redis_says(&url, &format!("SET {key} first"));
    let other = Redis::start().unwrap();
    let mut connection = redis_connection(&url);
    proxy.retarget(address(&other.url())).unwrap();
    assert!(remainder(&mut connection).is_empty());
    assert_eq!(redis_says(&proxy.url(&other.url()), &format!("EXISTS {key}")), ":0");
    proxy.retarget(address(&direct)).unwrap();
    assert_eq!(redis_says(&url, &format!("GET {key}")), "$5 first");
}

#[test]
fn a_server_that_is_down_shows_as_a_closed_connection() {
    let redis = Redis::start().unwrap();
    let proxy = FaultProxy::start(address(&redis.url())).unwrap();
    let url = proxy.url(&redis.url());
    let mut connection = redis_connection(&url);
    redis.kill().unwrap();
    assert!(remainder(&mut connection).is_empty());
    assert!(remainder(&mut TcpStream::connect(address(&url)).unwrap()).is_empty());
    redis.restart().unwrap();
    assert_eq!(redis_says(&url, "PING"), "+PONG");
}

#[test]
fn the_end_of_a_proxy_is_prompt_and_closes_everything() {
    let (proxy, url, _) = redis_proxy();
    let mut connections: Vec<TcpStream> = (0..20).map(|_| redis_connection(&url)).collect();
    proxy.stall();
    connections[0].write_all(b"PING\r\n").unwrap();
    let start = Instant::now();
    drop(proxy);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(connections.iter_mut().all(|connection| remainder(connection).is_empty()));
    assert!(TcpStream::connect(address(&url)).is_err());
}

#[test]
fn what_the_server_sends_is_replaced_wherever_it_stands() {
    let (proxy, url, direct) = redis_proxy();
    let key = key();
    proxy.rewrite("old", "new");
    assert!(redis_says(&url, &format!("SET {key} old,older,cold")).contains("OK"));
    assert!(redis_says(&url, &format!("GET {key}")).contains("new,"));
    assert!(redis_says(&direct, &format!("GET {key}")).contains("old,"), "the request went through as it was");
}
