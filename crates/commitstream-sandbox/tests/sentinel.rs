//! Sentinels that make a replica the master.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use commitstream_sandbox::RedisSentinel;
use support::{redis_says, try_redis_says, wait_until};

#[test]
fn a_replica_becomes_the_master_when_the_master_is_killed() {
    let group = RedisSentinel::start(2).unwrap();
    let servers = group.servers();
    assert_eq!((servers.len(), group.master().unwrap()), (3, 0));
    assert_eq!(redis_says(&servers[0].url(), "SET kept 1"), "+OK");
    for replica in &servers[1..] {
        wait_until("the write arrives", || redis_says(&replica.url(), "GET kept") == "$1 1");
    }
    servers[0].kill().unwrap();
    let master = group.wait_for_master_other_than(0).unwrap();
    assert_ne!(master, 0);
    assert_eq!(redis_says(&servers[master].url(), "INCR kept"), ":2");
}

#[test]
fn a_failover_can_be_asked_for() {
    let group = RedisSentinel::start(1).unwrap();
    let servers = group.servers();
    assert_eq!(group.failover().unwrap(), 1);
    assert_eq!(redis_says(&servers[1].url(), "SET kept 1"), "+OK");
    let follows = || try_redis_says(&servers[0].url(), "GET kept").is_ok_and(|value| value == "$1 1");
    wait_until("the former master follows", follows);
}

#[test]
fn the_url_names_the_sentinels() {
    let group = RedisSentinel::start(0).unwrap();
    let url = group.url();
    let (_, hosts) = url.strip_prefix("redis-sentinel://default:").unwrap().split_once('@').unwrap();
    let hosts: Vec<&str> = hosts.strip_suffix("/0#mymaster").unwrap().split(',').collect();
    assert_eq!(hosts.len(), 3);
    let master = support::address(&group.servers()[0].url()).rsplit_once(':').unwrap().1.to_owned();
    for host in hosts {
        let mut sentinel = TcpStream::connect(host).unwrap();
        sentinel.write_all(b"SENTINEL GET-MASTER-ADDR-BY-NAME mymaster\r\n").unwrap();
        let mut answer = [0; 28];
        sentinel.read_exact(&mut answer).unwrap();
        assert!(String::from_utf8_lossy(&answer).contains(&master));
    }
}
