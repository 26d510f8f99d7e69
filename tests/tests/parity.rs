//! The mesh's own chains and Interceptor, side by side: whatever the mesh's tool
//! can be told, each connection is served by the same server, which is told the
//! same original destination, and both ends see the same names.
//!
//! What differs by design is in one list, [`DIFFERENCES`].
//!
//! Each test prints how many connections it compared. `PARITY_CASES` says how
//! many random ones to make, and with `PARITY_STEP` only each so many connections
//! are.

#![expect(clippy::print_stdout, reason = "says how much was compared")]

use std::{
    collections::BTreeSet,
    env,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    agent::{
        Agent, Connect, Listen, Listening, Means,
        calls::{Operation, Value},
    },
    cases::{Case, Observed, Row, as_interceptor_may},
    cli::Cli,
    command::run,
    iptables::{Flavour, Version, prepare, replace, restore, save_all},
    mesh::{Dns, Mesh, Mode, random, strings},
    pod::{Credentials, Host, PEER_V4, PEER_V6, POD_V4, POD_V6, Pod},
};
use interceptor_userspace::settings::{self, Cidrs, Family, OwnerGroups, Ports, Settings};
use proptest::{
    prelude::*,
    test_runner::{Config, FileFailurePersistence, RngSeed, TestRunner},
};

/// What differs, why, and the test that shows it.
type Difference = (&'static str, &'static str, fn() -> Result<()>);

/// What differs from the mesh's chains by design: what, why, and the test that
/// shows it.
const DIFFERENCES: [Difference; 7] = [
    (
        "getsockname() of the proxy's socket",
        "the packet isn't changed on the way in, and the address says where to on the way out",
        the_proxys_own_name,
    ),
    (
        "a client's port that an ended connection still has in conntrack",
        "there is no conntrack: nothing is renumbered. Whatever the chains renumber is made again",
        nothing_is_renumbered,
    ),
    (
        "--drop-invalid",
        "without conntrack no packet is invalid; a stray one is answered with a reset, as \
         everywhere",
        nothing_is_invalid,
    ),
    (
        "under TPROXY, what the proxy connects from its client's address to 127.0.0.1",
        "it works; under the chains the answers are lost, because the kernel routes none anew \
         that comes from 127.0.0.1",
        from_elsewhere_to_localhost,
    ),
    (
        "captured DNS over UDP to a link-local address without its scope",
        "the kernel doesn't tell the programs the scope, and after the rewrite needs none: the \
         proxy answers, where connect() would fail with EINVAL",
        dns_without_scope,
    ),
    (
        "virtual interfaces (-k)",
        "forwarded traffic needs IP_TRANSPARENT on the proxy's listener; the setting is refused",
        virtual_interfaces_are_refused,
    ),
    (
        "one unconnected UDP socket that asks several DNS servers at once",
        "which of them an answer is for can't be told without conntrack: it names the one asked \
         last",
        the_server_asked_last,
    ),
];

/// An application's uid and gid.
const APP: Credentials = Credentials {
    uid: 2000,
    gid: 2000,
};

/// The ports of the proxy and of its DNS server.
const PROXY_PORTS: [u16; 3] = [15001, 15006, 15053];
const DNS: u16 = 53;

/// A second cable between the pod and its peer.
const POD_ETH1_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 76, 0, 2));
const PEER_ETH1_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 76, 0, 1));
const POD_ETH1_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x76, 0, 0, 0, 0, 0, 2));
const PEER_ETH1_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x76, 0, 0, 0, 0, 0, 1));

/// A pod with two cables to a peer that has every address but the pod's own.
struct Side {
    app: Agent,
    proxy: Agent,
    peer: Agent,
    pod: Pod,
}

impl Side {
    fn new() -> Result<Self> {
        let pod = Pod::new()?;
        pod.netns().ip(&format!(
            "link add eth1 type veth peer name eth1 netns {}",
            pod.peer().name()
        ))?;
        for (netns, v4, v6) in [
            (pod.netns(), POD_ETH1_V4, POD_ETH1_V6),
            (pod.peer(), PEER_ETH1_V4, PEER_ETH1_V6),
        ] {
            netns.ip(&format!("addr add {v4}/24 dev eth1"))?;
            netns.ip(&format!("addr add {v6}/64 dev eth1"))?;
            netns.ip("link set eth1 up")?;
        }
        for route in [
            "route add local default dev lo table local",
            "route add throw 10.76.0.0/23 table local",
            "-6 route add local default dev lo table local",
            "-6 route add throw fd00:76::/31 table local",
            "-6 route add throw fe80::/10 table local",
        ] {
            pod.peer().ip(route)?;
        }
        Ok(Self {
            app: Agent::start(&pod, Host::Pod)?,
            proxy: Agent::start(&pod, Host::Pod)?,
            peer: Agent::start(&pod, Host::Peer)?,
            pod,
        })
    }

    /// Starts servers: the application's and the peer's on each of the ports,
    /// and the proxy's.
    fn serve(&self, ports: &BTreeSet<u16>, mesh: &Mesh) -> Result<Servers<'_>> {
        let transparent = mesh.mode == Mode::Tproxy;
        let proxy = Credentials {
            uid: mesh.uids.first().copied().unwrap_or(1337),
            gid: mesh.gids.first().copied().unwrap_or(1337),
        };
        let mut servers = Servers(Vec::new());
        let mut start = |agent, listen| -> Result<()> {
            servers.0.push((agent, Agent::listen(agent, listen)?));
            Ok(())
        };
        let own: Vec<SocketAddr> = ports
            .iter()
            .filter(|port| !PROXY_PORTS.contains(port))
            .flat_map(|port| everywhere(*port))
            .collect();
        start(&self.app, Listen::new("APP", own.clone()))?;
        start(&self.peer, Listen::new("PEER", own))?;
        for (agent, name, port, owner) in [
            (&self.app, "APP", DNS, Credentials::ROOT),
            (&self.peer, "PEER", DNS, Credentials::ROOT),
            // The mesh's chains know its answers by their owner.
            (&self.proxy, "PROXY:15053", 15053, proxy),
        ] {
            start(
                agent,
                Listen {
                    datagrams: true,
                    ..Listen::new(name, localhost_or_everywhere(port)).owned_by(owner)
                },
            )?;
        }
        for port in PROXY_PORTS {
            start(
                &self.proxy,
                Listen {
                    transparent,
                    ..Listen::new(&format!("PROXY:{port}"), everywhere(port))
                },
            )?;
        }
        Ok(servers)
    }

    fn observe(&self, connection: &Connection) -> Result<Observed> {
        let agent = match connection.from {
            Host::Pod => &self.app,
            Host::Peer => &self.peer,
        };
        let outcome = agent.connect(Connect {
            bind: connection.bind.map(|address| SocketAddr::new(address, 0)),
            mark: connection.mark,
            timeout: match connection.means {
                Means::Tcp => Duration::from_secs(5),
                Means::Datagram | Means::ConnectedDatagram => Duration::from_millis(300),
            },
            payload: 10,
            means: connection.means,
            ..Connect::new(connection.owner, connection.to)
        })?;
        Ok(Observed::from(&outcome))
    }
}

/// Whether conntrack gave the client another port, because an ended connection
/// still has its own: chance, which [`DIFFERENCES`] knows.
fn renumbered(observed: &Observed) -> bool {
    observed.served_by.starts_with("PROXY")
        && observed.server_getpeername != "-"
        && !observed.server_getpeername.ends_with(":*")
}

fn everywhere(port: u16) -> [SocketAddr; 2] {
    [
        (Ipv4Addr::UNSPECIFIED, port).into(),
        (Ipv6Addr::UNSPECIFIED, port).into(),
    ]
}

/// The proxy's DNS server listens on localhost, as the mesh's does.
fn localhost_or_everywhere(port: u16) -> [SocketAddr; 2] {
    if port == DNS {
        everywhere(port)
    } else {
        [
            (Ipv4Addr::LOCALHOST, port).into(),
            (Ipv6Addr::LOCALHOST, port).into(),
        ]
    }
}

/// Servers that run until this is dropped.
struct Servers<'a>(Vec<(&'a Agent, Listening)>);

impl Drop for Servers<'_> {
    fn drop(&mut self) {
        for (agent, listening) in self.0.drain(..) {
            // What fails here fails the next test, too, which says so.
            let _: Result<()> = agent.close(listening);
        }
    }
}

/// A connection to make on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    from: Host,
    owner: Credentials,
    bind: Option<IpAddr>,
    mark: Option<u32>,
    to: SocketAddr,
    means: Means,
}

impl Connection {
    const fn from_app(to: SocketAddr) -> Self {
        Self {
            from: Host::Pod,
            owner: APP,
            bind: None,
            mark: None,
            to,
            means: Means::Tcp,
        }
    }

    fn case(&self) -> Case {
        let means = match self.means {
            Means::Tcp => "",
            Means::Datagram => " by datagram",
            Means::ConnectedDatagram => " by connected datagram",
        };
        Case {
            name: format!(
                "{:?} {}/{} {} -> {}{means}",
                self.from,
                self.owner.uid,
                self.owner.gid,
                self.bind
                    .map_or_else(|| "-".to_owned(), |address| address.to_string()),
                self.to
            ),
            from: self.from,
            owner: self.owner,
            bind: self.bind,
            to: self.to,
        }
    }
}

/// Both sides, and what was compared.
struct Bed {
    iptables: Side,
    interceptor: Side,
    cli: Cli,
    attached: bool,
    compared: usize,
    differ: usize,
}

impl Bed {
    fn new() -> Result<Self> {
        let iptables = Side::new()?;
        prepare(&iptables.pod)?;
        Ok(Self {
            iptables,
            interceptor: Side::new()?,
            cli: Cli::new()?,
            attached: false,
            compared: 0,
            differ: 0,
        })
    }

    /// The settings, but for what this kernel can't do, of which it says so:
    /// sk_lookup tells the interface since Linux 5.17.
    fn possible(mesh: Mesh) -> Result<Mesh> {
        if mesh.excluded_interfaces.is_empty() {
            return Ok(mesh);
        }
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let mut numbers = release.split('.').map(str::parse::<u32>);
        let version = numbers.next().zip(numbers.next());
        let Some((Ok(major), Ok(minor))) = version else {
            anyhow::bail!("no version: {release}");
        };
        if (major, minor) >= (5, 17) {
            return Ok(mesh);
        }
        println!("not on Linux {}: excluded interfaces", release.trim());
        Ok(Mesh {
            excluded_interfaces: Vec::new(),
            ..mesh
        })
    }

    /// Gives both sides these settings: the first time Interceptor attaches with
    /// them, later it changes to them.
    fn install(&mut self, mesh: &Mesh) -> Result<()> {
        // nft's can't flush and fill a table in one text.
        replace(&self.iptables.pod, Flavour::Legacy, mesh)?;
        let mut command = if self.attached {
            let mut command = self.cli.command()?;
            command.args(["set", self.interceptor.pod.name()]);
            command
        } else {
            self.cli.attach_command(&self.interceptor.pod)?
        };
        run(command.args(mesh.flags()))?;
        self.attached = true;
        Ok(())
    }

    /// Attaches anew for the next settings.
    fn detach(&mut self) -> Result<()> {
        if std::mem::take(&mut self.attached) {
            self.cli.detach(self.interceptor.pod.name())?;
        }
        Ok(())
    }

    /// Makes the connections on both sides; what differs.
    fn compare(&mut self, mesh: &Mesh, connections: &[Connection]) -> Result<Vec<String>> {
        self.install(mesh)?;
        let ports = connections
            .iter()
            .map(|connection| connection.to.port())
            .collect();
        let _servers = [
            self.iptables.serve(&ports, mesh)?,
            self.interceptor.serve(&ports, mesh)?,
        ];
        let mut all = Vec::new();
        for connection in connections {
            let row = |observed| Row {
                case: connection.case(),
                observed,
            };
            let mut expected = row(self.iptables.observe(connection)?);
            for _ in 0..3 {
                if !renumbered(&expected.observed) {
                    break;
                }
                expected = row(self.iptables.observe(connection)?);
            }
            let observed = row(self.interceptor.observe(connection)?);
            self.compared += 1;
            let differences = as_interceptor_may(&expected, &observed);
            if !differences.is_empty() {
                self.differ += 1;
                all.extend(differences);
            }
        }
        Ok(all)
    }

    fn report(&self) {
        println!(
            "parity: {} comparisons, {} differ",
            self.compared, self.differ
        );
    }
}

/// Connections that show every class that the settings tell apart, and both sides
/// of every boundary, in both families.
fn table(mesh: &Mesh) -> Vec<Connection> {
    let mut connections = Vec::new();
    let mut add = |connection: Connection| {
        if !connections.contains(&connection) {
            connections.push(connection);
        }
    };
    let mut own: Vec<IpAddr> = [
        "127.0.0.1",
        "127.0.0.2",
        "127.0.0.4",
        "127.1.0.0",
        "::1",
        "::ffff:127.0.0.2",
        "::ffff:10.77.0.2",
    ]
    .iter()
    .map(|address| address.parse().expect("an address"))
    .collect();
    own.extend([POD_V4, POD_V6, POD_ETH1_V4]);
    let mut destinations = mesh.destinations();
    destinations.extend([PEER_ETH1_V4, PEER_ETH1_V6]);
    let special = [
        "::ffff:10.77.0.1",
        // Without a scope, in the range of the interfaces' routes and beyond it.
        "fe80::1234",
        "febf::1234",
    ];
    destinations.extend(special.map(|address| -> IpAddr { address.parse().expect("an address") }));
    let owners = mesh.owners();
    for address in destinations.iter().chain(&own) {
        let to = SocketAddr::new(*address, 8080);
        add(Connection::from_app(to));
    }
    for port in mesh.ports() {
        for address in [PEER_V4, PEER_V6] {
            add(Connection::from_app(SocketAddr::new(address, port)));
        }
        for address in [POD_V4, POD_V6] {
            let to = SocketAddr::new(address, port);
            add(Connection {
                owner: Credentials::PROXY,
                ..Connection::from_app(to)
            });
            add(Connection {
                from: Host::Peer,
                owner: Credentials::ROOT,
                ..Connection::from_app(to)
            });
        }
    }
    for address in [POD_ETH1_V4, POD_ETH1_V6] {
        add(Connection {
            from: Host::Peer,
            owner: Credentials::ROOT,
            ..Connection::from_app(SocketAddr::new(address, 8080))
        });
    }
    for owner in owners {
        for address in own.iter().chain(&[PEER_V4, PEER_V6]) {
            add(Connection {
                owner,
                ..Connection::from_app(SocketAddr::new(*address, 8080))
            });
        }
    }
    for (bind, to) in [
        ("127.0.0.6", POD_V4),
        ("127.0.0.7", POD_V4),
        ("::6", POD_V6),
    ] {
        for owner in [APP, Credentials::PROXY] {
            add(Connection {
                owner,
                bind: Some(bind.parse().expect("an address")),
                ..Connection::from_app(SocketAddr::new(to, 8080))
            });
        }
    }
    if mesh.dns != Dns::Off {
        let other: [IpAddr; 4] = ["10.78.0.54", "fd00:78::54", "127.0.0.1", "::1"]
            .map(|address| address.parse().expect("an address"));
        for address in destinations.iter().chain(&other) {
            for owner in [APP, Credentials::PROXY] {
                for means in [Means::Tcp, Means::Datagram, Means::ConnectedDatagram] {
                    // By design: `dns_without_scope`.
                    if is_link_local(address) && means == Means::ConnectedDatagram {
                        continue;
                    }
                    add(Connection {
                        owner,
                        means,
                        ..Connection::from_app(SocketAddr::new(*address, DNS))
                    });
                }
            }
        }
    }
    connections
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// The settings that the mesh's own tests try, with their v6 twins in them, and
/// those that they leave out.
fn scenarios() -> Vec<(&'static str, Mesh)> {
    let default = Mesh::default;
    let injected = Mesh::injected;
    let addresses = |texts: &[&str]| -> Vec<IpAddr> {
        texts
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect()
    };
    let wildcard = || Mesh {
        inbound_ports: strings(&["*"]),
        ..default()
    };
    let list = || Mesh {
        inbound_ports: strings(&["32000", "31000", "8000:8010"]),
        ..default()
    };
    let ip_range = Mesh {
        cidrs: strings(&["10.78.0.0/16", "fd00:78::/32"]),
        excluded_cidrs: strings(&["10.78.4.0/22", "fd00:78:4::/48"]),
        dns: Dns::Servers(addresses(&["127.0.0.53", "10.78.0.53", "fd00:78::53"])),
        uids: vec![3, 4],
        gids: vec![1, 2],
        ..default()
    };
    let tproxy = |mesh| Mesh {
        mode: Mode::Tproxy,
        ..mesh
    };
    vec![
        ("empty", default()),
        ("ip-range", ip_range.clone()),
        (
            "ipnets",
            Mesh {
                cidrs: strings(&["10.0.0.0/8", "fd00::/8"]),
                ..default()
            },
        ),
        ("inbound-ports-include", list()),
        ("inbound-ports-wildcard", wildcard()),
        ("inbound-ports-tproxy", tproxy(list())),
        ("inbound-ports-wildcard-tproxy", tproxy(wildcard())),
        (
            "outbound-ports-include",
            Mesh {
                outbound_ports: strings(&["32000", "31000"]),
                ..default()
            },
        ),
        (
            "outbound-owner-groups",
            Mesh {
                only_groups: vec![3000, 202],
                ..injected()
            },
        ),
        (
            "outbound-owner-groups-exclude",
            Mesh {
                except_groups: vec![888, 3001],
                dns: Dns::All,
                ..injected()
            },
        ),
        (
            "loopback-outbound-iprange",
            Mesh {
                cidrs: strings(&["127.1.2.3/32", "10.78.0.0/16", "fd00:78::/32"]),
                ..wildcard()
            },
        ),
        (
            "loopback-outbound-iprange, v6",
            Mesh {
                cidrs: strings(&["::1/128", "10.78.0.0/16", "fd00:78::/32"]),
                ..wildcard()
            },
        ),
        (
            "host-ipv4-loopback-cidr",
            Mesh {
                loopback: "127.0.0.0/8".to_owned(),
                ..injected()
            },
        ),
        (
            "basic-exclude-nic",
            Mesh {
                excluded_interfaces: strings(&["eth1"]),
                ..injected()
            },
        ),
        (
            "dns-uid-gid",
            Mesh {
                uids: vec![3, 4],
                gids: vec![1, 2],
                dns: Dns::All,
                ..injected()
            },
        ),
        (
            "drop-invalid",
            Mesh {
                drop_invalid: true,
                ..injected()
            },
        ),
        (
            "tproxy",
            Mesh {
                mode: Mode::Tproxy,
                inbound_ports: strings(&["*"]),
                excluded_interfaces: strings(&["eth1"]),
                uids: vec![1337],
                gids: vec![1337],
                ..ip_range
            },
        ),
        (
            "outbound ports excluded",
            Mesh {
                excluded_outbound_ports: strings(&["25", "8000:8090"]),
                dns: Dns::All,
                ..injected()
            },
        ),
        ("injected", injected()),
        (
            "capture-all DNS",
            Mesh {
                dns: Dns::All,
                ..injected()
            },
        ),
        (
            "all but some CIDRs",
            Mesh {
                excluded_cidrs: strings(&[
                    "10.78.0.0/16",
                    "10.77.0.1/32",
                    "fd00:78:4::/47",
                    "127.0.0.0/8",
                ]),
                ..injected()
            },
        ),
        (
            "ports whatever the CIDRs",
            Mesh {
                outbound_ports: strings(&["9000:9010"]),
                cidrs: strings(&["10.78.4.0/22"]),
                excluded_cidrs: strings(&["10.78.4.128/25", "fd00:77::/64"]),
                ..injected()
            },
        ),
        (
            "none",
            Mesh {
                mode: Mode::None,
                ..injected()
            },
        ),
        (
            "no owners",
            Mesh {
                uids: Vec::new(),
                gids: Vec::new(),
                ..injected()
            },
        ),
    ]
}

/// Which part of the connections to compare: each so many.
fn step() -> Result<u32> {
    match env::var("PARITY_STEP") {
        Ok(step) => step.parse().context("PARITY_STEP"),
        Err(_) => Ok(1),
    }
}

#[test]
fn every_scenario() -> Result<()> {
    let only = env::var("PARITY_SCENARIO").ok();
    let step = step()?;
    let mut bed = Bed::new()?;
    let mut failures = Vec::new();
    for (name, mesh) in scenarios() {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let mesh = Bed::possible(mesh)?;
        let table: Vec<Connection> = table(&mesh).into_iter().step_by(step as usize).collect();
        let differences = bed
            .compare(&mesh, &table)
            .with_context(|| name.to_owned())?;
        println!(
            "scenario {name}: {} connections, {} differences",
            table.len(),
            differences.len()
        );
        failures.extend(
            differences
                .into_iter()
                .map(|text| format!("{name}: {text}")),
        );
        bed.detach()?;
    }
    bed.report();
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// Connections for each random settings.
const CONNECTIONS: usize = 10;

/// A random connection of those that show what the settings tell apart, but with
/// port and destination chosen apart.
fn connection(mesh: &Mesh, random: [usize; 6]) -> Connection {
    fn one<T: Copy>(from: &[T], random: usize) -> T {
        from[random % from.len()]
    }
    let [which, port, owner, destination, source, means] = random;
    let port = one(&mesh.ports(), port);
    let owner = one(&mesh.owners(), owner);
    match which % 4 {
        0 => Connection {
            from: Host::Peer,
            owner: Credentials::ROOT,
            ..Connection::from_app(SocketAddr::new(
                one(&[POD_V4, POD_V6, POD_ETH1_V4, POD_ETH1_V6], destination),
                port,
            ))
        },
        1 if mesh.dns != Dns::Off => Connection {
            owner,
            means: one(
                &[Means::Tcp, Means::Datagram, Means::ConnectedDatagram],
                means,
            ),
            ..Connection::from_app(SocketAddr::new(one(&mesh.destinations(), destination), DNS))
        },
        1 | 2 => {
            let own = ["127.0.0.1", "127.0.0.2", "127.0.0.4", "::1"]
                .map(|address| address.parse().expect("an address"));
            let own = [&own[..], &[POD_V4, POD_V6, POD_ETH1_V4, POD_ETH1_V6]].concat();
            let to = SocketAddr::new(one(&own, destination), port);
            let bind = if to.is_ipv4() { "127.0.0.6" } else { "::6" };
            Connection {
                owner,
                bind: (source % 4 == 0).then(|| bind.parse().expect("an address")),
                ..Connection::from_app(to)
            }
        }
        _ => {
            let mut destinations = mesh.destinations();
            destinations.extend([PEER_ETH1_V4, PEER_ETH1_V6]);
            Connection {
                owner,
                ..Connection::from_app(SocketAddr::new(one(&destinations, destination), port))
            }
        }
    }
}

#[test]
fn random_settings() -> Result<()> {
    // The same ones each time, so that a change fails for what it did; a number
    // of cases asks for others.
    let (pairs, rng_seed): (u32, _) = match env::var("PARITY_CASES") {
        Ok(cases) => (cases.parse().context("PARITY_CASES")?, RngSeed::Random),
        Err(_) => (400 / step()?, RngSeed::Fixed(1337)),
    };
    let bed = std::cell::RefCell::new(Bed::new()?);
    let mut runner = TestRunner::new(Config {
        cases: pairs.div_ceil(u32::try_from(CONNECTIONS)?),
        // Each step takes as long as the case.
        max_shrink_iters: 10,
        rng_seed,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        source_file: Some(file!()),
        ..Config::default()
    });
    let strategy = (
        random::settings(&[
            Mode::Redirect,
            Mode::Redirect,
            Mode::Redirect,
            Mode::Tproxy,
            Mode::None,
        ]),
        prop::collection::vec(any::<[usize; 6]>(), CONNECTIONS),
    );
    let result = runner.run(&strategy, |(mesh, choices)| {
        let mesh =
            Bed::possible(mesh).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        let connections: Vec<_> = choices
            .into_iter()
            .map(|choice| connection(&mesh, choice))
            .collect();
        let differences = bed
            .borrow_mut()
            .compare(&mesh, &connections)
            .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        prop_assert!(differences.is_empty(), "{}", differences.join("\n"));
        Ok(())
    });
    bed.borrow().report();
    result.map_err(|error| anyhow::anyhow!("{error}"))
}

#[test]
fn each_difference_is_as_it_is_said() -> Result<()> {
    for (what, why, test) in DIFFERENCES {
        test().with_context(|| format!("{what} ({why})"))?;
    }
    Ok(())
}

fn the_proxys_own_name() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh::injected();
    bed.install(&mesh)?;
    let connection = Connection::from_app(SocketAddr::new(PEER_V4, 8080));
    let ports = BTreeSet::from([8080]);
    let _servers = [
        bed.iptables.serve(&ports, &mesh)?,
        bed.interceptor.serve(&ports, &mesh)?,
    ];
    let [chains, ours] = [
        bed.iptables.observe(&connection)?,
        bed.interceptor.observe(&connection)?,
    ];
    ensure!(chains.server_getsockname == "127.0.0.1:15001", "{chains:?}");
    ensure!(ours.server_getsockname.starts_with("127.15."), "{ours:?}");
    Ok(())
}

fn nothing_is_renumbered() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh::injected();
    bed.install(&mesh)?;
    let _servers = bed.interceptor.serve(&BTreeSet::from([8080]), &mesh)?;
    for _ in 0..300 {
        let observed = bed
            .interceptor
            .observe(&Connection::from_app(SocketAddr::new(PEER_V4, 8080)))?;
        ensure!(
            observed.served_by == "PROXY:15001" && !renumbered(&observed),
            "{observed:?}"
        );
    }
    Ok(())
}

/// What the mesh's proxy is under TPROXY: it needs root's rights, and the chains
/// know it by its group.
const TPROXYS: Credentials = Credentials { uid: 0, gid: 1337 };

/// The mark of TPROXY.
const MARK: u32 = 1337;

/// What the proxy connects to its own pod from its client's address reaches the
/// application, and the answers, also a refusal, come back.
#[test]
fn under_tproxy_the_proxy_connects_from_its_clients_address() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh {
        mode: Mode::Tproxy,
        ..Mesh::injected()
    };
    let of = |from, to: IpAddr, port| Connection {
        owner: TPROXYS,
        bind: Some(from),
        mark: Some(MARK),
        ..Connection::from_app(SocketAddr::new(to, port))
    };
    let clients = [
        (PEER_V4, POD_V4),
        (PEER_V6, POD_V6),
        (PEER_ETH1_V4, POD_V4),
        ("10.78.1.1".parse()?, POD_ETH1_V4),
        ("fd00:78::1".parse()?, POD_ETH1_V6),
    ];
    // Attached with it, and changed to it.
    for first in [mesh.clone(), Mesh::injected()] {
        bed.install(&first)?;
        bed.install(&mesh)?;
        let ports = BTreeSet::from([8080]);
        let servers = [
            bed.iptables.serve(&ports, &mesh)?,
            bed.interceptor.serve(&ports, &mesh)?,
        ];
        let mut compare = |connection: &Connection, served_by: &str| -> Result<()> {
            let [expected, observed] = [
                bed.iptables.observe(connection)?,
                bed.interceptor.observe(connection)?,
            ];
            bed.compared += 1;
            let name = connection.case().name;
            ensure!(expected.served_by == served_by, "{name}: {expected:?}");
            bed.differ += usize::from(expected != observed);
            ensure!(expected == observed, "{name}: {expected:?}\n{observed:?}");
            Ok(())
        };
        for (client, pod) in clients {
            compare(&of(client, pod, 8080), "APP")?;
            compare(&of(client, pod, 8081), "REFUSED")?;
            // One that arrives from the same address is the proxy's still.
            let arriving = Connection {
                from: Host::Peer,
                owner: Credentials::ROOT,
                bind: Some(client),
                mark: Some(0),
                ..Connection::from_app(SocketAddr::new(pod, 8080))
            };
            compare(&arriving, "PROXY:15006")?;
        }
        compare(&of("::1".parse()?, "::1".parse()?, 8080), "APP")?;
        drop(servers);
        bed.detach()?;
    }
    // Without the mark nothing leads the answers back.
    bed.install(&mesh)?;
    let ports = BTreeSet::from([8080]);
    let _servers = [
        bed.iptables.serve(&ports, &mesh)?,
        bed.interceptor.serve(&ports, &mesh)?,
    ];
    let unmarked = Connection {
        mark: Some(0),
        ..of("10.78.1.1".parse()?, POD_V4, 8080)
    };
    for side in [&bed.iptables, &bed.interceptor] {
        let observed = side.observe(&unmarked)?;
        ensure!(observed.served_by == "TIMEOUT", "{observed:?}");
    }
    bed.report();
    Ok(())
}

fn dns_without_scope() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh {
        dns: Dns::All,
        ..Mesh::injected()
    };
    bed.install(&mesh)?;
    let connection = Connection {
        means: Means::ConnectedDatagram,
        ..Connection::from_app("[fe80::1]:53".parse()?)
    };
    for (side, served_by) in [(&bed.iptables, "EINVAL"), (&bed.interceptor, "PROXY:15053")] {
        let _servers = side.serve(&BTreeSet::new(), &mesh)?;
        let observed = side.observe(&connection)?;
        ensure!(observed.served_by == served_by, "{observed:?}");
    }
    Ok(())
}

fn from_elsewhere_to_localhost() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh {
        mode: Mode::Tproxy,
        ..Mesh::injected()
    };
    bed.install(&mesh)?;
    let ports = BTreeSet::from([8080]);
    let connection = Connection {
        owner: TPROXYS,
        bind: Some(PEER_V4),
        mark: Some(MARK),
        ..Connection::from_app("127.0.0.1:8080".parse()?)
    };
    for (side, served_by) in [(&bed.iptables, "TIMEOUT"), (&bed.interceptor, "APP")] {
        let _servers = side.serve(&ports, &mesh)?;
        let observed = side.observe(&connection)?;
        ensure!(observed.served_by == served_by, "{observed:?}");
    }
    Ok(())
}

/// A packet that belongs to no connection: dropped by the chains, answered with a
/// reset by a pod without conntrack.
fn nothing_is_invalid() -> Result<()> {
    let mut bed = Bed::new()?;
    bed.install(&Mesh {
        drop_invalid: true,
        ..Mesh::injected()
    })?;
    let answered = |side: &Side| {
        side.pod.peer().enter(|| {
            let (IpAddr::V4(from), IpAddr::V4(to)) = (PEER_V4, POD_V4) else {
                anyhow::bail!("not of IPv4");
            };
            stray_is_reset(from, to)
        })
    };
    ensure!(!answered(&bed.iptables)?, "the chains let it through");
    ensure!(answered(&bed.interceptor)?, "nobody answers");
    Ok(())
}

/// Sends the second packet of a handshake that nobody began; whether a reset
/// comes back.
fn stray_is_reset(from: Ipv4Addr, to: Ipv4Addr) -> Result<bool> {
    const PORTS: [u8; 4] = [0x9c, 0x40, 0x1f, 0x90];
    const SYN_ACK: u8 = 0x12;
    const RST: u8 = 0x04;
    let mut packet = [0u8; 20];
    packet[..4].copy_from_slice(&PORTS);
    packet[12] = 5 << 4;
    packet[13] = SYN_ACK;
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 6, 0, 20], &packet].concat();
    let sum: u32 = pseudo
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16))?;
    packet[16..18].copy_from_slice(&checksum.to_be_bytes());
    let socket = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::RAW,
        Some(socket2::Protocol::TCP),
    )?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.send_to(&packet, &SocketAddr::new(to.into(), 0).into())?;
    let mut room = [std::mem::MaybeUninit::uninit(); 100];
    // The peer's own kernel may answer what comes back: only the pod's counts.
    while let Ok((length, _)) = socket.recv_from(&mut room) {
        let bytes: Vec<u8> = room[..length]
            .iter()
            // SAFETY: the kernel has written that many bytes.
            .map(|byte| unsafe { byte.assume_init() })
            .collect();
        if bytes.len() >= 40
            && bytes[12..16] == to.octets()
            && bytes[20..24] == [0x1f, 0x90, 0x9c, 0x40]
            && bytes[33] & RST != 0
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn virtual_interfaces_are_refused() -> Result<()> {
    let mut bed = Bed::new()?;
    let mut attach = bed.cli.attach_command(&bed.interceptor.pod)?;
    let attached = attach.arg("--virtual-interfaces=net1").output()?;
    let tool = bed
        .cli
        .command()?
        .args(["istio-iptables", "-k", "net1", "-n"])
        .output()?;
    for output in [attached, tool] {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(1) && stderr.contains("`net1` can't be captured"),
            "{stderr}"
        );
    }
    ensure!(!bed.cli.pins().exists(), "something is attached");

    // The reason: even if routes bring what is to be forwarded to the proxy, it can
    // answer only from a listener with IP_TRANSPARENT.
    let mesh = Mesh::injected();
    bed.install(&mesh)?;
    let side = &bed.interceptor;
    for (netns, command) in [
        (side.pod.peer(), "route add throw 10.98.0.0/15 table local"),
        (side.pod.peer(), "route add 10.99.0.0/24 via 10.76.0.2"),
        (side.pod.netns(), "rule add iif eth1 lookup 100"),
        (side.pod.netns(), "route add local default dev lo table 100"),
    ] {
        netns.ip(command)?;
    }
    let forwarded = Connection {
        from: Host::Peer,
        owner: Credentials::ROOT,
        ..Connection::from_app("10.99.0.1:80".parse()?)
    };
    for (mode, served_by) in [(Mode::Redirect, "TIMEOUT"), (Mode::Tproxy, "PROXY:15006")] {
        let _servers = side.serve(
            &BTreeSet::new(),
            &Mesh {
                mode,
                ..mesh.clone()
            },
        )?;
        let observed = side.observe(&forwarded)?;
        ensure!(observed.served_by == served_by, "{mode:?}: {observed:?}");
    }
    Ok(())
}

fn the_server_asked_last() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh {
        dns: Dns::All,
        ..Mesh::injected()
    };
    bed.install(&mesh)?;
    let _servers = bed.interceptor.serve(&BTreeSet::new(), &mesh)?;
    let socket = bed
        .interceptor
        .app
        .open(APP, libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP)?
        .map_err(anyhow::Error::msg)?;
    let servers: [SocketAddr; 2] = ["10.78.0.53:53".parse()?, "10.78.0.54:53".parse()?];
    for server in servers {
        socket.must(Operation::Send {
            bytes: vec![0],
            to: Some(server),
            flags: 0,
        })?;
    }
    for _ in servers {
        let Value::Received { from, .. } = socket.must(Operation::Receive)? else {
            anyhow::bail!("no answer");
        };
        ensure!(from == Some(servers[1]), "{from:?}");
    }
    Ok(())
}

/// The settings as Interceptor has them, but for what no chain shows.
fn shown(mesh: &Mesh) -> Result<Settings> {
    let mut settings: Settings = serde_json::from_value(mesh.json())?;
    if settings.inbound_ports != Ports::All {
        settings.excluded_inbound_ports.clear();
    }
    if !settings.dns.is_on() {
        settings.dns = settings::Dns::Off;
    }
    if let settings::Dns::Servers(servers) = &mut settings.dns {
        servers.sort();
    }
    Ok(settings)
}

#[test]
fn what_iptables_saves_is_imported() -> Result<()> {
    let bed = Bed::new()?;
    for (name, mesh) in scenarios() {
        if mesh.mode == Mode::None {
            continue;
        }
        let mut text = String::new();
        let pod = &bed.iptables.pod;
        replace(pod, Flavour::Legacy, &mesh)?;
        for version in Version::BOTH {
            text.push_str(&save_all(pod, Flavour::Legacy, version)?);
        }
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), &text)?;
        let json = run(bed.cli.command()?.arg("import").arg(file.path()))
            .with_context(|| format!("{name}\n{text}"))?;
        let mut imported: Settings = serde_json::from_str(&json)?;
        if let settings::Dns::Servers(servers) = &mut imported.dns {
            servers.sort();
        }
        let mut expected = shown(&mesh)?;
        if mesh.mode == Mode::Tproxy {
            // Only the owners' rules name it then.
            expected.tunnel_port = mesh.tunnel_port;
        }
        // Each family's CIDRs come together.
        for settings in [&mut imported, &mut expected] {
            settings
                .excluded_outbound_cidrs
                .sort_by_key(|cidr| cidr.addr().is_ipv6());
            // In one rule, whose conditions have no order.
            if let OwnerGroups::Only(groups) = &mut settings.owner_groups {
                groups.sort_unstable();
            }
            if let Cidrs::List(list) = &mut settings.outbound_cidrs {
                list.sort_by_key(|cidr| cidr.addr().is_ipv6());
            }
        }
        ensure!(imported == expected, "{name}: {imported:?}\n{expected:?}");
    }
    Ok(())
}

/// The chains that `--dry-run` shows are ones that iptables takes.
#[test]
fn the_equivalent_chains_can_be_installed() -> Result<()> {
    let bed = Bed::new()?;
    for (name, mesh) in scenarios() {
        let settings: Settings = serde_json::from_value(mesh.json())?;
        for (version, family) in [(Version::V4, Family::V4), (Version::V6, Family::V6)] {
            let text = settings.iptables_restore(family);
            restore(&bed.iptables.pod, Flavour::Legacy, version, &text)
                .with_context(|| name.to_owned())?;
        }
    }
    Ok(())
}

#[test]
fn explain_says_what_happens() -> Result<()> {
    let mut bed = Bed::new()?;
    let mesh = Mesh {
        dns: Dns::All,
        excluded_cidrs: strings(&["10.78.4.0/22", "fd00:78:4::/48"]),
        excluded_outbound_ports: strings(&["9000:9010"]),
        excluded_interfaces: strings(&["eth1"]),
        ..Mesh::injected()
    };
    let mesh = Bed::possible(mesh)?;
    bed.install(&mesh)?;
    let connections: Vec<Connection> = table(&mesh)
        .into_iter()
        .filter(|connection| connection.means == Means::Tcp)
        // From there it arrives by an interface that is left alone, which depends
        // on the interface and not on the addresses.
        .filter(|connection| {
            connection.from == Host::Pod
                || ![POD_ETH1_V4, POD_ETH1_V6].contains(&connection.to.ip())
        })
        .collect();
    // What the kernel makes of the destination before any rule is asked.
    let multicast = Connection::from_app("224.0.0.1:8080".parse()?);
    let link_local = Connection::from_app("[fe80::1234]:53".parse()?);
    let unspecified = Connection {
        bind: Some(POD_V4),
        owner: Credentials::PROXY,
        ..Connection::from_app("0.0.0.0:8080".parse()?)
    };
    let special = [multicast, link_local, unspecified];
    let ports = connections.iter().map(|c| c.to.port()).collect();
    let side = &bed.interceptor;
    let _servers = side.serve(&ports, &mesh)?;
    for connection in connections.iter().step_by(3).chain(&special) {
        let observed = side.observe(connection)?;
        let mut command = bed.cli.command()?;
        command.args(["explain", "-o", "json", "--pod", side.pod.name()]);
        command.arg(format!("--to={}", connection.to));
        command.arg(format!("--uid={}", connection.owner.uid));
        command.arg(format!("--gid={}", connection.owner.gid));
        let from = match connection.from {
            Host::Pod => connection.bind,
            Host::Peer => Some(if connection.to.is_ipv4() {
                PEER_V4
            } else {
                PEER_V6
            }),
        };
        if let Some(from) = from {
            command.arg(format!("--from={from}"));
        }
        let json = run(&mut command)?;
        let answer: serde_json::Value = serde_json::from_str(&json)?;
        let expected = match (answer["outcome"].as_str(), answer["port"].as_u64()) {
            (Some("proxy"), Some(port)) => format!("PROXY:{port}"),
            _ => String::new(),
        };
        let proxied = observed.served_by.starts_with("PROXY:");
        ensure!(
            if proxied {
                observed.served_by == expected
            } else {
                expected.is_empty()
            },
            "{}: {observed:?}\n{json}",
            connection.case().name
        );
    }
    Ok(())
}

/// While the settings change, each connection meets the old or the new: with the
/// lists of one and the flags of the other it would come to the peer.
#[test]
fn settings_change_at_once() -> Result<()> {
    let mut bed = Bed::new()?;
    let one = Mesh {
        dns: Dns::All,
        cidrs: strings(&["10.99.0.0/16"]),
        ..Mesh::injected()
    };
    let other = Mesh {
        cidrs: strings(&["10.77.0.1/32"]),
        ..Mesh::injected()
    };
    bed.install(&one)?;
    let side = &bed.interceptor;
    let _servers = side.serve(&BTreeSet::from([DNS]), &one)?;
    let connection = Connection::from_app(SocketAddr::new(PEER_V4, DNS));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|scope| -> Result<BTreeSet<String>> {
        let traffic = scope.spawn(|| -> Result<BTreeSet<String>> {
            let mut seen = BTreeSet::new();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let observed = side.observe(&connection)?;
                ensure!(observed.original_dst == "10.77.0.1:53", "{observed:?}");
                seen.insert(observed.served_by);
            }
            Ok(seen)
        });
        let mut changed = Ok(());
        for round in 0..30 {
            let mesh = if round % 2 == 0 { &other } else { &one };
            let mut command = bed.cli.command()?;
            command.args(["set", side.pod.name()]).args(mesh.flags());
            changed = run(&mut command).map(drop);
            if changed.is_err() {
                break;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        changed?;
        traffic.join().map_err(|_| anyhow::anyhow!("panic"))?
    })?;
    ensure!(
        seen == BTreeSet::from(["PROXY:15001", "PROXY:15053"].map(str::to_owned)),
        "{seen:?}"
    );
    Ok(())
}

/// The mesh's own tool's command line, in the pod.
#[test]
fn in_the_place_of_the_meshs_own_tool() -> Result<()> {
    let bed = Bed::new()?;
    let side = &bed.interceptor;
    let tool = |arguments: &[&str]| -> Result<std::process::Output> {
        // In the pod's cgroup, for the check, but not in its network namespace, which
        // then is named as the CNI plugin does.
        let program = bed.cli.command()?.get_program().to_owned();
        let mut command = std::process::Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
            .arg(side.pod.cgroup().path())
            .arg(program)
            .arg("--pins")
            .arg(bed.cli.pins())
            .arg("istio-iptables")
            .arg("--network-namespace")
            .arg(side.pod.netns().path())
            .arg("--cgroup")
            .arg(side.pod.cgroup().path())
            .args(["--pod", side.pod.name(), "--dual-stack"])
            .args(arguments);
        Ok(command.output()?)
    };
    let succeeds = |arguments: &[&str]| -> Result<()> {
        let output = tool(arguments)?;
        ensure!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    let injected = [
        "-p",
        "15001",
        "-z",
        "15006",
        "-u",
        "1337",
        "-m",
        "REDIRECT",
        "-i",
        "*",
        "-x",
        "",
        "-b",
        "*",
        "-d",
        "15090,15021,15020",
    ];
    let with = |more: &[&'static str]| [&injected[..], more].concat();
    // Nothing is attached yet: the check fails.
    let output = tool(&with(&[
        "--run-validation",
        "--skip-rule-apply",
        "--probe-timeout=1s",
    ]))?;
    ensure!(output.status.code() == Some(126), "{output:?}");
    succeeds(&with(&["--dry-run"]))?;
    ensure!(!bed.cli.pins().exists(), "the dry run has attached");
    succeeds(&with(&["--run-validation"]))?;
    let status = bed.cli.status(side.pod.name())?;
    ensure!(
        serde_json::from_value::<Settings>(status["settings"].clone())?
            == Settings {
                dns: settings::Dns::Off,
                ..Settings::of(settings::Profile::Injected)
            },
        "{status}"
    );
    succeeds(&with(&[]))?;
    // Other settings need a word.
    let output = tool(&with(&["-o", "25"]))?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    succeeds(&with(&["-o", "25", "--reconcile"]))?;
    let status = bed.cli.status(side.pod.name())?;
    ensure!(
        status["settings"]["excluded_outbound_ports"][0] == "25",
        "{status}"
    );
    succeeds(&["--cleanup-only"])?;
    succeeds(&["--cleanup-only"])?;
    ensure!(!bed.cli.pins().exists(), "something is left");
    Ok(())
}

/// A process, killed when this is dropped.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        // It may be gone already.
        let _: std::io::Result<()> = self.0.kill();
        let _: std::io::Result<_> = self.0.wait();
    }
}

/// In a pod with a user namespace of its own, uid 1337 is the one that this
/// namespace numbers so: xt_owner's `make_kuid(net->user_ns, ...)`.
#[test]
fn uids_are_those_of_the_pods_user_namespace() -> Result<()> {
    let bed = Bed::new()?;
    let pod = &bed.interceptor.pod;
    let child = Child(
        std::process::Command::new("unshare")
            .args(["--user", "--net", "sleep", "60"])
            .spawn()
            .context("start unshare")?,
    );
    let pid = child.0.id();
    let ours = std::fs::read_link("/proc/self/ns/user")?;
    interceptor_tests::command::wait_until("a user namespace", Duration::from_secs(5), || {
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/user"))?;
        Ok((theirs != ours).then_some(()))
    })?;
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{map}"), "0 100000 2000")?;
    }
    let attach = |more: &[&str]| -> Result<std::process::Output> {
        let mut command = bed.cli.command()?;
        command
            .args(["attach", "--pod", "inner", "--netns", &pid.to_string()])
            .arg("--cgroup")
            .arg(pod.cgroup().path())
            .args(more);
        Ok(command.output()?)
    };
    // An id that the namespace doesn't have, which iptables would refuse, too.
    let refused = attach(&["--proxy-uid", "2000"])?;
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.code() == Some(1) && stderr.contains("`2000` is no id"),
        "{stderr}"
    );
    let attached = attach(&[])?;
    ensure!(attached.status.success(), "{attached:?}");
    for (uid, rule) in [(101_337, 4), (1337, 9), (100_000, 9)] {
        let mut command = bed.cli.command()?;
        command.args([
            "explain",
            "-o",
            "json",
            "--pod",
            "inner",
            "--to",
            "10.1.1.1:80",
        ]);
        let json = run(command.args(["--uid", &uid.to_string(), "--gid", "1"]))?;
        let answer: serde_json::Value = serde_json::from_str(&json)?;
        ensure!(answer["rule"] == rule, "uid {uid}: {json}");
    }
    bed.cli.detach("inner")
}
