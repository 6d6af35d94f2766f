//! Redis Cluster: which node holds a stream?
//!
//! The redis crate has a cluster client, and it is not used, because it repeats what it sends: up to 16 times after a lost
//! connection, a time-out, `LOADING`, `READONLY`, `CLUSTERDOWN`, `TRYAGAIN` and every redirection
//! (`cluster_handling/async_connection/request.rs`, `choose_response`). An `XADD` whose answer was lost would be in the stream twice, and
//! of a pipeline that gets one redirection the whole is sent again, with what was carried out. Without retries
//! it follows no redirection at all and throws the other answers of that pipeline away, so that nothing is known of
//! them; and one node that is silent holds up the commands to all, because the client looks for the others first.
//!
//! So each node has a connection of its own here, which breaks and is mended alone, and this file knows the way. It is
//! learnt from any node that answers, and learnt anew after a redirection (from the node that it names, since others may not
//! know yet) or an outage. Nothing is sent twice, except what
//! was answered with `MOVED`: that was not carried out. `ASK` and `TRYAGAIN` (a slot on its way to another node) count as outages of a
//! moment: the script cannot run in such a slot in any case, since its marker and its stream are on different nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::future::select_ok;
use rand::seq::IteratorRandom;
use redis::{ConnectionInfo, ErrorKind, RedisError, Value, from_redis_value};
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;

use super::StreamsError;
use super::node::{Node, Way};
use super::open::{Access, timed_out};
use super::server::{Address, elsewhere};

/// So many nodes, at random, are asked at once for the way; the first answer counts.
const ASKED: usize = 4;

pub(super) struct Cluster {
    login: ConnectionInfo,
    access: Access,
    /// Of the URL: they are asked even if the cluster does not name them.
    seeds: Vec<Address>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<Address, Arc<Node>>,
    /// Empty when it must be learnt (again).
    masters: Vec<Range>,
    /// A redirection named it: it knows at least of its own slots who holds them.
    named: Option<Address>,
}

/// Slots from `first` to `last` are held by `master`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Range {
    first: u16,
    last: u16,
    master: Address,
    replicas: Vec<Address>,
}

impl Cluster {
    pub fn new(login: &ConnectionInfo, seeds: &[Address], access: Access) -> Self {
        Self { login: login.clone(), access, seeds: seeds.to_vec(), state: Mutex::default() }
    }

    /// The master of the slot of `key`.
    pub async fn node_of(&self, doing: &'static str, key: &str) -> Result<Arc<Node>, StreamsError> {
        let mut state = self.learnt(doing).await?;
        let slot = slot_of(key.as_bytes());
        let master = state.masters.iter().find(|range| (range.first..=range.last).contains(&slot)).map(|r| r.master.clone());
        let Some(master) = master else {
            state.masters.clear();
            let source = RedisError::from((ErrorKind::ClusterConnectionNotFound, "no node of the cluster holds this stream now"));
            return Err(StreamsError::Unavailable { server: key.to_owned(), doing, source });
        };
        Ok(self.node(&mut state, &master))
    }

    /// All masters that hold slots.
    pub async fn masters(&self, doing: &'static str) -> Result<Vec<Arc<Node>>, StreamsError> {
        let mut state = self.learnt(doing).await?;
        let masters: BTreeSet<Address> = state.masters.iter().map(|range| range.master.clone()).collect();
        Ok(masters.iter().map(|master| self.node(&mut state, master)).collect())
    }

    /// The node that a redirection names. Other slots may have moved, too.
    pub async fn moved(&self, address: Address) -> Arc<Node> {
        let mut state = self.state.lock().await;
        state.masters.clear();
        state.named = Some(address.clone());
        self.node(&mut state, &address)
    }

    /// A node failed: another may have taken its place.
    pub async fn forget(&self) {
        self.state.lock().await.masters.clear();
    }

    fn node(&self, state: &mut State, address: &Address) -> Arc<Node> {
        let new =
            || Arc::new(Node::new(Way::Direct(Box::new(elsewhere(&self.login, &address.0, address.1))), self.access.clone()));
        Arc::clone(state.nodes.entry(address.clone()).or_insert_with(new))
    }

    /// The way, which takes no longer to learn than the time-out to connect.
    async fn learnt(&self, doing: &'static str) -> Result<MutexGuard<'_, State>, StreamsError> {
        let learn = async {
            let mut state = self.state.lock().await;
            self.learn(doing, &mut state).await?;
            Ok(state)
        };
        let timed_out = || {
            let source = timed_out("timed out while asking for the nodes of the cluster");
            StreamsError::Unavailable { server: self.login.addr().to_string(), doing, source }
        };
        timeout(self.access.connect, learn).await.unwrap_or_else(|_| Err(timed_out()))
    }

    /// Asks for the way if it is not known.
    async fn learn(&self, doing: &'static str, state: &mut State) -> Result<(), StreamsError> {
        if !state.masters.is_empty() {
            return Ok(());
        }
        let asked = state.named.take().map_or_else(|| self.some_nodes(state), |named| vec![named]);
        let nodes: Vec<_> = asked.iter().map(|address| (self.node(state, address), address.0.as_str())).collect();
        let slots = redis::cmd("CLUSTER").arg("SLOTS").to_owned();
        let ask = |(node, host): (Arc<Node>, &str)| {
            let (slots, host) = (&slots, host.to_owned());
            Box::pin(async move {
                let answer: Vec<Vec<Value>> = node.query(doing, slots).await?;
                let ranges: Option<Vec<Range>> = answer.iter().map(|entry| range(entry, &host)).collect();
                let strange = || node.typed(doing, RedisError::from((ErrorKind::Parse, "CLUSTER SLOTS makes no sense")));
                ranges.filter(|ranges| !ranges.is_empty()).ok_or_else(strange)
            })
        };
        let (ranges, _) = select_ok(nodes.into_iter().map(ask))
            .await
            .map_err(|error: StreamsError| error.before_it_was_sent(&self.login.addr().to_string()))?;
        let named: BTreeSet<&Address> = ranges.iter().flat_map(|range| range.replicas.iter().chain([&range.master])).collect();
        state.nodes.retain(|address, _| self.seeds.contains(address) || named.contains(address));
        for address in named {
            // Replicas are known so that they can be asked when their master is gone; connections are opened when needed.
            self.node(state, address);
        }
        state.masters = ranges;
        Ok(())
    }

    fn some_nodes(&self, state: &State) -> Vec<Address> {
        let known: BTreeSet<Address> = self.seeds.iter().chain(state.nodes.keys()).cloned().collect();
        known.into_iter().choose_multiple(&mut rand::rng(), ASKED)
    }
}

/// One entry of `CLUSTER SLOTS`. A node that does not know its own host leaves it empty: then it is the one that was asked.
/// <https://redis.io/docs/latest/commands/cluster-slots/>
fn range(entry: &[Value], asked: &str) -> Option<Range> {
    let number = |value: &Value| from_redis_value::<u16>(value.clone()).ok();
    let address = |value: &Value| {
        let Value::Array(parts) = value else { return None };
        let host: Option<String> = from_redis_value(parts.first()?.clone()).ok()?;
        let host = host.filter(|host| !host.is_empty() && host != "?").unwrap_or_else(|| asked.to_owned());
        Some((host, number(parts.get(1)?)?))
    };
    let [first, last, master, replicas @ ..] = entry else { return None };
    let replicas = replicas.iter().filter_map(address).collect();
    Some(Range { first: number(first)?, last: number(last)?, master: address(master)?, replicas })
}

/// CRC-16/XMODEM of the key, or of what stands in its first pair of braces.
/// <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#key-distribution-model>
fn slot_of(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let inside = &key[open + 1..];
        inside.iter().position(|byte| *byte == b'}').map(|close| &inside[..close])
    });
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    let crc = hashed.iter().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 })
    });
    crc % 16_384
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first value is the check value of the specification; the others are what `CLUSTER KEYSLOT` answers.
    #[test]
    fn slots_are_those_of_redis() {
        assert_eq!(slot_of(b"123456789"), 0x31C3);
        assert_eq!([slot_of(b"foo"), slot_of(b"bar"), slot_of(b"foo{}{bar}")], [12_182, 5_061, 8_363]);
        assert_eq!(slot_of(b"foo{bar}{zap}"), slot_of(b"bar"));
    }

    #[test]
    fn a_marker_is_in_the_slot_of_its_stream() {
        let marker = super::super::marker_key("events:user", uuid::Uuid::nil());
        assert_eq!(slot_of(marker.as_bytes()), slot_of(b"events:user"));
    }

    #[test]
    fn a_node_that_does_not_know_its_host_is_the_one_that_was_asked() {
        let text = |text: &str| Value::BulkString(text.into());
        let node = |host: Value, port: i64| Value::Array(vec![host, Value::Int(port), text("id"), Value::Array(vec![])]);
        let entry = [Value::Int(0), Value::Int(5_460), node(Value::Nil, 7_000), node(text("ten"), 7_001), node(text(""), 7_002)];
        let found = range(&entry, "asked").expect("a range");
        assert_eq!((found.first, found.last, found.master), (0, 5_460, ("asked".to_owned(), 7_000)));
        assert_eq!(found.replicas, [("ten".to_owned(), 7_001), ("asked".to_owned(), 7_002)]);
        assert_eq!(range(&entry[..2], "asked"), None);
    }
}
