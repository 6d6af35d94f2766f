//! Replicas and standbys: kept in step, promoted, and turned to another master.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use commitstream_sandbox::{Postgres, Redis};
use support::{psql, redis_says, wait_until};

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

#[test]
fn a_promoted_postgres_standby_has_what_was_committed() {
    let primary = Postgres::start().unwrap();
    psql(&primary.url(), "CREATE TABLE kept AS SELECT 0 AS number");
    let standby = Postgres::start_standby_of(&primary).unwrap();
    assert_eq!(psql(&standby.url(), "SELECT pg_is_in_recovery()"), "t");
    primary.set_synchronous_replication(true).unwrap();
    for number in 1..=20 {
        psql(&primary.url(), &format!("INSERT INTO kept VALUES ({number})"));
    }
    primary.kill().unwrap();
    standby.promote().unwrap();
    assert_eq!(psql(&standby.url(), "SELECT count(*), max(number) FROM kept"), "21|20");
    psql(&standby.url(), "INSERT INTO kept VALUES (21)"); // and waits for no other standby
    standby.kill().unwrap();
    standby.restart().unwrap();
    assert_eq!(psql(&standby.url(), "SELECT count(*) FROM kept WHERE NOT pg_is_in_recovery()"), "22");
}

#[test]
fn a_synchronous_commit_waits_for_the_postgres_standby() {
    let primary = Postgres::start().unwrap();
    psql(&primary.url(), "CREATE TABLE kept (number int)");
    let standby = Postgres::start_standby_of(&primary).unwrap();
    standby.pause().unwrap();
    psql(&primary.url(), "INSERT INTO kept VALUES (1)"); // asynchronous: waits for nobody
    standby.resume().unwrap();
    for _ in 0..3 {
        primary.set_synchronous_replication(true).unwrap();
        standby.pause().unwrap();
        let url = primary.url();
        let commit = std::thread::spawn(move || psql(&url, "INSERT INTO kept VALUES (2)"));
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        wait_until("the commit waits", || psql(&primary.url(), waiting) == "1");
        standby.resume().unwrap();
        commit.join().unwrap();
        primary.set_synchronous_replication(false).unwrap();
    }
}

#[test]
fn a_standby_can_follow_a_synchronous_primary_and_then_stand_alone() {
    let primary = Postgres::start_with(&[("work_mem", "7MB")]).unwrap();
    let first = Postgres::start_standby_of(&primary).unwrap();
    primary.set_synchronous_replication(true).unwrap();
    let second = Postgres::start_standby_of(&primary).unwrap(); // copies the primary's settings too
    psql(&primary.url(), "CREATE TABLE kept AS SELECT 7 AS number");
    wait_until("the table arrives", || psql(&second.url(), "SELECT to_regclass('kept') IS NOT NULL") == "t");
    drop(first);
    primary.stop().unwrap();
    second.promote().unwrap();
    psql(&second.url(), "UPDATE kept SET number = 8");
    assert_eq!(psql(&second.url(), "SHOW work_mem"), "7MB");
}
