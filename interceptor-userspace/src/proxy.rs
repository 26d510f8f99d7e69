//! A small transparent TCP proxy: it asks the kernel for a connection's original destination,
//! connects there and copies bytes. It stands in where no service mesh proxy runs.

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt::IpBindAddressNoPort},
};
use serde::{Serialize, Serializer};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    select,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long live connections may go on after [`Proxy::run`] was told to stop.
pub const GRACE: Duration = Duration::from_secs(5);

/// How long a listener rests after accept() failed, so that a lack of descriptors isn't a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that may wait for accept(); the kernel lowers it to net.core.somaxconn.
const BACKLOG: u32 = 4096;

/// Bytes that one direction of a connection holds at most; an idle direction holds none.
const BUFFER: usize = 32 * 1024;

/// What the proxy listens on and how it connects.
#[derive(Clone, Debug)]
pub struct Config {
    /// The port that connections leaving the pod are redirected to; 0 lets the kernel choose.
    pub outbound_port: u16,
    /// The port that connections entering the pod are redirected to; 0 lets the kernel choose.
    pub inbound_port: u16,
    /// The addresses to listen on, both ports on each.
    pub bind: Vec<IpAddr>,
    /// The source address of the connections that carry inbound IPv4 traffic to the application.
    pub passthrough_v4: Ipv4Addr,
    /// The source address of the connections that carry inbound IPv6 traffic to the application.
    pub passthrough_v6: Ipv6Addr,
}

/// Why the proxy couldn't start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One port was given for both directions.
    #[error("port {0} can't be both the outbound and the inbound port")]
    SamePort(u16),
    /// An address can't be listened on.
    #[error("listen on {address} for {direction} connections")]
    Listen {
        /// Whose port it is.
        direction: Direction,
        /// The address and port asked for.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Which way a connection crosses the edge of the pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From an application in the pod to anywhere.
    Outbound,
    /// To an application in the pod.
    Inbound,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        })
    }
}

/// What [`Proxy::run`] reports.
#[derive(Debug)]
pub enum Event {
    /// A connection has ended and both of its sockets are closed.
    Ended(Connection),
    /// accept() failed; the listener tries again after a short pause.
    AcceptFailed {
        /// The listener's address.
        listener: SocketAddr,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// One accepted connection, from its end.
///
/// `Display` gives the text log line and `Serialize` the same keys for JSON.
#[derive(Debug, Serialize)]
pub struct Connection {
    /// The listener that accepted it.
    pub direction: Direction,
    /// The client's address.
    pub client: SocketAddr,
    /// Where the client meant to connect to, when the kernel knew.
    pub original_dst: Option<SocketAddr>,
    /// The accepted socket's own address.
    pub local: SocketAddr,
    /// The local address of the connection to the original destination, once there is one.
    pub upstream: Option<SocketAddr>,
    /// Bytes from the client that were written to the destination's socket.
    pub sent: u64,
    /// Bytes from the destination that were written to the client's socket.
    pub received: u64,
    /// How it ended: an error unless both sides closed their direction.
    #[serde(serialize_with = "serialize_result")]
    pub result: Result<(), ConnectionError>,
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = |address: Option<SocketAddr>| {
            address.map_or_else(|| "-".to_owned(), |address| address.to_string())
        };
        write!(
            f,
            "{} client={} original_dst={} local={} upstream={} sent={} received={} result=",
            self.direction,
            self.client,
            address(self.original_dst),
            self.local,
            address(self.upstream),
            self.sent,
            self.received,
        )?;
        match &self.result {
            Ok(()) => f.write_str("ok"),
            Err(error) => write!(f, "{:?}", error.to_string()),
        }
    }
}

fn serialize_result<S: Serializer>(
    result: &Result<(), ConnectionError>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match result {
        Ok(()) => serializer.serialize_str("ok"),
        Err(error) => serializer.collect_str(error),
    }
}

/// Why a connection was given up. Both of its sockets were then closed with a reset, so that
/// neither side takes a broken stream for a complete one.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The kernel doesn't know where the client meant to connect to.
    #[error("no original destination: {0}")]
    NoOriginalDestination(io::Error),
    /// The client connected to the proxy's own port: forwarding would come back for ever.
    #[error("loop")]
    Loop,
    /// The connection to the destination can't have the passthrough source address.
    #[error("bind to source {address}: {error}")]
    Source {
        /// The passthrough address.
        address: IpAddr,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The destination can't be connected to.
    #[error("connect: {0}")]
    Connect(io::Error),
    /// The connection to the client failed.
    #[error("client: {0}")]
    Client(io::Error),
    /// The connection to the destination failed.
    #[error("destination: {0}")]
    Destination(io::Error),
    /// The proxy stopped and the connection outlived [`GRACE`].
    #[error("the proxy was stopped")]
    Stopped,
}

/// The proxy with its listeners open.
#[derive(Debug)]
pub struct Proxy {
    listeners: Vec<Listener>,
    without_ipv6: Option<io::Error>,
    forwarding: Forwarding,
}

#[derive(Debug)]
struct Listener {
    direction: Direction,
    address: SocketAddr,
    socket: TcpListener,
}

/// What every connection needs to know.
#[derive(Clone, Debug)]
struct Forwarding {
    original_destination: fn(&TcpStream) -> io::Result<SocketAddr>,
    passthrough_v4: Ipv4Addr,
    passthrough_v6: Ipv6Addr,
    /// Ends all connections at once.
    abort: CancellationToken,
}

impl Proxy {
    /// Opens both ports on every address.
    ///
    /// On a machine without IPv6 the IPv6 wildcard is left out when there is another address;
    /// [`Proxy::without_ipv6`] then has the reason.
    ///
    /// # Errors
    /// [`Error::Listen`] names the first address that can't be listened on.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O enabled.
    pub fn bind(config: &Config) -> Result<Self, Error> {
        if config.outbound_port == config.inbound_port && config.outbound_port != 0 {
            return Err(Error::SamePort(config.outbound_port));
        }
        let mut listeners = Vec::new();
        let mut without_ipv6 = None;
        for (direction, port) in [
            (Direction::Outbound, config.outbound_port),
            (Direction::Inbound, config.inbound_port),
        ] {
            for &ip in &config.bind {
                let address = SocketAddr::new(ip, port);
                let listener = listen(address).and_then(|socket| {
                    Ok(Listener {
                        direction,
                        address: socket.local_addr()?,
                        socket,
                    })
                });
                match listener {
                    Ok(listener) => listeners.push(listener),
                    Err(error)
                        if ip == Ipv6Addr::UNSPECIFIED
                            && config.bind.iter().any(|&other| other != ip)
                            && is_unavailable(&error) =>
                    {
                        without_ipv6 = Some(error);
                    }
                    Err(source) => {
                        return Err(Error::Listen {
                            direction,
                            address,
                            source,
                        });
                    }
                }
            }
        }
        Ok(Self {
            listeners,
            without_ipv6,
            forwarding: Forwarding {
                original_destination,
                passthrough_v4: config.passthrough_v4,
                passthrough_v6: config.passthrough_v6,
                abort: CancellationToken::new(),
            },
        })
    }

    /// The addresses listened on, the outbound ones first.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|listener| listener.address)
    }

    /// Why the IPv6 wildcard was left out, if it was.
    #[must_use]
    pub fn without_ipv6(&self) -> Option<&io::Error> {
        self.without_ipv6.as_ref()
    }

    /// Accepts and forwards connections until `stop` is cancelled.
    ///
    /// Then the listeners are closed, and live connections are reset after [`GRACE`]. `report` is
    /// called from many tasks at once and mustn't block.
    pub async fn run(
        self,
        stop: CancellationToken,
        report: impl Fn(Event) + Send + Sync + 'static,
    ) {
        let report = Arc::new(report);
        // Accept loops count as tasks too, so none can start a connection after the wait is over.
        let tasks = TaskTracker::new();
        for listener in self.listeners {
            tasks.spawn(accept(
                listener,
                self.forwarding.clone(),
                stop.clone(),
                tasks.clone(),
                Arc::clone(&report),
            ));
        }
        stop.cancelled().await;
        tasks.close();
        if timeout(GRACE, tasks.wait()).await.is_err() {
            self.forwarding.abort.cancel();
            tasks.wait().await;
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = new_socket(address)?;
    // Connections of an earlier run that are still in TIME_WAIT don't keep the port taken.
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        SockRef::from(&socket).set_only_v6(true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn new_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
}

fn is_unavailable(error: &io::Error) -> bool {
    [Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL]
        .iter()
        .any(|&errno| error.raw_os_error() == Some(errno as i32))
}

async fn accept<R: Fn(Event) + Send + Sync + 'static>(
    listener: Listener,
    forwarding: Forwarding,
    stop: CancellationToken,
    tasks: TaskTracker,
    report: Arc<R>,
) {
    while let Some(accepted) = stop.run_until_cancelled(listener.socket.accept()).await {
        let accepted = accepted.and_then(|(stream, client)| {
            let local = stream.local_addr()?;
            Ok((stream, client, local))
        });
        match accepted {
            Ok((stream, client, local)) => {
                let connection = Connection {
                    direction: listener.direction,
                    client,
                    original_dst: None,
                    local,
                    upstream: None,
                    sent: 0,
                    received: 0,
                    result: Ok(()),
                };
                let (forwarding, report) = (forwarding.clone(), Arc::clone(&report));
                let port = listener.address.port();
                tasks.spawn(async move {
                    report(Event::Ended(
                        forwarding.serve(stream, connection, port).await,
                    ));
                });
            }
            Err(error) => {
                report(Event::AcceptFailed {
                    listener: listener.address,
                    error,
                });
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Forwarding {
    /// Serves an accepted connection to its end and closes it.
    async fn serve(
        &self,
        mut client: TcpStream,
        mut connection: Connection,
        listener_port: u16,
    ) -> Connection {
        connection.result = match self.destination(&client, &mut connection, listener_port) {
            Ok(destination) => {
                self.forward(&mut client, destination, &mut connection)
                    .await
            }
            Err(error) => Err(error),
        };
        if connection.result.is_err() {
            reset_on_close(&client);
        }
        connection
    }

    /// Where the client meant to connect to, unless that is this proxy.
    fn destination(
        &self,
        client: &TcpStream,
        connection: &mut Connection,
        listener_port: u16,
    ) -> Result<SocketAddr, ConnectionError> {
        let destination =
            (self.original_destination)(client).map_err(ConnectionError::NoOriginalDestination)?;
        connection.original_dst = Some(destination);
        // The accepted socket's own address alone is no loop: a connection that sk_lookup steered
        // here has its real destination there, with a port that isn't the listener's.
        if destination.port() == listener_port
            && destination.ip().to_canonical() == connection.local.ip().to_canonical()
        {
            return Err(ConnectionError::Loop);
        }
        Ok(destination)
    }

    /// Connects to the destination and copies in both directions until both have ended.
    async fn forward(
        &self,
        client: &mut TcpStream,
        destination: SocketAddr,
        connection: &mut Connection,
    ) -> Result<(), ConnectionError> {
        client.set_nodelay(true).map_err(ConnectionError::Client)?;
        let source = match (connection.direction, destination) {
            (Direction::Outbound, _) => None,
            (Direction::Inbound, SocketAddr::V4(_)) => Some(self.passthrough_v4.into()),
            (Direction::Inbound, SocketAddr::V6(_)) => Some(self.passthrough_v6.into()),
        };
        let mut upstream = self.unless_stopped(connect(destination, source)).await?;
        connection.upstream = upstream.local_addr().ok();
        let result = self
            .unless_stopped(copy(
                client,
                &mut upstream,
                &mut connection.sent,
                &mut connection.received,
            ))
            .await;
        if result.is_err() {
            reset_on_close(&upstream);
        }
        result
    }

    async fn unless_stopped<T>(
        &self,
        work: impl Future<Output = Result<T, ConnectionError>>,
    ) -> Result<T, ConnectionError> {
        self.abort
            .run_until_cancelled(work)
            .await
            .unwrap_or(Err(ConnectionError::Stopped))
    }
}

/// Asks the kernel where the client of a redirected connection meant to connect to, with the
/// option of the client's address family: IPv4 for IPv4-mapped addresses too.
fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let answer = match stream.local_addr()?.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    }?;
    answer.as_socket().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel's answer isn't an IP address",
        )
    })
}

async fn connect(
    destination: SocketAddr,
    source: Option<IpAddr>,
) -> Result<TcpStream, ConnectionError> {
    let socket = new_socket(destination).map_err(ConnectionError::Connect)?;
    socket.set_nodelay(true).map_err(ConnectionError::Connect)?;
    if let Some(address) = source {
        // The port is chosen at connect(), so that two destinations can share one.
        setsockopt(&socket, IpBindAddressNoPort, &true)
            .map_err(io::Error::from)
            .and_then(|()| socket.bind(SocketAddr::new(address, 0)))
            .map_err(|error| ConnectionError::Source { address, error })?;
    }
    socket
        .connect(destination)
        .await
        .map_err(ConnectionError::Connect)
}

/// Copies both ways until both sides have closed their direction or one of them fails.
async fn copy(
    client: &mut TcpStream,
    upstream: &mut TcpStream,
    sent: &mut u64,
    received: &mut u64,
) -> Result<(), ConnectionError> {
    use ConnectionError::{Client, Destination};

    let (client_read, client_write) = client.split();
    let (upstream_read, upstream_write) = upstream.split();
    let up = pump(client_read, Client, upstream_write, Destination, sent);
    let down = pump(upstream_read, Destination, client_write, Client, received);
    tokio::pin!(up, down);
    // Nobody reads a side that has closed its direction, so a reset of it has to be watched for.
    select! {
        client = &mut up => {
            let client = client?;
            select! {
                biased;
                ended = down => ended.map(drop),
                error = failure(client.as_ref()) => Err(Client(error)),
            }
        }
        upstream = &mut down => {
            let upstream = upstream?;
            select! {
                biased;
                ended = up => ended.map(drop),
                error = failure(upstream.as_ref()) => Err(Destination(error)),
            }
        }
    }
}

/// Copies one way until the reading side has closed its direction, then closes the writing side's.
async fn pump<'a>(
    mut from: ReadHalf<'a>,
    from_error: fn(io::Error) -> ConnectionError,
    mut to: WriteHalf<'_>,
    to_error: fn(io::Error) -> ConnectionError,
    copied: &mut u64,
) -> Result<ReadHalf<'a>, ConnectionError> {
    loop {
        // No buffer before there is something to put in: idle connections stay small.
        from.readable().await.map_err(from_error)?;
        let mut buffer = Vec::with_capacity(BUFFER);
        if from.read_buf(&mut buffer).await.map_err(from_error)? == 0 {
            to.shutdown().await.map_err(to_error)?;
            return Ok(from);
        }
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            let written = to.write(rest).await.map_err(to_error)?;
            *copied += written as u64;
            rest = &rest[written..];
        }
    }
}

/// Waits until the socket has an error, without reading from it.
async fn failure(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => match stream.take_error() {
            Ok(Some(error)) | Err(error) => error,
            // Another call has taken it.
            Ok(None) => io::ErrorKind::ConnectionReset.into(),
        },
        Err(error) => error,
    }
}

/// Makes the socket's close send a reset. Best effort: without it, the close is an ordinary one.
fn reset_on_close(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

#[cfg(test)]
mod tests;
