use super::super::redact_url;

#[test]
fn passwords_are_hidden_and_the_rest_is_kept() {
    let cases = [
        ("postgres://user:secret@host:5432/db?sslmode=require", "postgres://user:***@host:5432/db?sslmode=require"),
        ("postgres://user@host/db", "postgres://user@host/db"),
        ("postgres://user:@host/db", "postgres://user:***@host/db"),
        ("postgres://h1:5432,h2:5433/db", "postgres://h1:5432,h2:5433/db"),
        ("postgres:///db?host=/run/postgresql", "postgres:///db?host=/run/postgresql"),
        ("redis://:secret@host", "redis://:***@host"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("rediss://user:s%65cr%40et@host:6380/1#insecure", "rediss://user:***@host:6380/1#insecure"),
        ("redis-sentinel://user:secret@h1:1,h2:2/0#mymaster", "redis-sentinel://user:***@h1:1,h2:2/0#mymaster"),
        ("redis-sentinel://h1,h2:2/0#mymaster", "redis-sentinel://h1,h2:2/0#mymaster"),
        ("rediss-cluster://:secret@h1:1,[::1]:2", "rediss-cluster://:***@h1:1,[::1]:2"),
        ("postgres://host/db?user=u&password=secret&sslmode=require", "postgres://host/db?user=u&password=***&sslmode=require"),
        ("postgres://host/db?p%61ssword=secret", "postgres://host/db?p%61ssword=***"),
        ("postgres://host/db?PASSWORD=secret&x=1", "postgres://host/db?PASSWORD=***&x=1"),
        ("postgres://host/db?sslpassword=secret", "postgres://host/db?sslpassword=***"),
    ];
    for (url, shown) in cases {
        assert_eq!(redact_url(url), shown);
        assert_eq!(redact_url(shown), shown, "what is redacted stays as it is");
    }
}

#[test]
fn a_badly_written_url_hides_more_rather_than_less() {
    let cases = [
        "postgres://user:p@secret@host/db",
        "postgres://user:p/secret@host/db",
        "postgres://user:p#secret@host/db",
        "postgres://user:p?secret@host/db",
        "postgres://user:p?x=secret@host/db",
        "postgres://user:p@ss/secret@host/db",
        "postgres://host/db?password=p&secret",
        "postgres://host/db?password=p@secret",
        "postgres://host/db?password=p?secret",
        "redis://:secret",
        "redis-sentinel://user:p@secret@h1:1,h2:2/0#mymaster",
        "redis-sentinel://user:p#secret@h1:1,h2:2/0#mymaster",
        "redis-cluster://:secret,h2:2",
        "postgres://user:secret/db",
        "host=localhost password=secret",
        "user:secret@host",
        "secret",
        "secret://",
        "a secret://host",
        "://secret",
    ];
    for url in cases {
        let shown = redact_url(url);
        assert!(!shown.contains("secret") || url == "secret://", "{url}: {shown}");
    }
    assert_eq!(redact_url(""), "***");
    assert_eq!(redact_url("not a url"), "***");
}

#[test]
fn odd_percent_signs_do_no_harm() {
    for url in ["redis://h?%=1", "redis://h?%4=1", "redis://h?%zz=1", "redis://h?%\u{e9}\u{e9}=1", "redis://h?a%"] {
        assert_eq!(redact_url(url), url);
    }
}
