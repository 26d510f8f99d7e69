//! The table of cases: connections to make, and what live iptables did with
//! each.
//!
//! `oracle/observed.tsv` holds the IPv4 cases. Their twins, made by
//! [`Case::twin`], are in `observed-v6.tsv` (IPv6) and `observed-mapped.tsv`
//! (IPv4 on `AF_INET6` sockets).

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::{
    agent::{Agent, Connect, Listen, Outcome},
    pod::{Credentials, Host, PEER_V4, PEER_V6, POD_V4, POD_V6, Pod},
    proxies::Proxy,
};

/// The IPv4 loopback address with which a proxy passes inbound connections on.
const PASSTHROUGH_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
/// The same for IPv6.
const PASSTHROUGH_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// The ports on which the pod's application listens.
const APP_PORTS: [u16; 4] = [8080, 22, 15090, 15020];
/// The port on which the peer listens.
const PEER_PORT: u16 = 8080;

/// The destination that a proxy can't reach.
const CLOSED: &str = "CLOSED";

/// What kind of socket connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`.
    V6,
    /// `AF_INET6`, to an IPv4 address of the form `::ffff:a.b.c.d`.
    Mapped,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    const fn table(self) -> &'static str {
        match self {
            Self::V4 => include_str!("../oracle/observed.tsv"),
            Self::V6 => include_str!("../oracle/observed-v6.tsv"),
            Self::Mapped => include_str!("../oracle/observed-mapped.tsv"),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        })
    }
}

/// A connection to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// What the table calls it.
    pub name: String,
    /// Which host connects.
    pub from: Host,
    /// Whose the client's socket is.
    pub owner: Credentials,
    /// What the client binds its socket to.
    pub bind: Option<IpAddr>,
    /// Where it connects.
    pub to: SocketAddr,
}

impl Case {
    /// The same connection as another family makes it, if that has it: there
    /// is but one IPv6 localhost, and what a peer's socket is like doesn't
    /// matter to the pod.
    #[must_use]
    pub fn twin(&self, family: Family) -> Option<Self> {
        let map = |address: IpAddr| match family {
            Family::V4 => Some(address),
            Family::V6 => v6_twin(address),
            Family::Mapped => match (self.from, address) {
                (Host::Pod, IpAddr::V4(v4)) => Some(v4.to_ipv6_mapped().into()),
                _ => None,
            },
        };
        let name = match family {
            Family::V4 | Family::Mapped => self.name.clone(),
            Family::V6 => self
                .name
                .replace("127.0.0.1:8080", "[::1]:8080")
                .replace("127.0.0.1", "::1")
                .replace("127.0.0.6", "::6"),
        };
        Some(Self {
            name,
            bind: match self.bind {
                Some(address) => Some(map(address)?),
                None => None,
            },
            to: SocketAddr::new(map(self.to.ip())?, self.to.port()),
            ..*self
        })
    }
}

fn v6_twin(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        POD_V4 => POD_V6,
        PEER_V4 => PEER_V6,
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(PASSTHROUGH_V4) => PASSTHROUGH_V6.into(),
        _ => return None,
    })
}

/// What was seen of a connection. A client's port is written `*` (where the
/// server sees another port than the client, that port), and `-` is what there
/// was nothing to see of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// `APP`, `PEER`, `PROXY:` and a port, or how the connection failed;
    /// through a real proxy `PROXY:15001 -> PEER` or the like.
    pub served_by: String,
    /// What `SO_ORIGINAL_DST` told the server, or the real proxy.
    pub original_dst: String,
    /// The client's getsockname.
    pub client_getsockname: String,
    /// The client's getpeername.
    pub client_getpeername: String,
    /// The server's getpeername.
    pub server_getpeername: String,
    /// The server's getsockname.
    pub server_getsockname: String,
}

impl Observed {
    /// The names of the columns.
    pub const COLUMNS: [&str; 6] = [
        "served_by",
        "original_dst",
        "client_getsockname",
        "client_getpeername",
        "server_getpeername",
        "server_getsockname",
    ];

    /// The columns.
    pub fn columns(&self) -> [&str; 6] {
        [
            &self.served_by,
            &self.original_dst,
            &self.client_getsockname,
            &self.client_getpeername,
            &self.server_getpeername,
            &self.server_getsockname,
        ]
    }

    /// The same, but a real proxy closed it because it couldn't reach the
    /// destination: no server saw it, and whether the client still could ask
    /// for its peer's name is chance.
    fn closed(self) -> Self {
        let Self {
            served_by,
            original_dst,
            client_getsockname,
            ..
        } = self;
        Self {
            original_dst,
            client_getsockname,
            ..Self::failed(&served_by)
        }
    }

    fn failed(how: &str) -> Self {
        let nothing = || "-".to_owned();
        Self {
            served_by: how.to_owned(),
            original_dst: nothing(),
            client_getsockname: nothing(),
            client_getpeername: nothing(),
            server_getpeername: nothing(),
            server_getsockname: nothing(),
        }
    }
}

impl From<&Outcome> for Observed {
    fn from(outcome: &Outcome) -> Self {
        let (getsockname, getpeername, served) = match outcome {
            Outcome::Failed(how) => return Self::failed(how),
            Outcome::Connected {
                getsockname,
                getpeername,
                served,
            } => (getsockname, getpeername, served),
        };
        let text = |result: &Result<SocketAddr, String>| match result {
            Ok(address) => address.to_string(),
            Err(error) => error.clone(),
        };
        let client = Self {
            client_getsockname: any_port(*getsockname),
            client_getpeername: text(getpeername),
            ..Self::failed("")
        };
        match served {
            Ok(served) => Self {
                served_by: served.server.clone(),
                original_dst: text(&served.original_dst),
                server_getpeername: if served.getpeername.port() == getsockname.port() {
                    any_port(served.getpeername)
                } else {
                    served.getpeername.to_string()
                },
                server_getsockname: served.getsockname.to_string(),
                ..client
            },
            Err(error) => Self {
                served_by: error.clone(),
                ..client
            },
        }
    }
}

/// Written as in the tables, with `*` for the port.
fn any_port(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(v4) => format!("{}:*", v4.ip()),
        SocketAddr::V6(v6) => format!("[{}]:*", v6.ip()),
    }
}

/// A case, and what live iptables did with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The case.
    pub case: Case,
    /// What was seen.
    pub observed: Observed,
}

/// The rows of a family's table.
///
/// # Errors
///
/// If the file is damaged.
pub fn table(family: Family) -> Result<Vec<Row>> {
    family
        .table()
        .lines()
        .filter(|line| !line.starts_with('#'))
        .skip(1)
        .map(|line| {
            line.parse()
                .with_context(|| format!("{family} row: {line}"))
        })
        .collect()
}

impl FromStr for Row {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[
            name,
            client,
            to,
            served_by,
            original_dst,
            client_getsockname,
            client_getpeername,
            server_getpeername,
            server_getsockname,
        ] = fields.as_slice()
        else {
            anyhow::bail!("{} fields instead of 9", fields.len());
        };
        let mut client = client.splitn(3, '/');
        let mut part = || client.next().context("a client is uid/gid/address");
        let owner = Credentials {
            uid: part()?.parse()?,
            gid: part()?.parse()?,
        };
        let bind = match part()? {
            "-" => None,
            address => Some(address.parse()?),
        };
        let case = Case {
            name: name.to_owned(),
            from: if name.starts_with("peer->") {
                Host::Peer
            } else {
                Host::Pod
            },
            owner,
            bind,
            to: to.parse()?,
        };
        let observed = Observed {
            served_by: served_by.to_owned(),
            original_dst: original_dst.to_owned(),
            client_getsockname: client_getsockname.to_owned(),
            client_getpeername: client_getpeername.to_owned(),
            server_getpeername: server_getpeername.to_owned(),
            server_getsockname: server_getsockname.to_owned(),
        };
        Ok(Self { case, observed })
    }
}

impl Row {
    /// What is to be seen of the case while no proxy listens: what would go to
    /// the proxy is refused.
    #[must_use]
    pub fn without_proxy(self) -> Self {
        if !self.observed.served_by.starts_with("PROXY") {
            return self;
        }
        Self {
            observed: Observed::failed("REFUSED"),
            ..self
        }
    }

    /// What is to be seen of the case through a real proxy, if the table has
    /// what a proxy saw that only says so.
    #[must_use]
    pub fn through_proxy(self) -> Self {
        let row = &self.observed;
        let Ok(destination) = row.original_dst.parse::<SocketAddr>() else {
            return self;
        };
        // Where the proxy's own connection comes from.
        let source = match (row.served_by.as_str(), destination.ip()) {
            ("PROXY:15001", IpAddr::V4(_)) => POD_V4,
            ("PROXY:15001", IpAddr::V6(_)) => POD_V6,
            ("PROXY:15006", IpAddr::V4(_)) => PASSTHROUGH_V4.into(),
            ("PROXY:15006", IpAddr::V6(_)) => PASSTHROUGH_V6.into(),
            _ => return self,
        };
        let at_peer = [PEER_V4, PEER_V6].contains(&destination.ip());
        let server = match destination.port() {
            PEER_PORT if at_peer => "PEER",
            port if !at_peer && APP_PORTS.contains(&port) => "APP",
            _ => CLOSED,
        };
        let served_by = format!("{} -> {server}", row.served_by);
        let observed = Observed {
            served_by,
            server_getpeername: any_port(SocketAddr::new(source, 0)),
            server_getsockname: row.original_dst.clone(),
            ..self.observed
        };
        let observed = if server == CLOSED {
            observed.closed()
        } else {
            observed
        };
        Self { observed, ..self }
    }
}

/// The row's line of the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case {
            name,
            owner: Credentials { uid, gid },
            bind,
            to,
            ..
        } = &self.case;
        let bind = bind.map_or_else(|| "-".to_owned(), |address| address.to_string());
        write!(f, "{name}\t{uid}/{gid}/{bind}\t{to}")?;
        for column in self.observed.columns() {
            write!(f, "\t{column}")?;
        }
        Ok(())
    }
}

/// How a proxy that only says what it saw listens on its two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorder {
    /// One socket on 0.0.0.0, one on `[::]`.
    Separate,
    /// One socket on `[::]` for both families.
    DualStack,
    /// Several sockets share each address, as those of worker threads do.
    Workers,
}

/// A pod and a peer in which the servers of the cases listen.
#[derive(Debug)]
pub struct Bed {
    app: Agent,
    peer: Agent,
    pod: Pod,
}

impl Bed {
    /// Makes the pod and starts the application in it and the peer's server.
    ///
    /// # Errors
    ///
    /// If the pod can't be made or an agent fails.
    pub fn new() -> Result<Self> {
        let pod = Pod::new()?;
        let app = Agent::start(&pod, Host::Pod)?;
        let peer = Agent::start(&pod, Host::Peer)?;
        app.listen(Listen::new(
            "APP",
            APP_PORTS.into_iter().flat_map(everywhere),
        ))?;
        peer.listen(Listen::new("PEER", everywhere(PEER_PORT)))?;
        Ok(Self { app, peer, pod })
    }

    /// The pod.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Starts a proxy that only says what it saw.
    ///
    /// # Errors
    ///
    /// If the agent fails.
    pub fn start_recorder(&self, recorder: Recorder) -> Result<Agent> {
        let proxy = Agent::start(&self.pod, Host::Pod)?;
        for port in [15001, 15006] {
            let listen = Listen::new(&format!("PROXY:{port}"), everywhere(port))
                .owned_by(Credentials::PROXY);
            proxy.listen(match recorder {
                Recorder::Separate => listen,
                Recorder::DualStack => Listen {
                    addresses: vec![(Ipv6Addr::UNSPECIFIED, port).into()],
                    v6only: false,
                    ..listen
                },
                Recorder::Workers => Listen {
                    sockets: 4,
                    ..listen
                },
            })?;
        }
        Ok(proxy)
    }

    /// Makes the case's connection and returns what was seen of it. `proxy` is
    /// the real proxy that runs in the pod, if one does; what its server saw is
    /// then what the destination saw.
    ///
    /// # Errors
    ///
    /// If the agent fails; that the connection fails is no error.
    pub fn observe(&self, case: &Case, proxy: Option<&Proxy>) -> Result<Observed> {
        match proxy {
            None => Ok(Observed::from(&self.connect(case, false)?)),
            Some(proxy) => self.observe_through(case, proxy),
        }
    }

    fn observe_through(&self, case: &Case, proxy: &Proxy) -> Result<Observed> {
        let mut position = proxy.log_position();
        let mut outcome = self.connect(case, false)?;
        if matches!(&outcome, Outcome::Failed(error) if error == "ECONNRESET") {
            // The proxy has nowhere to go and closed before connect() returned,
            // which then forgets the socket's name.
            position = proxy.log_position();
            outcome = self.connect(case, true)?;
        }
        let observed = Observed::from(&outcome);
        let Outcome::Connected {
            getsockname: client,
            served,
            ..
        } = &outcome
        else {
            return Ok(observed);
        };
        let (destination, observed) = match served {
            Ok(served) if served.getpeername.port() == client.port() => return Ok(observed),
            Ok(served) => (
                served.server.as_str(),
                Observed {
                    server_getpeername: any_port(served.getpeername),
                    ..observed
                },
            ),
            Err(error) if ["CLOSED", "ECONNRESET"].contains(&error.as_str()) => {
                (CLOSED, observed.closed())
            }
            Err(error) => (error.as_str(), observed),
        };
        let (served_by, original_dst) = match proxy.logged(*client, position) {
            Ok(logged) => (
                format!("PROXY:{} -> {destination}", logged.port),
                logged.original_dst.to_string(),
            ),
            Err(error) => (
                format!("{destination}, not logged: {error:#}"),
                observed.original_dst.clone(),
            ),
        };
        Ok(Observed {
            served_by,
            original_dst,
            ..observed
        })
    }

    fn connect(&self, case: &Case, nonblocking: bool) -> Result<Outcome> {
        let agent = match case.from {
            Host::Pod => &self.app,
            Host::Peer => &self.peer,
        };
        agent.connect(Connect {
            bind: case.bind.map(|address| SocketAddr::new(address, 0)),
            nonblocking,
            ..Connect::new(case.owner, case.to)
        })
    }

    /// Makes every connection of a table and returns the table of what was seen.
    ///
    /// # Errors
    ///
    /// If an agent fails.
    pub fn observe_all(&self, rows: &[Row], proxy: Option<&Proxy>) -> Result<Vec<Row>> {
        rows.iter()
            .map(|Row { case, .. }| {
                Ok(Row {
                    case: case.clone(),
                    observed: self.observe(case, proxy)?,
                })
            })
            .collect()
    }
}

fn everywhere(port: u16) -> [SocketAddr; 2] {
    [
        (Ipv4Addr::UNSPECIFIED, port).into(),
        (Ipv6Addr::UNSPECIFIED, port).into(),
    ]
}

/// Checks that two tables say the same.
///
/// # Errors
///
/// If not: the error lists every difference.
pub fn assert_same(
    expected: &[Row],
    observed: &[Row],
    differences: impl Fn(&Row, &Row) -> Vec<String>,
) -> Result<()> {
    ensure!(
        expected.len() == observed.len(),
        "{} rows expected, {} observed",
        expected.len(),
        observed.len()
    );
    let all: Vec<String> = expected
        .iter()
        .zip(observed)
        .flat_map(|(e, o)| differences(e, o))
        .collect();
    ensure!(
        all.is_empty(),
        "{} differences:\n{}\nobserved:\n{}",
        all.len(),
        all.join("\n"),
        observed
            .iter()
            .map(Row::to_string)
            .collect::<Vec<_>>()
            .join("\n"),
    );
    Ok(())
}

/// Every column in which the rows differ.
pub fn exactly(expected: &Row, observed: &Row) -> Vec<String> {
    differences(expected, observed, |_, _, _| false)
}

/// Every column in which Interceptor's row differs from that of iptables, but
/// for what `differs_by_design`.
pub fn as_interceptor_may(expected: &Row, observed: &Row) -> Vec<String> {
    differences(expected, observed, |column, expected, observed| {
        column == "server_getsockname" && differs_by_design(expected, observed)
    })
}

fn differences(
    expected: &Row,
    observed: &Row,
    allowed: impl Fn(&str, &Row, &Row) -> bool,
) -> Vec<String> {
    let columns = expected
        .observed
        .columns()
        .into_iter()
        .zip(observed.observed.columns());
    Observed::COLUMNS
        .into_iter()
        .zip(columns)
        .filter(|(column, (e, o))| e != o && !allowed(column, expected, observed))
        .map(|(column, (e, o))| format!("{}: {column} is {o}, expected {e}", expected.case.name))
        .collect()
}

/// Whether the local address of the server's socket is another than under
/// iptables because Interceptor works in another way. A proxy doesn't take the
/// original destination from it.
fn differs_by_design(expected: &Row, observed: &Row) -> bool {
    let parse = |row: &Row| row.observed.server_getsockname.parse::<SocketAddr>();
    let (Ok(iptables), Ok(interceptor)) = (parse(expected), parse(observed)) else {
        return false;
    };
    let through_proxy = [15001, 15006, 15053]
        .map(|port| format!("PROXY:{port}"))
        .contains(&expected.observed.served_by);
    match expected.case.from {
        // REDIRECT sends to 127.0.0.1 and ::1. Interceptor spreads over 127.15.0.0/16
        // and 100::f01:0/112, so that not all destinations share one range of
        // ephemeral ports. What comes from an IPv6 address other than the pod's
        // usual one it sends to that address, which needs no bind() to be kept.
        // TPROXY leaves what the proxy connects to its own pod where it was sent.
        Host::Pod => {
            let to = SocketAddr::new(
                expected.case.to.ip().to_canonical(),
                expected.case.to.port(),
            );
            let by_tproxy = iptables == to && interceptor.port() == 15006;
            let sent_to = match interceptor.ip() {
                IpAddr::V4(v4) => {
                    (by_tproxy || iptables.ip() == Ipv4Addr::LOCALHOST)
                        && v4.octets()[..2] == [127, 15]
                }
                IpAddr::V6(v6) => {
                    (by_tproxy || iptables.ip() == Ipv6Addr::LOCALHOST)
                        && (v6.segments()[..7] == [0x100, 0, 0, 0, 0, 0, 0xf01]
                            || expected.observed.client_getsockname == format!("[{v6}]:*"))
                }
            };
            through_proxy && sent_to && (by_tproxy || interceptor.port() == iptables.port())
        }
        // REDIRECT changes the port. Interceptor leaves the packet alone and
        // chooses the socket: its local address is the one the client dialled.
        Host::Peer => through_proxy && iptables.port() == 15006 && interceptor == expected.case.to,
    }
}
