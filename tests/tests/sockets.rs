//! Every kind of socket use gets the same answer from Interceptor as from live
//! iptables: each test does the same with two pods, one with each, and compares
//! all that client and server saw.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use interceptor_tests::{
    agent::{
        Agent,
        calls::{Actor, Answer, Operation, RemoteSocket, Value, payload},
    },
    cases::{Bed, Case, Family, Observed, Recorder, Row, as_interceptor_may},
    interception::{Installed, Interception},
    iptables::Flavour,
    netns::Netns,
    pod::{Credentials, Host, PEER_V4, PEER_V6, POD_V4, POD_V6, Pod},
};

const APP: Credentials = Credentials {
    uid: 2000,
    gid: 2000,
};
const GID_ONLY: Credentials = Credentials {
    uid: 2000,
    gid: 1337,
};
const UID_ONLY: Credentials = Credentials {
    uid: 1337,
    gid: 2000,
};

/// One of the two pods.
struct Side {
    client: Agent,
    // Another process, for what two processes do.
    other: Agent,
    peer: Agent,
    proxy: Mutex<Option<Agent>>,
    _installed: Option<Installed>,
    bed: Bed,
}

impl Side {
    /// `prepare` changes the pod before anything intercepts.
    fn new(interception: Option<Interception>, prepare: fn(&Pod) -> Result<()>) -> Result<Self> {
        let bed = Bed::new()?;
        prepare(bed.pod())?;
        let proxy = Mutex::new(Some(bed.start_recorder(Recorder::Separate)?));
        let client = Agent::start(bed.pod(), Host::Pod)?;
        let other = Agent::start(bed.pod(), Host::Pod)?;
        let peer = Agent::start(bed.pod(), Host::Peer)?;
        let installed = match interception {
            Some(interception) => Some(interception.install(bed.pod())?),
            None => None,
        };
        Ok(Self {
            client,
            other,
            peer,
            proxy,
            _installed: installed,
            bed,
        })
    }

    fn stop_proxy(&self) {
        // Its listeners end with it.
        *self.proxy.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn start_proxy(&self) -> Result<()> {
        let proxy = self.bed.start_recorder(Recorder::Separate)?;
        *self.proxy.lock().unwrap_or_else(PoisonError::into_inner) = Some(proxy);
        Ok(())
    }
}

/// Something that was seen.
#[derive(Clone, Debug)]
enum Seen {
    /// What a call returned, and the like.
    Said(String),
    /// All of a conversation.
    Served(Box<Row>),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Said(text) => f.write_str(text),
            Self::Served(row) => f.write_str(&row.observed.columns().join(" ")),
        }
    }
}

/// What was seen of a pod, in order, and of what.
#[derive(Debug, Default)]
struct Log {
    context: String,
    entries: Vec<(String, Seen)>,
}

impl Log {
    /// What comes next belongs to this.
    fn about(&mut self, context: impl Into<String>) {
        self.context = context.into();
    }

    fn say(&mut self, what: &str, seen: impl fmt::Display) {
        let label = format!("{}: {what}", self.context);
        self.entries.push((label, Seen::Said(seen.to_string())));
    }

    /// The entries, each of which must have a label of its own.
    fn by_label(&self) -> Result<BTreeMap<&str, &Seen>> {
        let mut all = BTreeMap::new();
        for (label, seen) in &self.entries {
            let earlier = all.insert(label.as_str(), seen);
            ensure!(earlier.is_none(), "{label} is there twice");
        }
        Ok(all)
    }

    /// Whether it succeeded.
    fn answer(&mut self, what: &str, answer: &Answer) -> bool {
        match answer {
            Ok(value) => self.say(what, value),
            Err(errno) => self.say(what, errno),
        }
        answer.is_ok()
    }
}

/// A difference from iptables that Interceptor has by design.
struct ByDesign {
    reason: &'static str,
    /// Whether a difference is just this one.
    is: fn(label: &str, iptables: &str, interceptor: &str) -> bool,
}

/// Beside it there are those of the server's getsockname that
/// [`as_interceptor_may`] knows.
const SERVED_AT_POD_IP: ByDesign = ByDesign {
    reason: "A port bound to any address can't be bound again to the pod's, so that a client on \
             127.0.0.1 would be what the proxy sees: it is sent to the proxy's port on the pod's \
             own address instead of a local one's.",
    is: |label, iptables, interceptor| {
        let ports = [":15001", ":15006"].into_iter();
        let mut all = ports.map(|port| (format!("127.0.0.1{port}"), format!("10.77.0.2{port}")));
        (label.contains("bound to 0.0.0.0:") || label.contains("bound to [::]:"))
            && label.ends_with("server_getsockname")
            && all.any(|(from, to)| iptables == from && interceptor == to)
    },
};

const SOURCE_STAYS: ByDesign = ByDesign {
    reason: "The source address of a redirected connection is bound, and the kernel keeps what is \
             bound when the connection ends or was refused. The next connect() takes it back.",
    is: |label, iptables, interceptor| {
        let unbound = ["0.0.0.0:*", "[::%0]:*"].contains(&iptables);
        let bound = [
            "10.77.0.2:*",
            "127.0.0.1:*",
            "[::ffff:10.77.0.2%0]:*",
            "[::ffff:127.0.0.1%0]:*",
        ];
        [", first", ", second", ", disconnected"]
            .iter()
            .any(|when| label.ends_with(&format!("{when}: getsockname")))
            && unbound
            && bound.contains(&interceptor)
    },
};

const MPTCP_PEER: ByDesign = ByDesign {
    reason: "What is remembered of an MPTCP connection is its first subflow's, and getpeername() \
             asks for that of the MPTCP socket.",
    is: |label, iptables, interceptor| {
        let proxy = ["[100::f01:", "127.15.", "[::ffff:127.15."];
        let original = [
            "10.77.0.",
            "127.0.0.2:",
            "127.15.",
            "[::ffff:",
            "[fd00:77::",
        ];
        label.ends_with("getpeername")
            && original.iter().any(|start| iptables.starts_with(start))
            && proxy.iter().any(|start| interceptor.starts_with(start))
            && [":15001", ":15006"]
                .iter()
                .any(|end| interceptor.ends_with(end))
    },
};

const ANSWER_LENGTH: ByDesign = ByDesign {
    reason: "getsockopt() returns the length of the answer; conntrack leaves the buffer's as it \
             was. Both are at least what a proxy needs.",
    is: |_, iptables, interceptor| match (iptables.split_once(", "), interceptor.split_once(", ")) {
        (Some((_, iptables)), Some((length, interceptor))) => {
            iptables == interceptor && ["length 16", "length 28"].contains(&length)
        }
        _ => false,
    },
};

const UNREDIRECTED_CLIENT: ByDesign = ByDesign {
    reason: "Of a client's socket whose connection wasn't redirected conntrack knows where it went. \
             Nothing tells it from an accepted one here, which answers where it arrived. No proxy \
             asks its own client sockets.",
    is: |label, iptables, interceptor| {
        let redirected = [
            "2000 to 10.77.0.1:",
            "2000 to [::ffff:10.77.0.1]:",
            "2000 to [fd00:77::1]:",
            "1337 to 10.77.0.2:",
            "1337 to [::ffff:10.77.0.2]:",
            "1337 to [fd00:77::2]:",
            "1337 to 127.0.0.2:",
            "1337 to [::ffff:127.0.0.2]:",
        ];
        let answers = [("SOL_IP,", "length 16, 02"), ("SOL_IPV6,", "length 28, 0a")];
        !redirected.iter().any(|start| label.starts_with(start))
            && iptables.starts_with("length ")
            && answers.iter().any(|(level, start)| {
                label.contains(&format!("client, {level}")) && interceptor.starts_with(start)
            })
    },
};

/// Whether it is only iptables that gave the client another port: it must
/// where one port's connections to two destinations would become one. That is
/// rare, but not in a run of many.
fn renumbered(iptables: &str, interceptor: &str) -> bool {
    match (iptables.rsplit_once(':'), interceptor.rsplit_once(':')) {
        (Some((iptables, port)), Some((interceptor, "*"))) => {
            iptables == interceptor && port.parse::<u16>().is_ok()
        }
        _ => false,
    }
}

/// Checks that two pods' logs say the same, but for what is by design.
fn assert_same(iptables: &Log, interceptor: &Log, by_design: &[ByDesign]) -> Result<()> {
    let (expected, mut observed) = (iptables.by_label()?, interceptor.by_label()?);
    let mut all = Vec::new();
    let mut used = vec![false; by_design.len()];
    let mut differ = |label: &str, expected: &str, observed: &str| {
        let known = by_design
            .iter()
            .position(|known| (known.is)(label, expected, observed));
        match known {
            Some(known) => used[known] = true,
            None => all.push(format!("{label} is {observed}, expected {expected}")),
        }
    };
    let count = expected.len();
    for (label, expected) in expected {
        match (expected, observed.remove(label)) {
            (_, None) => differ(label, &expected.to_string(), "nothing"),
            (Seen::Served(expected), Some(Seen::Served(observed))) => {
                let allowed = as_interceptor_may(expected, observed);
                let columns = expected.observed.columns().into_iter();
                let columns = columns.zip(observed.observed.columns());
                for (column, (expected, observed)) in Observed::COLUMNS.iter().zip(columns) {
                    // A column that may differ isn't in this list.
                    let start = format!("{column} is ");
                    let listed = allowed.iter().any(|line| line.contains(&start));
                    let renumbered =
                        *column == "server_getpeername" && renumbered(expected, observed);
                    if expected != observed && listed && !renumbered {
                        differ(&format!("{label} {column}"), expected, observed);
                    }
                }
            }
            (expected, Some(observed)) => {
                let (expected, observed) = (expected.to_string(), observed.to_string());
                if expected != observed {
                    differ(label, &expected, &observed);
                }
            }
        }
    }
    for (label, observed) in observed {
        differ(label, "nothing", &observed.to_string());
    }
    ensure!(
        all.is_empty(),
        "{} differences in {count} observations:\n{}",
        all.len(),
        all.join("\n")
    );
    for (known, used) in by_design.iter().zip(used) {
        ensure!(used, "this difference is gone: {}", known.reason);
    }
    Ok(())
}

/// Does the same with both pods and compares.
fn compare(
    prepare: fn(&Pod) -> Result<()>,
    by_design: &[ByDesign],
    scenario: impl Fn(&Side, &mut Log) -> Result<()> + Sync,
) -> Result<()> {
    let iptables = Some(Interception::Iptables(Flavour::Nft));
    compare_with(iptables, prepare, by_design, scenario)
}

fn compare_with(
    reference: Option<Interception>,
    prepare: fn(&Pod) -> Result<()>,
    by_design: &[ByDesign],
    scenario: impl Fn(&Side, &mut Log) -> Result<()> + Sync,
) -> Result<()> {
    let run = |interception| -> Result<Log> {
        let side = Side::new(interception, prepare)?;
        let mut log = Log::default();
        scenario(&side, &mut log).with_context(|| format!("{interception:?}: {}", log.context))?;
        Ok(log)
    };
    let (expected, observed) = thread::scope(|scope| {
        let expected = scope.spawn(|| run(reference));
        let observed = scope.spawn(|| run(Some(Interception::Interceptor)));
        let join = |run: thread::ScopedJoinHandle<'_, Result<Log>>| {
            run.join().unwrap_or_else(|_| Err(anyhow!("panic")))
        };
        (join(expected), join(observed))
    });
    let (expected, observed) = (expected?, observed?);
    assert_same(&expected, &observed, by_design)
}

fn as_is(_: &Pod) -> Result<()> {
    Ok(())
}

/// A way to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Blocking,
    Nonblocking,
    Ring,
    FastOpenConnect,
    FastOpenSend,
}

/// How many bytes a client sends.
const LENGTH: usize = 1000;
/// And how many of them with the first packet.
const EARLY: usize = 100;

/// A client: its socket, and what it has sent.
struct Client<'a> {
    socket: RemoteSocket<'a>,
    from: Host,
    owner: Credentials,
    sent: usize,
    /// The port that it has bound, if it has.
    port: u16,
}

fn family_of(address: &SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    }
}

fn open_tcp(agent: &Agent, actor: impl Into<Actor>, family: i32) -> Result<RemoteSocket<'_>> {
    agent
        .open(actor, family, libc::SOCK_STREAM, libc::IPPROTO_TCP)?
        .map_err(|errno| anyhow!("socket: {errno}"))
}

impl<'a> Client<'a> {
    /// A socket of the pod's.
    fn open(side: &'a Side, owner: Credentials, family: i32) -> Result<Self> {
        let socket = open_tcp(&side.client, owner, family)?;
        Ok(Self::new(socket, Host::Pod, owner))
    }

    fn new(socket: RemoteSocket<'a>, from: Host, owner: Credentials) -> Self {
        Self {
            socket,
            from,
            owner,
            sent: 0,
            port: 0,
        }
    }

    /// Connects; true if that succeeded.
    fn connect(&mut self, log: &mut Log, to: SocketAddr, way: Way) -> Result<bool> {
        Ok(match way {
            Way::Blocking => log.answer("connect", &self.socket.call(Operation::Connect(to))?),
            Way::Ring => log.answer("connect", &self.socket.call(Operation::ConnectByRing(to))?),
            Way::Nonblocking => {
                self.socket.must(Operation::SetBlocking(false))?;
                let answer = self.socket.call(Operation::Connect(to))?;
                log.answer("connect", &answer);
                let connected = match answer {
                    Ok(_) => true,
                    Err(errno) if errno == "EINPROGRESS" => {
                        log.answer("poll", &self.socket.call(Operation::AwaitWritable)?);
                        let error = self.socket.must(Operation::GetOption {
                            level: libc::SOL_SOCKET,
                            name: libc::SO_ERROR,
                            room: 4,
                        })?;
                        log.say("SO_ERROR", &error);
                        matches!(error, Value::Option { buffer, .. } if buffer == [0; 4])
                    }
                    Err(_) => false,
                };
                self.socket.must(Operation::SetBlocking(true))?;
                connected
            }
            Way::FastOpenConnect => {
                let set = self
                    .socket
                    .set(libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
                set.map_err(|errno| anyhow!("TCP_FASTOPEN_CONNECT: {errno}"))?;
                log.answer("connect", &self.socket.call(Operation::Connect(to))?)
                    && self.send(log, None, 0)?
            }
            Way::FastOpenSend => self.send(log, Some(to), libc::MSG_FASTOPEN)?,
        })
    }

    fn send(&mut self, log: &mut Log, to: Option<SocketAddr>, flags: i32) -> Result<bool> {
        let sent = log.answer(
            "send",
            &self.socket.call(Operation::Send {
                bytes: payload(EARLY),
                to,
                flags,
            })?,
        );
        if sent {
            self.sent += EARLY;
        }
        Ok(sent)
    }

    fn port(&self, port: u16) -> String {
        if port == 0 || port == self.port {
            port.to_string()
        } else {
            "*".to_owned()
        }
    }

    /// Logs getsockname and getpeername.
    fn names(&self, log: &mut Log) -> Result<()> {
        match self.socket.must(Operation::LocalName)? {
            Value::Name(SocketAddr::V4(v4)) => {
                log.say(
                    "getsockname",
                    format!("{}:{}", v4.ip(), self.port(v4.port())),
                );
            }
            Value::Name(SocketAddr::V6(v6)) => log.say(
                "getsockname",
                format!("[{}%{}]:{}", v6.ip(), v6.scope_id(), self.port(v6.port())),
            ),
            other => log.say("getsockname", other),
        }
        log.answer("getpeername", &self.socket.call(Operation::PeerName)?);
        Ok(())
    }

    /// Logs all that client and server saw of the connection to `to`.
    fn converse(&mut self, log: &mut Log, to: SocketAddr) -> Result<()> {
        let value = self.socket.must(Operation::Converse {
            sent: self.sent,
            length: LENGTH,
        })?;
        self.sent = 0;
        let Value::Conversed(outcome) = value else {
            log.say("served", value);
            return Ok(());
        };
        let case = Case {
            name: log.context.clone(),
            from: self.from,
            owner: self.owner,
            bind: None,
            // Without the scope: nobody says it there.
            to: SocketAddr::new(to.ip(), to.port()),
        };
        let row = Row {
            case,
            observed: Observed::from(&outcome),
        };
        let label = format!("{}: served", log.context);
        log.entries.push((label, Seen::Served(Box::new(row))));
        Ok(())
    }

    /// Connects, converses, and asks for the names before and after.
    fn dial(&mut self, log: &mut Log, to: SocketAddr, way: Way) -> Result<()> {
        let connected = self.connect(log, to, way)?;
        self.names(log)?;
        if connected {
            let again = self.socket.call(Operation::Connect(to))?;
            log.answer("connect again", &again);
            self.converse(log, to)?;
        }
        Ok(())
    }
}

/// Every destination of a family that there is an answer from at once.
fn destinations(family: Family) -> Vec<SocketAddr> {
    let v4 = [
        (PEER_V4, 8080),
        (PEER_V4, 9),
        (POD_V4, 8080),
        (POD_V4, 9),
        (POD_V4, 15001),
        (Ipv4Addr::LOCALHOST.into(), 8080),
        (Ipv4Addr::LOCALHOST.into(), 9),
        (Ipv4Addr::LOCALHOST.into(), 15001),
        (Ipv4Addr::LOCALHOST.into(), 15006),
        (Ipv4Addr::new(127, 0, 0, 2).into(), 8080),
        (Ipv4Addr::new(127, 0, 0, 2).into(), 9),
        (Ipv4Addr::new(127, 15, 1, 7).into(), 8080),
        (Ipv4Addr::UNSPECIFIED.into(), 8080),
        (Ipv4Addr::UNSPECIFIED.into(), 9),
        (Ipv4Addr::new(224, 0, 0, 1).into(), 8080),
        (Ipv4Addr::BROADCAST.into(), 8080),
    ];
    let v6 = [
        (PEER_V6, 8080),
        (PEER_V6, 9),
        (POD_V6, 8080),
        (POD_V6, 9),
        (Ipv6Addr::LOCALHOST.into(), 8080),
        (Ipv6Addr::LOCALHOST.into(), 9),
        (Ipv6Addr::LOCALHOST.into(), 15001),
        (Ipv6Addr::LOCALHOST.into(), 15006),
        (Ipv6Addr::UNSPECIFIED.into(), 8080),
        (Ipv6Addr::UNSPECIFIED.into(), 9),
        (Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).into(), 8080),
        (Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 0, 1).into(), 8080),
    ];
    match family {
        Family::V4 => v4.map(SocketAddr::from).to_vec(),
        Family::V6 => v6.map(SocketAddr::from).to_vec(),
        Family::Mapped => v4.map(mapped).to_vec(),
    }
}

fn mapped((address, port): (IpAddr, u16)) -> SocketAddr {
    let address = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    SocketAddr::new(address.into(), port)
}

/// An address as one of the families writes it.
fn written(family: Family, address: &str) -> Result<SocketAddr> {
    let address: SocketAddr = address.parse()?;
    Ok(match family {
        Family::Mapped => mapped((address.ip(), address.port())),
        Family::V4 | Family::V6 => address,
    })
}

fn number(socket: &RemoteSocket<'_>, level: i32, name: i32, value: i32) -> Result<()> {
    socket
        .set(level, name, value)?
        .map_err(|errno| anyhow!("setsockopt {level}, {name}: {errno}"))?;
    Ok(())
}

fn every_destination(
    prepare: fn(&Pod) -> Result<()>,
    way: Way,
    owners: &[Credentials],
    destinations: fn(Family) -> Vec<SocketAddr>,
) -> Result<()> {
    compare(prepare, &[], |side, log| {
        for family in Family::ALL {
            for owner in owners {
                for to in destinations(family) {
                    log.about(format!("{way:?}, {}/{} to {to}", owner.uid, owner.gid));
                    Client::open(side, *owner, family_of(&to))?.dial(log, to, way)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn blocking_connects() -> Result<()> {
    let owners = [
        APP,
        Credentials::PROXY,
        GID_ONLY,
        UID_ONLY,
        Credentials::ROOT,
    ];
    every_destination(as_is, Way::Blocking, &owners, destinations)
}

#[test]
fn nonblocking_connects() -> Result<()> {
    let owners = [APP, Credentials::PROXY];
    every_destination(as_is, Way::Nonblocking, &owners, destinations)
}

#[test]
fn io_uring_connects() -> Result<()> {
    let owners = [APP, Credentials::PROXY, GID_ONLY];
    every_destination(as_is, Way::Ring, &owners, destinations)
}

/// Data may come with the first packet, without a cookie.
fn with_fast_open(pod: &Pod) -> Result<()> {
    // Client, server, for every listener; cookies on neither side.
    for netns in [pod.netns(), pod.peer()] {
        netns.sysctl("ipv4/tcp_fastopen", "0x607")?;
    }
    Ok(())
}

/// Data may come with the first packet of the second connection.
fn with_fast_open_cookies(pod: &Pod) -> Result<()> {
    for netns in [pod.netns(), pod.peer()] {
        netns.sysctl("ipv4/tcp_fastopen", "0x403")?;
    }
    Ok(())
}

#[test]
fn fast_open_connects() -> Result<()> {
    for way in [Way::FastOpenConnect, Way::FastOpenSend] {
        let owners = [APP, Credentials::PROXY];
        every_destination(with_fast_open, way, &owners, destinations)?;
    }
    Ok(())
}

#[test]
fn fast_open_connects_with_cookies() -> Result<()> {
    compare(with_fast_open_cookies, &[], |side, log| {
        for way in [Way::FastOpenConnect, Way::FastOpenSend] {
            for to in [
                "10.77.0.1:8080",
                "[::ffff:10.77.0.1]:8080",
                "[fd00:77::1]:8080",
            ] {
                for round in 1..=3 {
                    log.about(format!("{way:?} to {to}, round {round}"));
                    let to = to.parse()?;
                    Client::open(side, APP, family_of(&to))?.dial(log, to, way)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn fast_open_carries_data_with_the_first_packet() -> Result<()> {
    /// `TCPI_OPT_SYN_DATA` of `tcp_info`, and where the options are.
    const SYN_DATA: u8 = 1 << 5;
    const OPTIONS: usize = 5;
    compare(with_fast_open, &[], |side, log| {
        for way in [Way::FastOpenConnect, Way::FastOpenSend] {
            for (agent, from, to) in [
                (&side.client, Host::Pod, "10.77.0.1:8080"),
                (&side.client, Host::Pod, "[fd00:77::1]:8080"),
                (&side.peer, Host::Peer, "10.77.0.2:8080"),
                (&side.peer, Host::Peer, "[fd00:77::2]:8080"),
            ] {
                log.about(format!("{way:?}, {from:?} to {to}"));
                let to = to.parse()?;
                let socket = open_tcp(agent, APP, family_of(&to))?;
                let mut client = Client::new(socket, from, APP);
                client.connect(log, to, way)?;
                let info = client.socket.must(Operation::AwaitReadable).and_then(|_| {
                    client.socket.must(Operation::GetOption {
                        level: libc::IPPROTO_TCP,
                        name: libc::TCP_INFO,
                        room: 64,
                    })
                })?;
                let Value::Option { buffer, .. } = info else {
                    continue;
                };
                ensure!(
                    buffer[OPTIONS] & SYN_DATA != 0,
                    "{}: no data with the SYN",
                    log.context
                );
                client.names(log)?;
                client.converse(log, to)?;
            }
        }
        Ok(())
    })
}

/// A redirected destination, and the same local ones without and with a
/// listener.
const AGAIN: [(Family, &str, [&str; 3], [&str; 3]); 3] = [
    (
        Family::V4,
        "10.77.0.1:8080",
        ["10.77.0.2:9", "127.0.0.1:9", "127.0.0.2:9"],
        ["10.77.0.2:8080", "127.0.0.1:8080", "127.0.0.2:8080"],
    ),
    (
        Family::Mapped,
        "10.77.0.1:8080",
        ["10.77.0.2:9", "127.0.0.1:9", "127.0.0.2:9"],
        ["10.77.0.2:8080", "127.0.0.1:8080", "127.0.0.2:8080"],
    ),
    (
        Family::V6,
        "[fd00:77::1]:8080",
        ["[fd00:77::2]:9", "[::1]:9", "[::1]:10"],
        ["[fd00:77::2]:8080", "[::1]:8080", "[::1]:15020"],
    ),
];

/// Chooses the first and the second destination from a row of [`AGAIN`].
type Pairs = fn(&str, [&'static str; 3], [&'static str; 3]) -> Vec<(String, String)>;

/// First while no proxy listens, then while one does, on the same socket.
fn again_after_a_refused_connect(by_design: &[ByDesign], pairs: Pairs) -> Result<()> {
    compare(as_is, by_design, |side, log| {
        side.stop_proxy();
        let mut clients = Vec::new();
        for (family, redirected, closed, open) in AGAIN {
            for owner in [APP, Credentials::PROXY] {
                for way in [Way::Blocking, Way::Nonblocking] {
                    for (first, second) in pairs(redirected, closed, open) {
                        let (first, second) = (written(family, &first)?, written(family, &second)?);
                        let context =
                            format!("{family}, {way:?}, {} to {first}, then {second}", owner.uid);
                        log.about(format!("{context}, first"));
                        let mut client = Client::open(side, owner, family_of(&first))?;
                        let connected = client.connect(log, first, way)?;
                        client.names(log)?;
                        if !connected {
                            clients.push((client, second, way, context));
                        }
                    }
                }
            }
        }
        side.start_proxy()?;
        for (mut client, second, way, context) in clients {
            if way == Way::Nonblocking {
                // The kernel tells of the failure once more.
                log.about(format!("{context}, second"));
                client.connect(log, second, way)?;
                client.names(log)?;
            }
            log.about(context);
            client.dial(log, second, way)?;
        }
        Ok(())
    })
}

#[test]
fn connects_again_after_a_refused_connect() -> Result<()> {
    again_after_a_refused_connect(&[SOURCE_STAYS], |redirected, closed, open| {
        let pairs = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let mut all = vec![pairs(redirected, redirected)];
        all.extend(open.map(|to| pairs(redirected, to)));
        all.extend(closed.map(|from| pairs(from, redirected)));
        all.extend(
            closed
                .into_iter()
                .zip(open)
                .map(|(from, to)| pairs(from, to)),
        );
        all
    })
}

#[test]
fn connects_again_after_a_disconnect() -> Result<()> {
    compare(as_is, &[SOURCE_STAYS], |side, log| {
        for (family, redirected, _, [a, b, c]) in AGAIN {
            for owner in [APP, Credentials::PROXY] {
                for first in [redirected, a, b, c] {
                    for second in [redirected, a, b, c] {
                        let (first, second) = (written(family, first)?, written(family, second)?);
                        let context = format!("{family}, {} to {first}, then {second}", owner.uid);
                        let mut client = Client::open(side, owner, family_of(&first))?;
                        log.about(format!("{context}, first"));
                        client.connect(log, first, Way::Blocking)?;
                        client.names(log)?;
                        log.about(format!("{context}, disconnected"));
                        let disconnected = client.socket.call(Operation::Disconnect)?;
                        log.answer("disconnect", &disconnected);
                        client.names(log)?;
                        log.about(context);
                        client.dial(log, second, Way::Blocking)?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// What is done with a client's socket before it is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preparation {
    Nothing,
    NoPort,
    FreeBind,
    Transparent,
    ReuseAddress,
    Device(&'static str),
}

impl Preparation {
    fn apply(self, client: &mut Client<'_>, family: i32) -> Result<()> {
        let v6 = family == libc::AF_INET6;
        let set = |level, name, value| number(&client.socket, level, name, value);
        match self {
            Self::Nothing => Ok(()),
            Self::NoPort => set(libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1),
            Self::FreeBind if v6 => set(libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, 1),
            Self::FreeBind => set(libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
            Self::Transparent => {
                // Root may.
                client.socket.pass_to(Credentials::ROOT);
                let result = if v6 {
                    number(
                        &client.socket,
                        libc::IPPROTO_IPV6,
                        libc::IPV6_TRANSPARENT,
                        1,
                    )
                } else {
                    number(&client.socket, libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1)
                };
                client.socket.pass_to(client.owner);
                result
            }
            Self::ReuseAddress => set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
            Self::Device(name) => {
                // Some hang: not for long.
                let limit = [0i64, 700_000].into_iter().flat_map(i64::to_ne_bytes);
                for (name, value) in [
                    (libc::SO_BINDTODEVICE, name.as_bytes().to_vec()),
                    (libc::SO_SNDTIMEO, limit.collect()),
                ] {
                    client.socket.must(Operation::SetOption {
                        level: libc::SOL_SOCKET,
                        name,
                        value,
                    })?;
                }
                Ok(())
            }
        }
    }
}

/// Binds and connects: `binds` to each of `destinations`, a port `*` being one
/// that no other client has.
fn bound(
    family: Family,
    preparations: &[Preparation],
    binds: &[&str],
    destinations: &[&str],
    by_design: &[ByDesign],
) -> Result<()> {
    compare(as_is, by_design, |side, log| {
        let mut next_port = 20000;
        for owner in [APP, Credentials::PROXY] {
            for preparation in preparations {
                for bind in binds {
                    for to in destinations {
                        let to = written(family, to)?;
                        log.about(format!(
                            "{preparation:?}, {} bound to {bind}, to {to}",
                            owner.uid
                        ));
                        let mut client = Client::open(side, owner, family_of(&to))?;
                        preparation.apply(&mut client, family_of(&to))?;
                        if *bind != "-" {
                            next_port += 1;
                            let bind = bind.replace('*', &next_port.to_string());
                            let bind = written(family, &bind)?;
                            client.port = bind.port();
                            if !log.answer("bind", &client.socket.call(Operation::Bind(bind))?) {
                                continue;
                            }
                        }
                        client.dial(log, to, Way::Blocking)?;
                    }
                }
            }
        }
        Ok(())
    })
}

const BINDS: [Preparation; 5] = [
    Preparation::Nothing,
    Preparation::NoPort,
    Preparation::FreeBind,
    Preparation::Transparent,
    Preparation::ReuseAddress,
];
const BINDS_V4: [&str; 8] = [
    "10.77.0.2:0",
    "10.77.0.2:*",
    "0.0.0.0:0",
    "0.0.0.0:*",
    "127.0.0.1:0",
    "127.0.0.1:*",
    "127.0.0.6:0",
    "127.0.0.6:*",
];
const DESTINATIONS_V4: [&str; 5] = [
    "10.77.0.1:8080",
    "10.77.0.2:8080",
    "127.0.0.1:8080",
    "127.0.0.2:8080",
    "0.0.0.0:8080",
];
const BINDS_V6: [&str; 6] = [
    "[fd00:77::2]:0",
    "[fd00:77::2]:*",
    "[::]:0",
    "[::]:*",
    "[::1]:*",
    "[::6]:*",
];
const DESTINATIONS_V6: [&str; 4] = [
    "[fd00:77::1]:8080",
    "[fd00:77::2]:8080",
    "[::1]:8080",
    "[::]:8080",
];

#[test]
fn bound_clients_v4() -> Result<()> {
    bound(
        Family::V4,
        &BINDS,
        &BINDS_V4,
        &DESTINATIONS_V4,
        &[SERVED_AT_POD_IP],
    )
}

#[test]
fn bound_clients_mapped() -> Result<()> {
    let binds: Vec<&str> = BINDS_V4.into_iter().chain(["[::]:0", "[::]:*"]).collect();
    bound(
        Family::Mapped,
        &BINDS,
        &binds,
        &DESTINATIONS_V4,
        &[SERVED_AT_POD_IP],
    )
}

#[test]
fn bound_clients_v6() -> Result<()> {
    bound(Family::V6, &BINDS, &BINDS_V6, &DESTINATIONS_V6, &[])
}

#[test]
fn clients_bound_to_lo() -> Result<()> {
    let lo = [Preparation::Device("lo")];
    let binds = ["-", "10.77.0.2:*", "0.0.0.0:*"];
    bound(Family::V4, &lo, &binds, &DESTINATIONS_V4, &[])?;
    bound(Family::Mapped, &lo, &["-"], &DESTINATIONS_V4, &[])?;
    // Others fail with any socket bound to lo, here late and there at once.
    bound(
        Family::V6,
        &lo,
        &["-", "[::]:*"],
        &["[::1]:8080", "[::]:8080"],
        &[],
    )
}

/// Under iptables an IPv4 client can't reach the proxy: it is redirected to
/// 127.0.0.1, and that isn't to be found on eth0.
#[test]
fn clients_bound_to_eth0() -> Result<()> {
    let eth0 = [Preparation::Device("eth0")];
    bound(
        Family::V4,
        &eth0,
        &["-", "10.77.0.2:*"],
        &["10.77.0.1:8080"],
        &[],
    )?;
    bound(Family::Mapped, &eth0, &["-"], &["10.77.0.1:8080"], &[])
}

/// Dials in a pod of its own and gives what was seen.
fn dial_once(
    interception: Interception,
    preparation: Preparation,
    change: fn(&Pod) -> Result<()>,
    to: impl Fn(&Pod) -> Result<SocketAddr>,
) -> Result<Log> {
    let mut log = Log::default();
    let side = Side::new(Some(interception), change)?;
    let to = to(side.bed.pod())?;
    log.about("app");
    let mut client = Client::open(&side, APP, libc::AF_INET6)?;
    preparation.apply(&mut client, libc::AF_INET6)?;
    client.dial(&mut log, to, Way::Blocking)?;
    Ok(log)
}

/// Under iptables they can't be reached: they are redirected to ::1, which a
/// socket bound to eth0, or to a link-local destination's scope, doesn't find
/// there. Interceptor redirects to the source address.
#[test]
fn ipv6_connections_that_iptables_loses() -> Result<()> {
    let unbound = |_: &Pod| -> Result<SocketAddr> { Ok("[fd00:77::1]:8080".parse()?) };
    let link_local = |pod: &Pod| scoped(pod.netns(), "fe80::77:1", "eth0", 8080);
    let device = Preparation::Device("eth0");
    for (preparation, change, to, served) in [
        (
            device,
            as_is as fn(&Pod) -> Result<()>,
            &unbound as &dyn Fn(&Pod) -> Result<SocketAddr>,
            "PROXY:15001 [fd00:77::1]:8080 ",
        ),
        (
            Preparation::Nothing,
            with_link_local_addresses,
            &link_local,
            "PROXY:15001 [fe80::77:1%",
        ),
    ] {
        let lost = dial_once(
            Interception::Iptables(Flavour::Nft),
            preparation,
            change,
            to,
        )?;
        assert_eq!(lost.by_label()?["app: connect"].to_string(), "EINPROGRESS");
        let reached = dial_once(Interception::Interceptor, preparation, change, to)?;
        let seen = reached.by_label()?["app: served"].to_string();
        assert!(seen.starts_with(served), "{seen}");
    }
    Ok(())
}

/// Whose a socket is: what opened its file counts, not who connects.
#[test]
fn owners() -> Result<()> {
    let actor = |real: Credentials, effective: Credentials, filesystem: Credentials| Actor {
        real,
        effective,
        filesystem,
    };
    let (proxy, root) = (Credentials::PROXY, Credentials::ROOT);
    // Who opens, and who connects.
    let cases: Vec<(&str, Actor, Actor)> = vec![
        ("app, then proxy", APP.into(), proxy.into()),
        ("proxy, then app", proxy.into(), APP.into()),
        ("root, then proxy", root.into(), proxy.into()),
        ("root, then app", root.into(), APP.into()),
        ("proxy, then root", proxy.into(), root.into()),
        ("proxy's gid, then app", GID_ONLY.into(), APP.into()),
        ("app, then proxy's gid", APP.into(), GID_ONLY.into()),
        (
            "app with proxy's fsuid and fsgid",
            actor(proxy, APP, proxy),
            APP.into(),
        ),
        (
            "proxy with app's fsuid and fsgid",
            actor(APP, proxy, APP),
            proxy.into(),
        ),
        (
            "proxy's real ids alone",
            actor(proxy, APP, APP),
            actor(proxy, APP, APP),
        ),
        (
            "app's real ids alone",
            actor(APP, proxy, proxy),
            actor(APP, proxy, proxy),
        ),
        (
            "root with proxy's fsuid",
            actor(root, root, proxy),
            root.into(),
        ),
        (
            "root with proxy's fsuid at connect",
            root.into(),
            actor(root, root, proxy),
        ),
        (
            "root with proxy's fsgid",
            actor(root, root, Credentials { uid: 0, gid: 1337 }),
            root.into(),
        ),
    ];
    compare(as_is, &[], |side, log| {
        let destinations = [
            "10.77.0.1:8080",
            "10.77.0.2:8080",
            "127.0.0.1:8080",
            "127.0.0.2:8080",
            "[::ffff:10.77.0.1]:8080",
            "[::ffff:10.77.0.2]:8080",
            "[fd00:77::1]:8080",
            "[fd00:77::2]:8080",
        ];
        for (case, opens, connects) in &cases {
            for to in destinations {
                for passed in [false, true] {
                    let how = if passed { "passed" } else { "kept" };
                    log.about(format!("{case}, {how}, to {to}"));
                    let to = to.parse()?;
                    let mut socket = open_tcp(&side.client, *opens, family_of(&to))?;
                    if passed {
                        let name = format!("{} to {to}", case.replace(' ', "-"));
                        socket = thread::scope(|scope| {
                            let taken = scope.spawn(|| side.other.take(*connects, &name));
                            socket.must(Operation::Give(name.clone()))?;
                            taken.join().unwrap_or_else(|_| Err(anyhow!("panic")))
                        })?;
                    }
                    socket.pass_to(*connects);
                    Client::new(socket, Host::Pod, APP).dial(log, to, Way::Blocking)?;
                    for way in [Way::Ring, Way::FastOpenSend] {
                        if passed || to.ip() != PEER_V4 {
                            continue;
                        }
                        log.about(format!("{case}, {way:?}, to {to}"));
                        let mut socket = open_tcp(&side.client, *opens, family_of(&to))?;
                        socket.pass_to(*connects);
                        Client::new(socket, Host::Pod, APP).dial(log, to, way)?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// UDP: nothing is asked, nothing is changed.
#[test]
fn udp_is_left_alone() -> Result<()> {
    fn open(agent: &Agent, owner: Credentials, family: i32) -> Result<RemoteSocket<'_>> {
        agent
            .open(owner, family, libc::SOCK_DGRAM, libc::IPPROTO_UDP)?
            .map_err(|errno| anyhow!("socket: {errno}"))
    }
    compare_with(None, as_is, &[], |side, log| {
        let mut servers = Vec::new();
        for (agent, bind) in [
            (&side.peer, "10.77.0.1:53"),
            (&side.peer, "10.77.0.1:15001"),
            (&side.peer, "[fd00:77::1]:53"),
            (&side.other, "10.77.0.2:53"),
            (&side.other, "127.0.0.1:53"),
            (&side.other, "127.0.0.2:53"),
            (&side.other, "[fd00:77::2]:53"),
            (&side.other, "[::1]:53"),
            (&side.other, "10.77.0.2:15001"),
        ] {
            let address: SocketAddr = bind.parse()?;
            let socket = open(agent, Credentials::ROOT, family_of(&address))?;
            socket.must(Operation::Bind(address))?;
            servers.push((address, socket));
        }
        for owner in [APP, Credentials::PROXY, GID_ONLY, Credentials::ROOT] {
            for (to, server) in &servers {
                let as_v6 = to.is_ipv4().then(|| mapped((to.ip(), to.port())));
                for to in [Some(*to), as_v6].into_iter().flatten() {
                    log.about(format!("{}/{} to {to}", owner.uid, owner.gid));
                    let socket = open(&side.client, owner, family_of(&to))?;
                    log.answer("connect", &socket.call(Operation::Connect(to))?);
                    let client = Client::new(socket, Host::Pod, owner);
                    client.names(log)?;
                    let send = |bytes: &[u8], to| Operation::Send {
                        bytes: bytes.to_vec(),
                        to,
                        flags: 0,
                    };
                    client.socket.must(send(b"question", None))?;
                    let Value::Received { bytes, from } = server.must(Operation::Receive)? else {
                        continue;
                    };
                    log.say("question", String::from_utf8_lossy(&bytes));
                    let from = from.context("UDP has senders")?;
                    log.say("asker", from.ip());
                    server.must(send(b"answer", Some(from)))?;
                    log.answer("answer", &client.socket.call(Operation::Receive)?);
                    original_destination(log, "client", &client.socket, &[128])?;
                }
            }
        }
        Ok(())
    })
}

const SO_ORIGINAL_DST: i32 = 80;
const ROOMS: [u32; 11] = [0, 4, 15, 16, 27, 28, 32, 128, 4096, 5000, 8192];

/// Asks for the original destination in every way.
fn original_destination(
    log: &mut Log,
    what: &str,
    socket: &RemoteSocket<'_>,
    rooms: &[u32],
) -> Result<()> {
    for (level_name, level) in [("SOL_IP", libc::SOL_IP), ("SOL_IPV6", libc::SOL_IPV6)] {
        for room in rooms {
            let answer = socket.call(Operation::GetOption {
                level,
                name: SO_ORIGINAL_DST,
                room: *room,
            })?;
            log.answer(&format!("{what}, {level_name}, {room} bytes"), &answer);
        }
    }
    Ok(())
}

/// A listener in the pod that only listens: what it accepts is the test's.
fn listener(side: &Side, address: SocketAddr, protocol: i32) -> Result<RemoteSocket<'_>> {
    let family = family_of(&address);
    let socket = side
        .other
        .open(Credentials::PROXY, family, libc::SOCK_STREAM, protocol)?
        .map_err(|errno| anyhow!("socket: {errno}"))?;
    if family == libc::AF_INET6 {
        number(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
    }
    number(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    socket.must(Operation::Bind(address))?;
    socket.must(Operation::Listen)?;
    Ok(socket)
}

/// A connection to a [`listener`]: its port, from where, to where.
const ACCEPTED: [(u16, Host, Family, &str); 10] = [
    (15001, Host::Pod, Family::V4, "10.77.0.1:8080"),
    (15001, Host::Pod, Family::Mapped, "10.77.0.1:8080"),
    (15001, Host::Pod, Family::V6, "[fd00:77::1]:8080"),
    (15006, Host::Peer, Family::V4, "10.77.0.2:8080"),
    (15006, Host::Peer, Family::Mapped, "10.77.0.2:8080"),
    (15006, Host::Peer, Family::V6, "[fd00:77::2]:8080"),
    (9000, Host::Pod, Family::V4, "10.77.0.2:9000"),
    (9000, Host::Pod, Family::V4, "127.0.0.1:9000"),
    (9000, Host::Pod, Family::Mapped, "127.0.0.2:9000"),
    (9000, Host::Pod, Family::V6, "[::1]:9000"),
];

/// Connects to listeners of one family and of both, and has `look` look at the
/// listener and the client before anything is accepted.
fn accepted(
    side: &Side,
    log: &mut Log,
    look: impl Fn(&mut Log, RemoteSocket<'_>, RemoteSocket<'_>) -> Result<()>,
) -> Result<()> {
    side.stop_proxy();
    for any in ["0.0.0.0", "[::]"] {
        for (port, from, family, to) in ACCEPTED {
            if any == "0.0.0.0" && family == Family::V6 {
                continue;
            }
            let to = written(family, to)?;
            log.about(format!("{from:?} to {to} at {any}:{port}"));
            let address = format!("{any}:{port}").parse()?;
            let server = listener(side, address, libc::IPPROTO_TCP)?;
            let agent = match from {
                Host::Pod => &side.client,
                Host::Peer => &side.peer,
            };
            let client = open_tcp(agent, APP, family_of(&to))?;
            client.must(Operation::Connect(to))?;
            look(log, server, client)?;
        }
    }
    Ok(())
}

#[test]
fn original_destination_of_accepted_sockets() -> Result<()> {
    compare(as_is, &[ANSWER_LENGTH], |side, log| {
        accepted(side, log, |log, server, _client| {
            let socket = server.accept()?;
            original_destination(log, "accepted", &socket, &ROOMS)?;
            original_destination(log, "listening", &server, &ROOMS)
        })
    })
}

#[test]
fn original_destination_after_a_reset() -> Result<()> {
    compare(as_is, &[ANSWER_LENGTH], |side, log| {
        accepted(side, log, |log, server, client| {
            let socket = server.accept()?;
            client.reset()?;
            socket.must(Operation::AwaitReadable)?;
            original_destination(log, "reset after accept()", &socket, &[16, 28, 128])
        })?;
        accepted(side, log, |log, server, client| {
            server.must(Operation::AwaitReadable)?;
            client.reset()?;
            let socket = server.accept()?;
            socket.must(Operation::AwaitReadable)?;
            original_destination(log, "reset before accept()", &socket, &[16, 28, 128])
        })
    })
}

#[test]
fn original_destination_of_client_sockets() -> Result<()> {
    compare(as_is, &[ANSWER_LENGTH, UNREDIRECTED_CLIENT], |side, log| {
        for owner in [APP, Credentials::PROXY] {
            for family in Family::ALL {
                for to in destinations(family) {
                    log.about(format!("{} to {to}", owner.uid));
                    let client = open_tcp(&side.client, owner, family_of(&to))?;
                    original_destination(log, "unconnected", &client, &[16, 28, 128])?;
                    if client.call(Operation::Connect(to))?.is_ok() {
                        original_destination(log, "client", &client, &[16, 28, 128])?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// Whatever else is asked, the kernel answers.
#[test]
fn other_options_are_left_alone() -> Result<()> {
    compare(as_is, &[], |side, log| {
        accepted(side, log, |log, server, client| {
            let accepted = server.accept()?;
            for (end, socket) in [("accepted", &accepted), ("client", &client)] {
                for (level, name, what) in [
                    (libc::SOL_SOCKET, libc::SO_TYPE, "SO_TYPE"),
                    (libc::SOL_SOCKET, libc::SO_DOMAIN, "SO_DOMAIN"),
                    (libc::SOL_SOCKET, libc::SO_PROTOCOL, "SO_PROTOCOL"),
                    (libc::SOL_SOCKET, libc::SO_ERROR, "SO_ERROR"),
                    (libc::SOL_SOCKET, libc::SO_PEERCRED, "SO_PEERCRED"),
                    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE, "SO_BINDTODEVICE"),
                    (libc::SOL_SOCKET, libc::SO_MARK, "SO_MARK"),
                    (libc::SOL_SOCKET, SO_ORIGINAL_DST, "80 of SOL_SOCKET"),
                    (libc::SOL_IP, libc::IP_TOS, "IP_TOS"),
                    (libc::SOL_IP, libc::IP_TRANSPARENT, "IP_TRANSPARENT"),
                    (
                        libc::SOL_IP,
                        libc::IP_BIND_ADDRESS_NO_PORT,
                        "IP_BIND_ADDRESS_NO_PORT",
                    ),
                    (libc::SOL_IP, 79, "79 of SOL_IP"),
                    (libc::SOL_IP, 81, "81 of SOL_IP"),
                    (libc::SOL_IPV6, libc::IPV6_V6ONLY, "IPV6_V6ONLY"),
                    (libc::SOL_IPV6, libc::IPV6_TCLASS, "IPV6_TCLASS"),
                    (libc::SOL_TCP, libc::TCP_CONGESTION, "TCP_CONGESTION"),
                    (libc::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY"),
                    (libc::SOL_TCP, SO_ORIGINAL_DST, "80 of SOL_TCP"),
                    (libc::SOL_TCP, 9999, "none of SOL_TCP"),
                    (SO_ORIGINAL_DST, SO_ORIGINAL_DST, "80 of 80"),
                ] {
                    for room in [0, 1, 4, 16, 4096, 8192] {
                        let answer = socket.call(Operation::GetOption { level, name, room })?;
                        log.answer(&format!("{end}, {what}, {room} bytes"), &answer);
                    }
                }
                // Its numbers are those of this very connection.
                for room in [0, 4, 64, 4096, 8192] {
                    let answer = socket.call(Operation::GetOption {
                        level: libc::SOL_TCP,
                        name: libc::TCP_INFO,
                        room,
                    })?;
                    let length = answer.map(|value| match value {
                        Value::Option { length, .. } => length.to_string(),
                        other => other.to_string(),
                    });
                    log.say(
                        &format!("{end}, TCP_INFO, {room} bytes"),
                        format!("{length:?}"),
                    );
                }
            }
            Ok(())
        })
    })
}

#[test]
fn mptcp_clients() -> Result<()> {
    compare(as_is, &[MPTCP_PEER], |side, log| {
        for owner in [APP, Credentials::PROXY, GID_ONLY] {
            for family in Family::ALL {
                for to in destinations(family) {
                    for way in [Way::Blocking, Way::Nonblocking] {
                        log.about(format!("{way:?}, {}/{} to {to}", owner.uid, owner.gid));
                        open_mptcp(&side.client, owner, &to)?.dial(log, to, way)?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// A proxy whose listeners speak MPTCP.
#[test]
fn mptcp_on_both_ends() -> Result<()> {
    compare(as_is, &[ANSWER_LENGTH], |side, log| {
        side.stop_proxy();
        for (any, to) in [
            ("0.0.0.0:15001", "10.77.0.1:8080"),
            ("[::]:15001", "[fd00:77::1]:8080"),
        ] {
            log.about(format!("to {to}"));
            let to = to.parse()?;
            let server = listener(side, any.parse()?, libc::IPPROTO_MPTCP)?;
            for tcp in [true, false] {
                log.about(format!("{} to {to}", if tcp { "TCP" } else { "MPTCP" }));
                let client = if tcp {
                    open_tcp(&side.client, APP, family_of(&to))?
                } else {
                    open_mptcp(&side.client, APP, &to)?.socket
                };
                client.must(Operation::Connect(to))?;
                let socket = server.accept()?;
                original_destination(log, "accepted", &socket, &[16, 28, 128])?;
            }
        }
        Ok(())
    })
}

/// # Panics
///
/// If the kernel has no MPTCP: the net.mptcp.enabled sysctl, CONFIG_MPTCP.
fn open_mptcp<'a>(agent: &'a Agent, owner: Credentials, to: &SocketAddr) -> Result<Client<'a>> {
    let socket = agent
        .open(owner, family_of(to), libc::SOCK_STREAM, libc::IPPROTO_MPTCP)?
        .map_err(|errno| {
            anyhow!("MPTCP socket: {errno} (`sysctl net.mptcp.enabled=1`, CONFIG_MPTCP)")
        })?;
    Ok(Client::new(socket, Host::Pod, owner))
}

/// IPv6 link-local addresses that are the same in every pod.
fn with_link_local_addresses(pod: &Pod) -> Result<()> {
    for (netns, address) in [(pod.peer(), "fe80::77:1"), (pod.netns(), "fe80::77:2")] {
        // The kernel's own may come late: then it doesn't come.
        netns.sysctl("ipv6/conf/eth0/addr_gen_mode", "1")?;
        netns.ip("-6 addr flush dev eth0 scope link")?;
        netns.ip(&format!("-6 addr add {address}/64 dev eth0"))?;
    }
    Ok(())
}

/// `[fe80::77:1%INDEX]` and the like, of an interface of the network namespace.
fn scoped(netns: &Netns, address: &str, device: &str, port: u16) -> Result<SocketAddr> {
    let link = netns.ip(&format!("-o link show dev {device}"))?;
    let (index, _) = link.split_once(':').context("ip link's output")?;
    Ok(format!("[{address}%{index}]:{port}").parse()?)
}

#[test]
fn link_local_destinations() -> Result<()> {
    compare(with_link_local_addresses, &[], |side, log| {
        let (pod, peer) = (side.bed.pod().netns(), side.bed.pod().peer());
        let mut clients = Vec::new();
        for port in [8080, 9] {
            // Direct: to itself, and all that is the proxy's.
            for (owner, address) in [
                (APP, "fe80::77:2"),
                (GID_ONLY, "fe80::77:1"),
                (GID_ONLY, "fe80::77:2"),
                (Credentials::PROXY, "fe80::77:1"),
            ] {
                clients.push((
                    &side.client,
                    Host::Pod,
                    owner,
                    scoped(pod, address, "eth0", port)?,
                ));
                clients.push((
                    &side.client,
                    Host::Pod,
                    owner,
                    scoped(pod, address, "lo", port)?,
                ));
            }
            for owner in [APP, Credentials::PROXY] {
                for address in ["ff02::1", "fd00:77::1", "fd00:77::2", "::1"] {
                    clients.push((
                        &side.client,
                        Host::Pod,
                        owner,
                        scoped(pod, address, "eth0", port)?,
                    ));
                }
            }
        }
        for port in [8080, 9999, 22] {
            for address in ["fe80::77:2", "fd00:77::2"] {
                clients.push((
                    &side.peer,
                    Host::Peer,
                    APP,
                    scoped(peer, address, "eth0", port)?,
                ));
            }
        }
        for (agent, from, owner, to) in clients {
            log.about(format!("{from:?}, {}/{} to {to}", owner.uid, owner.gid));
            let mut client = Client::new(open_tcp(agent, owner, libc::AF_INET6)?, from, owner);
            client.dial(log, to, Way::Blocking)?;
        }
        Ok(())
    })
}

/// The mesh's passthrough address is the pod's own.
#[test]
fn the_ipv6_passthrough_address_is_local_at_once() -> Result<()> {
    let owners = [APP, Credentials::PROXY, GID_ONLY];
    every_destination(as_is, Way::Blocking, &owners, |family| match family {
        Family::V6 => [8080, 9]
            .map(|port| SocketAddr::from((Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6), port)))
            .to_vec(),
        Family::V4 | Family::Mapped => Vec::new(),
    })
}

/// A socket that was redirected to an IPv6 destination can connect to an IPv4
/// one as well as before.
#[test]
fn connects_again_with_the_other_family() -> Result<()> {
    again_after_a_refused_connect(&[], |redirected, _, _| {
        if redirected.starts_with('[') {
            ["[::ffff:10.77.0.1]:8080", "[::ffff:127.0.0.1]:8080"]
                .map(|to| (redirected.to_owned(), to.to_owned()))
                .to_vec()
        } else {
            Vec::new()
        }
    })
}

/// Routes that lead nowhere, and no default route.
fn with_dead_ends(pod: &Pod) -> Result<()> {
    let netns = pod.netns();
    netns.ip("route del default")?;
    netns.ip("-6 route del default")?;
    for (index, kind) in (1..).zip(["unreachable", "prohibit", "blackhole", "throw"]) {
        netns.ip(&format!("route add {kind} 10.66.{index}.0/24"))?;
        netns.ip(&format!("-6 route add {kind} fd66:{index}::/32"))?;
    }
    Ok(())
}

/// Where no packet can be sent to, nothing is redirected: the kernel's own
/// error stands. (A client that tries IPv6 first then goes on with IPv4.)
#[test]
fn destinations_without_a_route() -> Result<()> {
    let owners = [APP, Credentials::PROXY, Credentials::ROOT];
    every_destination(
        with_dead_ends,
        Way::Blocking,
        &owners,
        |family| match family {
            Family::V4 | Family::Mapped => [
                [10, 66, 1, 1],
                [10, 66, 2, 1],
                [10, 66, 3, 1],
                [10, 66, 4, 1],
                [10, 77, 0, 255],
                [0, 1, 2, 3],
                [192, 0, 2, 1],
            ]
            .into_iter()
            .map(|octets| {
                let address = (Ipv4Addr::from(octets).into(), 8080);
                if family == Family::V4 {
                    SocketAddr::from(address)
                } else {
                    mapped(address)
                }
            })
            .collect(),
            Family::V6 => (1..=5)
                .map(|index| {
                    SocketAddr::from((Ipv6Addr::new(0xfd66, index, 0, 0, 0, 0, 0, 1), 8080))
                })
                .collect(),
        },
    )
}

/// What a subnet's broadcast address is, no connection can be made to.
#[test]
fn broadcast_destinations() -> Result<()> {
    let owners = [APP, Credentials::PROXY];
    every_destination(as_is, Way::Blocking, &owners, |family| {
        let all = [(Ipv4Addr::new(10, 77, 0, 255).into(), 8080)];
        match family {
            Family::V4 => all.map(SocketAddr::from).to_vec(),
            Family::Mapped => all.map(mapped).to_vec(),
            Family::V6 => Vec::new(),
        }
    })
}
