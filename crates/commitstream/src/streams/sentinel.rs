//! Redis Sentinel: who is the master now?
//!
//! The redis crate has a sentinel client. It asks one sentinel after the other, and its limits hold for each step alone, so that one
//! sentinel that is silent takes the time of all. Here all are asked at once, and whoever leads to a master first is
//! believed: the caller's limit then bounds the whole.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{ConnectionInfo, ErrorKind, RedisError, RedisResult, Value};
use tokio::time::timeout;

use super::StreamsError;
use super::open::{Access, timed_out};
use super::server::elsewhere;

pub(super) struct Sentinels {
    pub sentinels: Vec<ConnectionInfo>,
    /// What the sentinels call the master.
    pub name: String,
    /// The login of the master; its address is a placeholder.
    pub data: ConnectionInfo,
}

impl fmt::Display for Sentinels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (sentinels", self.name)?;
        self.sentinels.iter().try_for_each(|sentinel| write!(f, " {}", sentinel.addr()))?;
        f.write_str(")")
    }
}

/// How far one sentinel led. What comes later says more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// The sentinel was asked.
    Asking,
    /// It knows no master of this name.
    Unknown,
    /// The master that it named was tried.
    Master,
    /// The sentinel wants another password.
    Login,
}

/// Why there is no master, at the address that was tried last.
#[derive(Debug)]
pub(super) struct NoMaster {
    step: Step,
    address: String,
    source: RedisError,
}

impl NoMaster {
    pub fn typed(self, sentinels: &Sentinels, doing: &'static str) -> StreamsError {
        let Self { step, address, source } = self;
        let server = match step {
            Step::Login => return StreamsError::SentinelLogin { sentinel: address, doing, source },
            Step::Asking | Step::Unknown => sentinels.to_string(),
            Step::Master => format!("{address}, the address of {sentinels},"),
        };
        StreamsError::Unavailable { server, doing, source }
    }
}

/// What the caller is told where no sentinel leads to a master in time.
#[derive(Default)]
struct Furthest(Mutex<Option<NoMaster>>);

impl Furthest {
    fn failed(&self, why: NoMaster) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.step <= why.step) {
            *known = Some(why);
        }
    }

    /// The time may be over before more is known of it.
    fn trying(&self, address: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.step < Step::Master) {
            let source = timed_out("timed out while connecting");
            *known = Some(NoMaster { step: Step::Master, address: address.to_owned(), source });
        }
    }

    fn into_inner(self) -> NoMaster {
        let nobody =
            || NoMaster { step: Step::Asking, address: String::new(), source: timed_out("no sentinel answered in time") };
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or_else(nobody)
    }
}

impl Sentinels {
    /// A new connection to the master, and where that is.
    pub async fn master(&self, access: &Access) -> Result<(MultiplexedConnection, ConnectionInfo), NoMaster> {
        let furthest = Furthest::default();
        let find = async {
            let mut ways: FuturesUnordered<_> =
                self.sentinels.iter().map(|sentinel| self.master_by(sentinel, access, &furthest)).collect();
            while let Some(way) = ways.next().await {
                match way {
                    Ok(found) => return Some(found),
                    Err(why) => furthest.failed(why),
                }
            }
            None
        };
        let found = timeout(access.connect, find).await.ok().flatten();
        found.ok_or_else(|| furthest.into_inner())
    }

    /// What one sentinel says is checked: for a while after a failover it may name a server that is the master no more.
    async fn master_by(
        &self,
        sentinel: &ConnectionInfo,
        access: &Access,
        furthest: &Furthest,
    ) -> Result<(MultiplexedConnection, ConnectionInfo), NoMaster> {
        let (host, port) = self.address_by(sentinel, access).await.map_err(|source| {
            let step = match source.kind() {
                ErrorKind::MasterNameNotFoundBySentinel => Step::Unknown,
                _ if is_refused_login(&source) => Step::Login,
                _ => Step::Asking,
            };
            NoMaster { step, address: sentinel.addr().to_string(), source }
        })?;
        let address = format!("{host}:{port}");
        furthest.trying(&address);
        let place = elsewhere(&self.data, &host, port);
        let connect = async {
            let mut master = access.open(&place).await?;
            let role: Vec<Value> = redis::cmd("ROLE").query_async(&mut master).await?;
            match role.first() {
                Some(Value::BulkString(role)) if role == b"master" => Ok(master),
                _ => Err(RedisError::from((ErrorKind::Io, "the sentinels still name a server that is not the master"))),
            }
        };
        match connect.await {
            Ok(master) => Ok((master, place)),
            Err(source) => Err(NoMaster { step: Step::Master, address, source }),
        }
    }

    async fn address_by(&self, sentinel: &ConnectionInfo, access: &Access) -> RedisResult<(String, u16)> {
        let mut asked = access.open(sentinel).await?;
        let address: Option<(String, u16)> =
            redis::cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name).query_async(&mut asked).await?;
        let unknown = || RedisError::from((ErrorKind::MasterNameNotFoundBySentinel, "the sentinels know no master of this name"));
        address.ok_or_else(unknown)
    }
}

pub(super) fn is_refused_login(error: &RedisError) -> bool {
    error.kind() == ErrorKind::AuthenticationFailed || matches!(error.code(), Some("NOAUTH" | "WRONGPASS"))
}
