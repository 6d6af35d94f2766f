use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use redis::{Cmd, FromRedisValue, ScriptInvocation};

use super::StreamsError;
use super::cluster::Cluster;
use super::node::{Node, Request, Way};
use super::open::Access;
use super::registry::Registry;
use super::replicas::Replicas;
use super::server::Server;
use crate::config::RedisSettings;

/// Redirections that one command follows: the first is usual after a slot has moved, another may meet the next move.
pub(super) const REDIRECTIONS: usize = 3;

/// A connection to Redis (one server, the master that sentinels name, or the masters of a cluster) that is opened when first
/// needed and again after it broke. Cheap to clone; clones share it.
///
/// Nothing is repeated here: a command that may have been carried out is reported as such
/// ([`StreamsError::OutcomeUnknown`]), and the caller knows whether repeating it is safe.
#[derive(Clone)]
pub struct Streams {
    pub(super) prefix: Arc<str>,
    server: Arc<Server>,
    access: Access,
    servers: Servers,
    /// What the append of a batch waits for.
    pub(super) replicas: Option<Arc<Replicas>>,
    pub(super) registry: Arc<Registry>,
}

#[derive(Clone)]
enum Servers {
    One(Arc<Node>),
    Cluster(Arc<Cluster>),
}

impl Servers {
    fn new(server: &Server, access: Access) -> Self {
        let way = match server {
            Server::Single(info) => Way::Direct(Box::new(info.clone())),
            Server::Sentinel(sentinels) => Way::Sentinels(Arc::clone(sentinels)),
            Server::Cluster { login, seeds } => return Self::Cluster(Arc::new(Cluster::new(login, seeds, access))),
        };
        Self::One(Arc::new(Node::new(way, access)))
    }
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").field("server", &self.server.to_string()).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Streams {
    /// Prepares a connection to `url`; nothing is sent yet.
    ///
    /// # Errors
    /// The URL cannot be read.
    pub fn new(url: &str, settings: &RedisSettings) -> Result<Self, StreamsError> {
        let (server, tls) = Server::parse(url, settings)?;
        let (connect, response) = (settings.connect_timeout, settings.response_timeout);
        let access = Access { connect, response, block: Duration::ZERO, tls: Arc::new(tls) };
        let servers = Servers::new(&server, access.clone());
        let prefix = settings.stream_prefix.as_str().into();
        let (server, registry) = (Arc::new(server), Arc::default());
        let mut streams = Self { prefix, server, access, servers, replicas: None, registry };
        streams.replicas = Replicas::new(&streams, settings).map(Arc::new);
        Ok(streams)
    }

    /// Key of the stream that events of `aggregate_type` go to.
    #[must_use]
    pub fn stream_of(&self, aggregate_type: &str) -> String {
        format!("{}{aggregate_type}", self.prefix)
    }

    /// Asks for a sign of life; in a cluster, of every master.
    ///
    /// # Errors
    /// Redis is not reachable or not able to answer.
    pub async fn ping(&self) -> Result<(), StreamsError> {
        let doing = "asking for a sign of life";
        let ping = redis::cmd("PING");
        let masters = self.masters(doing).await?;
        try_join_all(masters.iter().map(|master| master.query::<()>(doing, &ping))).await?;
        Ok(())
    }

    /// A connection of its own to the same servers, for calls that block the connection they run on: for so long, its silence says
    /// nothing. Keep it short: a connection that is dead is noticed only after it.
    #[must_use]
    pub(crate) fn dedicated(&self, longest_block: Duration) -> Self {
        let access = self.access.blocking(longest_block);
        Self { servers: Servers::new(&self.server, access.clone()), access, ..self.clone() }
    }

    /// A connection of its own to the same servers that waits no longer than this.
    #[must_use]
    pub(super) fn within(&self, connect: Duration, response: Duration) -> Self {
        let (connect, response) = (self.access.connect.min(connect), self.access.response.min(response));
        let access = Access { connect, response, ..self.access.clone() };
        Self { servers: Servers::new(&self.server, access.clone()), access, ..self.clone() }
    }

    /// True if a command can concern keys of one slot only, and so, mostly, of one stream.
    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.servers, Servers::Cluster(_))
    }

    /// A command that concerns `key`.
    pub(super) async fn query<T: FromRedisValue>(
        &self,
        doing: &'static str,
        key: &str,
        command: &Cmd,
    ) -> Result<T, StreamsError> {
        self.send(doing, key, Request::Command(command)).await
    }

    pub(super) async fn invoke<T: FromRedisValue>(
        &self,
        doing: &'static str,
        key: &str,
        script: &ScriptInvocation<'_>,
    ) -> Result<T, StreamsError> {
        self.send(doing, key, Request::Script(script)).await
    }

    /// Sends to where `key` is. All keys of the request are in the slot of that key.
    pub(super) async fn send<T: FromRedisValue>(
        &self,
        doing: &'static str,
        key: &str,
        request: Request<'_>,
    ) -> Result<T, StreamsError> {
        let mut node = self.node_of(doing, key).await?;
        for _ in 0..REDIRECTIONS {
            match node.send(doing, request).await {
                Ok(answer) => return Ok(answer),
                Err(error) => match self.redirected(&error).await {
                    Some(other) => node = other,
                    None => return Err(error.about(key)),
                },
            }
        }
        node.send(doing, request).await.map_err(|error| error.about(key))
    }

    /// The node to ask instead, for what was redirected. After any other outage, the way is learnt anew before the next call.
    pub(super) async fn redirected(&self, error: &StreamsError) -> Option<Arc<Node>> {
        let Servers::Cluster(cluster) = &self.servers else { return None };
        if let Some(address) = error.moved_to() {
            return Some(cluster.moved(address).await);
        }
        if error.is_outage() {
            cluster.forget().await;
        }
        None
    }

    pub(super) async fn node_of(&self, doing: &'static str, key: &str) -> Result<Arc<Node>, StreamsError> {
        match &self.servers {
            Servers::One(node) => Ok(Arc::clone(node)),
            Servers::Cluster(cluster) => cluster.node_of(doing, key).await,
        }
    }

    /// Every server that holds streams.
    pub(super) async fn masters(&self, doing: &'static str) -> Result<Vec<Arc<Node>>, StreamsError> {
        match &self.servers {
            Servers::One(node) => Ok(vec![Arc::clone(node)]),
            Servers::Cluster(cluster) => cluster.masters(doing).await,
        }
    }

    /// What goes to the same node, by the streams that things concern. Each group keeps the order.
    pub(super) async fn by_node<T>(
        &self,
        doing: &'static str,
        things: impl IntoIterator<Item = T>,
        stream: impl Fn(&T) -> String,
    ) -> Result<Vec<(Arc<Node>, Vec<T>)>, StreamsError> {
        let mut groups: Vec<(Arc<Node>, Vec<T>)> = Vec::new();
        for thing in things {
            let node = self.node_of(doing, &stream(&thing)).await?;
            match groups.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &node)) {
                Some((_, group)) => group.push(thing),
                None => groups.push((node, vec![thing])),
            }
        }
        Ok(groups)
    }
}
