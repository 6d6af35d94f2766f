//! A private Redis Cluster.

use crate::server::{in_parallel, wait_until};
use crate::{Redis, SandboxError, random, resp};

/// Each has one replica.
const MASTERS: usize = 3;
const SLOTS: usize = 16_384;
/// A master that is silent for a second is taken for dead. The slots of the others are served meanwhile.
const SETTINGS: [(&str, &str); 3] =
    [("cluster-enabled", "yes"), ("cluster-node-timeout", "1000"), ("cluster-require-full-coverage", "no")];

/// A Redis Cluster of three masters with one replica each. Needs Redis 7. A replica takes over from a killed master
/// within about three seconds.
///
/// All are servers of our own on 127.0.0.1 with one password, and end as a [`Redis`] does.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<Redis>,
}

impl RedisCluster {
    /// Starts six nodes and makes them a cluster. Returns when all agree on it and the replicas are in step; this takes
    /// about three seconds.
    pub fn start() -> Result<RedisCluster, SandboxError> {
        let password = random::hex(16)?;
        let nodes = in_parallel(2 * MASTERS, |_| Redis::start_as(&password, &SETTINGS))?;
        let cluster = RedisCluster { nodes };
        cluster.hand_out_slots()?;
        cluster.introduce()?;
        cluster.add_replicas()?;
        Ok(cluster)
    }

    /// `redis-cluster://default:PASSWORD@127.0.0.1:PORT,127.0.0.1:PORT,…` with the ports of all nodes.
    pub fn url(&self) -> String {
        let hosts: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis-cluster://default:{}@{}", self.nodes[0].password(), hosts.join(","))
    }

    /// All nodes: first those that were masters at the start, then their replicas in the same order.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// Which of the nodes is the master for a key, in the view of the first node that answers. After the master was
    /// killed, this names it until its replica has taken over.
    pub fn master_of(&self, key: &str) -> Result<usize, SandboxError> {
        let slot: usize = self.ask_any(&["CLUSTER", "KEYSLOT", key])?.concat().parse().unwrap_or(SLOTS);
        let table = self.ask_any(&["CLUSTER", "NODES"])?.concat();
        let port = table.lines().find_map(|line| port_of_owner(line, slot));
        let index = self.nodes.iter().position(|node| Some(node.port()) == port);
        index.ok_or_else(|| SandboxError::Redis {
            command: "CLUSTER".to_owned(),
            port: self.nodes[0].port(),
            message: format!("no master for slot {slot}"),
        })
    }

    /// Waits until another node than this is the master for a key, and all nodes that run agree that the cluster is
    /// whole. Returns which.
    pub fn wait_for_master_of_other_than(&self, key: &str, former: usize) -> Result<usize, SandboxError> {
        let mut master = former;
        wait_until("another node of the Redis Cluster is the master", || {
            master = self.master_of(key)?;
            Ok(master != former && self.nodes.iter().filter_map(is_whole).all(|whole| whole))
        })?;
        Ok(master)
    }

    fn hand_out_slots(&self) -> Result<(), SandboxError> {
        for (index, node) in self.nodes[..MASTERS].iter().enumerate() {
            let first = index * SLOTS / MASTERS;
            let last = (index + 1) * SLOTS / MASTERS - 1;
            node.ask(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()])?;
            // Each its own epoch from the start, or the masters would have to settle that among themselves.
            node.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()])?;
        }
        Ok(())
    }

    fn introduce(&self) -> Result<(), SandboxError> {
        for node in &self.nodes[1..] {
            let (port, bus) = (node.port().to_string(), Redis::cluster_port(node.port()).to_string());
            self.nodes[0].ask(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus])?;
        }
        let known = self.nodes.len().to_string();
        wait_until("all nodes of the Redis Cluster know each other", || {
            for node in &self.nodes {
                let info = node.ask(&["CLUSTER", "INFO"])?;
                let whole = resp::field(&info, "cluster_state") == Some("ok");
                if !whole || resp::field(&info, "cluster_known_nodes") != Some(&known) {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn add_replicas(&self) -> Result<(), SandboxError> {
        let (masters, replicas) = self.nodes.split_at(MASTERS);
        for (master, replica) in masters.iter().zip(replicas) {
            let id = master.ask(&["CLUSTER", "MYID"])?.concat();
            replica.ask(&["CLUSTER", "REPLICATE", &id])?;
        }
        for (master, replica) in masters.iter().zip(replicas) {
            replica.wait_for_master(master.port())?;
        }
        // A node that takes a replica for a master would not let it stand for election.
        wait_until("all nodes of the Redis Cluster know the replicas", || {
            for node in &self.nodes {
                let table = node.ask(&["CLUSTER", "NODES"])?.concat();
                if table.lines().filter(|line| has_flag(line, "slave")).count() != replicas.len() {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn ask_any(&self, command: &[&str]) -> Result<Vec<String>, SandboxError> {
        let answer = self.nodes.iter().find_map(|node| node.ask(command).ok());
        answer.map_or_else(|| self.nodes[0].ask(command), Ok)
    }
}

/// Whether a node says that the cluster is whole; `None` if it says nothing.
fn is_whole(node: &Redis) -> Option<bool> {
    let info = node.ask(&["CLUSTER", "INFO"]).ok()?;
    Some(resp::field(&info, "cluster_state") == Some("ok"))
}

/// From a line of `CLUSTER NODES`, such as
/// `<id> 127.0.0.1:30001@31001 myself,master - 0 1426238317000 1 connected 0-5460 5462`:
/// the node's port, if it is the master for this slot.
fn port_of_owner(line: &str, slot: usize) -> Option<u16> {
    let owns = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        first.parse().is_ok_and(|first: usize| first <= slot) && last.parse().is_ok_and(|last: usize| slot <= last)
    };
    let mut words = line.split(' ');
    let (_, port) = words.nth(1)?.split_once('@')?.0.rsplit_once(':')?;
    (has_flag(line, "master") && words.skip(6).any(owns)).then(|| port.parse().ok())?
}

fn has_flag(line: &str, flag: &str) -> bool {
    line.split(' ').nth(2).is_some_and(|flags| flags.split(',').any(|known| known == flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_slot_is_read_from_the_table() {
        let line = "07c37df 127.0.0.1:30001@31001 myself,master - 0 1426238317000 1 connected 0-5460 5462";
        for (slot, owner) in [(0, Some(30001)), (5460, Some(30001)), (5461, None), (5462, Some(30001)), (5463, None)] {
            assert_eq!(port_of_owner(line, slot), owner, "{slot}");
        }
        let replica = "07c37df 127.0.0.1:30001@31001 slave 292f8b3 0 1426238317000 1 connected";
        assert_eq!(port_of_owner(replica, 0), None);
        assert_eq!(port_of_owner("", 0), None);
    }
}
