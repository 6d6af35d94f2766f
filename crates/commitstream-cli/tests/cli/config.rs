//! Settings: which are in force, and where they came from.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::support::{bare_command, finish};

/// A file of settings that is removed in the end.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&path, text)?;
        Ok(Self(path))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = bare_command(args);
    command.env("DATABASE_URL", "postgres://app:hunter2@db.example:5432/app").env("OUTBOX_BATCH_SIZE", "200");
    command
}

#[test]
fn settings_in_force_as_people_read_them() -> Result<()> {
    let file = File::new("people.conf", "app.redis.streamPrefix = \"shop:\"\napp.outbox.processor.batchSize = 20\n")?;
    let answer = finish(command(&["config", "--config", "people.conf", "--redis-url", "redis://:hunter2@cache.example"]))?;
    drop(file);
    assert_eq!((answer.code, answer.stderr.as_str()), (Some(0), ""));
    insta::assert_snapshot!(answer.stdout, @"
    SETTING                                 VALUE                                   FROM           ENVIRONMENT VARIABLE
    app.database.url                        postgres://app:***@db.example:5432/app  environment    DATABASE_URL
    app.database.schema                     public                                  default        OUTBOX_SCHEMA
    app.database.timeout                    30s                                     default        DATABASE_TIMEOUT
    app.database.preparedStatements         true                                    default        DATABASE_PREPARED_STATEMENTS
    app.database.tls.caFile                 (not set)                               default        DATABASE_CA_FILE
    app.database.tls.certFile               (not set)                               default        DATABASE_CERT_FILE
    app.database.tls.keyFile                (not set)                               default        DATABASE_KEY_FILE
    app.redis.url                           redis://:***@cache.example              command line   REDIS_URL
    app.redis.sentinelPassword              (not set)                               default        REDIS_SENTINEL_PASSWORD
    app.redis.streamPrefix                  shop:                                   people.conf:1  STREAM_PREFIX
    app.redis.connectTimeout                2s                                      default        REDIS_CONNECT_TIMEOUT
    app.redis.responseTimeout               5s                                      default        REDIS_RESPONSE_TIMEOUT
    app.redis.waitReplicas                  0                                       default        REDIS_WAIT_REPLICAS
    app.redis.waitTimeout                   1s                                      default        REDIS_WAIT_TIMEOUT
    app.redis.tls.caFile                    (not set)                               default        REDIS_CA_FILE
    app.redis.tls.certFile                  (not set)                               default        REDIS_CERT_FILE
    app.redis.tls.keyFile                   (not set)                               default        REDIS_KEY_FILE
    app.outbox.enabled                      true                                    default        OUTBOX_ENABLED
    app.outbox.processor.pollInterval       1s                                      default        OUTBOX_POLL_INTERVAL
    app.outbox.processor.batchSize          200                                     environment    OUTBOX_BATCH_SIZE
    app.outbox.processor.maxRetries         3                                       default        OUTBOX_MAX_RETRIES
    app.outbox.processor.retryBaseDelay     1s                                      default        OUTBOX_RETRY_BASE_DELAY
    app.outbox.processor.retryMaxDelay      5m                                      default        OUTBOX_RETRY_MAX_DELAY
    app.outbox.processor.afterFailure       release                                 default        OUTBOX_AFTER_FAILURE
    app.outbox.processor.maxInFlightBytes   8MiB                                    default        OUTBOX_MAX_IN_FLIGHT_BYTES
    app.outbox.processor.leaseDuration      10s                                     default        OUTBOX_LEASE_DURATION
    app.outbox.processor.shutdownTimeout    10s                                     default        OUTBOX_SHUTDOWN_TIMEOUT
    app.outbox.processor.markerLife         7d                                      default        OUTBOX_MARKER_LIFE
    app.outbox.processor.settledMarkerLife  5m                                      default        OUTBOX_SETTLED_MARKER_LIFE
    app.outbox.cleanup.enabled              true                                    default        OUTBOX_CLEANUP_ENABLED
    app.outbox.cleanup.interval             1h                                      default        OUTBOX_CLEANUP_INTERVAL
    app.outbox.cleanup.retentionDays        7                                       default        OUTBOX_RETENTION_DAYS
    app.outbox.cleanup.batchSize            250                                     default        OUTBOX_CLEANUP_BATCH_SIZE
    app.eventPublishing.defaultStrategy     hybrid                                  default        EVENT_PUBLISHING_STRATEGY
    app.eventPublishing.maxPayloadBytes     1MiB                                    default        EVENT_PUBLISHING_MAX_PAYLOAD_BYTES
    app.eventPublishing.fallbackToOutbox    false                                   default        EVENT_PUBLISHING_FALLBACK_TO_OUTBOX
    app.consumer.batchSize                  500                                     default        CONSUMER_BATCH_SIZE
    app.consumer.concurrency                16                                      default        CONSUMER_CONCURRENCY
    app.consumer.maxInFlightBytes           16MiB                                   default        CONSUMER_MAX_IN_FLIGHT_BYTES
    app.consumer.maxDeliveries              5                                       default        CONSUMER_MAX_DELIVERIES
    app.consumer.maxDeadLettersInRow        20                                      default        CONSUMER_MAX_DEAD_LETTERS_IN_ROW
    app.consumer.retryBaseDelay             1s                                      default        CONSUMER_RETRY_BASE_DELAY
    app.consumer.retryMaxDelay              5m                                      default        CONSUMER_RETRY_MAX_DELAY
    app.consumer.claimIdle                  10s                                     default        CONSUMER_CLAIM_IDLE
    app.consumer.unknownEvents              skip                                    default        CONSUMER_UNKNOWN_EVENTS
    app.consumer.startFrom                  beginning                               default        CONSUMER_START_FROM
    app.consumer.shutdownTimeout            10s                                     default        CONSUMER_SHUTDOWN_TIMEOUT
    app.consumer.inboxRetentionDays         30                                      default        CONSUMER_INBOX_RETENTION_DAYS
    app.streams.trim                        true                                    default        STREAMS_TRIM
    app.streams.retentionDays               7                                       default        STREAMS_RETENTION_DAYS
    app.streams.maxEntries                  0                                       default        STREAMS_MAX_ENTRIES
    app.http.listen                         127.0.0.1:9464                          default        HTTP_LISTEN
    app.http.stalledAfter                   1m                                      default        HTTP_STALLED_AFTER
    app.tracing.endpoint                    (not set)                               default        OTEL_EXPORTER_OTLP_ENDPOINT
    app.tracing.sampleRatio                 1                                       default        OTEL_TRACES_SAMPLER_ARG
    app.tracing.serviceName                 commitstream                            default        OTEL_SERVICE_NAME
    app.console.enabled                     true                                    default        CONSOLE_ENABLED
    app.console.password                    (not set)                               default        CONSOLE_PASSWORD
    app.console.readOnlyPassword            (not set)                               default        CONSOLE_READ_ONLY_PASSWORD
    app.console.environment                 (not set)                               default        CONSOLE_ENVIRONMENT
    app.console.environmentColor            gray                                    default        CONSOLE_ENVIRONMENT_COLOR
    app.console.pathPrefix                                                          default        CONSOLE_PATH_PREFIX
    ");
    Ok(())
}

#[test]
fn settings_in_force_as_programs_read_them() -> Result<()> {
    let file = File::new("programs.conf", "app.outbox.processor.pollInterval = 500ms")?;
    let answer = finish(command(&["--json", "--config", "programs.conf", "--redis-url", "redis://cache.example", "config"]))?;
    drop(file);
    let settings = answer.json()?;
    for (key, value, source) in [
        ("app.database.url", "postgres://app:***@db.example:5432/app", "environment"),
        ("app.redis.url", "redis://cache.example", "flag"),
        ("app.outbox.processor.pollInterval", "500ms", "file"),
        ("app.outbox.processor.batchSize", "200", "environment"),
        ("app.outbox.enabled", "true", "default"),
    ] {
        assert_eq!(settings[key], serde_json::json!({ "value": value, "source": source }), "{key}");
    }
    Ok(())
}

#[test]
fn the_file_of_the_directory_is_read() -> Result<()> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("with-settings");
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("application.conf"), "app.outbox.cleanup.retentionDays = 30")?;
    let mut config = bare_command(&["config", "--json"]);
    config.current_dir(&directory);
    let settings = finish(config)?.json()?;
    std::fs::remove_dir_all(&directory)?;
    assert_eq!(settings["app.outbox.cleanup.retentionDays"], serde_json::json!({ "value": "30", "source": "file" }));
    Ok(())
}

#[test]
fn a_flag_wins_over_the_environment() -> Result<()> {
    let answer = finish(command(&["config", "--json", "--database-url", "postgres://flag.example/app"]))?.json()?;
    assert_eq!(answer["app.database.url"]["value"], "postgres://flag.example/app");
    assert_eq!(answer["app.database.url"]["source"], "flag");
    Ok(())
}
