//! Redis Sentinel: who is the master now?
//!
//! The redis crate has a sentinel client. It asks one sentinel after the other, and its limits hold for each step alone, so that one
//! sentinel that is silent takes the time of all. Here all are asked at once, and whoever leads to a master first is
//! believed: the caller's limit then bounds the whole.

use std::fmt;

use futures_util::future::select_ok;
use redis::aio::MultiplexedConnection;
use redis::{ConnectionInfo, ErrorKind, RedisError, RedisResult, Value};

use super::node::Limits;
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

impl Sentinels {
    /// A new connection to the master, and where that is.
    pub async fn master(&self, limits: Limits) -> RedisResult<(MultiplexedConnection, ConnectionInfo)> {
        let ways = self.sentinels.iter().map(|sentinel| Box::pin(self.master_by(sentinel, limits)));
        let (master, _) = select_ok(ways).await?;
        Ok(master)
    }

    /// What one sentinel says is checked: for a while after a failover it may name a server that is the master no more.
    async fn master_by(&self, sentinel: &ConnectionInfo, limits: Limits) -> RedisResult<(MultiplexedConnection, ConnectionInfo)> {
        let mut asked = limits.open(sentinel.clone()).await?;
        let address: Option<(String, u16)> =
            redis::cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name).query_async(&mut asked).await?;
        let unknown = || RedisError::from((ErrorKind::MasterNameNotFoundBySentinel, "the sentinels know no master of this name"));
        let (host, port) = address.ok_or_else(unknown)?;
        let place = elsewhere(&self.data, &host, port);
        let mut master = limits.open(place.clone()).await?;
        let role: Vec<Value> = redis::cmd("ROLE").query_async(&mut master).await?;
        match role.first() {
            Some(Value::BulkString(role)) if role == b"master" => Ok((master, place)),
            _ => {
                let what = "the sentinels still name a server that is not the master";
                Err(RedisError::from((ErrorKind::Io, what, format!("{host}:{port}"))))
            }
        }
    }
}
