//! Spans of OpenTelemetry, sent to a receiver of OTLP over HTTP. Nothing here runs unless one is set.
//!
//! Spans wait in a bounded queue for a thread of the exporter; what finds it full is dropped. So a receiver that is slow or away costs the
//! relay nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use commitstream::config::{Settings, TracingSettings, redact_url};
use opentelemetry::{KeyValue, global};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Longest that a receiver may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest that the end of the process waits for spans to be sent.
const FLUSH: Duration = Duration::from_secs(3);
/// Most bytes of an answer that are read.
const LONGEST_ANSWER: u64 = 64 << 10;

/// The spans of this process, until it ends.
pub struct Spans(Option<SdkTracerProvider>);

impl Spans {
    /// Begins to send spans, if the settings name a receiver.
    pub fn start(settings: &Settings) -> anyhow::Result<Self> {
        let TracingSettings { endpoint, sample_ratio, service_name } = &settings.tracing;
        let Some(endpoint) = endpoint else { return Ok(Self(None)) };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Receiver::new(endpoint))
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(PATIENCE)
            .build()
            .with_context(|| format!("cannot send spans to {} (setting app.tracing.endpoint)", redact_url(endpoint)))?;
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let resource = Resource::builder().with_service_name(service_name.clone()).with_attribute(version).build();
        // Where a trace began elsewhere, it was decided there.
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(*sample_ratio)));
        let provider =
            SdkTracerProvider::builder().with_sampler(sampler).with_resource(resource).with_batch_exporter(exporter).build();
        global::set_tracer_provider(provider.clone());
        Ok(Self(Some(provider)))
    }

    /// Sends what is left, within [`FLUSH`].
    pub fn stop(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown_with_timeout(FLUSH)
        {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// The receiver as the exporter calls it, on its own thread.
#[derive(Debug)]
struct Receiver {
    agent: Agent,
    /// For people: without a password.
    endpoint: String,
    is_failing: AtomicBool,
}

impl Receiver {
    fn new(endpoint: &str) -> Self {
        let tls = TlsConfig::builder().root_certs(trusted(endpoint)).build();
        let config = Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).tls_config(tls).build();
        Self { agent: config.into(), endpoint: redact_url(endpoint), is_failing: AtomicBool::new(false) }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (parts, body) = request.into_parts();
        let (parts, mut answer) = self.agent.run(Request::from_parts(parts, &body[..]))?.into_parts();
        Ok(Response::from_parts(parts, answer.with_config().limit(LONGEST_ANSWER).read_to_vec()?.into()))
    }

    /// One line when it begins to fail, and one when it works again.
    fn log(&self, sent: &Result<Response<Bytes>, ureq::Error>) {
        let reason = match sent {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("it answered {}", answer.status())),
            Err(error) => Some(error.to_string()),
        };
        let endpoint = &self.endpoint;
        match (reason, self.is_failing.load(Ordering::Relaxed)) {
            (Some(reason), false) => {
                tracing::warn!(
                    endpoint,
                    reason,
                    "the receiver of spans (app.tracing.endpoint) fails: spans are dropped until it works"
                );
                self.is_failing.store(true, Ordering::Relaxed);
            }
            (None, true) => {
                tracing::info!(endpoint, "the receiver of spans works again");
                self.is_failing.store(false, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// The certificates that this computer trusts; Mozilla's where it has none, and where none is needed.
fn trusted(endpoint: &str) -> RootCerts {
    if !endpoint.starts_with("https:") {
        return RootCerts::WebPki;
    }
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        tracing::warn!(errors = ?found.errors, "no trusted certificates were found: those of Mozilla are used");
        return RootCerts::WebPki;
    }
    found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).into()
}

#[async_trait::async_trait]
impl HttpClient for Receiver {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.send(request);
        self.log(&sent);
        Ok(sent?)
    }
}
