//! The life of single servers: start, stop, kill, restart, pause.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use commitstream_sandbox::{Postgres, Redis, Sandbox};
use support::{processes_mentioning, psql, redis_connection, redis_says, wait_until};

#[test]
fn postgres_starts_serves_and_leaves_nothing() {
    let postgres = Postgres::start().unwrap();
    let directory = postgres.directory().to_owned();
    assert_eq!(psql(&postgres.url(), "SELECT 6 * 7"), "42");
    assert_eq!(psql(&postgres.url(), "SHOW fsync"), "off");
    assert_eq!(psql(&postgres.url(), "SHOW server_encoding"), "UTF8");
    assert_eq!(psql(&postgres.url(), "SHOW server_version").split(' ').next().unwrap(), postgres.version().unwrap());
    assert!(!processes_mentioning(&directory).is_empty());
    drop(postgres);
    assert!(!directory.exists());
    assert_eq!(processes_mentioning(&directory), Vec::<String>::new());
}

#[test]
fn redis_starts_serves_and_leaves_nothing() {
    let redis = Redis::start().unwrap();
    let (directory, pid) = (redis.directory().to_owned(), redis.pid());
    assert_eq!(redis_says(&redis.url(), "SET a b"), "+OK");
    assert!(support::is_running(pid));
    assert_eq!(redis_says(&redis.url(), "CONFIG GET save").split(' ').next_back(), Some("$0"));
    drop(redis);
    assert!(!support::is_running(pid));
    assert!(!directory.exists());
    assert_eq!(processes_mentioning(&directory), Vec::<String>::new());
}

#[test]
fn settings_of_the_caller_win() {
    let postgres = Postgres::start_with(&[("fsync", "on"), ("max_connections", "20")]).unwrap();
    assert_eq!(psql(&postgres.url(), "SHOW fsync"), "on");
    assert_eq!(psql(&postgres.url(), "SHOW max_connections"), "20");
    let redis = Redis::start_with(&[("maxmemory", "3mb")]).unwrap();
    assert!(redis_says(&redis.url(), "CONFIG GET maxmemory").ends_with("3145728"));
}

#[test]
fn a_directory_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let redis = Redis::start().unwrap();
    assert_eq!(redis.directory().metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_killed_postgres_keeps_its_data_and_its_port() {
    let postgres = Postgres::start().unwrap();
    let (url, pid) = (postgres.url(), postgres.pid());
    psql(&url, "CREATE TABLE kept AS SELECT 7 AS number");
    for round in 1..=3 {
        postgres.kill().unwrap();
        assert!(TcpStream::connect(support::address(&url)).is_err(), "round {round}: still listening");
        postgres.restart().unwrap();
        assert_eq!(psql(&postgres.url(), "SELECT number FROM kept"), "7", "round {round}");
    }
    assert_eq!(postgres.url(), url);
    assert_ne!(postgres.pid(), pid);
    postgres.stop().unwrap();
    postgres.restart().unwrap();
    postgres.restart().unwrap(); // of a running server
    assert_eq!(psql(&url, "SELECT number FROM kept"), "7");
}

#[test]
fn a_killed_redis_keeps_its_data_and_its_port() {
    let redis = Redis::start().unwrap();
    let url = redis.url();
    for round in 1..=5 {
        assert_eq!(redis_says(&url, "INCR counter"), format!(":{round}"));
        redis.kill().unwrap();
        assert!(TcpStream::connect(support::address(&url)).is_err(), "round {round}: still listening");
        redis.restart().unwrap();
    }
    redis.stop().unwrap();
    redis.restart().unwrap();
    assert_eq!(redis.url(), url);
    assert_eq!(redis_says(&url, "GET counter"), "$1 5");
}

#[test]
fn a_paused_redis_is_silent_until_it_is_resumed() {
    let redis = Redis::start().unwrap();
    let mut connection = redis_connection(&redis.url());
    redis.pause().unwrap();
    connection.write_all(b"PING\r\n").unwrap();
    connection.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut answer = [0; 7];
    let silence = connection.read_exact(&mut answer).unwrap_err();
    assert!(matches!(silence.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{silence}");
    redis.resume().unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"+PONG\r\n");
}

#[test]
fn a_paused_postgres_has_paused_backends_and_can_still_be_removed() {
    let postgres = Postgres::start().unwrap();
    let url = postgres.url();
    let busy_url = url.clone();
    let worker = std::thread::spawn(move || support::try_psql(&busy_url, "DO $$ BEGIN LOOP END LOOP; END $$").unwrap_err());
    let busy = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DO %'";
    wait_until("a backend is busy", || psql(&url, busy) == "1");
    let backend_states = || support::child_states(postgres.pid());
    assert!(!backend_states().contains(&'T'));
    postgres.pause().unwrap();
    // A backend that ends at this moment stays a zombie, since the server is stopped.
    wait_until("all backends are stopped", || backend_states().iter().all(|state| ['T', 'Z'].contains(state)));
    let directory = postgres.directory().to_owned();
    drop(postgres); // resumes, stops and removes it
    worker.join().unwrap();
    assert!(!directory.exists());
}

#[test]
fn two_sandboxes_at_once_are_strangers() {
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(Sandbox::start);
        let second = scope.spawn(Sandbox::start);
        (first.join().unwrap().unwrap(), second.join().unwrap().unwrap())
    });
    assert_ne!(support::address(&first.postgres_url()), support::address(&second.postgres_url()));
    assert_ne!(support::address(&first.redis_url()), support::address(&second.redis_url()));
    assert_eq!(redis_says(&first.redis_url(), "SET only first"), "+OK");
    assert_eq!(redis_says(&second.redis_url(), "EXISTS only"), ":0");
}

#[test]
fn each_test_database_is_empty_and_dropped() {
    let sandbox = Sandbox::shared();
    let (first, second) = (sandbox.database().unwrap(), sandbox.database().unwrap());
    first.psql("CREATE TABLE mine (a int, b text); INSERT INTO mine VALUES (1, 'x'), (2, 'y');").unwrap();
    assert_eq!(first.psql("SELECT * FROM mine ORDER BY a;").unwrap(), "1|x\n2|y\n");
    let error = second.psql("SELECT * FROM mine; SELECT 'not reached';").unwrap_err().to_string();
    assert!(error.contains("relation \"mine\" does not exist"), "{error}");
    let long = second.psql(&"SELECT repeat('x', 1000);\n".repeat(2000)).unwrap();
    assert_eq!(long.len(), 2000 * 1001);
    let name = first.name().to_owned();
    drop(first);
    assert_eq!(second.psql(&format!("SELECT count(*) FROM pg_database WHERE datname = '{name}';")).unwrap(), "0\n");
}
