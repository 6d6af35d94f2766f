//! A private Redis with replicas, watched by Sentinels.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::guard::Guard;
use crate::server::{Server, Service, in_parallel, wait_until};
use crate::{Redis, SandboxError, binaries, resp};

/// The name of the group for clients, as in most examples.
const GROUP: &str = "mymaster";
/// Two of them agree that a master is down, and two elect who of them makes another.
const SENTINELS: usize = 3;

/// One Redis master, its replicas, and three Sentinels that make a replica the master when the master is down for half
/// a second. A failover takes about two seconds.
///
/// All are servers of our own on 127.0.0.1, and end as a [`Redis`] does.
#[derive(Debug)]
pub struct RedisSentinel {
    // Dropped first, so that no failover begins while the servers end.
    sentinels: Vec<Server<SentinelService>>,
    servers: Vec<Redis>,
}

impl RedisSentinel {
    /// Starts a master, its replicas and the Sentinels. Returns when all Sentinels know each other and the replicas, so
    /// that a failover can happen; this takes about three seconds.
    pub fn start(replicas: usize) -> Result<RedisSentinel, SandboxError> {
        let master = Redis::start()?;
        let mut servers = in_parallel(replicas, |_| Redis::start_replica_of(&master))?;
        servers.insert(0, master);
        let sentinels = in_parallel(SENTINELS, |_| start_sentinel(&servers[0]))?;
        wait_until("the Sentinels know each other and the replicas", || {
            for sentinel in &sentinels {
                let others = resp::ask(sentinel.port(), None, &["SENTINEL", "CKQUORUM", GROUP])?;
                let known = resp::ask(sentinel.port(), None, &["SENTINEL", "REPLICAS", GROUP])?;
                let linked = known.windows(2).filter(|pair| *pair == ["master-link-status", "ok"]).count();
                if linked != replicas || !others.concat().starts_with(&format!("OK {SENTINELS} ")) {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(RedisSentinel { sentinels, servers })
    }

    /// `redis-sentinel://default:PASSWORD@127.0.0.1:PORT,127.0.0.1:PORT,127.0.0.1:PORT/0#mymaster` with the ports of the
    /// Sentinels, as Lettuce writes it. The password is that of the servers; the Sentinels have none.
    pub fn url(&self) -> String {
        let hosts: Vec<String> = self.sentinels.iter().map(Server::host_and_port).collect();
        format!("redis-sentinel://default:{}@{}/0#{GROUP}", self.servers[0].password(), hosts.join(","))
    }

    /// All servers: first the one that was the master at the start, then the others. Killed ones may be restarted; a
    /// former master becomes a replica when the Sentinels tell it to, which may take half a minute or more.
    pub fn servers(&self) -> &[Redis] {
        &self.servers
    }

    /// Which of the servers is the master, in the words of the first Sentinel, which is the one that clients ask first.
    pub fn master(&self) -> Result<usize, SandboxError> {
        let port: String = self.ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", GROUP])?.into_iter().skip(1).collect();
        let index = self.servers.iter().position(|server| server.port().to_string() == port);
        index.ok_or_else(|| SandboxError::Redis {
            command: "SENTINEL".to_owned(),
            port: self.sentinels[0].port(),
            message: format!("port {port}, which is none of the servers"),
        })
    }

    /// Waits until another server than this is the master, and takes writes. Returns which.
    pub fn wait_for_master_other_than(&self, former: usize) -> Result<usize, SandboxError> {
        let mut master = former;
        wait_until("the Sentinels have made another server the master", || {
            master = self.master()?;
            Ok(master != former && self.servers[master].ask(&["ROLE"])?.first().is_some_and(|role| role == "master"))
        })?;
        Ok(master)
    }

    /// Has a Sentinel make another server the master, while the present one runs. Returns which, when the former master
    /// has become its replica.
    pub fn failover(&self) -> Result<usize, SandboxError> {
        let former = self.master()?;
        self.ask(&["SENTINEL", "FAILOVER", GROUP])?;
        let master = self.wait_for_master_other_than(former)?;
        self.servers[former].wait_for_master(self.servers[master].port())?;
        Ok(master)
    }

    fn ask(&self, command: &[&str]) -> Result<Vec<String>, SandboxError> {
        resp::ask(self.sentinels[0].port(), None, command)
    }
}

fn start_sentinel(master: &Redis) -> Result<Server<SentinelService>, SandboxError> {
    let guard = Guard::new("sentinel", "TERM")?;
    guard.write("sentinel.conf", &configuration(guard.directory(), master.port(), master.password()))?;
    Server::start(SentinelService { binary: binaries::redis_server()? }, guard)
}

#[derive(Debug)]
struct SentinelService {
    binary: PathBuf,
}

impl Service for SentinelService {
    const NAME: &'static str = "Redis Sentinel";

    fn command(&self, directory: &Path, port: u16) -> Vec<OsString> {
        let file = directory.join("sentinel.conf");
        vec![self.binary.clone().into(), file.into(), "--port".into(), port.to_string().into(), "--sentinel".into()]
    }

    fn is_ready(&self, _directory: &Path, port: u16, pid: u32) -> bool {
        let info = resp::ask(port, None, &["INFO", "server"]);
        info.is_ok_and(|info| resp::field(&info, "process_id") == Some(pid.to_string().as_str()))
    }
}

/// A Sentinel keeps what it learns in this very file.
fn configuration(directory: &Path, master: u16, password: &str) -> String {
    format!(
        "dir \"{}\"\n\
         bind 127.0.0.1\n\
         sentinel monitor {GROUP} 127.0.0.1 {master} 2\n\
         sentinel auth-pass {GROUP} {password}\n\
         sentinel down-after-milliseconds {GROUP} 500\n\
         sentinel failover-timeout {GROUP} 3000\n\
         sentinel parallel-syncs {GROUP} 1\n",
        directory.display()
    )
}
