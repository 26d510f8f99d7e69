//! A pod with servers and clients, to be attached with the command: what the
//! suites about the attachment itself have in common.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::{Agent, Listen},
    bpf::{self, Id, Kind},
    cli::Cli,
    inside::{Conversation, Inside, Server},
    pod::{Credentials, Host, PEER_V4, PEER_V6, POD_V4, POD_V6, Pod},
};

/// The application's credentials.
pub const APP: Credentials = Credentials {
    uid: 1000,
    gid: 1000,
};

/// `0.0.0.0` and `[::]`.
pub const EVERYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];

/// The proxy's port for connections that the pod makes.
pub const OUTBOUND: u16 = 15001;
/// The proxy's port for connections that arrive.
pub const INBOUND: u16 = 15006;

/// The port of the application and of the peer's server.
pub const PORT: u16 = 8080;
/// An inbound port that is left alone, on which the application listens too.
pub const EXCLUDED_PORT: u16 = 15020;

/// Which way a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the pod to the peer.
    Out,
    /// From the peer to the pod.
    In,
}

impl Way {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Out, Self::In];

    /// The proxy's port for it.
    pub const fn proxy_port(self) -> u16 {
        match self {
            Self::Out => OUTBOUND,
            Self::In => INBOUND,
        }
    }

    /// The server that the client means, in IPv4 and in IPv6.
    pub fn destinations(self) -> [SocketAddr; 2] {
        match self {
            Self::Out => [PEER_V4, PEER_V6],
            Self::In => [POD_V4, POD_V6],
        }
        .map(|address| SocketAddr::new(address, PORT))
    }

    /// The name of the server that the client means.
    pub const fn server(self) -> &'static str {
        match self {
            Self::Out => "PEER",
            Self::In => "APP",
        }
    }
}

/// A pod and its peer. `APP` listens in the pod and `PEER` in the peer, on
/// every address; nothing is attached and no proxy runs.
#[derive(Debug)]
pub struct World {
    // Detached first, then stopped, then removed.
    /// The command.
    pub cli: Cli,
    /// The application's process, to connect from.
    pub app: Inside,
    /// The proxy's process, to listen and connect from.
    pub proxy: Inside,
    /// The peer's process, to connect from.
    pub peer: Inside,
    _servers: [Agent; 2],
    /// The pod.
    pub pod: Pod,
}

impl World {
    /// Makes the pod and starts all that is in it.
    ///
    /// # Errors
    ///
    /// If something can't be made or started.
    pub fn new() -> Result<Self> {
        Self::of(Pod::new()?)
    }

    /// Starts all that is in a pod.
    ///
    /// # Errors
    ///
    /// If something can't be started.
    pub fn of(pod: Pod) -> Result<Self> {
        let servers = [
            Agent::start(&pod, Host::Pod)?,
            Agent::start(&pod, Host::Peer)?,
        ];
        let everywhere = |ports: &[u16]| -> Vec<SocketAddr> {
            ports
                .iter()
                .flat_map(|port| EVERYWHERE.map(|address| SocketAddr::new(address, *port)))
                .collect()
        };
        servers[0].listen(Listen::new(
            Way::In.server(),
            everywhere(&[PORT, EXCLUDED_PORT]),
        ))?;
        servers[1].listen(Listen::new(Way::Out.server(), everywhere(&[PORT])))?;
        Ok(Self {
            cli: Cli::new()?,
            app: Inside::start(&pod, Host::Pod, APP)?,
            proxy: Inside::start(&pod, Host::Pod, Credentials::PROXY)?,
            peer: Inside::start(&pod, Host::Peer, Credentials::ROOT)?,
            _servers: servers,
            pod,
        })
    }

    /// The pod's name.
    pub fn name(&self) -> &str {
        self.pod.name()
    }

    /// The client that connects this way.
    pub fn client(&self, way: Way) -> &Inside {
        match way {
            Way::Out => &self.app,
            Way::In => &self.peer,
        }
    }

    /// Starts a proxy that says what it sees, with both ports on each address.
    ///
    /// # Errors
    ///
    /// If it can't listen.
    pub fn start_proxy(&self, addresses: &[IpAddr]) -> Result<Vec<Server>> {
        let mut servers = Vec::new();
        for address in addresses {
            for way in Way::BOTH {
                let listener = self
                    .proxy
                    .listen(SocketAddr::new(*address, way.proxy_port()))?;
                servers.push(start_server(way, listener));
            }
        }
        Ok(servers)
    }

    /// One connection each way and in both families goes through the proxy;
    /// they are returned.
    ///
    /// # Errors
    ///
    /// If one doesn't.
    pub fn assert_intercepted(&self) -> Result<Vec<Conversation>> {
        let mut conversations = Vec::new();
        for way in Way::BOTH {
            for to in way.destinations() {
                conversations.push(assert_served(way, self.client(way), to)?);
            }
        }
        Ok(conversations)
    }

    /// One connection each way and in both families goes past the proxy.
    ///
    /// # Errors
    ///
    /// If one doesn't.
    pub fn assert_left_alone(&self) -> Result<()> {
        for way in Way::BOTH {
            for to in way.destinations() {
                assert_direct(way.server(), self.client(way), to)?;
            }
        }
        Ok(())
    }
}

/// A server on one of the proxy's ports.
pub fn start_server(way: Way, listener: socket2::Socket) -> Server {
    Server::start(proxy_name(way), listener)
}

const fn proxy_name(way: Way) -> &'static str {
    match way {
        Way::Out => "PROXY out",
        Way::In => "PROXY in",
    }
}

/// Whether the proxy served a connection and knows where it was meant to go.
///
/// # Errors
///
/// If not: the error says what was seen.
pub fn check_served(way: Way, conversation: &Conversation, to: SocketAddr) -> Result<()> {
    let served = &conversation.served;
    ensure!(
        served.server == proxy_name(way) && served.original_dst == Ok(to),
        "connection {way:?} to {to}: {served:?}"
    );
    Ok(())
}

/// Connects; the proxy serves it.
///
/// # Errors
///
/// If not.
pub fn assert_served(way: Way, client: &Inside, to: SocketAddr) -> Result<Conversation> {
    let conversation = client
        .connect(to)?
        .with_context(|| format!("connect {way:?} to {to}"))?;
    check_served(way, &conversation, to)?;
    Ok(conversation)
}

/// Connects; this server serves it, not the proxy.
///
/// # Errors
///
/// If not.
pub fn assert_direct(server: &str, client: &Inside, to: SocketAddr) -> Result<Conversation> {
    let conversation = client
        .connect(to)?
        .with_context(|| format!("connect to {to}"))?;
    ensure!(
        conversation.served.server == server,
        "connection to {to}: {:?} instead of {server}",
        conversation.served
    );
    Ok(conversation)
}

/// Connects; connect() fails with `ECONNREFUSED`, at once.
///
/// # Errors
///
/// If not.
pub fn assert_refused(client: &Inside, to: SocketAddr) -> Result<()> {
    let start = std::time::Instant::now();
    match client.connect(to)? {
        Ok(conversation) => anyhow::bail!("connection to {to}: {:?}", conversation.served),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(error).with_context(|| format!("connect to {to}")),
    }
    // A retransmitted SYN would take a second.
    let taken = start.elapsed();
    ensure!(taken.as_millis() < 900, "refused only after {taken:?}");
    Ok(())
}

/// The kernel's objects that belong to a pod: the links and programs that its
/// pins name, and the maps that these programs use.
///
/// # Errors
///
/// If the pod isn't attached, or some are missing.
pub fn objects(cli: &Cli, pod: &str) -> Result<Vec<Id>> {
    let status = cli.status(pod)?;
    let mut objects = Vec::new();
    for link in status["links"].as_array().context("no links")? {
        let number = |field: &str| -> Result<u32> {
            let number = link[field]
                .as_u64()
                .with_context(|| format!("no {field}"))?;
            Ok(u32::try_from(number)?)
        };
        let program = number("program_id")?;
        objects.push(Id(Kind::Link, number("link_id")?));
        objects.push(Id(Kind::Program, program));
        objects.extend(bpf::maps_of(program)?);
    }
    objects.sort();
    objects.dedup();
    let count = |kind| objects.iter().filter(|id| id.0 == kind).count();
    ensure!(
        (count(Kind::Link), count(Kind::Program)) == (7, 7) && count(Kind::Map) >= 6,
        "unexpected objects {objects:?}"
    );
    Ok(objects)
}
