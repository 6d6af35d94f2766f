//! Opens connections: how long that may take, what the sockets are told, and what TLS needs.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, RedisResult,
    TlsCertificates,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::config::TlsSettings;

/// When nothing was sent for so long, the kernel asks whether the other side is there, and NATs keep their entries.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(2);

/// In less, one packet that is lost and sent again would end a connection that is well.
#[cfg(target_os = "linux")]
const SHORTEST_USER_TIMEOUT: Duration = Duration::from_secs(1);

/// A server without TLS answers within this; it is asked only where TLS has failed.
const PLAIN_ANSWER: Duration = Duration::from_millis(500);

/// Limits of one attempt to connect and of the answer to one command, and the files for TLS.
#[derive(Clone)]
pub(super) struct Access {
    pub connect: Duration,
    pub response: Duration,
    /// How long a command may block its connection before it answers. Zero: none does.
    pub block: Duration,
    pub tls: Arc<TlsSettings>,
}

impl Access {
    /// For commands that block the connection for so long, whose silence says nothing until then.
    pub fn blocking(&self, block: Duration) -> Self {
        Self { response: self.response / 2 + block, block, ..self.clone() }
    }

    /// A new connection, whose server has answered.
    pub async fn open(&self, info: &ConnectionInfo) -> RedisResult<MultiplexedConnection> {
        let info = info.clone().set_tcp_settings(self.sockets());
        let ConnectionAddr::TcpTls { host, port, .. } = info.addr().clone() else {
            return self.connect(Client::open(info)?, self.connect).await;
        };
        let client = client(&self.tls, info)?;
        let without_tls = async {
            sleep(self.connect / 2).await;
            if !speaks_plainly(&host, port).await {
                pending::<()>().await;
            }
        };
        let opened = tokio::select! {
            opened = self.connect(client, self.connect) => opened,
            () = without_tls => return Err(no_tls()),
        };
        match opened {
            Err(_) if speaks_plainly(&host, port).await => Err(no_tls()),
            opened => opened,
        }
    }

    async fn connect(&self, client: Client, limit: Duration) -> RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(limit)).set_response_timeout(Some(self.response));
        let opened = client.get_multiplexed_async_connection_with_config(&config).await;
        opened.map_err(|error| if error.is_timeout() { timed_out("timed out while connecting") } else { error })
    }

    /// The kernel gives up what the other side has not confirmed for as long as an answer may take.
    fn sockets(&self) -> TcpSettings {
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
        let settings = TcpSettings::default().set_nodelay(true).set_keepalive(keepalive);
        #[cfg(target_os = "linux")]
        let settings = settings.set_user_timeout(self.response.max(SHORTEST_USER_TIMEOUT));
        settings
    }
}

pub(super) fn timed_out(what: &'static str) -> RedisError {
    RedisError::from((ErrorKind::Io, what))
}

fn no_tls() -> RedisError {
    let what = "a server without TLS answers there: write redis:// in place of rediss://, or give its port for TLS";
    RedisError::from((ErrorKind::Io, what))
}

/// Whether a Redis without TLS is there.
async fn speaks_plainly(host: &str, port: u16) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect((host, port)).await?;
        stream.write_all(b"PING\r\n").await?;
        let mut first = [0];
        stream.read_exact(&mut first).await?;
        // A status or an error, such as that of a missing password.
        io::Result::Ok(matches!(first, [b'+' | b'-']))
    };
    matches!(timeout(PLAIN_ANSWER, ask).await, Ok(Ok(true)))
}

/// PEM files are read again for each connection, since they are replaced before they expire.
pub(super) fn client(files: &TlsSettings, info: ConnectionInfo) -> RedisResult<Client> {
    if *files == TlsSettings::default() {
        return Client::open(info);
    }
    let client_tls = match (&files.cert_file, &files.key_file) {
        (Some(cert), Some(key)) => Some(ClientTlsConfig { client_cert: read(cert)?, client_key: read(key)? }),
        (None, None) => None,
        _ => {
            let what = "a client certificate and its key must be given together";
            return Err(RedisError::from((ErrorKind::InvalidClientConfig, what)));
        }
    };
    let root_cert = files.ca_file.as_deref().map(read).transpose()?;
    Client::build_with_tls(info, TlsCertificates { client_tls, root_cert })
}

fn read(path: &str) -> RedisResult<Vec<u8>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot read {path}: {error}"));
    Ok(std::fs::read(path).map_err(named)?)
}
