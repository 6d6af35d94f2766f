//! A TCP proxy that does harm to the connections through it.
//!
//! It knows nothing of what is said: a chunk is what one read returned, and a reply is all that the server sends from its
//! first byte until it pauses. One thread accepts; each connection has two more, one for each direction. They are all
//! scoped in the accepting thread, so they end before it does.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::server::PORT_ATTEMPTS;
use crate::{SandboxError, random, url};

const CHUNK_BYTES: usize = 16 * 1024;
/// Of a reply that a fault cuts off, this much is kept.
const REPLY_BYTES: usize = 64 * 1024;
/// A server that says nothing for this long has ended its reply.
const REPLY_PAUSE: Duration = Duration::from_millis(50);
/// A server on this machine accepts at once, unless its queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const WAKE_INTERVAL: Duration = Duration::from_millis(1);

/// A TCP proxy on 127.0.0.1 before any server, which cuts, refuses, stalls, slows or mutilates connections when told to.
///
/// Until then it passes on everything without delay. All its connections end when this value is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    port: u16,
    shared: Arc<Shared>,
    /// The accepting thread; `None` while connections are refused.
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl FaultProxy {
    /// Starts a proxy on a free port before a server, such as `"127.0.0.1:5432"`.
    ///
    /// A client whose connection the server refuses sees it accepted and then closed.
    ///
    /// # Errors
    ///
    /// When the address cannot be resolved, or no port or thread can be had.
    pub fn start(upstream: impl ToSocketAddrs) -> Result<FaultProxy, SandboxError> {
        let state = State {
            upstream: resolve(upstream)?,
            refusing: false,
            stalled: false,
            delay: Duration::ZERO,
            armed: None,
            fired: 0,
            rewrites: Vec::new(),
            accepted: 0,
            connections: HashMap::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let listener = listen()?;
        let port = listener.local_addr().map_err(SandboxError::io("ask for the proxy's port"))?.port();
        let acceptor = Mutex::new(Some(start_accepting(&shared, listener)?));
        Ok(FaultProxy { port, shared, acceptor })
    }

    /// The port on 127.0.0.1 where the proxy listens. It stays the same for its whole life.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A server's URL with the proxy in the server's place; credentials, database and parameters stay.
    pub fn url(&self, server_url: &str) -> String {
        url::with_host(server_url, &self.address().to_string())
    }

    /// Closes all connections now, on both sides. New ones are served.
    pub fn cut(&self) {
        self.shared.lock().close_all();
        self.shared.changed.notify_all();
    }

    /// Closes all connections and refuses new ones (nobody listens on the port) until [`FaultProxy::accept`].
    pub fn refuse(&self) {
        let mut acceptor = self.acceptor();
        let mut state = self.shared.lock();
        state.refusing = true;
        state.close_all();
        drop(state);
        self.shared.changed.notify_all();
        let Some(thread) = acceptor.take() else {
            return;
        };
        while !thread.is_finished() {
            // Nothing ends an accept that waits but a connection. It may fail: then the thread is already on its way out.
            drop(TcpStream::connect_timeout(&self.address(), CONNECT_TIMEOUT));
            thread::sleep(WAKE_INTERVAL);
        }
        if thread.join().is_err() {
            eprintln!("commitstream-sandbox: a thread of the proxy on port {} panicked", self.port);
        }
    }

    /// Accepts connections again after [`FaultProxy::refuse`].
    ///
    /// # Errors
    ///
    /// When somebody else has taken the port meanwhile, or no thread can be had.
    pub fn accept(&self) -> Result<(), SandboxError> {
        let mut acceptor = self.acceptor();
        if acceptor.is_none() {
            let listener = TcpListener::bind(self.address());
            let listener = listener.map_err(SandboxError::io(format!("listen on port {} again", self.port)))?;
            self.shared.lock().refusing = false;
            *acceptor = Some(start_accepting(&self.shared, listener)?);
        }
        Ok(())
    }

    /// Holds back all bytes in both directions, and also the news that a side has closed, until [`FaultProxy::flow`].
    /// Connections stay open, and new ones are accepted. What the proxy had already passed on is not called back.
    pub fn stall(&self) {
        self.shared.lock().stalled = true;
    }

    /// Lets the bytes flow again after [`FaultProxy::stall`], none of them lost.
    pub fn flow(&self) {
        self.shared.lock().stalled = false;
        self.shared.changed.notify_all();
    }

    /// Swallows, for ever and in both directions, all that comes on the connections open now, also the news that a side has closed:
    /// each side sees a peer that is there and says nothing, as behind a NAT that has dropped its entry or a host that has vanished.
    /// New connections are served. [`FaultProxy::cut`] and [`FaultProxy::refuse`] end the swallowed ones too.
    pub fn swallow(&self) {
        self.shared.lock().connections.values_mut().for_each(|connection| connection.swallowed = true);
    }

    /// Delays each chunk (up to 16 KiB) in each direction by this much. [`Duration::ZERO`] ends it.
    pub fn slow(&self, delay: Duration) {
        self.shared.lock().delay = delay;
        self.shared.changed.notify_all();
    }

    /// Once: passes on the next request of any client, swallows the whole reply to it, and closes this connection. The
    /// write has happened and its answer is lost.
    ///
    /// The next request is the next chunk that comes from a client, whatever it is: a new connection's greeting too. A
    /// reply has ended when the server is silent for 50 ms. Replies to earlier requests that come in that time are lost
    /// as well.
    pub fn drop_reply(&self) {
        self.shared.lock().armed = Some(ReplyFault::Drop);
    }

    /// Once: as [`FaultProxy::drop_reply`], but passes on the first half of the reply (of its first 64 KiB, if it is
    /// longer) before it closes the connection.
    pub fn half_reply(&self) {
        self.shared.lock().armed = Some(ReplyFault::Halve);
    }

    /// How many times [`FaultProxy::drop_reply`] and [`FaultProxy::half_reply`] have done their work.
    pub fn fired(&self) -> u64 {
        self.shared.lock().fired
    }

    /// From now on, replaces these bytes by others wherever the server sends them, so that it seems to be another one: of another
    /// version, or with another clock. What a read returns in two parts is not noticed.
    ///
    /// # Panics
    ///
    /// When the others are longer or shorter: protocols say beforehand how much will come.
    pub fn rewrite(&self, from: impl Into<Vec<u8>>, to: impl Into<Vec<u8>>) {
        let (from, to) = (from.into(), to.into());
        assert!(from.len() == to.len() && !from.is_empty(), "the proxy replaces bytes by as many others");
        self.shared.lock().rewrites.push((from, to));
    }

    /// Cuts all connections and leads new ones to another server, as a virtual address does at a failover.
    ///
    /// # Errors
    ///
    /// When the address cannot be resolved.
    pub fn retarget(&self, upstream: impl ToSocketAddrs) -> Result<(), SandboxError> {
        let upstream = resolve(upstream)?;
        let mut state = self.shared.lock();
        state.upstream = upstream;
        state.close_all();
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    fn acceptor(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.acceptor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.refuse();
    }
}

fn resolve(upstream: impl ToSocketAddrs) -> Result<SocketAddr, SandboxError> {
    let first = upstream.to_socket_addrs().and_then(|mut addresses| addresses.next().ok_or(ErrorKind::NotFound.into()));
    first.map_err(SandboxError::io("resolve the address of the server behind a proxy"))
}

fn listen() -> Result<TcpListener, SandboxError> {
    let mut port = 0;
    for _ in 0..PORT_ATTEMPTS {
        port = random::free_port("the proxy")?;
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            return Ok(listener);
        }
    }
    Err(SandboxError::NoPort { server: "the proxy", port })
}

fn start_accepting(shared: &Arc<Shared>, listener: TcpListener) -> Result<JoinHandle<()>, SandboxError> {
    let shared = Arc::clone(shared);
    let thread = thread::Builder::new().name("sandbox-proxy".to_owned()).spawn(move || shared.accept_all(listener));
    thread.map_err(SandboxError::io("start a thread"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReplyFault {
    Drop,
    Halve,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told whenever a held chunk may have to go on, or its connection is closed.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    upstream: SocketAddr,
    refusing: bool,
    stalled: bool,
    delay: Duration,
    armed: Option<ReplyFault>,
    fired: u64,
    /// What the server sends, and what the client gets in its place.
    rewrites: Vec<(Vec<u8>, Vec<u8>)>,
    /// How many connections there have been: the number of the next one.
    accepted: u64,
    /// The open ones. Whoever takes a connection out of here closes it.
    connections: HashMap<u64, Connection>,
}

#[derive(Debug)]
struct Connection {
    client: Arc<TcpStream>,
    /// `None` until the server has accepted.
    server: Option<Arc<TcpStream>>,
    /// What shall happen to the reply that comes next.
    fault: Option<ReplyFault>,
    /// Nothing is passed on any more.
    swallowed: bool,
}

impl Connection {
    fn close(self) {
        for socket in [Some(self.client), self.server].into_iter().flatten() {
            drop(socket.shutdown(Shutdown::Both)); // fails where the peer has closed it already
        }
    }
}

impl State {
    fn close_all(&mut self) {
        for (_, connection) in self.connections.drain() {
            connection.close();
        }
    }
}

impl Shared {
    /// A panic of another thread while it held the lock leaves nothing half done: every change is one assignment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves connections until they shall be refused, and returns when all have ended.
    fn accept_all(&self, listener: TcpListener) {
        thread::scope(|scope| {
            let listener = listener; // closed before the connections are waited for
            loop {
                let accepted = listener.accept();
                if self.lock().refusing {
                    return;
                }
                let started = accepted.and_then(|(client, _)| {
                    let name = "sandbox-proxy-client".to_owned();
                    thread::Builder::new().name(name).spawn_scoped(scope, move || self.serve(client))
                });
                if let Err(error) = started {
                    eprintln!("commitstream-sandbox: the proxy cannot serve a connection: {error}");
                    thread::sleep(WAKE_INTERVAL);
                }
            }
        });
    }

    /// The life of one connection.
    fn serve(&self, client: TcpStream) {
        let client = Arc::new(client);
        let Some((number, upstream)) = self.register(&client) else {
            return;
        };
        // A client learns of a server that cannot be reached by being closed.
        self.close_after(number, || {
            let server = connect(&client, upstream)?;
            if !self.attach(number, &server) {
                return Ok(());
            }
            thread::scope(|scope| {
                let replies = || self.close_after(number, || self.pass_replies(number, &server, &client));
                thread::Builder::new().name("sandbox-proxy-server".to_owned()).spawn_scoped(scope, replies)?;
                self.close_after(number, || self.pass_requests(number, &client, &server));
                Ok(())
            })
        });
        self.close(number);
    }

    fn register(&self, client: &Arc<TcpStream>) -> Option<(u64, SocketAddr)> {
        let mut state = self.lock();
        if state.refusing {
            return None;
        }
        let number = state.accepted;
        state.accepted += 1;
        state.connections.insert(number, Connection { client: Arc::clone(client), server: None, fault: None, swallowed: false });
        Some((number, state.upstream))
    }

    /// Adds the server's side. `false` if the connection was closed meanwhile: it may lead to a server of the past.
    fn attach(&self, number: u64, server: &Arc<TcpStream>) -> bool {
        let mut state = self.lock();
        let connection = state.connections.get_mut(&number);
        connection.map(|connection| connection.server = Some(Arc::clone(server))).is_some()
    }

    fn close(&self, number: u64) {
        if let Some(connection) = self.lock().connections.remove(&number) {
            connection.close();
        }
        self.changed.notify_all();
    }

    /// One direction that fails ends the other; one that ends in an orderly way does not.
    fn close_after(&self, number: u64, pass: impl FnOnce() -> io::Result<()>) {
        if pass().is_err() {
            self.close(number);
        }
    }

    fn pass_requests(&self, number: u64, mut client: &TcpStream, mut server: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; CHUNK_BYTES];
        loop {
            let length = client.read(&mut buffer)?;
            if length > 0 {
                self.mark(number);
            }
            if !self.wait_to_pass(number) {
                return Ok(());
            }
            if self.is_swallowed(number) {
                if length == 0 {
                    return Ok(());
                }
                continue;
            }
            if length == 0 {
                return server.shutdown(Shutdown::Write);
            }
            server.write_all(&buffer[..length])?;
        }
    }

    fn pass_replies(&self, number: u64, mut server: &TcpStream, mut client: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; CHUNK_BYTES];
        loop {
            let length = server.read(&mut buffer)?;
            self.rewrite(&mut buffer[..length]);
            let fault = self.fault(number).filter(|_| length > 0);
            let reply = fault.map(|_| rest_of_reply(server, &buffer[..length])).transpose()?;
            if !self.wait_to_pass(number) {
                return Ok(());
            }
            if self.is_swallowed(number) {
                if length == 0 {
                    return Ok(());
                }
                continue;
            }
            match (fault, reply) {
                (Some(fault), Some(reply)) => {
                    if fault == ReplyFault::Halve {
                        client.write_all(&reply[..reply.len() / 2])?;
                    }
                    self.lock().fired += 1; // before the client can notice
                    self.close(number);
                    return Ok(());
                }
                _ if length == 0 => return client.shutdown(Shutdown::Write),
                _ => client.write_all(&buffer[..length])?,
            }
        }
    }

    fn rewrite(&self, chunk: &mut [u8]) {
        for (from, to) in &self.lock().rewrites {
            let mut at = 0;
            while let Some(found) = chunk[at..].windows(from.len()).position(|window| window == from) {
                at += found + from.len();
                chunk[at - from.len()..at].copy_from_slice(to);
            }
        }
    }

    /// A request has come: an armed fault is for its reply.
    fn mark(&self, number: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(connection) = state.connections.get_mut(&number)
            && connection.fault.is_none()
        {
            connection.fault = state.armed.take();
        }
    }

    fn fault(&self, number: u64) -> Option<ReplyFault> {
        self.lock().connections.get(&number).and_then(|connection| connection.fault)
    }

    fn is_swallowed(&self, number: u64) -> bool {
        self.lock().connections.get(&number).is_some_and(|connection| connection.swallowed)
    }

    /// Waits as long as a chunk must be held back. `false` if its connection was closed.
    fn wait_to_pass(&self, number: u64) -> bool {
        let arrival = Instant::now();
        let mut state = self.lock();
        while state.connections.contains_key(&number) {
            let left = state.delay.saturating_sub(arrival.elapsed());
            state = if state.stalled {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else if left.is_zero() {
                return true;
            } else {
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            };
        }
        false
    }
}

/// Connects to the server, without delay for small chunks on either side.
fn connect(client: &TcpStream, upstream: SocketAddr) -> io::Result<Arc<TcpStream>> {
    client.set_nodelay(true)?;
    let server = TcpStream::connect_timeout(&upstream, CONNECT_TIMEOUT)?;
    server.set_nodelay(true)?;
    Ok(Arc::new(server))
}

/// Reads a reply until the server pauses or closes; returns its beginning.
fn rest_of_reply(mut server: &TcpStream, beginning: &[u8]) -> io::Result<Vec<u8>> {
    let mut reply = beginning.to_vec();
    let mut buffer = [0; CHUNK_BYTES];
    server.set_read_timeout(Some(REPLY_PAUSE))?;
    loop {
        match server.read(&mut buffer) {
            Ok(0) => return Ok(reply),
            Ok(length) => {
                let room = REPLY_BYTES - reply.len();
                reply.extend_from_slice(&buffer[..length.min(room)]);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(reply),
            Err(error) => return Err(error),
        }
    }
}
