//! Every kind of socket use gets the same answer from Interceptor as from live
//! iptables: each test does the same with two pods, one with each, and compares
//! all that client and server saw.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use interceptor_tests::{
    agent::{
        Agent, Listen, Listening,
        calls::{Actor, Answer, Operation, RemoteSocket, Value, payload},
    },
    cases::{Bed, Case, Family, Observed, Recorder, Row, as_interceptor_may},
    interception::{Installed, Interception},
    iptables::Flavour,
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
    peer: Agent,
    proxy: Agent,
    _installed: Option<Installed>,
    bed: Bed,
}

impl Side {
    /// `prepare` changes the pod before anything intercepts.
    fn new(
        interception: Option<Interception>,
        prepare: fn(&Pod) -> Result<()>,
    ) -> Result<Self> {
        let bed = Bed::new()?;
        prepare(bed.pod())?;
        let proxy = bed.start_recorder(Recorder::Separate)?;
        let client = Agent::start(bed.pod(), Host::Pod)?;
        let peer = Agent::start(bed.pod(), Host::Peer)?;
        let installed = match interception {
            Some(interception) => Some(interception.install(bed.pod())?),
            None => None,
        };
        Ok(Self {
            client,
            peer,
            proxy,
            _installed: installed,
            bed,
        })
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
    is: fn(label: &str, iptables: &str, interceptor: &str) -> bool,
}

const BY_DESIGN: &[ByDesign] = &[];

/// Every difference between two pods' logs that isn't by design.
fn differences(iptables: &Log, interceptor: &Log) -> Result<Vec<String>> {
    let (expected, mut observed) = (iptables.by_label()?, interceptor.by_label()?);
    let mut all = Vec::new();
    for (label, expected) in expected {
        let Some(observed) = observed.remove(label) else {
            all.push(format!("{label} isn't seen, expected {expected}"));
            continue;
        };
        if let (Seen::Served(expected), Seen::Served(observed)) = (expected, observed) {
            all.extend(as_interceptor_may(expected, observed));
            continue;
        }
        let (expected, observed) = (expected.to_string(), observed.to_string());
        let known = || {
            BY_DESIGN
                .iter()
                .any(|known| (known.is)(label, &expected, &observed))
        };
        if expected != observed && !known() {
            all.push(format!("{label} is {observed}, expected {expected}"));
        }
    }
    for (label, observed) in observed {
        all.push(format!("{label} is {observed}, expected not to be seen"));
    }
    Ok(all)
}

/// Does the same with both pods and compares.
fn compare(
    prepare: fn(&Pod) -> Result<()>,
    scenario: impl Fn(&Side, &mut Log) -> Result<()> + Sync,
) -> Result<()> {
    compare_with(
        Some(Interception::Iptables(Flavour::Nft)),
        prepare,
        scenario,
    )
}

fn compare_with(
    reference: Option<Interception>,
    prepare: fn(&Pod) -> Result<()>,
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
    if std::env::var_os("SHOW").is_some() {
        for (label, seen) in &expected.entries {
            println!("{label} = {seen}");
        }
    }
    let all = differences(&expected, &observed)?;
    ensure!(
        all.is_empty(),
        "{} differences in {} observations:\n{}",
        all.len(),
        expected.entries.len(),
        all.join("\n")
    );
    Ok(())
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

/// A client: its socket, where it goes, and what it has sent.
struct Client<'a> {
    socket: RemoteSocket<'a>,
    sent: usize,
    owner: Credentials,
    /// The port that it has bound, if it has.
    port: u16,
}

fn family_of(address: &SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    }
}

impl<'a> Client<'a> {
    fn open(side: &'a Side, owner: Credentials, family: i32) -> Result<Self> {
        Self::open_with(side, owner, family, libc::IPPROTO_TCP)
    }

    fn open_with(side: &'a Side, owner: Credentials, family: i32, protocol: i32) -> Result<Self> {
        let socket = side
            .client
            .open(owner, family, libc::SOCK_STREAM, protocol)?
            .map_err(|errno| anyhow!("socket: {errno}"))?;
        Ok(Self {
            socket,
            sent: 0,
            owner,
            port: 0,
        })
    }

    /// Connects; true if that succeeded.
    fn connect(&mut self, log: &mut Log, to: SocketAddr, way: Way) -> Result<bool> {
        Ok(match way {
            Way::Blocking => {
                log.answer("connect", &self.socket.call(Operation::Connect(to))?)
            }
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
                let set =
                    self.socket
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
                log.say("getsockname", format!("{}:{}", v4.ip(), self.port(v4.port())));
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
            from: Host::Pod,
            owner: self.owner,
            bind: None,
            to,
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
        (Ipv4Addr::new(10, 77, 0, 255).into(), 8080),
        (Ipv4Addr::new(0, 1, 2, 3).into(), 8080),
        (Ipv4Addr::new(10, 66, 1, 1).into(), 8080),
        (Ipv4Addr::new(10, 66, 2, 1).into(), 8080),
        (Ipv4Addr::new(10, 66, 3, 1).into(), 8080),
        (Ipv4Addr::new(10, 66, 4, 1).into(), 8080),
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
        (Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(), 8080),
        (Ipv6Addr::UNSPECIFIED.into(), 8080),
        (Ipv6Addr::UNSPECIFIED.into(), 9),
        (Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).into(), 8080),
        (Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 0, 1).into(), 8080),
        (Ipv6Addr::new(0xfd66, 1, 0, 0, 0, 0, 0, 1).into(), 8080),
        (Ipv6Addr::new(0xfd66, 2, 0, 0, 0, 0, 0, 1).into(), 8080),
        (Ipv6Addr::new(0xfd66, 3, 0, 0, 0, 0, 0, 1).into(), 8080),
        (Ipv6Addr::new(0xfd66, 4, 0, 0, 0, 0, 0, 1).into(), 8080),
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

/// Routes that lead nowhere.
fn with_dead_ends(pod: &Pod) -> Result<()> {
    for (index, kind) in (1..).zip(["unreachable", "prohibit", "blackhole", "throw"]) {
        pod.netns().ip(&format!("route add {kind} 10.66.{index}.0/24"))?;
        pod.netns().ip(&format!("-6 route add {kind} fd66:{index}::/32"))?;
    }
    // What a pod without IPv4 or IPv6 has.
    pod.netns().ip("route del default")?;
    pod.netns().ip("-6 route del default")?;
    Ok(())
}

fn every_destination(way: Way, owners: &[Credentials]) -> Result<()> {
    compare(with_dead_ends, |side, log| {
        for family in Family::ALL {
            for owner in owners {
                for to in destinations(family) {
                    log.about(format!(
                        "{way:?}, {}/{} to {to}",
                        owner.uid, owner.gid
                    ));
                    Client::open(side, *owner, family_of(&to))?.dial(log, to, way)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn blocking_connects() -> Result<()> {
    every_destination(
        Way::Blocking,
        &[APP, Credentials::PROXY, GID_ONLY, UID_ONLY, Credentials::ROOT],
    )
}
