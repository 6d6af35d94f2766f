//! Settings: plain structs with defaults and validation.
//!
//! | file | what lives there |
//! |---|---|
//! | `keys` | the one table of settings: name, environment variable, range; everything below reads it |
//! | `kinds`, `units` | how a value of each kind is read, checked and printed |
//! | `load` | defaults < file < environment < flags, and where each value came from |
//! | `hocon`, `file`, `resolve` | the file: its syntax, its includes, its references |
//! | `error`, `redact`, `suggest` | what a refusal says, and what it never shows |
//!
//! The process environment is never read here: whoever calls [`Settings::load`] passes a function that looks a variable up.

mod error;
mod file;
mod hocon;
mod keys;
mod kinds;
mod load;
mod redact;
mod resolve;
mod suggest;
#[cfg(test)]
mod tests;
mod units;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

pub use error::ConfigError;
pub use load::{DEFAULT_FILE, Entry, Loaded, Source};
use redact::HIDDEN;
pub use redact::redact_url;

/// Everything that can be set. [`Settings::default`] is what holds when nothing is said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    pub database: DatabaseSettings,
    pub redis: RedisSettings,
    pub outbox: OutboxSettings,
    pub publishing: PublishingSettings,
    pub consumer: ConsumerSettings,
    pub streams: StreamsSettings,
    pub http: HttpSettings,
    pub tracing: TracingSettings,
    pub console: ConsoleSettings,
}

/// `app.database`
#[derive(Clone, PartialEq)]
pub struct DatabaseSettings {
    /// PostgreSQL URL (`DATABASE_URL`). The relay needs a direct connection, not a transaction-mode pooler.
    pub url: Option<String>,
    /// Schema that holds `event_outbox`. Default `public`.
    pub schema: String,
    /// Limit of one attempt to connect and of one statement of the relay. Default 30 s.
    pub timeout: Duration,
    /// Whether publishing uses prepared statements. `false` for a pooler in transaction mode that does not know them (PgBouncer
    /// before 1.21); it costs a round trip each time. Default `true`.
    pub prepared_statements: bool,
    pub tls: TlsSettings,
}

/// `app.database.tls`, `app.redis.tls`: PEM files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TlsSettings {
    /// The authorities that may sign the server's certificate (`DATABASE_CA_FILE`, `REDIS_CA_FILE`). Default: those that the system trusts.
    pub ca_file: Option<String>,
    /// The client's certificate, where the server wants one (`DATABASE_CERT_FILE`, `REDIS_CERT_FILE`).
    pub cert_file: Option<String>,
    /// The key of the client's certificate (`DATABASE_KEY_FILE`, `REDIS_KEY_FILE`).
    pub key_file: Option<String>,
}

impl DatabaseSettings {
    /// The URL with the files for TLS in it, unless it names its own. With them, the server's certificate and name are verified unless the
    /// URL has an `sslmode`.
    #[must_use]
    pub fn url_with_tls(&self) -> Option<String> {
        let url = self.url.clone()?;
        let (path, query) = url.split_once('?').unwrap_or((&url, ""));
        let mut parameters: Vec<String> = query.split('&').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        let TlsSettings { ca_file, cert_file, key_file } = &self.tls;
        let mode = (self.tls != TlsSettings::default()).then(|| "verify-full".to_owned());
        let files = [("sslmode", &mode), ("sslrootcert", ca_file), ("sslcert", cert_file), ("sslkey", key_file)];
        for (name, value) in files {
            let known_as = |given: &str| if given == "ssl-ca" { "sslrootcert".to_owned() } else { given.replace('-', "") };
            let is_given = |part: &String| part.split_once('=').is_some_and(|(given, _)| known_as(given) == name);
            if let (Some(value), false) = (value, parameters.iter().any(is_given)) {
                parameters.push(format!("{name}={}", percent_encoded(value)));
            }
        }
        let query = if parameters.is_empty() { String::new() } else { format!("?{}", parameters.join("&")) };
        Some(format!("{path}{query}"))
    }
}

/// As a value in the query of a URL.
fn percent_encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    text.bytes().map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// `app.redis`
#[derive(Clone, PartialEq)]
pub struct RedisSettings {
    /// Redis URL (`REDIS_URL`), in one of these forms, or with `rediss` for TLS:
    /// - `redis://[user:password@]host:port[/db]`
    /// - `redis-sentinel://[user:password@]host:port,host:port/[db]#master`: the master of this name, which the sentinels at these
    ///   hosts know. User, password and database are those of the master.
    /// - `redis-cluster://[user:password@]host:port,host:port`: some nodes of a cluster, which name the others.
    /// - `unix:///path/of/socket[?db=0&user=…&pass=…]`: a socket of this host.
    ///
    /// With TLS, `?sslrootcert=…&sslcert=…&sslkey=…` name PEM files as [`TlsSettings`] does, and `#insecure`, where no master is named, verifies nothing.
    pub url: Option<String>,
    /// Password of the sentinels themselves (`REDIS_SENTINEL_PASSWORD`), if they have one.
    pub sentinel_password: Option<String>,
    /// Stream keys are this prefix and the aggregate type. Default `events:`. No braces.
    pub stream_prefix: String,
    /// Limit of one attempt to connect. Default 2 s.
    pub connect_timeout: Duration,
    /// Limit of one command's answer. Default 5 s. After half of it another connection is tried: where that answers, this one is dead.
    pub response_timeout: Duration,
    /// How many replicas must have a batch of the relay before its events are settled. With all replicas of the master, no failover
    /// loses what was settled, and the relay pauses while one is away; with fewer, one that has not confirmed may be
    /// promoted. Default 0, which does not wait; at most 10.
    pub wait_replicas: u32,
    /// How long replicas are waited for at a time, before the relay says that it cannot work. Default 1 s; 10 ms to 1 min.
    pub wait_timeout: Duration,
    pub tls: TlsSettings,
}

/// `app.outbox`
#[derive(Debug, Clone, PartialEq)]
pub struct OutboxSettings {
    /// `false` (`OUTBOX_ENABLED=false`) sends every event straight to streams. Default `true`.
    pub enabled: bool,
    pub processor: ProcessorSettings,
    pub cleanup: CleanupSettings,
}

/// `app.outbox.processor`
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessorSettings {
    /// Longest sleep between two looks at the table (`OUTBOX_POLL_INTERVAL`). Default 1 s; wake-ups come earlier.
    pub poll_interval: Duration,
    /// Most events in one append (`OUTBOX_BATCH_SIZE`). Default 100; 1 to 10,000.
    pub batch_size: u32,
    /// Refusals after which an event is `FAILED`: it is tried once and then this many times again. Default 3; 0 to 100.
    pub max_retries: u32,
    /// Wait before the first retry; doubles each time. Default 1 s.
    pub retry_base_delay: Duration,
    /// Longest wait before a retry. Default 5 min.
    pub retry_max_delay: Duration,
    /// What becomes of the later events of its aggregate when an event is `FAILED`. Default release.
    pub after_failure: AfterFailure,
    /// Most payload bytes in memory between claim and settle, as the outbox has them: on their way they are copied some times. Default
    /// 8 MiB; at least 1 MiB.
    pub max_in_flight_bytes: usize,
    /// Life of a relay without a heartbeat: how long the work of a vanished host waits. Also, how long a relay that cannot use Redis
    /// keeps its partitions while another one could. Default 10 s; at least 1 s.
    pub lease_duration: Duration,
    /// How long a graceful stop waits for what is in flight. Default 10 s.
    pub shutdown_timeout: Duration,
    /// Life of a batch marker in Redis before its batch is settled. Default 7 days; at least 1 hour.
    pub marker_life: Duration,
    /// Life of a batch marker after its batch is settled. What was settled within half of it is looked up after a failover of Redis. The same
    /// for all relays. Default 5 min; 1 min to 1 h.
    pub settled_marker_life: Duration,
}

/// `app.outbox.cleanup`
#[derive(Debug, Clone, PartialEq)]
pub struct CleanupSettings {
    /// Default `true`.
    pub enabled: bool,
    /// Default 1 h; at least 1 s.
    pub interval: Duration,
    /// Days that published rows are kept (`OUTBOX_RETENTION_DAYS`). Default 7. With 0 the relay deletes each row as soon
    /// as it is published, which is faster; then what a failover of Redis loses cannot be published again.
    pub retention_days: u32,
    /// Most rows deleted in one transaction. Default 1,000; 1 to 100,000.
    pub batch_size: u32,
}

/// `app.eventPublishing`
#[derive(Debug, Clone, PartialEq)]
pub struct PublishingSettings {
    /// `EVENT_PUBLISHING_STRATEGY`. Default hybrid.
    pub default_strategy: Strategy,
    /// Event type → the way it takes, whatever its lane and the strategy.
    pub overrides: BTreeMap<String, Route>,
    /// Most bytes of payload and headers of one event. Default 1 MiB; 1 KiB to 64 MiB.
    pub max_payload_bytes: usize,
    /// When Redis is down: write high-frequency events to the outbox instead of returning an error. Default `false`.
    pub fallback_to_outbox: bool,
}

/// `app.consumer`
#[derive(Debug, Clone, PartialEq)]
pub struct ConsumerSettings {
    /// Most entries in one read of a stream, and most events in one call of a batch handler. Default 500; 1 to 1,000.
    pub batch_size: u32,
    /// Most calls of handlers at once, for each stream. Default 16; 1 to 1,024.
    pub concurrency: u32,
    /// Most payload bytes in memory, for each stream; one read may exceed it by what it brings. Default 16 MiB; at least 1 MiB.
    pub max_in_flight_bytes: usize,
    /// Failed deliveries after which an event is a dead letter. Default 5; 1 to 100.
    pub max_deliveries: u32,
    /// Dead letters of a stream in a row, in this process and for one reason, after which each further one waits: from
    /// `retry_base_delay`, doubling, up to `retry_max_delay`. Default 20; 0 is no limit.
    pub max_dead_letters_in_row: u32,
    /// Wait before the second delivery; doubles each time. Default 1 s.
    pub retry_base_delay: Duration,
    /// Longest wait before a delivery. Default 5 min.
    pub retry_max_delay: Duration,
    /// How long a consumer may be silent before others take what it has in hand; a living one is heard of whatever its handlers do.
    /// Default 10 s; at least 1 s, and no shorter than `connectTimeout` and `responseTimeout` together where those are not the defaults.
    pub claim_idle: Duration,
    /// What becomes of an event that no handler is for. Default skip.
    pub unknown_events: UnknownEvents,
    /// Where a group that is new reads from. Default beginning.
    pub start_from: StartFrom,
    /// How long a graceful stop waits for handlers. What they have not finished is returned. Default 10 s.
    pub shutdown_timeout: Duration,
    /// Days that the inbox remembers a handled event. Longer than any event may wait to be delivered again. Default 30; at least 1.
    pub inbox_retention_days: u32,
}

/// What becomes of an event in a consumer's stream that no handler is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownEvents {
    /// It is acknowledged and counted.
    Skip,
    /// It is a dead letter at once, until a version with a handler has it delivered again.
    Park,
    /// A failure like one of a handler: tried again, then a dead letter. Holds back its aggregate meanwhile.
    Error,
}

/// Where a consumer group that is new reads from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartFrom {
    /// Everything the stream still has.
    Beginning,
    /// What comes after the group was made.
    Now,
}

/// `app.streams`
#[derive(Debug, Clone, PartialEq)]
pub struct StreamsSettings {
    /// Whether the clean-up of a relay trims streams: of each, the entries that are older than the retention and that every consumer
    /// group has acknowledged. A stream without a group is left alone. Default `true`.
    pub trim: bool,
    /// Days that entries are kept at least. Default 7; at least 1.
    pub retention_days: u32,
    /// A hard cap: a stream with more entries is cut to this number, whether or not every group has acknowledged them, with a
    /// warning where one has not. Default 0, which is none. Give it room for an hour of events at least: after a failover of
    /// Redis the relay looks for the last entries of recent batches, and takes those that were cut for lost where their
    /// markers are gone too.
    pub max_entries: u32,
}

/// `app.http`: what the daemon `commitstream relay` serves.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpSettings {
    /// IP address and port of health and metrics (`HTTP_LISTEN`); `None`, written `off`, serves nothing. Default `127.0.0.1:9464`: this
    /// host only, and the port that OpenTelemetry's exporter for Prometheus has.
    pub listen: Option<SocketAddr>,
    /// How long events may be due while the relay settles none of them, with both servers at work, before it says that it is not alive
    /// (`HTTP_STALLED_AFTER`). Default 60 s; 1 s to 1 day.
    pub stalled_after: Duration,
}

/// `app.tracing`: where the command line sends its spans. An application sets up OpenTelemetry by itself.
#[derive(Clone, PartialEq)]
pub struct TracingSettings {
    /// URL of a receiver of OTLP over HTTP (`OTEL_EXPORTER_OTLP_ENDPOINT`), to which `/v1/traces` is added. Without one, nothing is traced.
    pub endpoint: Option<String>,
    /// Part of the traces that begin in this process (`OTEL_TRACES_SAMPLER_ARG`), as with `commitstream publish`. Whether the relay traces an
    /// event is decided where its trace began. Default 1; 0 to 1.
    pub sample_ratio: f64,
    /// Name of the service in its spans (`OTEL_SERVICE_NAME`). Default `commitstream`.
    pub service_name: String,
}

/// `app.console`: the web console, with what [`HttpSettings`] serves.
#[derive(Clone, PartialEq)]
pub struct ConsoleSettings {
    /// Whether the daemon serves it (`CONSOLE_ENABLED`). Default `true`.
    pub enabled: bool,
    /// Of operators (`CONSOLE_PASSWORD`). Without one, the daemon generates one for each run and logs it, and listens on this host only.
    pub password: Option<String>,
    /// Of those who may look and not act (`CONSOLE_READ_ONLY_PASSWORD`); without one there are none.
    pub read_only_password: Option<String>,
    /// What this installation is called on every page (`CONSOLE_ENVIRONMENT`), such as `production`: at most 255 bytes. Default none.
    pub environment: Option<String>,
    /// Of that name (`CONSOLE_ENVIRONMENT_COLOR`). Default [`Color::Gray`].
    pub environment_color: Color,
    /// Where a proxy in front serves the console, without `/console` (`CONSOLE_PATH_PREFIX`): `/ops` for `/ops/console`. It may
    /// pass the prefix on or take it off. Default empty.
    pub path_prefix: String,
}

/// By which an environment is told from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    Gray,
    Blue,
    Green,
    Amber,
    Red,
    Violet,
}

impl Color {
    /// As it is written in the settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gray => "gray",
            Self::Blue => "blue",
            Self::Green => "green",
            Self::Amber => "amber",
            Self::Red => "red",
            Self::Violet => "violet",
        }
    }
}

/// What a `FAILED` event means for the later ones of its aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterFailure {
    /// They go on without it.
    Release,
    /// They wait until an operator has it tried again, or discards it.
    Hold,
}

/// Which way events take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// By the event's lane.
    Hybrid,
    /// Everything through the outbox.
    Outbox,
    /// Everything straight to streams.
    Streams,
}

/// The way of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Outbox,
    Streams,
}

impl Default for DatabaseSettings {
    fn default() -> Self {
        Self {
            url: None,
            schema: "public".to_owned(),
            timeout: Duration::from_secs(30),
            prepared_statements: true,
            tls: TlsSettings::default(),
        }
    }
}

impl Default for RedisSettings {
    fn default() -> Self {
        Self {
            url: None,
            sentinel_password: None,
            stream_prefix: "events:".to_owned(),
            connect_timeout: Duration::from_secs(2),
            response_timeout: Duration::from_secs(5),
            wait_replicas: 0,
            wait_timeout: Duration::from_secs(1),
            tls: TlsSettings::default(),
        }
    }
}

impl Default for OutboxSettings {
    fn default() -> Self {
        Self { enabled: true, processor: ProcessorSettings::default(), cleanup: CleanupSettings::default() }
    }
}

impl Default for ProcessorSettings {
    fn default() -> Self {
        Self {
            poll_interval: Duration::from_secs(1),
            batch_size: 100,
            max_retries: 3,
            retry_base_delay: Duration::from_secs(1),
            retry_max_delay: Duration::from_secs(5 * 60),
            after_failure: AfterFailure::Release,
            max_in_flight_bytes: 8 << 20,
            lease_duration: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(10),
            marker_life: Duration::from_secs(7 * 24 * 60 * 60),
            settled_marker_life: Duration::from_secs(5 * 60),
        }
    }
}

impl Default for CleanupSettings {
    fn default() -> Self {
        Self { enabled: true, interval: Duration::from_secs(60 * 60), retention_days: 7, batch_size: 250 }
    }
}

impl Default for PublishingSettings {
    fn default() -> Self {
        Self {
            default_strategy: Strategy::Hybrid,
            overrides: BTreeMap::new(),
            max_payload_bytes: 1 << 20,
            fallback_to_outbox: false,
        }
    }
}

impl Default for ConsumerSettings {
    fn default() -> Self {
        Self {
            batch_size: 500,
            concurrency: 16,
            max_in_flight_bytes: 16 << 20,
            max_deliveries: 5,
            max_dead_letters_in_row: 20,
            retry_base_delay: Duration::from_secs(1),
            retry_max_delay: Duration::from_secs(5 * 60),
            claim_idle: Duration::from_secs(10),
            unknown_events: UnknownEvents::Skip,
            start_from: StartFrom::Beginning,
            shutdown_timeout: Duration::from_secs(10),
            inbox_retention_days: 30,
        }
    }
}

impl Default for StreamsSettings {
    fn default() -> Self {
        Self { trim: true, retention_days: 7, max_entries: 0 }
    }
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9464))), stalled_after: Duration::from_secs(60) }
    }
}

impl Default for TracingSettings {
    fn default() -> Self {
        Self { endpoint: None, sample_ratio: 1.0, service_name: "commitstream".to_owned() }
    }
}

impl Default for ConsoleSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            password: None,
            read_only_password: None,
            environment: None,
            environment_color: Color::Gray,
            path_prefix: String::new(),
        }
    }
}

// Not derived: settings end up in logs, and a URL holds a password.
impl fmt::Debug for DatabaseSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseSettings")
            .field("url", &self.url.as_deref().map(redact_url))
            .field("schema", &self.schema)
            .field("timeout", &self.timeout)
            .field("prepared_statements", &self.prepared_statements)
            .field("tls", &self.tls)
            .finish()
    }
}

impl fmt::Debug for ConsoleSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleSettings")
            .field("enabled", &self.enabled)
            .field("password", &self.password.as_ref().map(|_| HIDDEN))
            .field("read_only_password", &self.read_only_password.as_ref().map(|_| HIDDEN))
            .field("environment", &self.environment)
            .field("environment_color", &self.environment_color)
            .field("path_prefix", &self.path_prefix)
            .finish()
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("url", &self.url.as_deref().map(redact_url))
            .field("sentinel_password", &self.sentinel_password.as_ref().map(|_| HIDDEN))
            .field("stream_prefix", &self.stream_prefix)
            .field("connect_timeout", &self.connect_timeout)
            .field("response_timeout", &self.response_timeout)
            .field("wait_replicas", &self.wait_replicas)
            .field("wait_timeout", &self.wait_timeout)
            .field("tls", &self.tls)
            .finish()
    }
}

impl fmt::Debug for TracingSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TracingSettings")
            .field("endpoint", &self.endpoint.as_deref().map(redact_url))
            .field("sample_ratio", &self.sample_ratio)
            .field("service_name", &self.service_name)
            .finish()
    }
}
