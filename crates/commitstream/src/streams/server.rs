//! Where a URL leads: one server, the master that sentinels name, or a cluster.

use std::fmt;
use std::sync::Arc;

use redis::{ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, RedisError, RedisResult};

use super::StreamsError;
use super::open::client;
use super::sentinel::Sentinels;
use crate::config::{RedisSettings, TlsSettings};

/// What a URL names.
pub(super) enum Server {
    /// `redis://` and `rediss://`.
    Single(ConnectionInfo),
    /// `redis-sentinel://` and `rediss-sentinel://`, as Lettuce writes them: the credentials and the database are those of the
    /// master. <https://redis.github.io/lettuce/user-guide/connecting-redis/>
    Sentinel(Arc<Sentinels>),
    /// `redis-cluster://` and `rediss-cluster://`: some nodes of the cluster, which name the others.
    Cluster {
        /// Of every node; the address is that of the first.
        login: ConnectionInfo,
        seeds: Vec<Address>,
    },
}

/// Host (an IPv6 address stands without brackets) and port.
pub(super) type Address = (String, u16);

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Single(info) => info.addr().fmt(f),
            Self::Sentinel(sentinels) => sentinels.fmt(f),
            Self::Cluster { login, .. } => write!(f, "the cluster of {}", login.addr()),
        }
    }
}

const SENTINEL_PORT: u16 = 26_379;

impl Server {
    /// And the files for TLS, of the URL or else of the settings.
    pub fn parse(url: &str, settings: &RedisSettings) -> Result<(Self, TlsSettings), StreamsError> {
        let (url, named) = files_in(url).map_err(StreamsError::Url)?;
        let (scheme, rest) = url.split_once("://").unwrap_or_default();
        let parsed = match scheme.split_once('-') {
            Some((plain @ ("redis" | "rediss"), "sentinel")) => sentinel(plain, rest, settings.sentinel_password.as_deref()),
            Some((plain @ ("redis" | "rediss"), "cluster")) => cluster(plain, rest),
            _ if matches!(scheme, "unix" | "redis+unix") => socket(&url).map(Self::Single),
            _ => single(&url, rest).map(Self::Single),
        };
        let server = parsed.map_err(StreamsError::Url)?;
        let of_settings = settings.tls.clone();
        let files = TlsSettings {
            ca_file: named.ca_file.or(of_settings.ca_file),
            cert_file: named.cert_file.or(of_settings.cert_file),
            key_file: named.key_file.or(of_settings.key_file),
        };
        check_files(&files, server.login(), scheme.starts_with("rediss"))?;
        Ok((server, files))
    }

    fn login(&self) -> &ConnectionInfo {
        match self {
            Self::Single(info) | Self::Cluster { login: info, .. } => info,
            Self::Sentinel(sentinels) => &sentinels.data,
        }
    }
}

/// Files that are missing or hold something else are found at the start, not at the first connection.
fn check_files(files: &TlsSettings, info: &ConnectionInfo, is_tls: bool) -> Result<(), StreamsError> {
    if is_tls {
        return client(files, info.clone()).map(drop).map_err(StreamsError::Tls);
    }
    if *files == TlsSettings::default() {
        return Ok(());
    }
    Err(StreamsError::Tls(malformed("the URL asks for no TLS: write rediss in place of redis")))
}

/// Takes the files for TLS out of a URL, by the names that PostgreSQL's URLs have and by those of redis-py.
fn files_in(url: &str) -> RedisResult<(String, TlsSettings)> {
    let (before, fragment) = url.split_once('#').map_or((url, String::new()), |(before, name)| (before, format!("#{name}")));
    let (base, query) = before.split_once('?').unwrap_or((before, ""));
    let mut files = TlsSettings::default();
    // What follows a raw ? in a password is none of a query.
    if query.is_empty() || query.contains('@') || fragment.contains('@') {
        return Ok((url.to_owned(), files));
    }
    let mut others: Vec<&str> = Vec::new();
    for parameter in query.split('&') {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let file = match name {
            "sslrootcert" | "ssl_ca_certs" => &mut files.ca_file,
            "sslcert" | "ssl_certfile" => &mut files.cert_file,
            "sslkey" | "ssl_keyfile" => &mut files.key_file,
            _ if name.starts_with("ssl") || name.starts_with("tls") || name.starts_with("verify") => {
                let what = "of TLS, the URL can say sslrootcert, sslcert and sslkey, and #insecure; not";
                return Err(RedisError::from((ErrorKind::InvalidClientConfig, what, name.to_owned())));
            }
            _ => {
                others.push(parameter);
                continue;
            }
        };
        *file = Some(decoded(value)?);
    }
    let query = if others.is_empty() { String::new() } else { format!("?{}", others.join("&")) };
    Ok((format!("{base}{query}{fragment}"), files))
}

/// A value in a query.
fn decoded(value: &str) -> RedisResult<String> {
    let url = redis::parse_redis_url(&format!("redis://host/?value={value}"));
    let found = url.and_then(|url| url.query_pairs().next().map(|(_, value)| value.into_owned()));
    found.filter(|value| !value.is_empty()).ok_or_else(|| malformed("the path of a file is missing"))
}

fn single(url: &str, rest: &str) -> RedisResult<ConnectionInfo> {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.rsplit('@').next().unwrap_or_default().contains(',') {
        return Err(malformed("several hosts: write redis-sentinel://host,host/0#master or redis-cluster://host,host"));
    }
    url.into_connection_info()
}

/// The redis crate knows `user` and `pass`; other libraries write the words out.
fn socket(url: &str) -> RedisResult<ConnectionInfo> {
    let parsed = redis::parse_redis_url(url).ok_or_else(|| malformed("the path of the socket must be absolute"))?;
    if parsed.has_host() || parsed.path().len() < 2 {
        return Err(malformed("the path of the socket must be absolute: three slashes, as in unix:///run/redis/redis.sock"));
    }
    let info = url.into_connection_info()?;
    let mut login = info.redis_settings().clone();
    for (name, value) in parsed.query_pairs() {
        login = match name.as_ref() {
            "username" => login.set_username(value),
            "password" => login.set_password(value),
            "user" | "pass" | "db" | "protocol" => login,
            _ => return Err(malformed("of a socket, the URL can say db, user and pass only")),
        };
    }
    Ok(info.set_redis_settings(login))
}

/// The parts of `[user:password@]host:port,host:port/path#fragment`.
struct Parts<'a> {
    /// With the `@`, or empty.
    login: &'a str,
    hosts: Vec<&'a str>,
    path: &'a str,
    fragment: &'a str,
}

impl<'a> Parts<'a> {
    fn of(rest: &'a str) -> RedisResult<Self> {
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = authority.rfind('@').map_or(("", authority), |at| authority.split_at(at + 1));
        let hosts: Vec<&str> = hosts.split(',').map(str::trim).collect();
        if rest.contains('?') || path.contains(['@', '/']) || fragment.contains('@') {
            return Err(malformed("only hosts, credentials, a database and a name can be given"));
        }
        if hosts.iter().any(|host| host.is_empty() || host.starts_with(':')) {
            return Err(malformed("a host is missing"));
        }
        Ok(Self { login, hosts, path, fragment })
    }
}

fn malformed(what: &'static str) -> RedisError {
    RedisError::from((ErrorKind::InvalidClientConfig, what))
}

fn sentinel(plain: &str, rest: &str, password: Option<&str>) -> RedisResult<Server> {
    let parts = Parts::of(rest)?;
    if parts.fragment == "insecure" {
        return Err(malformed(
            "what follows # is the name of the master, so #insecure cannot be said: give the CA (REDIS_CA_FILE)",
        ));
    }
    if parts.fragment.is_empty() {
        return Err(malformed("the name of the master is missing: end the URL with #name"));
    }
    let sentinel = |host: &&str| {
        let has_port = host.rsplit_once(']').map_or(*host, |(_, after)| after).contains(':');
        let port = if has_port { String::new() } else { format!(":{SENTINEL_PORT}") };
        let info = format!("{plain}://{host}{port}").into_connection_info()?;
        let login = info.redis_settings().clone();
        Ok(match password {
            Some(password) => info.set_redis_settings(login.set_password(password)),
            None => info,
        })
    };
    let sentinels = parts.hosts.iter().map(sentinel).collect::<RedisResult<_>>()?;
    // The host is replaced by that of the master.
    let data = format!("{plain}://{}master/{}", parts.login, parts.path).into_connection_info()?;
    Ok(Server::Sentinel(Arc::new(Sentinels { sentinels, name: parts.fragment.to_owned(), data })))
}

fn cluster(plain: &str, rest: &str) -> RedisResult<Server> {
    let parts = Parts::of(rest)?;
    if !matches!(parts.path, "" | "0") {
        return Err(malformed("a cluster has the database 0 only"));
    }
    if !matches!(parts.fragment, "" | "insecure") {
        return Err(malformed("a cluster has no name: leave out what follows #"));
    }
    let fragment = if parts.fragment.is_empty() { "" } else { "#insecure" };
    let node = |host: &&str| format!("{plain}://{}{host}{fragment}", parts.login).into_connection_info();
    let nodes = parts.hosts.iter().map(node).collect::<RedisResult<Vec<_>>>()?;
    let seeds = nodes.iter().filter_map(|node| split(&node.addr().to_string())).collect();
    let login = nodes.into_iter().next().ok_or_else(|| malformed("a host is missing"))?;
    Ok(Server::Cluster { login, seeds })
}

/// Reads `host:port`, as Redis writes addresses.
pub(super) fn split(address: &str) -> Option<Address> {
    let (host, port) = address.rsplit_once(':')?;
    Some((host.to_owned(), port.parse().ok()?))
}

/// The same login, by the same means, at another address.
pub(super) fn elsewhere(like: &ConnectionInfo, host: &str, port: u16) -> ConnectionInfo {
    let host = host.to_owned();
    let addr = match like.addr() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => ConnectionAddr::Tcp(host, port),
    };
    like.clone().set_addr(addr)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Server, String> {
        let settings = RedisSettings { sentinel_password: Some("sesame".to_owned()), ..RedisSettings::default() };
        Server::parse(url, &settings).map(|(server, _)| server).map_err(|error| {
            let StreamsError::Url(source) = &error else { return error.to_string() };
            format!("{error}: {source}")
        })
    }

    fn login(info: &ConnectionInfo) -> (String, Option<&str>, Option<&str>, i64) {
        let redis = info.redis_settings();
        (info.addr().to_string(), redis.username(), redis.password(), redis.db())
    }

    #[test]
    fn the_credentials_of_a_sentinel_url_are_those_of_the_master() {
        let url = "redis-sentinel://app:s%40cret@one:5000,two,[::1]:5001,[::2]/3#mymaster";
        let Ok(Server::Sentinel(parsed)) = parse(url) else { panic!("{url}") };
        assert_eq!(parsed.name, "mymaster");
        let found: Vec<_> = parsed.sentinels.iter().map(login).collect();
        let at = |address: &str| (address.to_owned(), None, Some("sesame"), 0);
        assert_eq!(found, [at("one:5000"), at("two:26379"), at("::1:5001"), at("::2:26379")]);
        let master = elsewhere(&parsed.data, "ten", 6_380);
        assert_eq!(login(&master), ("ten:6380".to_owned(), Some("app"), Some("s@cret"), 3));
    }

    #[test]
    fn the_nodes_of_a_cluster_share_their_login() {
        let url = "rediss-cluster://:secret@one:7000,two/0#insecure";
        let Ok(Server::Cluster { login: first, seeds }) = parse(url) else { panic!("{url}") };
        assert_eq!(seeds, [("one".to_owned(), 7_000), ("two".to_owned(), 6_379)]);
        let at = |address: &str| (address.to_owned(), None, Some("secret"), 0);
        assert_eq!(login(&first), at("one:7000"));
        let other = elsewhere(&first, "three", 7_001);
        assert!(matches!(other.addr(), ConnectionAddr::TcpTls { insecure: true, .. }));
        assert_eq!(login(&other), at("three:7001"));
    }

    #[test]
    fn sockets_are_found_by_their_paths() {
        let cases = [
            ("unix:///run/redis.sock", ("/run/redis.sock".to_owned(), None, None, 0)),
            ("redis+unix:///run/a%20b.sock?db=3&user=app&pass=s%40", ("/run/a b.sock".to_owned(), Some("app"), Some("s@"), 3)),
            ("unix:///run/redis.sock?username=app&password=s", ("/run/redis.sock".to_owned(), Some("app"), Some("s"), 0)),
        ];
        for (url, expected) in cases {
            let Ok(Server::Single(info)) = parse(url) else { panic!("{url}") };
            assert_eq!(login(&info), expected, "{url}");
        }
    }

    #[test]
    fn files_for_tls_are_those_of_the_url_or_else_of_the_settings() {
        let named = |url: &str| {
            let (url, files) = files_in(url).expect(url);
            (url, files.ca_file.unwrap_or_default(), files.cert_file.unwrap_or_default(), files.key_file.unwrap_or_default())
        };
        let found = |url: &str, ca: &str, cert: &str, key: &str| (url.to_owned(), ca.to_owned(), cert.to_owned(), key.to_owned());
        assert_eq!(
            named("rediss://h/0?sslrootcert=/a%20b/ca.pem#insecure"),
            found("rediss://h/0#insecure", "/a b/ca.pem", "", "")
        );
        assert_eq!(
            named("rediss-cluster://h,i?ssl_ca_certs=c&ssl_certfile=d&ssl_keyfile=e"),
            found("rediss-cluster://h,i", "c", "d", "e")
        );
        assert_eq!(named("redis://h/0?protocol=resp3&sslkey=k"), found("redis://h/0?protocol=resp3", "", "", "k"));
        assert_eq!(named("redis://:a?sslcert=b@h"), found("redis://:a?sslcert=b@h", "", "", ""));

        let settings = RedisSettings {
            tls: TlsSettings { ca_file: Some("/none".into()), ..TlsSettings::default() },
            ..RedisSettings::default()
        };
        let refused = |url: &str| {
            let error = Server::parse(url, &settings).err().expect(url);
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        };
        assert!(refused("rediss://h").contains("REDIS_CA_FILE") && refused("rediss://h").contains("cannot read /none"));
        assert!(refused("redis://h").contains("write rediss in place of redis"));
        let unpaired = refused("rediss://h?sslcert=/none");
        assert!(unpaired.contains("must be given together"), "{unpaired}");
    }

    #[test]
    fn a_malformed_url_says_what_is_wrong_and_shows_no_password() {
        let cases = [
            ("redis-sentinel://u:hunter2@one,two", "end the URL with #name"),
            ("redis-sentinel://u:hunter2@one,,two/0#m", "a host is missing"),
            ("redis-sentinel://u:hunter2@:26379/0#m", "a host is missing"),
            ("redis-sentinel://u:hunter2@one:port/0#m", ""),
            ("redis-sentinel://u:hunter2@one/one#m", ""),
            ("redis-sentinel://u:hunter2/x@one/0#m", "only hosts"),
            ("redis-sentinel://u:hunter2#x@one/0#m", "only hosts"),
            ("redis-cluster://u:hunter2@one,two/3", "the database 0 only"),
            ("redis-cluster://u:hunter2@one,two#name", "has no name"),
            ("redis-cluster://u:hunter2@one?x=hunter2", "only hosts"),
            ("redis-cluster://", "a host is missing"),
            ("redis-clustre://u:hunter2@one", ""),
            ("redis://u:hunter2@one,two:6380/0", "several hosts"),
            ("rediss-sentinel://u:hunter2@one/0#insecure", "give the CA"),
            ("rediss://u:hunter2@one?ssl_cert_reqs=none", "ssl_cert_reqs"),
            ("rediss://u:hunter2@one?sslrootcert=", "the path of a file"),
            ("unix://run/redis.sock?pass=hunter2", "three slashes"),
            ("unix:///run/redis.sock?pass=hunter2&tls=no", "tls"),
            ("unix:///run/redis.sock?pass=hunter2&timeout=1", "db, user and pass only"),
        ];
        for (url, what) in cases {
            let error = parse(url).err().expect(url);
            assert!(error.contains(what) && error.contains("redis-cluster://") && !error.contains("hunter2"), "{url}: {error}");
        }
    }
}
