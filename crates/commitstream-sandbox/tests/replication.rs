//! Replicas: kept in step, promoted, and turned to another master.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use commitstream_sandbox::Redis;
use support::{redis_says, wait_until};

fn has_role(redis: &Redis, role: &str) -> bool {
    redis_says(&redis.url(), "INFO replication").contains(&format!("role:{role}"))
}

#[test]
fn a_redis_replica_takes_over_from_a_killed_master() {
    let master = Redis::start().unwrap();
    assert_eq!(redis_says(&master.url(), "SET before 1"), "+OK");
    let replica = Redis::start_replica_of(&master).unwrap();
    assert_eq!(redis_says(&replica.url(), "GET before"), "$1 1");
    assert!(redis_says(&replica.url(), "SET x y").starts_with("-READONLY"));
    assert_eq!(redis_says(&master.url(), "SET after 2"), "+OK");
    wait_until("the write arrives", || redis_says(&replica.url(), "GET after") == "$1 2");

    master.kill().unwrap();
    replica.promote().unwrap();
    assert_eq!(redis_says(&replica.url(), "INCR before"), ":2");
    // The promotion outlives a restart, and so does the role of the one that follows.
    replica.kill().unwrap();
    replica.restart().unwrap();
    assert!(has_role(&replica, "master"));
    master.restart().unwrap();
    assert_eq!(redis_says(&master.url(), "SET astray 1"), "+OK");
    master.follow(&replica).unwrap();
    assert_eq!(redis_says(&master.url(), "GET before"), "$1 2");
    assert_eq!(redis_says(&master.url(), "EXISTS astray"), ":0");
    master.kill().unwrap();
    master.restart().unwrap();
    assert!(has_role(&master, "slave"));
}

#[test]
fn a_killed_redis_replica_keeps_what_it_was_given() {
    let master = Redis::start().unwrap();
    redis_says(&master.url(), "SET kept 1");
    let replica = Redis::start_replica_of(&master).unwrap();
    replica.kill().unwrap();
    master.kill().unwrap();
    replica.restart().unwrap();
    replica.promote().unwrap();
    assert_eq!(redis_says(&replica.url(), "GET kept"), "$1 1");
}

#[test]
fn a_redis_can_follow_a_server_with_another_password() {
    let (first, second) = (Redis::start().unwrap(), Redis::start().unwrap());
    redis_says(&second.url(), "SET owner second");
    first.follow(&second).unwrap();
    assert_eq!(redis_says(&first.url(), "GET owner"), "$6 second");
}
