//! The one table of settings. File, environment, flags, refusals and printing all read it; a setting is added here and
//! in its struct, nowhere else.

use std::time::Duration;

use super::Settings;
use super::kinds::{Field, Kind, field};

/// One setting.
pub(super) struct Key {
    /// Its name in the file and on the command line.
    pub path: &'static str,
    /// The environment variable that overrides the file. Every setting has one, for whoever has no file to mount.
    pub env: Option<&'static str>,
    pub kind: Kind,
    /// A setting of the same kind that this one must not be more than.
    pub not_above: Option<&'static str>,
}

const fn key(path: &'static str, kind: Kind) -> Key {
    Key { path, env: None, kind, not_above: None }
}

impl Key {
    const fn env(self, name: &'static str) -> Key {
        Key { env: Some(name), ..self }
    }

    /// The name to write, as a suggestion shows it.
    pub fn pattern(&self) -> String {
        if matches!(self.kind, Kind::Routes(_)) { format!("{}.<event type>", self.path) } else { self.path.to_owned() }
    }

    const fn not_above(self, path: &'static str) -> Key {
        Key { not_above: Some(path), ..self }
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

const REDIS_SCHEMES: &[&str] = &[
    "redis://",
    "rediss://",
    "redis-sentinel://",
    "rediss-sentinel://",
    "redis-cluster://",
    "rediss-cluster://",
    "unix://",
    "redis+unix://",
];

pub(super) static KEYS: &[Key] = &[
    key("app.database.url", Kind::Url(field!(database.url), &["postgres://", "postgresql://"])).env("DATABASE_URL"),
    key("app.database.schema", Kind::Schema(field!(database.schema))).env("OUTBOX_SCHEMA"),
    key("app.database.timeout", Kind::Time(field!(database.timeout), Duration::from_millis(100)..=HOUR)).env("DATABASE_TIMEOUT"),
    key("app.database.preparedStatements", Kind::Switch(field!(database.prepared_statements)))
        .env("DATABASE_PREPARED_STATEMENTS"),
    key("app.database.tls.caFile", Kind::File(field!(database.tls.ca_file))).env("DATABASE_CA_FILE"),
    key("app.database.tls.certFile", Kind::File(field!(database.tls.cert_file))).env("DATABASE_CERT_FILE"),
    key("app.database.tls.keyFile", Kind::File(field!(database.tls.key_file))).env("DATABASE_KEY_FILE"),
    key("app.redis.url", Kind::Url(field!(redis.url), REDIS_SCHEMES)).env("REDIS_URL"),
    key("app.redis.sentinelPassword", Kind::Secret(field!(redis.sentinel_password))).env("REDIS_SENTINEL_PASSWORD"),
    key("app.redis.streamPrefix", Kind::Prefix(field!(redis.stream_prefix))).env("STREAM_PREFIX"),
    key("app.redis.connectTimeout", Kind::Time(field!(redis.connect_timeout), Duration::from_millis(10)..=HOUR))
        .env("REDIS_CONNECT_TIMEOUT"),
    key("app.redis.responseTimeout", Kind::Time(field!(redis.response_timeout), Duration::from_millis(10)..=HOUR))
        .env("REDIS_RESPONSE_TIMEOUT"),
    key("app.redis.waitReplicas", Kind::Count(field!(redis.wait_replicas), 0..=10)).env("REDIS_WAIT_REPLICAS"),
    key("app.redis.waitTimeout", Kind::Time(field!(redis.wait_timeout), Duration::from_millis(10)..=MINUTE))
        .env("REDIS_WAIT_TIMEOUT"),
    key("app.redis.tls.caFile", Kind::File(field!(redis.tls.ca_file))).env("REDIS_CA_FILE"),
    key("app.redis.tls.certFile", Kind::File(field!(redis.tls.cert_file))).env("REDIS_CERT_FILE"),
    key("app.redis.tls.keyFile", Kind::File(field!(redis.tls.key_file))).env("REDIS_KEY_FILE"),
    key("app.outbox.enabled", Kind::Switch(field!(outbox.enabled))).env("OUTBOX_ENABLED"),
    key("app.outbox.processor.pollInterval", Kind::Time(field!(outbox.processor.poll_interval), MILLISECOND..=DAY))
        .env("OUTBOX_POLL_INTERVAL"),
    key("app.outbox.processor.batchSize", Kind::Count(field!(outbox.processor.batch_size), 1..=10_000)).env("OUTBOX_BATCH_SIZE"),
    key("app.outbox.processor.maxRetries", Kind::Count(field!(outbox.processor.max_retries), 0..=100)).env("OUTBOX_MAX_RETRIES"),
    key("app.outbox.processor.retryBaseDelay", Kind::Time(field!(outbox.processor.retry_base_delay), MILLISECOND..=DAY))
        .env("OUTBOX_RETRY_BASE_DELAY")
        .not_above("app.outbox.processor.retryMaxDelay"),
    key("app.outbox.processor.retryMaxDelay", Kind::Time(field!(outbox.processor.retry_max_delay), MILLISECOND..=YEAR))
        .env("OUTBOX_RETRY_MAX_DELAY"),
    key("app.outbox.processor.afterFailure", Kind::AfterFailure(field!(outbox.processor.after_failure)))
        .env("OUTBOX_AFTER_FAILURE"),
    key("app.outbox.processor.maxInFlightBytes", Kind::Size(field!(outbox.processor.max_in_flight_bytes), 1 << 20..=1 << 30))
        .env("OUTBOX_MAX_IN_FLIGHT_BYTES"),
    key("app.outbox.processor.leaseDuration", Kind::Time(field!(outbox.processor.lease_duration), SECOND..=HOUR))
        .env("OUTBOX_LEASE_DURATION"),
    key("app.outbox.processor.shutdownTimeout", Kind::Time(field!(outbox.processor.shutdown_timeout), Duration::ZERO..=HOUR))
        .env("OUTBOX_SHUTDOWN_TIMEOUT"),
    key("app.outbox.processor.markerLife", Kind::Time(field!(outbox.processor.marker_life), HOUR..=YEAR))
        .env("OUTBOX_MARKER_LIFE"),
    key("app.outbox.processor.settledMarkerLife", Kind::Time(field!(outbox.processor.settled_marker_life), MINUTE..=HOUR))
        .env("OUTBOX_SETTLED_MARKER_LIFE"),
    key("app.outbox.cleanup.enabled", Kind::Switch(field!(outbox.cleanup.enabled))).env("OUTBOX_CLEANUP_ENABLED"),
    key("app.outbox.cleanup.interval", Kind::Time(field!(outbox.cleanup.interval), SECOND..=YEAR)).env("OUTBOX_CLEANUP_INTERVAL"),
    key("app.outbox.cleanup.retentionDays", Kind::Count(field!(outbox.cleanup.retention_days), 0..=36_500))
        .env("OUTBOX_RETENTION_DAYS"),
    key("app.outbox.cleanup.batchSize", Kind::Count(field!(outbox.cleanup.batch_size), 1..=100_000))
        .env("OUTBOX_CLEANUP_BATCH_SIZE"),
    key("app.eventPublishing.defaultStrategy", Kind::Strategy(field!(publishing.default_strategy)))
        .env("EVENT_PUBLISHING_STRATEGY"),
    key("app.eventPublishing.overrides", Kind::Routes(field!(publishing.overrides))).env("EVENT_PUBLISHING_OVERRIDES"),
    key("app.eventPublishing.maxPayloadBytes", Kind::Size(field!(publishing.max_payload_bytes), 1 << 10..=64 << 20))
        .env("EVENT_PUBLISHING_MAX_PAYLOAD_BYTES")
        .not_above("app.outbox.processor.maxInFlightBytes"),
    key("app.eventPublishing.fallbackToOutbox", Kind::Switch(field!(publishing.fallback_to_outbox)))
        .env("EVENT_PUBLISHING_FALLBACK_TO_OUTBOX"),
    key("app.consumer.batchSize", Kind::Count(field!(consumer.batch_size), 1..=1_000)).env("CONSUMER_BATCH_SIZE"),
    key("app.consumer.concurrency", Kind::Count(field!(consumer.concurrency), 1..=1_024)).env("CONSUMER_CONCURRENCY"),
    key("app.consumer.maxInFlightBytes", Kind::Size(field!(consumer.max_in_flight_bytes), 1 << 20..=1 << 30))
        .env("CONSUMER_MAX_IN_FLIGHT_BYTES"),
    key("app.consumer.maxDeliveries", Kind::Count(field!(consumer.max_deliveries), 1..=100)).env("CONSUMER_MAX_DELIVERIES"),
    key("app.consumer.maxDeadLettersInRow", Kind::Count(field!(consumer.max_dead_letters_in_row), 0..=1_000_000))
        .env("CONSUMER_MAX_DEAD_LETTERS_IN_ROW"),
    key("app.consumer.retryBaseDelay", Kind::Time(field!(consumer.retry_base_delay), MILLISECOND..=DAY))
        .env("CONSUMER_RETRY_BASE_DELAY")
        .not_above("app.consumer.retryMaxDelay"),
    key("app.consumer.retryMaxDelay", Kind::Time(field!(consumer.retry_max_delay), MILLISECOND..=YEAR))
        .env("CONSUMER_RETRY_MAX_DELAY"),
    key("app.consumer.claimIdle", Kind::Time(field!(consumer.claim_idle), SECOND..=HOUR)).env("CONSUMER_CLAIM_IDLE"),
    key("app.consumer.unknownEvents", Kind::UnknownEvents(field!(consumer.unknown_events))).env("CONSUMER_UNKNOWN_EVENTS"),
    key("app.consumer.startFrom", Kind::StartFrom(field!(consumer.start_from))).env("CONSUMER_START_FROM"),
    key("app.consumer.shutdownTimeout", Kind::Time(field!(consumer.shutdown_timeout), Duration::ZERO..=HOUR))
        .env("CONSUMER_SHUTDOWN_TIMEOUT"),
    key("app.consumer.inboxRetentionDays", Kind::Count(field!(consumer.inbox_retention_days), 1..=36_500))
        .env("CONSUMER_INBOX_RETENTION_DAYS"),
    key("app.streams.trim", Kind::Switch(field!(streams.trim))).env("STREAMS_TRIM"),
    key("app.streams.retentionDays", Kind::Count(field!(streams.retention_days), 1..=36_500)).env("STREAMS_RETENTION_DAYS"),
    key("app.streams.maxEntries", Kind::Count(field!(streams.max_entries), 0..=u32::MAX)).env("STREAMS_MAX_ENTRIES"),
    key("app.http.listen", Kind::Address(field!(http.listen))).env("HTTP_LISTEN"),
    key("app.http.stalledAfter", Kind::Time(field!(http.stalled_after), SECOND..=DAY)).env("HTTP_STALLED_AFTER"),
    key("app.tracing.endpoint", Kind::Endpoint(field!(tracing.endpoint))).env("OTEL_EXPORTER_OTLP_ENDPOINT"),
    key("app.tracing.sampleRatio", Kind::Ratio(field!(tracing.sample_ratio))).env("OTEL_TRACES_SAMPLER_ARG"),
    key("app.tracing.serviceName", Kind::Name(field!(tracing.service_name))).env("OTEL_SERVICE_NAME"),
    key("app.console.enabled", Kind::Switch(field!(console.enabled))).env("CONSOLE_ENABLED"),
    key("app.console.password", Kind::Secret(field!(console.password))).env("CONSOLE_PASSWORD"),
    key("app.console.readOnlyPassword", Kind::Secret(field!(console.read_only_password))).env("CONSOLE_READ_ONLY_PASSWORD"),
    key("app.console.environment", Kind::Label(field!(console.environment))).env("CONSOLE_ENVIRONMENT"),
    key("app.console.environmentColor", Kind::Color(field!(console.environment_color))).env("CONSOLE_ENVIRONMENT_COLOR"),
    key("app.console.pathPrefix", Kind::Path(field!(console.path_prefix))).env("CONSOLE_PATH_PREFIX"),
];

/// The sections under `app` that are ours; every other one is the application's own.
pub(super) fn sections() -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter_map(|key| key.path.split('.').nth(1))
}

/// Whether this path holds settings but is none itself.
pub(super) fn is_section(path: &str) -> bool {
    let is_within = |key: &Key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
    KEYS.iter().any(|key| is_within(key) || (key.path == path && matches!(key.kind, Kind::Routes(_))))
}

/// A setting, or one member of the map `overrides`.
pub(super) struct Setting {
    pub key: &'static Key,
    /// The event type in `overrides.<event type>`; empty for all others.
    pub member: String,
}

impl Setting {
    /// The setting of this name. Event types need no quotes here: everything after `overrides.` is the type.
    pub fn find(path: &str) -> Option<Setting> {
        KEYS.iter().find_map(|key| match key.kind {
            Kind::Routes(_) => {
                let member = path.strip_prefix(key.path)?.strip_prefix('.')?;
                let member = member.strip_prefix('"').and_then(|quoted| quoted.strip_suffix('"')).unwrap_or(member);
                (!member.is_empty()).then(|| Setting { key, member: member.to_owned() })
            }
            _ => (key.path == path).then(|| Setting::plain(key)),
        })
    }

    /// Every setting, in the order of the table; `overrides` once for each event type.
    pub fn all(settings: &Settings) -> Vec<Setting> {
        let of_key = |key: &'static Key| match &key.kind {
            Kind::Routes(Field { get, .. }) => {
                get(settings).keys().map(|member| Setting { key, member: member.clone() }).collect()
            }
            _ => vec![Setting::plain(key)],
        };
        KEYS.iter().flat_map(of_key).collect()
    }

    fn plain(key: &'static Key) -> Setting {
        Setting { key, member: String::new() }
    }

    /// The name as it is written in the file, with quotes where they are needed.
    pub fn name(&self) -> String {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        match self.member.as_str() {
            "" => self.key.path.to_owned(),
            member if member.chars().all(is_plain) => format!("{}.{member}", self.key.path),
            member => format!("{}.{member:?}", self.key.path),
        }
    }
}
