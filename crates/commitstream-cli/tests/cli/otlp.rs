//! A small receiver of OTLP over HTTP: it keeps the spans that it is sent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
pub use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message;

/// A span and the name of the service that it came from.
pub struct Received {
    pub service: String,
    pub span: Span,
}

impl Received {
    /// The attribute of this name, as text.
    pub fn attribute(&self, name: &str) -> Option<String> {
        text(self.span.attributes.iter().find(|attribute| attribute.key == name)?.value.as_ref()?.value.as_ref()?)
    }
}

/// It receives until the test binary ends.
pub struct Receiver {
    pub endpoint: String,
    spans: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    pub fn start() -> Result<Self> {
        Self::start_at("127.0.0.1:0".parse()?)
    }

    pub fn start_at(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let spans = Arc::default();
        let kept = Arc::clone(&spans);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let kept = Arc::clone(&kept);
                // A client that goes away in the middle shows as spans that are missing.
                thread::spawn(move || serve(stream, &kept).ok());
            }
        });
        Ok(Self { endpoint, spans })
    }

    /// What came so far and was not taken yet.
    pub fn take(&self) -> Vec<Received> {
        std::mem::take(&mut *lock(&self.spans))
    }
}

fn serve(stream: TcpStream, spans: &Mutex<Vec<Received>>) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let (mut length, mut is_protobuf) = (0, false);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse()?,
                "content-type" => is_protobuf = value == "application/x-protobuf",
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let is_right = request == "POST /v1/traces HTTP/1.1\r\n" && is_protobuf;
        let answer = if is_right { "200 OK" } else { "400 Bad Request" };
        lock(spans).extend(decode(&body).with_context(|| request.clone())?);
        write!(writer, "HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n")?;
        ensure!(is_right, "not a request of OTLP: {request}");
    }
}

fn lock(spans: &Mutex<Vec<Received>>) -> MutexGuard<'_, Vec<Received>> {
    spans.lock().unwrap_or_else(PoisonError::into_inner)
}

fn decode(body: &[u8]) -> Result<Vec<Received>> {
    let mut received = Vec::new();
    for of_resource in ExportTraceServiceRequest::decode(body)?.resource_spans {
        let attributes = of_resource.resource.map(|resource| resource.attributes).unwrap_or_default();
        let name = attributes.into_iter().find(|attribute| attribute.key == "service.name").and_then(|name| name.value?.value);
        let service = name.as_ref().and_then(text).context("a resource has a service.name")?;
        let spans = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
        received.extend(spans.map(|span| Received { service: service.clone(), span }));
    }
    Ok(received)
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        _ => None,
    }
}
