//! Where a database URL leads: to one server, or to the first of several that is wanted.

use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Row};
use tokio::time::timeout;

use super::OutboxError;
use super::connection::{CONNECTING, unreachable_or_refused};

/// Most hosts of one URL.
const MOST_HOSTS: usize = 16;

/// The servers that a URL names, in its order, and which of them will do. The driver knows one host only, so the others are tried here.
#[derive(Debug, Clone)]
pub struct Address {
    hosts: Vec<(String, PgConnectOptions)>,
    wanted: Wanted,
}

/// `target_session_attrs` of libpq, as far as it means a server that takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Any,
    /// `read-write`: transactions may write.
    Writable,
    /// `primary`: it is no standby.
    Primary,
}

impl Address {
    /// Reads `postgres://user:password@host:5432/database`, where several hosts are separated by commas, each with its port.
    ///
    /// # Errors
    /// The URL is malformed ([`OutboxError::Url`]), or has an option that cannot be kept to ([`OutboxError::UrlOption`]).
    pub fn parse(url: &str) -> Result<Self, OutboxError> {
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let (wanted, query) = options(query)?;
        let (scheme, rest) = base.split_once("://").unwrap_or(("", base));
        if !["", "postgres", "postgresql"].contains(&scheme) {
            return Err(OutboxError::Url(sqlx::Error::Configuration("it does not begin with postgres://".into())));
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (login, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        let hosts: Vec<&str> = hosts.split(',').collect();
        if hosts.len() > MOST_HOSTS {
            return Err(OutboxError::UrlOption { option: "more than 16 hosts", instead: "name fewer" });
        }
        let host = |host: &&str| {
            let url = if scheme.is_empty() { url.to_owned() } else { format!("{scheme}://{login}{host}{path}{query}") };
            let options = PgConnectOptions::from_str(&url).map_err(OutboxError::Url)?;
            // Poolers refuse this parameter, and nothing here reads a float as text.
            Ok(((*host).to_owned(), options.extra_float_digits(None)))
        };
        Ok(Self { hosts: hosts.iter().map(host).collect::<Result<_, OutboxError>>()?, wanted })
    }

    /// Sessions wait on purpose: the driver's warning that a statement is slow would be one every few seconds.
    #[must_use]
    pub(crate) fn that_waits(mut self) -> Self {
        for (_, options) in &mut self.hosts {
            *options = options.clone().disable_statement_logging();
        }
        self
    }

    /// Sessions keep no prepared statements, which old poolers in transaction mode mix up.
    #[must_use]
    pub(crate) fn without_prepared_statements(mut self) -> Self {
        for (_, options) in &mut self.hosts {
            *options = options.clone().statement_cache_capacity(0);
        }
        self
    }

    /// The options of the one host of an address that [`reach`](Self::reach) returned.
    pub(crate) fn first(&self) -> Option<&PgConnectOptions> {
        self.hosts.first().map(|(_, options)| options)
    }

    /// A session with nothing set, on the first host that answers and is wanted, and the address of that host alone.
    ///
    /// # Errors
    /// No host can be reached in time (they share it), or none is what the URL asks for.
    pub(crate) async fn reach(&self, application_name: &str, limit: Duration) -> Result<(PgConnection, Self), OutboxError> {
        let each = limit / u32::try_from(self.hosts.len()).unwrap_or(1).max(1);
        let mut first_error = None;
        for (host, options) in &self.hosts {
            let options = options.clone().application_name(application_name);
            let reached = timeout(each, reach_one(&options, self.wanted)).await;
            match reached.unwrap_or(Err(OutboxError::Timeout { doing: CONNECTING, limit: each })) {
                Ok(Some(connection)) => {
                    return Ok((connection, Self { hosts: vec![(host.clone(), options)], wanted: self.wanted }));
                }
                Ok(None) => {}
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match (self.hosts.as_slice(), first_error) {
            ([_], Some(error)) => Err(error),
            (hosts, source) => {
                let names: Vec<&str> = hosts.iter().map(|(host, _)| host.as_str()).collect();
                Err(OutboxError::NoHost { hosts: names.join(", "), source: source.map(Box::new) })
            }
        }
    }
}

/// `None` where the server is not what is wanted.
async fn reach_one(options: &PgConnectOptions, wanted: Wanted) -> Result<Option<PgConnection>, OutboxError> {
    let mut connection = options.connect().await.map_err(unreachable_or_refused)?;
    let sql = match wanted {
        Wanted::Any => return Ok(Some(connection)),
        Wanted::Writable => "SELECT NOT pg_is_in_recovery() AND current_setting('default_transaction_read_only') = 'off'",
        Wanted::Primary => "SELECT NOT pg_is_in_recovery()",
    };
    let row = sqlx::raw_sql(sql).fetch_one(&mut connection).await.map_err(unreachable_or_refused)?;
    if row.try_get(0).map_err(unreachable_or_refused)? {
        return Ok(Some(connection));
    }
    connection.close().await.ok();
    Ok(None)
}

/// Takes what the driver does not know out of the options, and refuses what would be lost with it.
fn options(query: &str) -> Result<(Wanted, String), OutboxError> {
    let (mut wanted, mut kept) = (Wanted::Any, String::new());
    for option in query.split('&').filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("target_session_attrs", "any") => wanted = Wanted::Any,
            ("target_session_attrs", "read-write") => wanted = Wanted::Writable,
            ("target_session_attrs", "primary") => wanted = Wanted::Primary,
            ("target_session_attrs", _) => {
                let instead = "the outbox is written to: use read-write, primary or any";
                return Err(OutboxError::UrlOption { option: "target_session_attrs", instead });
            }
            ("load_balance_hosts", value) if value != "disable" => {
                let instead = "the hosts are tried in their order: leave it out";
                return Err(OutboxError::UrlOption { option: "load_balance_hosts", instead });
            }
            ("load_balance_hosts", _) => {}
            (key @ ("host" | "hostaddr" | "port"), value) if value.contains(',') || value.contains("%2C") => {
                let option = if key == "port" { "port with several values" } else { "host with several values" };
                let instead = "name them as postgres://user:password@host:5432,host:5432/database";
                return Err(OutboxError::UrlOption { option, instead });
            }
            _ => {
                kept.push(if kept.is_empty() { '?' } else { '&' });
                kept.push_str(option);
            }
        }
    }
    Ok((wanted, kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(url: &str) -> Vec<String> {
        let options = |(_, options): &(String, PgConnectOptions)| format!("{}:{}", options.get_host(), options.get_port());
        Address::parse(url).unwrap_or_else(|error| panic!("{url}: {error}")).hosts.iter().map(options).collect()
    }

    #[test]
    fn hosts_are_tried_in_their_order_each_with_its_port() {
        assert_eq!(hosts("postgres://u:p%2C@a:1,b:2/d"), ["a:1", "b:2"]);
        assert_eq!(hosts("postgresql://a:1,[::1]:2/d?sslmode=disable"), ["a:1", "[::1]:2"]);
        assert_eq!(hosts("postgres://u@a:1/d"), ["a:1"]);
    }

    #[test]
    fn all_hosts_have_the_login_the_database_and_the_options() {
        let address = Address::parse("postgres://u:p@a,b/d?target_session_attrs=primary&statement-cache-capacity=7").unwrap();
        assert_eq!((address.hosts.len(), address.wanted), (2, Wanted::Primary));
        for (_, options) in &address.hosts {
            assert_eq!((options.get_username(), options.get_database()), ("u", Some("d")));
        }
    }

    #[test]
    fn what_cannot_be_kept_to_is_refused_by_name() {
        for (query, option) in [
            ("target_session_attrs=standby", "target_session_attrs"),
            ("target_session_attrs=prefer-standby", "target_session_attrs"),
            ("load_balance_hosts=random", "load_balance_hosts"),
            ("host=a,b", "host with several values"),
            ("port=1,2", "port with several values"),
        ] {
            let error = Address::parse(&format!("postgres://u:secret@h/d?{query}")).unwrap_err().to_string();
            assert!(error.contains(option) && !error.contains("secret"), "{error}");
        }
        assert!(Address::parse("postgres://h/d?load_balance_hosts=disable").is_ok());
    }

    #[test]
    fn a_malformed_url_is_no_address() {
        for url in ["", "nonsense", "postgres://h:port/d", "mysql://h/d", "postgres://a,b:x/d"] {
            assert!(matches!(Address::parse(url), Err(OutboxError::Url(_))), "{url}");
        }
    }
}
