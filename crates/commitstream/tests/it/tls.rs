//! TLS with an authority of one's own and with client certificates, against real servers; and Redis at a Unix socket.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream::config::{RedisSettings, Settings, TlsSettings};
use commitstream::outbox::{self, OutboxRepository};
use commitstream::relay::OutboxProcessor;
use commitstream::streams::{Streams, StreamsError};
use commitstream_sandbox::{Postgres, Redis};
use sqlx::Connection;

use crate::events::envelope;
use crate::support::eventually;

/// A directory with an authority, a certificate of the server at localhost, and one of a client.
struct Authority(PathBuf);

impl Drop for Authority {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

impl Authority {
    fn new() -> Result<Self> {
        let authority = Self(std::env::temp_dir().join(format!("commitstream-tls-{}", uuid::Uuid::now_v7().simple())));
        std::fs::create_dir(&authority.0)?;
        authority.openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority")?;
        std::fs::write(authority.0.join("server.ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n")?;
        std::fs::write(authority.0.join("client.ext"), "extendedKeyUsage=clientAuth\n")?;
        for name in ["server", "client"] {
            authority.openssl(&format!("req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"))?;
            let sign = "x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2";
            authority.openssl(&format!("{sign} -in {name}.csr -out {name}.pem -extfile {name}.ext"))?;
        }
        // The server of Redis runs as another user.
        use std::os::unix::fs::PermissionsExt;
        for name in ["ca.pem", "server.pem", "server.key"] {
            std::fs::set_permissions(authority.0.join(name), std::fs::Permissions::from_mode(0o644))?;
        }
        Ok(authority)
    }

    fn openssl(&self, words: &str) -> Result<()> {
        let done = Command::new("openssl").args(words.split(' ')).current_dir(&self.0).output()?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn files(&self) -> TlsSettings {
        let path = |name| Some(self.path(name));
        TlsSettings { ca_file: path("ca.pem"), cert_file: path("client.pem"), key_file: path("client.key") }
    }
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A Redis that wants a client certificate, and its URL for TLS.
fn redis_with_tls(authority: &Authority) -> Result<(Redis, String)> {
    let port = free_port()?;
    let redis = Redis::start_with(&[
        ("tls-port", &port.to_string()),
        ("tls-cert-file", &authority.path("server.pem")),
        ("tls-key-file", &authority.path("server.key")),
        ("tls-ca-cert-file", &authority.path("ca.pem")),
        ("tls-auth-clients", "yes"),
    ])?;
    let (login, _) = redis.url().rsplit_once('@').map(|(login, at)| (login.to_owned(), at.to_owned())).context("a login")?;
    let url = format!("{}@localhost:{port}", login.replace("redis://", "rediss://"));
    Ok((redis, url))
}

async fn ping(url: &str, tls: TlsSettings) -> Result<(), StreamsError> {
    Streams::new(url, &RedisSettings { tls, ..RedisSettings::default() })?.ping().await
}

/// The error with its causes.
fn told(error: StreamsError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_with_an_authority_of_ones_own_and_client_certificates() -> Result<()> {
    let authority = Authority::new()?;
    let (_redis, url) = redis_with_tls(&authority)?;
    let (files, none) = (authority.files(), TlsSettings::default());
    ping(&url, files.clone()).await?;
    let at = |name| authority.path(name);
    let in_url = format!("sslcert={}&sslkey={}", at("client.pem"), at("client.key"));
    ping(&format!("{url}?sslrootcert={}&{in_url}", at("ca.pem")), none.clone()).await?;
    ping(&format!("{url}/0?{in_url}#insecure"), none.clone()).await?;

    let unknown = told(ping(&format!("{url}?{in_url}"), none.clone()).await.unwrap_err());
    ensure!(unknown.contains("invalid peer certificate"), "{unknown}");
    let by_address = url.replace("localhost", "127.0.0.2");
    let misnamed = told(ping(&by_address, files.clone()).await.unwrap_err());
    ensure!(misnamed.contains("127.0.0.2") || misnamed.contains("not valid for name"), "{misnamed}");
    let only_ca = TlsSettings { ca_file: files.ca_file.clone(), ..none.clone() };
    ensure!(ping(&url, only_ca).await.is_err(), "the server wants a certificate");

    let missing = TlsSettings { ca_file: Some(at("none.pem")), ..none };
    let missing = told(ping(&url, missing).await.unwrap_err());
    ensure!(missing.contains("REDIS_CA_FILE") && missing.contains("none.pem"), "{missing}");
    Ok(())
}

/// Certificates are replaced before they expire, while programs run.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_certificate_is_used_by_the_next_connection() -> Result<()> {
    let authority = Authority::new()?;
    let (redis, url) = redis_with_tls(&authority)?;
    let streams = Streams::new(&url, &RedisSettings { tls: authority.files(), ..RedisSettings::default() })?;
    streams.ping().await?;
    let certificate = std::fs::read(authority.0.join("client.pem"))?;
    std::fs::write(authority.0.join("client.pem"), std::fs::read(authority.0.join("ca.pem"))?)?;
    redis.restart()?;
    ensure!(streams.ping().await.is_err(), "the certificate is of another key");
    std::fs::write(authority.0.join("client.pem"), certificate)?;
    Ok(streams.ping().await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_on_a_port_without_it_says_what_it_met() -> Result<()> {
    let redis = Redis::start()?;
    let url = redis.url().replace("redis://", "rediss://");
    let began = Instant::now();
    let error = told(ping(&url, TlsSettings::default()).await.unwrap_err());
    ensure!(error.contains("a server without TLS answers there: write redis://"), "{error}");
    ensure!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_at_a_unix_socket() -> Result<()> {
    let path = std::env::temp_dir().join(format!("commitstream-{}.sock", uuid::Uuid::now_v7().simple()));
    let socket = path.display().to_string();
    let redis = Redis::start_with(&[("unixsocket", &socket), ("unixsocketperm", "777")])?;
    let url = redis.url();
    let password = url.rsplit_once('@').and_then(|(login, _)| login.rsplit(':').next()).context("a password")?;
    let settings = RedisSettings::default();
    for url in [
        format!("unix://{socket}?user=default&pass={password}&db=3"),
        format!("redis+unix://{socket}?username=default&password={password}&db=3"),
    ] {
        let streams = Streams::new(&url, &settings)?;
        streams.publish(&[envelope("user", "1", &1)?]).await.map_err(|not_published| not_published.error)?;
        assert_eq!(streams.list().await?, ["events:user"]);
    }
    let of_three = Streams::new(&format!("{url}/3"), &settings)?;
    assert_eq!(of_three.len("events:user").await?, 2);
    redis.kill()?;
    let error = told(Streams::new(&format!("unix://{socket}"), &settings)?.ping().await.unwrap_err());
    ensure!(error.contains(&socket), "{error}");
    Ok(())
}

/// Has PostgreSQL speak TLS, and take certificates that the authority has signed.
async fn postgres_with_tls(authority: &Authority) -> Result<Postgres> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let postgres = Postgres::start()?;
    let owner = std::fs::metadata(postgres.directory())?;
    // The server insists on a key that nobody else can read.
    let own = |name: &str| -> Result<String> {
        let to = authority.0.join(format!("postgres-{name}"));
        std::fs::copy(authority.0.join(name), &to)?;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600))?;
        chown(&to, Some(owner.uid()), Some(owner.gid()))?;
        Ok(to.display().to_string())
    };
    let mut connection = sqlx::PgConnection::connect(&postgres.url()).await?;
    let settings = [("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.key"), ("ssl_ca_file", "ca.pem")];
    for (name, file) in settings {
        let sql = format!("ALTER SYSTEM SET {name} = '{}'", own(file)?);
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await?;
    }
    sqlx::raw_sql("ALTER SYSTEM SET ssl = on").execute(&mut connection).await?;
    postgres.restart()?;
    Ok(postgres)
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_with_an_authority_of_ones_own_and_client_certificates() -> Result<()> {
    let authority = Authority::new()?;
    let postgres = postgres_with_tls(&authority).await?;
    let redis = Redis::start()?;
    let mut settings = Settings::default();
    settings.database.url = Some(postgres.url());
    settings.redis.url = Some(redis.url());
    settings.database.tls = authority.files();
    let url = settings.database.url_with_tls().context("a URL")?;
    let mut connection = outbox::connect(&url, "test", Duration::from_secs(10)).await?;
    let who: (bool, Option<String>) =
        sqlx::query_as("SELECT ssl, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetch_one(&mut connection).await?;
    assert_eq!(who, (true, Some("/CN=client".to_owned())));

    OutboxRepository::new("public").migrate(&mut connection).await?;
    let relay = OutboxProcessor::new(settings.clone())?.start();
    let insert =
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('Happened', 'user', '1', '{}')";
    sqlx::query(insert).execute(&mut connection).await?;
    let streams = Streams::new(&redis.url(), &settings.redis)?;
    eventually("the event to be published", async || Ok(streams.len("events:user").await? == 1)).await?;
    let plain = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                 WHERE application_name LIKE 'commitstream relay%' AND NOT ssl";
    assert_eq!(sqlx::query_scalar::<_, i64>(plain).fetch_one(&mut connection).await?, 0);
    relay.stop().await?;

    // A server that somebody else's authority has signed is none.
    let other = Authority::new()?;
    settings.database.tls = other.files();
    let url = settings.database.url_with_tls().context("a URL")?;
    let refused = outbox::connect(&url, "test", Duration::from_secs(10)).await.unwrap_err();
    let refused = format!("{:#}", anyhow::Error::from(refused));
    ensure!(refused.contains("certificate"), "{refused}");
    ensure!(Path::new(&other.path("ca.pem")).exists());
    Ok(())
}
