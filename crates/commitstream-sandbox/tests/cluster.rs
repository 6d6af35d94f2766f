//! A cluster that survives the loss of a master.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use commitstream_sandbox::RedisCluster;
use support::{redis_says, wait_until};

#[test]
fn a_replica_takes_over_the_slots_of_a_killed_master() {
    let cluster = RedisCluster::start().unwrap();
    let nodes = cluster.nodes();
    assert_eq!(nodes.len(), 6);
    assert_eq!(cluster.url().split(',').count(), 6);
    for node in nodes {
        assert!(cluster.url().contains(support::address(&node.url())));
    }
    let keys: Vec<String> = (0..3)
        .map(|master| {
            let mut candidates = (0..1000).map(|number| format!("key{number}"));
            candidates.find(|key| cluster.master_of(key).unwrap() == master).unwrap()
        })
        .collect();
    for (master, key) in keys.iter().enumerate() {
        assert_eq!(redis_says(&nodes[master].url(), &format!("SET {key} 1")), "+OK");
        wait_until("the write arrives", || redis_says(&nodes[master + 3].url(), "DBSIZE") == ":1");
    }
    assert!(redis_says(&nodes[0].url(), &format!("GET {}", keys[1])).starts_with("-MOVED"));

    nodes[1].kill().unwrap();
    assert_eq!(cluster.wait_for_master_of_other_than(&keys[1], 1).unwrap(), 4);
    let owners = [0, 4, 2];
    for (key, owner) in keys.iter().zip(owners) {
        assert_eq!(redis_says(&nodes[owner].url(), &format!("INCR {key}")), ":2");
    }
    assert!(redis_says(&nodes[0].url(), "CLUSTER INFO").contains("cluster_state:ok"));

    // The killed one comes back as the replica of its replica.
    nodes[1].restart().unwrap();
    wait_until("it follows", || {
        let info = redis_says(&nodes[1].url(), "INFO replication");
        info.contains("role:slave") && info.contains("master_link_status:up")
    });
    assert_eq!(cluster.master_of(&keys[1]).unwrap(), 4);
}
