//! What [`doctor`](crate::doctor) wants to know of Redis: facts, without a verdict. Nothing here changes anything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use redis::{Cmd, ConnectionAddr, RedisError, Value};

use super::node::{Node, Request};
use super::read::escape_glob;
use super::registry::{REGISTRY, Registered};
use super::server::split;
use super::{GroupInfo, StreamInfo, Streams, StreamsError};
use crate::doctor::Clock;

const DOING: &str = "examining Redis";

/// Longest that all of it may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Steps of the walk over the keys of one server, of a thousand keys each.
const MOST_STEPS: usize = 500;

/// Keys under the prefix that are looked at.
const MOST_KEYS: usize = 1_000;

/// Names that are tried to find one whose slot a master of a cluster holds: enough for one that holds a thousandth of them.
const MOST_NAMES: usize = 10_000;

/// Streams whose groups are looked at.
const MOST_STREAMS: usize = 100;

/// Streams whose ends are looked at.
const MOST_STATES: usize = 1_000;

/// Each part is there, or why it is not.
#[derive(Debug)]
pub struct RedisFacts {
    /// Every master.
    pub servers: Vec<ServerFacts>,
    pub keys: Result<KeyFacts, StreamsError>,
    pub registry: Result<RegistryFacts, StreamsError>,
    pub streams: Result<Vec<StreamFacts>, StreamsError>,
    /// How streams stand that the outbox knows, by key; `None` of one that is not there.
    pub states: BTreeMap<String, Option<StreamInfo>>,
}

/// What is noted of the streams under the prefix, and of those beside it.
#[derive(Debug, Clone, Default)]
pub struct RegistryFacts {
    pub registered: Registered,
    /// Redis's clock.
    pub now_ms: u64,
    /// Prefixes of others with which ours begins.
    pub outer: Vec<String>,
}

/// One server.
#[derive(Debug)]
pub struct ServerFacts {
    /// `host:port`, or the name of the master and its sentinels.
    pub name: String,
    /// `None` where the URL is that of this server.
    pub place: Option<Place>,
    pub clock: Result<Clock, StreamsError>,
    /// `INFO`.
    pub info: Result<BTreeMap<String, String>, StreamsError>,
    /// `CONFIG GET` of what is asked below.
    pub config: Result<BTreeMap<String, String>, StreamsError>,
    /// Commands that the relay needs and this user may not run.
    pub denied: Vec<String>,
    /// Patterns of keys that they need and this user may not use.
    pub denied_keys: Vec<String>,
    /// Those that the server does not know.
    pub unknown: Vec<String>,
    /// Why nothing can be written at the moment.
    pub unable: Option<String>,
}

/// Where a server is that others named: one of a cluster, or the master of sentinels.
#[derive(Debug, Clone)]
pub struct Place {
    pub host: String,
    pub port: u16,
    pub tls: bool,
    /// `None` for the default user.
    pub user: Option<String>,
    pub has_password: bool,
    pub of_cluster: bool,
}

/// The keys under the prefix.
#[derive(Debug, Clone, Default)]
pub struct KeyFacts {
    pub streams: Vec<String>,
    /// Name and type of the others.
    pub foreign: Vec<(String, String)>,
    /// Prefixes of others that begin with ours.
    pub inner: Vec<String>,
    /// There were too many keys to look at them all.
    pub incomplete: bool,
}

/// A stream and its groups.
#[derive(Debug, Clone)]
pub struct StreamFacts {
    pub stream: String,
    /// How long ago its first entry was written, by the server's clock.
    pub first_age_ms: Option<u64>,
    pub groups: Vec<GroupInfo>,
}

impl Streams {
    /// Looks at every master and at what stands under the prefix.
    ///
    /// # Errors
    /// Redis is not reachable, or lets this user not in.
    pub async fn examine(&self) -> Result<RedisFacts, StreamsError> {
        let timed_out = || {
            let source = RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
            StreamsError::Unavailable { server: self.stream_of("*"), doing: DOING, source }
        };
        tokio::time::timeout(LIMIT, self.facts()).await.unwrap_or_else(|_| Err(timed_out()))
    }

    async fn facts(&self) -> Result<RedisFacts, StreamsError> {
        match self.ping().await {
            // One that cannot write to its disk answers nothing else to a PING.
            Err(StreamsError::Unavailable { source, .. }) if source.code() == Some("MISCONF") => {}
            answer => answer?,
        }
        let mut servers = Vec::new();
        for master in self.masters(DOING).await? {
            servers.push(self.server_facts(&master).await);
        }
        let keys = self.key_facts().await;
        let registry = self.registry_facts().await;
        let streams = match &registry {
            Ok(facts) => {
                let names: Vec<_> = facts.registered.types.keys().map(|of| self.stream_of(of)).collect();
                self.stream_facts(&names).await
            }
            Err(_) => Ok(Vec::new()),
        };
        Ok(RedisFacts { servers, keys, registry, streams, states: BTreeMap::new() })
    }

    async fn registry_facts(&self) -> Result<RegistryFacts, StreamsError> {
        let (registered, now_ms) = (self.registered().await?, self.now_ms().await?);
        let mut outer = Vec::new();
        // Every beginning of the prefix might be one.
        for (at, _) in self.prefix.char_indices() {
            let key = format!("{}{REGISTRY}", &self.prefix[..at]);
            match self.query(DOING, &key, redis::cmd("EXISTS").arg(&key)).await {
                Ok(true) => outer.push(self.prefix[..at].to_owned()),
                Ok(false) => {}
                // Most users may look at their own keys only.
                Err(StreamsError::Refused { source, .. }) if source.code() == Some("NOPERM") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(RegistryFacts { registered, now_ms, outer })
    }

    /// How these streams stand. What cannot be asked is left out.
    pub(crate) async fn states(&self, streams: impl Iterator<Item = &String>) -> BTreeMap<String, Option<StreamInfo>> {
        let mut states = BTreeMap::new();
        for stream in streams.filter(|stream| stream.starts_with(&*self.prefix)).take(MOST_STATES) {
            if let Ok(state) = self.state(stream).await {
                states.insert(stream.clone(), state);
            }
        }
        states
    }

    async fn server_facts(&self, node: &Node) -> ServerFacts {
        let info: Result<String, _> = node.query(DOING, &redis::cmd("INFO")).await;
        let mut facts = ServerFacts {
            name: node.name.to_string(),
            place: self.place(node).await,
            clock: clock(node).await,
            info: info.map(|text| fields(&text)),
            config: config(node).await,
            denied: Vec::new(),
            denied_keys: Vec::new(),
            unknown: Vec::new(),
            unable: None,
        };
        self.try_commands(node, &mut facts).await;
        facts
    }

    async fn place(&self, node: &Node) -> Option<Place> {
        let of_cluster = self.is_cluster();
        if node.is_direct() && !of_cluster {
            return None;
        }
        let info = node.place().await?;
        let (host, port) = split(&info.addr().to_string())?;
        let login = info.redis_settings();
        Some(Place {
            host,
            port,
            tls: matches!(info.addr(), ConnectionAddr::TcpTls { .. }),
            user: login.username().map(str::to_owned),
            has_password: login.password().is_some(),
            of_cluster,
        })
    }

    /// Runs each command of the relay where it changes nothing, on keys that do not exist: only that says for certain, with any version of Redis,
    /// what this user may do. Redis looks at the permission before anything else, so any other error than a missing one is an answer, too.
    async fn try_commands(&self, node: &Node, facts: &mut ServerFacts) {
        for (name, command) in self.commands(&self.stream_on(node).await) {
            let Err(error) = node.query::<Value>(DOING, &command).await else { continue };
            let (StreamsError::Refused { source, .. } | StreamsError::Unavailable { source, .. }) = &error else { continue };
            let (code, text) = (source.code().unwrap_or_default(), source.detail().unwrap_or_default());
            if code == "NOPERM" && is_of_key(text) {
                let pattern = self.key_pattern(name);
                if !facts.denied_keys.contains(&pattern) {
                    facts.denied_keys.push(pattern);
                }
            } else if code == "NOPERM" {
                facts.denied.push(name.to_owned());
            } else if text.contains("unknown command") {
                facts.unknown.push(name.to_owned());
            } else if matches!(code, "OOM" | "MISCONF" | "READONLY" | "NOREPLICAS") {
                facts.unable.get_or_insert_with(|| format!("{code} {text}"));
            }
        }
    }

    /// The keys that such a command is for, as a rule of `ACL SETUSER`.
    fn key_pattern(&self, command: &str) -> String {
        let beside = if BESIDE.contains(&command) { "{" } else { "" };
        format!("~{beside}{}*", escape_glob(&self.prefix))
    }

    /// The name of a stream that does not exist and would be on this node: elsewhere Redis says so before it says that it cannot write.
    async fn stream_on(&self, node: &Node) -> String {
        let new = || self.stream_of(&format!("doctor-{}", uuid::Uuid::new_v4().simple()));
        for _ in 0..MOST_NAMES {
            let stream = new();
            match self.node_of(DOING, &stream).await {
                Ok(owner) if !std::ptr::eq(&*owner, node) => {}
                _ => return stream,
            }
        }
        new()
    }

    fn commands(&self, stream: &str) -> Vec<(&'static str, Cmd)> {
        let marker = super::marker_key(stream, uuid::Uuid::new_v4());
        let words = |name: &'static str, words: &[&str]| {
            let mut command = Cmd::new();
            name.split(' ').chain(words.iter().copied()).for_each(|word| {
                command.arg(word);
            });
            (name, command)
        };
        let nothing = "return 1";
        let mut commands = vec![
            words("PING", &[]),
            words("SCRIPT LOAD", &[nothing]),
            // Of `return 1`.
            words("EVALSHA", &["e0e1f9fabfc9d4800c877a703b823ac0578ff8db", "1", stream]),
            words("XADD", &[stream, "NOMKSTREAM", "*", "id", "x"]),
            words("XRANGE", &[stream, "-", "+", "COUNT", "1"]),
            words("GET", &[&marker]),
            words("SET", &[&marker, "x", "XX"]),
            words("PEXPIRE", &[&marker, "1000"]),
            words("TIME", &[]),
            words("HGETALL", &[&self.registry_key()]),
            words("HGET", &[&self.registry_key(), "{nothing}"]),
            // Of two fields and one value.
            words("HSET", &[&self.registry_key(), "{nothing}", "x", "{nothing}"]),
            words("XLEN", &[stream]),
            words("XINFO STREAM", &[stream]),
            words("XINFO GROUPS", &[stream]),
            words("XPENDING", &[stream, "doctor"]),
            words("XTRIM", &[stream, "MAXLEN", "1000000"]),
        ];
        if self.replicas.is_some() {
            commands.push(words("WAIT", &["0", "1"]));
        }
        commands
    }

    /// One walk over the keys, whatever their type.
    async fn key_facts(&self) -> Result<KeyFacts, StreamsError> {
        let pattern = format!("{}*", escape_glob(&self.prefix));
        let mut facts = KeyFacts::default();
        for master in self.masters(DOING).await? {
            let (mut cursor, mut steps) = (0_u64, 0);
            loop {
                let mut scan = redis::cmd("SCAN");
                scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1_000);
                let (next, keys): (u64, Vec<String>) = master.query(DOING, &scan).await?;
                self.sort_keys(&master, keys, &mut facts).await?;
                (cursor, steps) = (next, steps + 1);
                let most = facts.streams.len() + facts.foreign.len() >= MOST_KEYS;
                facts.incomplete |= cursor != 0 && (most || steps >= MOST_STEPS);
                if cursor == 0 || facts.incomplete {
                    break;
                }
            }
        }
        facts.streams.sort();
        facts.streams.dedup();
        facts.foreign.sort();
        facts.foreign.dedup();
        facts.inner.sort();
        facts.inner.dedup();
        Ok(facts)
    }

    async fn sort_keys(&self, master: &Node, keys: Vec<String>, facts: &mut KeyFacts) -> Result<(), StreamsError> {
        if keys.is_empty() {
            return Ok(());
        }
        let mut pipeline = redis::pipe();
        for key in &keys {
            pipeline.cmd("TYPE").arg(key);
        }
        let types: Vec<String> = master.send(DOING, Request::Pipeline(&pipeline)).await?;
        for (key, kind) in keys.into_iter().zip(types) {
            match kind.as_str() {
                "hash" if key.ends_with(REGISTRY) && key != self.registry_key() => {
                    facts.inner.push(key[..key.len() - REGISTRY.len()].to_owned());
                }
                // No name of a stream has one: with an empty prefix, these are the markers.
                _ if key.contains('{') => {}
                "stream" if self.without_dead(&key).is_none() => facts.streams.push(key),
                // It is gone meanwhile.
                "stream" | "none" => {}
                _ => facts.foreign.push((key, kind)),
            }
        }
        Ok(())
    }

    async fn stream_facts(&self, streams: &[String]) -> Result<Vec<StreamFacts>, StreamsError> {
        let mut facts = Vec::new();
        for stream in streams.iter().take(MOST_STREAMS) {
            let time: (u64, u64) = self.query(DOING, stream, &redis::cmd("TIME")).await?;
            let Some(info) = self.state(stream).await? else { continue };
            let written = info.first_id.as_deref().and_then(|id| id.split('-').next()?.parse::<u64>().ok());
            facts.push(StreamFacts {
                first_age_ms: written.map(|written| (time.0 * 1_000 + time.1 / 1_000).saturating_sub(written)),
                groups: self.groups(stream).await?,
                stream: stream.clone(),
            });
        }
        Ok(facts)
    }
}

/// Commands that are tried on a marker, which stands beside its stream.
const BESIDE: [&str; 3] = ["GET", "SET", "PEXPIRE"];

/// Whether it is the key that may not be used: "this user has no permissions to access one of the keys used as arguments", or since
/// Redis 7.2 "No permissions to access a key". Of a command it says "to run the 'xadd' command".
fn is_of_key(text: &str) -> bool {
    text.contains("to access") && text.contains("key")
}

async fn clock(node: &Node) -> Result<Clock, StreamsError> {
    let (before, asked) = (Utc::now(), Instant::now());
    let (seconds, micros): (i64, u32) = node.query(DOING, &redis::cmd("TIME")).await?;
    let took = asked.elapsed();
    let time = DateTime::from_timestamp(seconds, micros.saturating_mul(1_000)).unwrap_or_default();
    Ok(Clock::measured(before, took, time))
}

/// `CONFIG GET` takes one name before Redis 7.
async fn config(node: &Node) -> Result<BTreeMap<String, String>, StreamsError> {
    let mut settings = BTreeMap::new();
    for name in ["save", "appendfsync"] {
        let found: Vec<String> = node.query(DOING, redis::cmd("CONFIG").arg("GET").arg(name)).await?;
        settings.extend(found.get(1).map(|value| (name.to_owned(), value.clone())));
    }
    Ok(settings)
}

/// The lines `name:value`.
fn fields(info: &str) -> BTreeMap<String, String> {
    let lines = info.lines().filter_map(|line| line.trim_end().split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

impl ServerFacts {
    /// A field of `INFO`.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.info.as_ref().ok()?.get(name).map(String::as_str)
    }

    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.field(name)?.parse().ok()
    }

    /// Replicas that are in step, or catching up by the stream of changes.
    #[must_use]
    pub fn replicas(&self) -> usize {
        let Ok(info) = &self.info else { return 0 };
        let is_replica = |name: &str| name.strip_prefix("slave").is_some_and(|number| number.parse::<u32>().is_ok());
        info.iter().filter(|(name, value)| is_replica(name) && value.split(',').any(|part| part == "state=online")).count()
    }
}
