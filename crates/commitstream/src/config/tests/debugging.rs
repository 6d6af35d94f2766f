use super::super::{DatabaseSettings, RedisSettings, Settings};

#[test]
fn debug_never_shows_a_password() {
    let settings = Settings {
        database: DatabaseSettings { url: Some("postgres://u:hunter2@h/d".to_owned()), ..DatabaseSettings::default() },
        redis: RedisSettings {
            url: Some("redis://:hunter2@h".to_owned()),
            sentinel_password: Some("hunter2".to_owned()),
            ..RedisSettings::default()
        },
        ..Settings::default()
    };
    let shown = format!("{settings:?} {settings:#?}");
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("postgres://u:***@h/d") && shown.contains("redis://:***@h"), "{shown}");
    // Every field is there: a hand-written Debug forgets new ones.
    for field in [
        "schema",
        "timeout",
        "sentinel_password",
        "stream_prefix",
        "connect_timeout",
        "response_timeout",
        "wait_replicas",
        "wait_timeout",
        "tls",
        "ca_file",
    ] {
        assert!(shown.contains(field), "{field}");
    }
}
