//! Two pods: a client's, whose proxy connects to a server's, whose proxy
//! connects to the server. Here the proxies are processes of their own, because
//! each connects in its own pod's name. All share one CPU, so that the time
//! that passes is the work of all.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4},
    os::fd::AsFd as _,
    process::{Child, Command},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt::IpBindAddressNoPort},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{load::pin, mode::Mode, worker::Worker};
use crate::{
    cli::Cli,
    command::wait_until,
    netns::Netns,
    pod::{Credentials, Host, Pod},
};

/// The server's address, on the cable between the pods.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
/// The port of the server's application.
pub(crate) const APP_PORT: u16 = 8080;

/// The client's address on that cable.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// Where a proxy connects from to its own pod's application.
const PASSTHROUGH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

/// Connections that a proxy or a server handles at once.
const THREADS: usize = 4;

/// Makes the client's pod and the server's, joined by a cable.
fn pods() -> Result<(Pod, Pod)> {
    let (client, server) = (Pod::new()?, Pod::new()?);
    client.netns().ip(&format!(
        "link add eth1 type veth peer name eth1 netns {}",
        server.netns().name()
    ))?;
    for (pod, address) in [(&client, CLIENT), (&server, SERVER)] {
        pod.netns().ip(&format!("addr add {address}/24 dev eth1"))?;
        pod.netns().ip("link set eth1 up")?;
    }
    Ok((client, server))
}

/// A pair of pods with all that runs in them; goes in this order.
pub(crate) struct Pair {
    client: Worker,
    _processes: [Process; 3],
    _attached: [Option<Cli>; 2],
    _pods: (Pod, Pod),
}

impl Pair {
    /// Makes both pods and starts all, on one CPU.
    pub(crate) fn new(mode: Mode, cpu: usize) -> Result<Self> {
        let (client, server) = pods()?;
        let attached = [mode.install(&client)?, mode.install(&server)?];
        let proxy = Credentials::PROXY;
        // Without interception the proxies must be told where to connect.
        let app = Forward::listening(APP_PORT);
        let outbound = Forward {
            to: (!mode.intercepts()).then(|| SocketAddrV4::new(SERVER, 15006)),
            ..Forward::listening(15001)
        };
        let inbound = Forward {
            to: (!mode.intercepts()).then(|| SocketAddrV4::new(Ipv4Addr::LOCALHOST, APP_PORT)),
            source: Some(PASSTHROUGH),
            ..Forward::listening(15006)
        };
        Ok(Self {
            _processes: [
                Process::start("serve", &server, Credentials::ROOT, app, cpu)?,
                Process::start("forward", &server, proxy, inbound, cpu)?,
                Process::start("forward", &client, proxy, outbound, cpu)?,
            ],
            client: Worker::start(&client, Host::Pod, None, mode.intercepts(), cpu)?,
            _attached: attached,
            _pods: (client, server),
        })
    }

    /// The worker that connects.
    pub(crate) fn client(&mut self) -> &mut Worker {
        &mut self.client
    }
}

/// A proxy or a server; killed when dropped.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn start(
        role: &str,
        pod: &Pod,
        credentials: Credentials,
        forward: Forward,
        cpu: usize,
    ) -> Result<Self> {
        let this = std::env::current_exe().context("find this program's own path")?;
        let mut command: Command = pod.command(Host::Pod, credentials, this)?;
        command.args([role, "--cpu", &cpu.to_string()]);
        command.args(["--port", &forward.port.to_string()]);
        if let Some(to) = forward.to {
            command.args(["--to", &to.to_string()]);
        }
        if let Some(source) = forward.source {
            command.args(["--source", &source.to_string()]);
        }
        let mut process = Self(command.spawn().with_context(|| format!("start {role}"))?);
        wait_until("it listens", Duration::from_secs(10), || {
            if let Some(status) = process.0.try_wait()? {
                bail!("it ended: {status}");
            }
            Ok(listens(pod.netns(), forward.port)?.then_some(()))
        })
        .with_context(|| format!("{role} on port {}", forward.port))?;
        Ok(process)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether something listens on the port, by the text of /proc/net/tcp.
pub(crate) fn listens(netns: &Netns, port: u16) -> Result<bool> {
    const LISTEN: &str = "0A";
    let sockets = netns.enter(|| {
        std::fs::read_to_string("/proc/thread-self/net/tcp").context("read /proc/net/tcp")
    })?;
    Ok(sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        matches!(fields[..], [_, local, _, LISTEN, ..] if local.ends_with(&format!(":{port:04X}")))
    }))
}

/// How a proxy or a server is started.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Forward {
    /// The port to listen on
    #[arg(long)]
    port: u16,
    /// Where to connect, if not where the client meant to
    #[arg(long)]
    to: Option<SocketAddrV4>,
    /// Where to connect from
    #[arg(long)]
    source: Option<Ipv4Addr>,
    /// The CPU to run on
    #[arg(long, default_value_t = 0)]
    cpu: usize,
}

impl Forward {
    const fn listening(port: u16) -> Self {
        Self {
            port,
            to: None,
            source: None,
            cpu: 0,
        }
    }
}

/// A small transparent proxy.
pub(crate) fn forward(arguments: Forward) -> Result<()> {
    accept(arguments, |client| {
        let upstream = connect(arguments, &client)?;
        both_ways(client, upstream)
    })
}

/// A server that echoes.
pub(crate) fn serve(arguments: Forward) -> Result<()> {
    accept(arguments, |mut client| {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match client.read(&mut buffer)? {
                0 => return Ok(()),
                length => client.write_all(&buffer[..length])?,
            }
        }
    })
}

/// Handles connections until this process is killed.
fn accept(arguments: Forward, handle: impl Fn(Socket) -> io::Result<()> + Sync) -> Result<()> {
    pin(arguments.cpu)?;
    let listener = tcp_socket()?;
    listener.set_reuse_address(true)?;
    listener.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, arguments.port).into())?;
    listener.listen(1024)?;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    // What goes wrong ends the one connection; the client
                    // fails then, and so does the benchmark.
                    if let Ok((socket, _)) = listener.accept() {
                        let _ = handle(socket);
                    }
                }
            });
        }
    });
    Ok(())
}

fn connect(arguments: Forward, client: &Socket) -> io::Result<Socket> {
    let origin = client.original_dst_v4();
    let to = match arguments.to {
        Some(to) => SockAddr::from(to),
        None => origin?,
    };
    let upstream = tcp_socket()?;
    if let Some(source) = arguments.source {
        // Or it would need a port of its own for each destination.
        setsockopt(&upstream, IpBindAddressNoPort, &true)?;
        upstream.bind(&SocketAddrV4::new(source, 0).into())?;
    }
    upstream.connect(&to)?;
    client.set_tcp_nodelay(true)?;
    upstream.set_tcp_nodelay(true)?;
    Ok(upstream)
}

/// Copies both ways until both have ended. A reset goes on as a reset.
fn both_ways(mut client: Socket, mut upstream: Socket) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut open = [true; 2];
    while open != [false; 2] {
        let events = open.map(|open| {
            if open {
                PollFlags::POLLIN
            } else {
                PollFlags::empty()
            }
        });
        let mut fds = [
            PollFd::new(client.as_fd(), events[0]),
            PollFd::new(upstream.as_fd(), events[1]),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        let ready = fds.map(|fd| fd.any().unwrap_or_default());
        for (index, ready) in ready.into_iter().enumerate() {
            let (from, to) = if index == 0 {
                (&mut client, &mut upstream)
            } else {
                (&mut upstream, &mut client)
            };
            if !ready {
                continue;
            }
            match from.read(&mut buffer) {
                Ok(0) => {
                    open[index] = false;
                    to.shutdown(Shutdown::Write)?;
                }
                Ok(length) => to.write_all(&buffer[..length])?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    to.set_linger(Some(Duration::ZERO))?;
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

fn tcp_socket() -> io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
}
