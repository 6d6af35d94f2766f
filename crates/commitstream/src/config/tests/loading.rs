use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::keys::KEYS;
use super::super::{Route, Settings, Source, Strategy};
use super::{load, load_path, refusal, settings};

#[test]
fn nothing_said_means_the_defaults() {
    let loaded = load("", &[], &[]).unwrap();
    assert_eq!(loaded.settings, Settings::default());
    assert!(loaded.entries().iter().all(|entry| entry.source == Source::Default && entry.value == entry.default));
    loaded.settings.validate().unwrap();
}

#[test]
fn without_a_named_file_the_default_one_may_be_absent() {
    // The tests run in the directory of the crate, which has no application.conf.
    assert_eq!(Settings::load(None, |_| None, &[]).unwrap().settings, Settings::default());
}

#[test]
fn the_reference_file_is_read() {
    let read = settings(
        r#"
        app {
          outbox {
            enabled = false
            processor { pollInterval = 500ms, batchSize = 200, maxRetries = 5 }
            cleanup { enabled = no, interval = 2 h, retentionDays = 30 }
          }
          eventPublishing { defaultStrategy = "outbox" }   # hybrid, outbox, streams
        }
        "#,
    );
    assert!(!read.outbox.enabled);
    assert_eq!(read.outbox.processor.poll_interval, Duration::from_millis(500));
    assert_eq!(read.outbox.processor.batch_size, 200);
    assert_eq!(read.outbox.processor.max_retries, 5);
    assert!(!read.outbox.cleanup.enabled);
    assert_eq!(read.outbox.cleanup.interval, Duration::from_secs(7_200));
    assert_eq!(read.outbox.cleanup.retention_days, 30);
    assert_eq!(read.publishing.default_strategy, Strategy::Outbox);
}

#[test]
fn durations_have_the_units_of_hocon_wherever_they_are_written() {
    let cases = [
        ("500 milliseconds", Duration::from_millis(500)),
        ("1 millisecond", Duration::from_millis(1)),
        ("500 milli", Duration::from_millis(500)),
        ("100000 micros", Duration::from_millis(100)),
        ("2000000 nanoseconds", Duration::from_millis(2)),
        ("1.5 seconds", Duration::from_millis(1_500)),
        ("2 hours", Duration::from_secs(7_200)),
    ];
    for (text, expected) in cases {
        for file in [format!("pollInterval = {text}"), format!("pollInterval = \"{text}\"")] {
            assert_eq!(settings(&format!("app.outbox.processor.{file}")).outbox.processor.poll_interval, expected, "{file}");
        }
        let from_env = load("", &[("OUTBOX_POLL_INTERVAL", text)], &[]).unwrap().settings;
        assert_eq!(from_env.outbox.processor.poll_interval, expected, "{text}");
    }
}

#[test]
fn environment_covers_the_file_and_flags_cover_both() {
    let file = "app.outbox.processor { batchSize = 1, maxRetries = 1, pollInterval = 1m }";
    let env = [("OUTBOX_BATCH_SIZE", "2"), ("OUTBOX_MAX_RETRIES", "2"), ("OUTBOX_RETENTION_DAYS", "")];
    let loaded = load(file, &env, &[("app.outbox.processor.batchSize", "3")]).unwrap();

    assert_eq!(loaded.settings.outbox.processor.batch_size, 3);
    assert_eq!(loaded.settings.outbox.processor.max_retries, 2);
    assert_eq!(loaded.settings.outbox.processor.poll_interval, Duration::from_secs(60));
    assert_eq!(loaded.settings.outbox.cleanup.retention_days, 7, "an empty variable counts as not set");

    assert_eq!(loaded.source("app.outbox.processor.batchSize"), Source::Flag);
    assert_eq!(loaded.source("app.outbox.processor.maxRetries"), Source::Environment("OUTBOX_MAX_RETRIES"));
    assert!(matches!(loaded.source("app.outbox.processor.pollInterval"), Source::File { line: 1, .. }));
    assert_eq!(loaded.source("app.outbox.cleanup.retentionDays"), Source::Default);
}

#[test]
fn every_environment_variable_of_the_table_takes_effect() {
    let env = [
        ("DATABASE_URL", "postgresql://db/app"),
        ("OUTBOX_SCHEMA", "events"),
        ("DATABASE_CA_FILE", "/etc/db ca.pem"),
        ("DATABASE_CERT_FILE", "db.pem"),
        ("DATABASE_KEY_FILE", "db.key"),
        ("REDIS_CA_FILE", "/etc/ca.pem"),
        ("REDIS_CERT_FILE", "client.pem"),
        ("REDIS_KEY_FILE", "client.key"),
        ("REDIS_URL", "rediss://cache:6380"),
        ("REDIS_SENTINEL_PASSWORD", "***"),
        ("CONSOLE_ENABLED", "false"),
        ("CONSOLE_PASSWORD", "***"),
        ("CONSOLE_READ_ONLY_PASSWORD", "***"),
        ("STREAM_PREFIX", "app:"),
        ("OUTBOX_ENABLED", "false"),
        ("OUTBOX_POLL_INTERVAL", "5s"),
        ("OUTBOX_BATCH_SIZE", "200"),
        ("OUTBOX_MAX_RETRIES", "0"),
        ("OUTBOX_RETENTION_DAYS", "30"),
        ("EVENT_PUBLISHING_STRATEGY", "streams"),
        ("HTTP_LISTEN", "[::1]:9000"),
        ("HTTP_STALLED_AFTER", "2m"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://otel:4318"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.01"),
        ("OTEL_SERVICE_NAME", "shop relay"),
        ("DATABASE_TIMEOUT", "7s"),
        ("DATABASE_PREPARED_STATEMENTS", "false"),
        ("REDIS_CONNECT_TIMEOUT", "3s"),
        ("REDIS_RESPONSE_TIMEOUT", "4s"),
        ("REDIS_WAIT_REPLICAS", "2"),
        ("REDIS_WAIT_TIMEOUT", "2s"),
        ("OUTBOX_RETRY_BASE_DELAY", "2s"),
        ("OUTBOX_RETRY_MAX_DELAY", "10m"),
        ("OUTBOX_AFTER_FAILURE", "hold"),
        ("OUTBOX_MAX_IN_FLIGHT_BYTES", "16MiB"),
        ("OUTBOX_LEASE_DURATION", "20s"),
        ("OUTBOX_SHUTDOWN_TIMEOUT", "11s"),
        ("OUTBOX_MARKER_LIFE", "8d"),
        ("OUTBOX_SETTLED_MARKER_LIFE", "6m"),
        ("OUTBOX_CLEANUP_ENABLED", "false"),
        ("OUTBOX_CLEANUP_INTERVAL", "2h"),
        ("OUTBOX_CLEANUP_BATCH_SIZE", "100"),
        ("EVENT_PUBLISHING_MAX_PAYLOAD_BYTES", "2MiB"),
        ("EVENT_PUBLISHING_FALLBACK_TO_OUTBOX", "true"),
        ("CONSUMER_BATCH_SIZE", "100"),
        ("CONSUMER_CONCURRENCY", "4"),
        ("CONSUMER_MAX_IN_FLIGHT_BYTES", "8MiB"),
        ("CONSUMER_MAX_DELIVERIES", "9"),
        ("CONSUMER_MAX_DEAD_LETTERS_IN_ROW", "5"),
        ("CONSUMER_RETRY_BASE_DELAY", "2s"),
        ("CONSUMER_RETRY_MAX_DELAY", "10m"),
        ("CONSUMER_CLAIM_IDLE", "30s"),
        ("CONSUMER_UNKNOWN_EVENTS", "park"),
        ("CONSUMER_START_FROM", "now"),
        ("CONSUMER_SHUTDOWN_TIMEOUT", "11s"),
        ("CONSUMER_INBOX_RETENTION_DAYS", "60"),
        ("STREAMS_TRIM", "false"),
        ("STREAMS_RETENTION_DAYS", "14"),
        ("STREAMS_MAX_ENTRIES", "1000000"),
        ("CONSOLE_ENVIRONMENT", "production"),
        ("CONSOLE_ENVIRONMENT_COLOR", "red"),
        ("CONSOLE_PATH_PREFIX", "/ops"),
    ];
    let loaded = load("", &env, &[]).unwrap();
    for (name, value) in env {
        let entry = loaded.entries().into_iter().find(|entry| entry.env == Some(name)).unwrap();
        assert_eq!(entry.value.as_deref(), Some(value), "{name}");
        assert!(matches!(entry.source, Source::Environment(from) if from == name));
    }
    let untried: Vec<_> =
        KEYS.iter().filter_map(|key| key.env).filter(|name| env.iter().all(|(tried, _)| tried != name)).collect();
    // A map, which has a test of its own.
    assert_eq!(untried, ["EVENT_PUBLISHING_OVERRIDES"]);
}

#[test]
fn overrides_are_an_open_map() {
    let loaded = load(
        r#"app.eventPublishing.overrides { MetricUpdated = outbox, "user.created" = streams, order.paid = outbox }"#,
        &[],
        &[("app.eventPublishing.overrides.MetricUpdated", "streams"), ("app.eventPublishing.overrides.\"log.line\"", "streams")],
    )
    .unwrap();
    let expected = [
        ("MetricUpdated", Route::Streams),
        ("log.line", Route::Streams),
        ("order.paid", Route::Outbox),
        ("user.created", Route::Streams),
    ];
    assert_eq!(loaded.settings.publishing.overrides, expected.map(|(name, route)| (name.to_owned(), route)).into());

    let entries = loaded.entries();
    let entry = entries.iter().find(|entry| entry.key == r#"app.eventPublishing.overrides."user.created""#).unwrap();
    assert_eq!((entry.value.as_deref(), entry.default.as_deref()), (Some("streams"), None));
    assert!(matches!(entry.source, Source::File { line: 1, .. }));
}

#[test]
fn what_belongs_to_the_application_is_left_alone() {
    let file = r#"
        akka { loglevel = INFO, http.server = [1, { a = 2 }] }
        app.mail { sender = ${MUST_BE_SET}, list += 1 }
        app.name = shop
        app.outbox.enabled = false
    "#;
    assert!(!settings(file).outbox.enabled);
}

#[test]
fn null_means_not_set() {
    let read = settings("app.redis.url = \"redis://a\"\napp.redis.url = null\napp.outbox.enabled = null");
    assert_eq!(read, Settings::default());
}

#[test]
fn entries_are_printed_so_that_they_can_be_pasted_back() {
    let text = "app { outbox.processor.retryMaxDelay = 90s, eventPublishing.overrides.\"a b\" = outbox, outbox.enabled = off }";
    let loaded = load(text, &[], &[]).unwrap();
    let printed: String =
        loaded.entries().iter().filter_map(|entry| Some(format!("{} = \"{}\"\n", entry.key, entry.value.as_ref()?))).collect();
    assert!(printed.contains("app.outbox.processor.retryMaxDelay = \"90s\""));
    assert!(printed.contains("app.outbox.processor.markerLife = \"7d\""));
    assert!(printed.contains("app.outbox.processor.maxInFlightBytes = \"8MiB\""));
    assert_eq!(settings(&printed), loaded.settings);
}

#[test]
fn entries_never_show_a_password() {
    let env = [
        ("DATABASE_URL", "postgres://u:hunter2@h/d"),
        ("REDIS_URL", "redis-sentinel://:hunter2@h,i/0#m"),
        ("REDIS_SENTINEL_PASSWORD", "hunter2"),
    ];
    let loaded = load("", &env, &[]).unwrap();
    assert_eq!(loaded.settings.database.url.as_deref(), Some("postgres://u:hunter2@h/d"));
    assert_eq!(loaded.settings.redis.sentinel_password.as_deref(), Some("hunter2"));
    assert!(!format!("{:?} {loaded:?}", loaded.entries()).contains("hunter2"));
}

#[test]
fn the_example_file_sets_every_key_to_its_default() {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../application.conf.example");
    let mut loaded = load_path(&path, &[], &[]).unwrap();
    for key in KEYS.iter().filter(|key| key.path != "app.eventPublishing.overrides") {
        assert!(matches!(loaded.source(key.path), Source::File { .. }), "{} is missing", key.path);
    }
    let text = std::fs::read_to_string(&path).unwrap();
    for name in KEYS.iter().filter_map(|key| key.env) {
        assert!(text.contains(name), "{name} is missing");
    }
    assert!(loaded.settings.database.url.take().is_some() && loaded.settings.redis.url.take().is_some());
    assert_eq!(loaded.settings, Settings::default());
}

#[test]
fn files_for_tls_become_part_of_the_url_of_postgresql() {
    let with = |url: &str, files: &[(&str, &str)]| {
        let env: Vec<_> = [("DATABASE_URL", url)].into_iter().chain(files.iter().copied()).collect();
        load("", &env, &[]).unwrap().settings.database.url_with_tls().unwrap()
    };
    let all = [("DATABASE_CA_FILE", "/a b/ca.pem"), ("DATABASE_CERT_FILE", "c.pem"), ("DATABASE_KEY_FILE", "c&k.pem")];
    assert_eq!(with("postgres://u@h/d?a=b", &[]), "postgres://u@h/d?a=b");
    assert_eq!(
        with("postgres://u@h/d", &all),
        "postgres://u@h/d?sslmode=verify-full&sslrootcert=/a%20b/ca.pem&sslcert=c.pem&sslkey=c%26k.pem"
    );
    assert_eq!(with("postgres://u@h/d?sslmode=require", &all[1..2]), "postgres://u@h/d?sslmode=require&sslcert=c.pem");
    assert_eq!(
        with("postgres://u@h/d?sslrootcert=x&ssl-mode=verify-ca", &all[..1]),
        "postgres://u@h/d?sslrootcert=x&ssl-mode=verify-ca"
    );
}

#[test]
fn every_setting_has_an_environment_variable_of_its_own() {
    let mut names = std::collections::BTreeSet::new();
    for key in KEYS {
        let name = key.env.unwrap_or_else(|| panic!("{} has none", key.path));
        assert!(names.insert(name), "{name} is of two settings");
    }
}

#[test]
fn overrides_are_pairs_in_the_environment() {
    let env = [("EVENT_PUBLISHING_OVERRIDES", "MetricUpdated=outbox, user.created = streams,")];
    let loaded = load("app.eventPublishing.overrides.MetricUpdated = streams", &env, &[]).unwrap();
    let routes = &loaded.settings.publishing.overrides;
    assert_eq!((routes.get("MetricUpdated"), routes.get("user.created")), (Some(&Route::Outbox), Some(&Route::Streams)));
    assert_eq!(loaded.source("app.eventPublishing.overrides.MetricUpdated"), Source::Environment("EVENT_PUBLISHING_OVERRIDES"));
    for (value, expected) in [("MetricUpdated", "must be pairs"), ("A=nowhere", "allowed are"), ("=outbox", "")] {
        let refused = refusal("", &[("EVENT_PUBLISHING_OVERRIDES", value)], &[]);
        assert!(refused.contains(expected) && refused.contains("EVENT_PUBLISHING_OVERRIDES"), "{value}: {refused}");
    }
}

#[test]
fn the_console_takes_a_name_a_color_and_a_path() {
    let text = "app.console { environment = production, environmentColor = red, pathPrefix = /ops/ }";
    let console = settings(text).console;
    assert_eq!((console.environment.as_deref(), console.environment_color.name()), (Some("production"), "red"));
    assert_eq!(console.path_prefix, "/ops");
    for wrong in ["ops", "//evil.example", "/a b", "/a?b", "/a<b>"] {
        let refused = refusal("", &[("CONSOLE_PATH_PREFIX", wrong)], &[]);
        assert!(refused.contains("must be empty, or a path"), "{wrong}: {refused}");
    }
}
