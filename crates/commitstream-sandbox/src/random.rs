//! Random names, passwords and ports.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};

use crate::SandboxError;

/// Ports are taken from here and not from the system's ephemeral range (from 32768 on Linux, 49152 on macOS). An
/// ephemeral port can be lost to any outgoing connection while its server is down, and a client that connects to an
/// ephemeral port of its own host where nobody listens may even end up connected to itself.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// `bytes` random bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: usize) -> Result<String, SandboxError> {
    Ok(random(bytes)?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A port on 127.0.0.1 where nobody listens at this moment.
pub(crate) fn free_port(server: &'static str) -> Result<u16, SandboxError> {
    let mut port = PORTS.start;
    for _ in 0..200 {
        let raw = random(2)?.iter().fold(0_u16, |sum, byte| (sum << 8) | u16::from(*byte));
        port = PORTS.start + raw % (PORTS.end - PORTS.start);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(SandboxError::NoPort { server, port })
}

fn random(bytes: usize) -> Result<Vec<u8>, SandboxError> {
    let mut buffer = vec![0; bytes];
    let read = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut buffer));
    read.map_err(SandboxError::io("read /dev/urandom"))?;
    Ok(buffer)
}
