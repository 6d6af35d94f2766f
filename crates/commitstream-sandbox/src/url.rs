//! Taking server URLs apart, for the few forms that occur here.

/// `SCHEME://[USER[:PASSWORD]@]HOST:PORT[/DATABASE][?PARAMETERS]` in its parts.
#[derive(Debug, Clone, Copy)]
struct Url<'a> {
    scheme: &'a str,
    credentials: Option<&'a str>,
    /// `HOST:PORT`, or several of them with commas.
    hosts: &'a str,
    /// The database with its slash, and the parameters.
    rest: &'a str,
}

impl<'a> Url<'a> {
    fn parse(url: &'a str) -> Option<Url<'a>> {
        let (scheme, address) = url.split_once("://")?;
        let (server, rest) = address.split_at(address.find(['/', '?', '#']).unwrap_or(address.len()));
        let (credentials, hosts) =
            server.rsplit_once('@').map_or((None, server), |(credentials, hosts)| (Some(credentials), hosts));
        Some(Url { scheme, credentials, hosts, rest })
    }

    fn join(self) -> String {
        let Url { scheme, credentials, hosts, rest } = self;
        match credentials {
            Some(credentials) => format!("{scheme}://{credentials}@{hosts}{rest}"),
            None => format!("{scheme}://{hosts}{rest}"),
        }
    }
}

/// The same URL with another server. A text that is no URL is taken for `HOST:PORT`.
pub(crate) fn with_host(url: &str, host_and_port: &str) -> String {
    Url::parse(url).map_or(host_and_port.to_owned(), |url| Url { hosts: host_and_port, ..url }.join())
}

/// The same URL with another database name.
pub(crate) fn with_database(url: &str, database: &str) -> Option<String> {
    let url = Url::parse(url)?;
    let parameters = url.rest.split_once('?').map(|(_, parameters)| format!("?{parameters}")).unwrap_or_default();
    Some(Url { rest: &format!("/{database}{parameters}"), ..url }.join())
}

/// The URL without its password, and the password.
pub(crate) fn without_password(url: &str) -> (String, Option<String>) {
    let split = || {
        let url = Url::parse(url)?;
        let (user, password) = url.credentials?.split_once(':')?;
        Some((Url { credentials: Some(user), ..url }.join(), percent_decoded(password)))
    };
    split().map_or((url.to_owned(), None), |(url, password)| (url, Some(password)))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(code) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_in_a_url_is_replaced_and_all_else_stays() {
        let replaced = |url| with_host(url, "127.0.0.1:2");
        assert_eq!(replaced("postgres://u:p%40@h:1/d?x=y@z"), "postgres://u:p%40@127.0.0.1:2/d?x=y@z");
        assert_eq!(replaced("redis://default:p@h:1"), "redis://default:p@127.0.0.1:2");
        assert_eq!(replaced("redis://h:1/0"), "redis://127.0.0.1:2/0");
    }

    #[test]
    fn the_database_in_a_url_is_replaced() {
        let replaced = |url| with_database(url, "t_1").unwrap();
        assert_eq!(replaced("postgres://u:p@h:1/postgres"), "postgres://u:p@h:1/t_1");
        assert_eq!(replaced("postgres://u:p@h:1"), "postgres://u:p@h:1/t_1");
        assert_eq!(replaced("postgresql://h/?sslmode=disable"), "postgresql://h/t_1?sslmode=disable");
        assert_eq!(with_database("localhost", "t_1"), None);
    }

    #[test]
    fn the_password_is_taken_out_of_a_url() {
        let taken = without_password("postgres://u:p%40%2Fs@h:1/d?x=y");
        assert_eq!(taken, ("postgres://u@h:1/d?x=y".to_owned(), Some("p@/s".to_owned())));
        assert_eq!(without_password("postgres://u@h/d"), ("postgres://u@h/d".to_owned(), None));
        assert_eq!(percent_decoded("100%"), "100%");
    }
}
