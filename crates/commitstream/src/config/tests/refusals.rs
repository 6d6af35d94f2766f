use std::error::Error;
use std::path::Path;
use std::time::Duration;

use super::super::keys::{KEYS, Setting};
use super::super::{ConfigError, Route, Settings};
use super::{load, load_path, refusal};

#[test]
fn numbers_and_sizes_out_of_range() {
    let cases = [
        (
            "app.outbox.processor.batchSize",
            "0",
            "app.outbox.processor.batchSize = 0 (from the command line): allowed are 1 to 10,000",
        ),
        ("app.outbox.processor.batchSize", "10001", "allowed are 1 to 10,000"),
        ("app.outbox.processor.batchSize", "99999999999999999999", "= 99999999999999999999 (from the command line): allowed are"),
        ("app.outbox.processor.batchSize", "many", "= many (from the command line): not a whole number; allowed are 1 to 10,000"),
        ("app.outbox.processor.batchSize", "1.5", "not a whole number"),
        ("app.outbox.processor.maxRetries", "101", "allowed are 0 to 100"),
        ("app.outbox.cleanup.retentionDays", "-1", "retentionDays = -1 (from the command line): allowed are 0 to 36,500"),
        ("app.outbox.cleanup.batchSize", "100001", "allowed are 1 to 100,000"),
        ("app.outbox.processor.maxInFlightBytes", "1023KiB", "allowed are 1MiB to 1GiB"),
        ("app.outbox.processor.maxInFlightBytes", "2GiB", "allowed are 1MiB to 1GiB"),
        ("app.outbox.processor.maxInFlightBytes", "lots", "not a number of bytes such as 65536, 64KiB or 16MiB"),
        ("app.eventPublishing.maxPayloadBytes", "1023", "allowed are 1KiB to 64MiB"),
    ];
    for (key, value, message) in cases {
        let refused = refusal("", &[], &[(key, value)]);
        assert!(refused.contains(message), "{refused}");
    }
}

#[test]
fn the_message_says_where_the_value_came_from() {
    let allowed = "allowed are 1 to 10,000";
    let from_env = refusal("", &[("OUTBOX_BATCH_SIZE", "0")], &[]);
    assert_eq!(from_env, format!("app.outbox.processor.batchSize = 0 (from OUTBOX_BATCH_SIZE): {allowed}"));
    let from_file = refusal("\napp {\n outbox.processor.batchSize = 0\n}", &[], &[]);
    assert_eq!(from_file, format!("app.outbox.processor.batchSize = 0 (from application.conf:3): {allowed}"));
}

#[test]
fn variables_of_opentelemetry_that_are_for_others_refuse_nothing() {
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"), ("OTEL_TRACES_SAMPLER_ARG", "endpoint=http://jaeger")];
    let tracing = load("", &env, &[]).unwrap().settings.tracing;
    assert_eq!((tracing.endpoint, tracing.sample_ratio), (None, 1.0));
    let refused = refusal("app.tracing.endpoint = \"collector:4317\"", &[], &[]);
    assert!(refused.contains("app.tracing.endpoint"), "{refused}");
}

#[test]
fn durations_that_are_none() {
    let key = "app.outbox.processor.pollInterval";
    let cases = [
        ("5 parsecs", "\"5 parsecs\" is not a duration: write for example 500ms, 1s, 5m or 1h"),
        ("5parsecs", "\"5parsecs\" is not a duration: write for example 500ms, 1s, 5m or 1h"),
        (
            "1000",
            "a duration needs a unit (HOCON would take milliseconds): write for example 500ms, 1s, 5m or 1h; allowed are 1ms to 1d",
        ),
        ("0", "a duration needs a unit"),
        ("", "\"\" is not a duration"),
        ("-1s", "\"-1s\" is not a duration"),
        ("99999999999999999999d", "is not a duration"),
        ("0s", "allowed are 1ms to 1d"),
        ("2d", "allowed are 1ms to 1d"),
        ("999us", "allowed are 1ms to 1d"),
    ];
    for (value, message) in cases {
        let refused = refusal("", &[], &[(key, value)]);
        assert!(refused.starts_with(key) && refused.contains(message), "{refused}");
    }
    let error = load("", &[], &[(key, "5 parsecs")]).unwrap_err();
    assert!(error.source().is_some(), "the cause is kept");
}

#[test]
fn every_duration_has_bounds() {
    for key in KEYS.iter().filter(|key| key.env == Some("OUTBOX_POLL_INTERVAL") || key.path.contains("imeout")) {
        assert!(refusal("", &[], &[(key.path, "1000years")]).contains("allowed are"), "{}", key.path);
    }
    let cases = [
        ("app.outbox.processor.leaseDuration", "999ms", "allowed are 1s to 1h"),
        ("app.outbox.processor.markerLife", "59m", "allowed are 1h to 365d"),
        ("app.outbox.processor.settledMarkerLife", "59s", "allowed are 1m to 1h"),
        ("app.outbox.cleanup.interval", "0s", "allowed are 1s to 365d"),
        ("app.outbox.processor.shutdownTimeout", "2h", "allowed are 0s to 1h"),
    ];
    for (key, value, message) in cases {
        assert!(refusal("", &[], &[(key, value)]).ends_with(message));
    }
}

#[test]
fn words_that_are_not_among_the_allowed() {
    let strategy = refusal("", &[("EVENT_PUBLISHING_STRATEGY", "kafka")], &[]);
    assert_eq!(
        strategy,
        "app.eventPublishing.defaultStrategy = kafka (from EVENT_PUBLISHING_STRATEGY): allowed are hybrid, outbox, streams"
    );
    let route = refusal("app.eventPublishing.overrides.\"user.created\" = hybrid", &[], &[]);
    assert_eq!(
        route,
        "app.eventPublishing.overrides.\"user.created\" = hybrid (from application.conf:1): allowed are outbox, streams"
    );
    assert!(refusal("app.outbox.enabled = maybe", &[], &[]).ends_with("allowed are true, false, yes, no, on, off"));
}

#[test]
fn names_in_databases_and_redis() {
    for schema in ["\"\"", &"s".repeat(64), "\"a\\u0000b\""] {
        let refused = refusal(&format!("app.database.schema = {schema}"), &[], &[]);
        assert!(refused.ends_with("must be the name of a schema, 1 to 63 bytes without NUL"), "{refused}");
    }
    let refused = refusal("", &[("STREAM_PREFIX", "{events}:")], &[]);
    assert_eq!(
        refused,
        "app.redis.streamPrefix = \"{events}:\" (from STREAM_PREFIX): must not contain { or }: Redis Cluster takes braces for a hash tag"
    );
}

#[test]
fn urls_of_something_else_without_their_passwords() {
    let cases = [
        ("DATABASE_URL", "mysql://u:hunter2@h/d", "mysql://u:***@h/d", "postgres:// or postgresql://"),
        ("DATABASE_URL", "u:hunter2@h/d", "***", "postgres:// or postgresql://"),
        ("DATABASE_URL", "postgres://", "postgres://", "postgres:// or postgresql://"),
        ("REDIS_URL", "http://:hunter2@h", "http://:***@h", "redis:// or rediss://"),
        ("OUTBOX_POLL_INTERVAL", "redis://:hunter2@h", "redis://:***@h", "is not a duration"),
    ];
    for (name, value, shown, message) in cases {
        let error = load("", &[(name, value)], &[]).unwrap_err();
        assert!(error.to_string().contains(&format!(" = {shown} (from {name}): ")), "{error}");
        assert!(error.to_string().contains(message), "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}

#[test]
fn settings_that_contradict_each_other() {
    let refused = refusal("app.outbox.processor.retryBaseDelay = 10m", &[], &[]);
    assert_eq!(
        refused,
        "app.outbox.processor.retryBaseDelay = 10m (from application.conf:1): must not be more than \
         app.outbox.processor.retryMaxDelay = 5m (from the default)"
    );
    let payload = refusal("app.eventPublishing.maxPayloadBytes = 32MiB", &[], &[]);
    assert!(payload.contains("must not be more than app.outbox.processor.maxInFlightBytes = 8MiB"), "{payload}");
}

#[test]
fn unknown_names_and_what_was_probably_meant() {
    let cases = [
        ("app.outbox.processor.batchsize = 1", "app.outbox.processor.batchsize", "app.outbox.processor.batchSize"),
        ("app.outbox.enable = true", "app.outbox.enable", "app.outbox.enabled"),
        ("app.outbox.procesor { pollInterval = 1s }", "app.outbox.procesor.pollInterval", "app.outbox.processor.pollInterval"),
        ("app.outbox = on", "app.outbox", "app.outbox.enabled"),
        ("app.outbx.enabled = false", "app.outbx", "app.outbox"),
        ("app { eventpublishing { defaultStrategy = outbox } }", "app.eventpublishing", "app.eventPublishing"),
        ("app.outbox.cleanupp {}", "app.outbox.cleanupp", "app.outbox.enabled"),
        ("app.Redis {}", "app.Redis", "app.redis"),
        ("app.eventPublishing.overrides = outbox", "app.eventPublishing.overrides", "app.eventPublishing.overrides.<event type>"),
    ];
    for (file, key, suggestion) in cases {
        let expected = format!("{key} (from application.conf:1) is not a setting; did you mean {suggestion}?");
        assert_eq!(refusal(file, &[], &[]), expected);
    }
    let flag = refusal("", &[], &[("app.redis.uri", "redis://h")]);
    assert_eq!(flag, "app.redis.uri (from the command line) is not a setting; did you mean app.redis.url?");
}

#[test]
fn a_list_or_an_object_in_place_of_a_value() {
    let list = refusal("app.outbox.processor.batchSize = [1]", &[], &[]);
    assert_eq!(list, "app.outbox.processor.batchSize = [...] (from application.conf:1): must be one value");
    let object = refusal("app.outbox.processor.batchSize { size = 1 }", &[], &[]);
    let empty = refusal("app.outbox.processor.batchSize {}", &[], &[]);
    assert_eq!(empty, "app.outbox.processor.batchSize = {...} (from application.conf:1): must be one value");
    assert!(object.contains("batchSize.size") && object.contains("did you mean app.outbox.processor.batchSize?"), "{object}");
}

#[test]
fn a_named_file_that_is_not_there_or_cannot_be_read() {
    let error = load_path(Path::new("/no/such/file.conf"), &[], &[]).unwrap_err();
    assert!(matches!(&error, ConfigError::Read { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound));
    assert!(error.to_string().contains("/no/such/file.conf"), "{error}");
    assert!(matches!(load_path(Path::new("/"), &[], &[]), Err(ConfigError::Read { .. })));
}

#[test]
fn settings_built_in_code_follow_the_same_rules() {
    let refused = |change: fn(&mut Settings)| {
        let mut settings = Settings::default();
        change(&mut settings);
        settings.validate().expect_err("must be refused").to_string()
    };
    let cases = [
        (refused(|s| s.outbox.processor.batch_size = 0), "app.outbox.processor.batchSize = 0: allowed are 1 to 10,000"),
        (refused(|s| s.outbox.processor.poll_interval = Duration::MAX), ": allowed are 1ms to 1d"),
        (refused(|s| s.database.schema.clear()), "app.database.schema = \"\": must be the name of a schema"),
        (refused(|s| s.redis.stream_prefix.push('{')), "app.redis.streamPrefix = \"events:{\": must not contain"),
        (refused(|s| s.redis.url = Some("x:hunter2@y".to_owned())), "app.redis.url = ***: must be a URL"),
        (refused(|s| s.outbox.processor.retry_base_delay = Duration::from_secs(301)), "= 301s: must not be more than"),
        (
            refused(|s| assert!(s.publishing.overrides.insert(String::new(), Route::Outbox).is_none())),
            "an event type must not be empty",
        ),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn limits_in_the_table_name_settings_of_the_same_kind() {
    let settings = Settings::default();
    for (key, limit) in KEYS.iter().filter_map(|key| Some((key, key.not_above?))) {
        let limit = Setting::find(limit).unwrap();
        assert_eq!(std::mem::discriminant(&key.kind), std::mem::discriminant(&limit.key.kind), "{}", key.path);
        assert!(key.kind.magnitude(&settings).is_some(), "{}", key.path);
    }
}

#[test]
fn time_outs_that_leave_a_consumer_no_time_for_its_heartbeat() {
    let mut settings = Settings::default();
    settings.consumer.claim_idle = Duration::from_secs(1);
    assert!(settings.validate_heartbeat().is_ok(), "the defaults give way");
    settings.redis.connect_timeout = Duration::from_millis(500);
    assert!(settings.validate_heartbeat().is_ok());
    settings.redis.response_timeout = Duration::from_millis(600);
    let error = settings.validate_heartbeat().map_err(|error| error.to_string());
    let expected =
        "app.redis.connectTimeout + app.redis.responseTimeout = 500ms + 600ms: must not be more than app.consumer.claimIdle = 1s";
    assert_eq!(error, Err(expected.to_owned()));
}
