//! An interpreter of iptables-restore text: what the chains would do with a connection.
//!
//! It is written from iptables' own rules, knows nothing of Interceptor's
//! policy and shares no code with it, so that the two can be compared. It
//! knows the nat table and what a sidecar's chains use; anything else is an
//! error, never ignored.

use std::{error::Error, fmt, mem::discriminant, net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::IpNet;

/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// The chains that the kernel itself has in the nat table.
const BUILT_IN: [&str; 4] = ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"];

/// The nat table.
#[derive(Clone, Debug)]
pub struct Table {
    chains: Vec<Chain>,
}

#[derive(Clone, Debug)]
struct Chain {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    /// All must hold.
    conditions: Vec<Condition>,
    target: Target,
}

#[derive(Clone, Debug)]
struct Condition {
    /// Whether `!` stands before it.
    inverted: bool,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Protocol(u8),
    Source(IpNet),
    Destination(IpNet),
    InInterface(String),
    OutInterface(String),
    DestinationPort(RangeInclusive<u16>),
    DestinationPorts(Vec<RangeInclusive<u16>>),
    Uid(u32),
    Gid(u32),
}

#[derive(Clone, Copy, Debug)]
enum Target {
    Return,
    Accept,
    Redirect(u16),
    /// The chain's place in the table.
    Jump(usize),
}

/// The first packet of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// The IP protocol number.
    pub protocol: u8,
    /// Where it comes from.
    pub origin: Origin<'a>,
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The destination port, if the protocol has ports.
    pub destination_port: u16,
}

/// Where a packet comes from, seen from the network namespace of the table.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A socket inside. The packet may come back in over `lo`.
    Inside {
        /// The interface that it leaves by.
        out_interface: &'a str,
        /// Whose socket it is; `None` for a socket without a file.
        owner: Option<Owner>,
    },
    /// Another host.
    Outside {
        /// The interface that it comes in by.
        in_interface: &'a str,
    },
}

/// The uid and gid with which a socket's file was opened.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What the table does with a connection, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// How it ends.
    pub ending: Ending,
    /// The rules that matched, in the order in which they were asked.
    pub trace: Vec<Step<'a>>,
}

/// How a packet's way through the table ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It keeps its destination.
    Accept,
    /// It goes to a local port instead.
    Redirect {
        /// The port.
        port: u16,
    },
}

/// A rule that matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// The chain's name.
    pub chain: &'a str,
    /// The rule's number in its chain, from 1.
    pub rule: u32,
}

impl Table {
    /// Asks the table about a new connection.
    ///
    /// NAT asks one chain for the destination of each connection. For one that
    /// starts inside that is `OUTPUT`, and `PREROUTING` isn't asked when the
    /// packet comes back in over `lo`.
    pub fn connection(&self, packet: &Packet<'_>) -> Outcome<'_> {
        let hook = match packet.origin {
            Origin::Inside { .. } => "OUTPUT",
            Origin::Outside { .. } => "PREROUTING",
        };
        let mut trace = Vec::new();
        let ending = self
            .chains
            .iter()
            .find(|chain| chain.name == hook)
            .and_then(|chain| self.walk(chain, packet, &mut trace))
            // The policy of a built-in chain.
            .unwrap_or(Ending::Accept);
        Outcome { ending, trace }
    }

    /// Whether the rule leads to another chain, from which a packet may return.
    pub fn is_jump(&self, step: Step<'_>) -> bool {
        self.chains
            .iter()
            .find(|chain| chain.name == step.chain)
            .and_then(|chain| chain.rules.get(step.rule as usize - 1))
            .is_some_and(|rule| matches!(rule.target, Target::Jump(_)))
    }

    /// The end that the packet finds in the chain or in those that it jumps
    /// to; `None` if the chain returns to where it was called.
    fn walk<'a>(
        &'a self,
        chain: &'a Chain,
        packet: &Packet<'_>,
        trace: &mut Vec<Step<'a>>,
    ) -> Option<Ending> {
        for (rule, number) in chain.rules.iter().zip(1..) {
            if !rule.conditions.iter().all(|c| c.holds(packet)) {
                continue;
            }
            trace.push(Step {
                chain: &chain.name,
                rule: number,
            });
            match rule.target {
                Target::Return => return None,
                Target::Accept => return Some(Ending::Accept),
                Target::Redirect(port) => return Some(Ending::Redirect { port }),
                Target::Jump(to) => {
                    if let Some(ending) = self.walk(&self.chains[to], packet, trace) {
                        return Some(ending);
                    }
                }
            }
        }
        None
    }

    fn place_of(&self, name: &str) -> Option<usize> {
        self.chains.iter().position(|chain| chain.name == name)
    }

    /// Whether a packet in chain `from` can come to chain `to`.
    fn reaches(&self, from: usize, to: usize) -> bool {
        from == to
            || self.chains[from]
                .rules
                .iter()
                .any(|rule| match rule.target {
                    Target::Jump(next) => self.reaches(next, to),
                    Target::Return | Target::Accept | Target::Redirect(_) => false,
                })
    }
}

impl Condition {
    fn holds(&self, packet: &Packet<'_>) -> bool {
        // A hook that doesn't know an interface compares with an empty name,
        // and xt_owner compares nothing with a socket that it can't see.
        let (in_interface, out_interface, owner) = match packet.origin {
            Origin::Inside {
                out_interface,
                owner,
            } => ("", out_interface, owner),
            Origin::Outside { in_interface } => (in_interface, "", None),
        };
        let holds = match &self.test {
            Test::Protocol(protocol) => packet.protocol == *protocol,
            Test::Source(network) => network.contains(&packet.source),
            Test::Destination(network) => network.contains(&packet.destination),
            Test::InInterface(name) => in_interface == name,
            Test::OutInterface(name) => out_interface == name,
            Test::DestinationPort(ports) => ports.contains(&packet.destination_port),
            Test::DestinationPorts(list) => list
                .iter()
                .any(|ports| ports.contains(&packet.destination_port)),
            Test::Uid(uid) => owner.is_some_and(|owner| owner.uid == *uid),
            Test::Gid(gid) => owner.is_some_and(|owner| owner.gid == *gid),
        };
        holds != self.inverted
    }
}

/// A line of the text that can't be interpreted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// The line's number, from 1.
    pub line: usize,
    /// The line.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            line,
            text,
            problem,
        } = self;
        write!(f, "line {line}: {problem}: {text}")
    }
}

impl Error for ParseError {}

/// How far the text is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    BeforeTable,
    InTable,
    Committed,
}

impl FromStr for Table {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut table = Self { chains: Vec::new() };
        let mut section = Section::BeforeTable;
        for (line, number) in text.lines().zip(1..) {
            section = table
                .read_line(line, section)
                .map_err(|problem| ParseError {
                    line: number,
                    text: line.to_owned(),
                    problem,
                })?;
        }
        if section == Section::Committed {
            Ok(table)
        } else {
            Err(ParseError {
                line: text.lines().count(),
                text: text.lines().last().unwrap_or_default().to_owned(),
                problem: "the text ends before COMMIT".to_owned(),
            })
        }
    }
}

impl Table {
    fn read_line(&mut self, line: &str, section: Section) -> Result<Section, String> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(section);
        }
        match section {
            Section::BeforeTable if line == "*nat" => return Ok(Section::InTable),
            Section::InTable if line == "COMMIT" => return Ok(Section::Committed),
            Section::InTable => {}
            Section::BeforeTable => return Err("not the nat table".to_owned()),
            Section::Committed => return Err("something after COMMIT".to_owned()),
        }
        if let Some(declaration) = line.strip_prefix(':') {
            self.declare(declaration)?;
        } else if let Some(rule) = line.strip_prefix("-A ") {
            self.append(rule)?;
        } else {
            return Err("neither a chain nor a rule".to_owned());
        }
        Ok(section)
    }

    /// Reads `NAME POLICY [PACKETS:BYTES]`.
    fn declare(&mut self, text: &str) -> Result<(), String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [name, policy, counters] = words[..] else {
            return Err("not NAME POLICY [PACKETS:BYTES]".to_owned());
        };
        let expected = if BUILT_IN.contains(&name) {
            "ACCEPT"
        } else {
            "-"
        };
        if policy != expected {
            return Err(format!("policy {policy} where only {expected} is known"));
        }
        let counts = counters
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .and_then(|rest| rest.split_once(':'));
        if !counts.is_some_and(|(packets, bytes)| {
            packets.parse::<u64>().is_ok() && bytes.parse::<u64>().is_ok()
        }) {
            return Err(format!("{counters} is not [PACKETS:BYTES]"));
        }
        if self.place_of(name).is_some() {
            return Err(format!("chain {name} is declared twice"));
        }
        self.chains.push(Chain {
            name: name.to_owned(),
            rules: Vec::new(),
        });
        Ok(())
    }

    /// Reads `CHAIN CONDITIONS -j TARGET`.
    fn append(&mut self, text: &str) -> Result<(), String> {
        let mut words = text.split_whitespace();
        let name = words.next().ok_or("no chain")?;
        let chain = self
            .place_of(name)
            .ok_or_else(|| format!("chain {name} is not declared"))?;
        let conditions = read_conditions(&mut words)?;
        let target = match words.next().ok_or("nothing after -j")? {
            "RETURN" => Target::Return,
            "ACCEPT" => Target::Accept,
            "REDIRECT" => {
                if !has_protocol(&conditions, TCP) && !has_protocol(&conditions, UDP) {
                    return Err("REDIRECT to a port needs -p tcp or -p udp".to_owned());
                }
                if words.next() != Some("--to-ports") {
                    return Err("REDIRECT without --to-ports".to_owned());
                }
                Target::Redirect(read(words.next().unwrap_or_default(), "port")?)
            }
            other => {
                let to = self
                    .place_of(other)
                    .filter(|_| !BUILT_IN.contains(&other))
                    .ok_or_else(|| format!("unknown target {other}"))?;
                if self.reaches(to, chain) {
                    return Err(format!("jumping to {other} makes a loop"));
                }
                Target::Jump(to)
            }
        };
        if let Some(word) = words.next() {
            return Err(format!("unexpected {word} after the target"));
        }
        self.chains[chain].rules.push(Rule { conditions, target });
        Ok(())
    }
}

/// Reads a rule's conditions and the `-j` that ends them.
fn read_conditions<'a>(
    words: &mut impl Iterator<Item = &'a str>,
) -> Result<Vec<Condition>, String> {
    let mut conditions: Vec<Condition> = Vec::new();
    let (mut ports_loaded, mut multiport_loaded, mut owner_loaded) = (false, false, false);
    loop {
        let mut option = words.next().ok_or("no target")?;
        let inverted = option == "!";
        if inverted {
            option = words.next().ok_or("nothing after !")?;
        }
        if option == "-j" && !inverted {
            return Ok(conditions);
        }
        let value = words
            .next()
            .ok_or_else(|| format!("nothing after {option}"))?;
        let test = match option {
            "-m" if !inverted => {
                match value {
                    "tcp" if has_protocol(&conditions, TCP) => ports_loaded = true,
                    "tcp" => return Err("-m tcp needs -p tcp".to_owned()),
                    "udp" if has_protocol(&conditions, UDP) => ports_loaded = true,
                    "udp" => return Err("-m udp needs -p udp".to_owned()),
                    "multiport"
                        if has_protocol(&conditions, TCP) || has_protocol(&conditions, UDP) =>
                    {
                        multiport_loaded = true;
                    }
                    "multiport" => return Err("-m multiport needs -p tcp or udp".to_owned()),
                    "owner" => owner_loaded = true,
                    _ => return Err(format!("unknown match {value}")),
                }
                continue;
            }
            "-p" => Test::Protocol(read_protocol(value)?),
            "-s" => Test::Source(read_network(value)?),
            "-d" => Test::Destination(read_network(value)?),
            "-i" => Test::InInterface(read_interface(value)?),
            "-o" => Test::OutInterface(read_interface(value)?),
            "--dports" if multiport_loaded => {
                Test::DestinationPorts(value.split(',').map(read_ports).collect::<Result<_, _>>()?)
            }
            "--dport" if ports_loaded => Test::DestinationPort(read_ports(value)?),
            "--uid-owner" if owner_loaded => Test::Uid(read_id(value)?),
            "--gid-owner" if owner_loaded => Test::Gid(read_id(value)?),
            _ if inverted => return Err(format!("unknown option ! {option}")),
            _ => return Err(format!("unknown option {option}")),
        };
        // Each `-m owner` is a match of its own.
        if !matches!(test, Test::Uid(_) | Test::Gid(_))
            && conditions
                .iter()
                .any(|other| discriminant(&other.test) == discriminant(&test))
        {
            return Err(format!("{option} is given twice"));
        }
        conditions.push(Condition { inverted, test });
    }
}

fn has_protocol(conditions: &[Condition], wanted: u8) -> bool {
    conditions
        .iter()
        .any(|c| !c.inverted && matches!(c.test, Test::Protocol(protocol) if protocol == wanted))
}

fn read<T: FromStr>(text: &str, what: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not a {what}"))
}

fn read_protocol(text: &str) -> Result<u8, String> {
    match text {
        "icmp" => Ok(1),
        "tcp" => Ok(TCP),
        "udp" => Ok(UDP),
        "ipv6-icmp" => Ok(58),
        // To iptables 0 is every protocol.
        _ => read(text, "protocol").and_then(|number| match number {
            0 => Err("unknown protocol 0".to_owned()),
            number => Ok(number),
        }),
    }
}

/// Reads an address, with or without a prefix length.
fn read_network(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => read(text, "network"),
    }
}

fn read_interface(text: &str) -> Result<String, String> {
    if text.ends_with('+') {
        Err("unknown: an interface name that ends in +".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// Reads `PORT` or `FIRST:LAST`.
fn read_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    let ports = read(first, "port")?..=read(last, "port")?;
    if ports.is_empty() {
        return Err(format!("{text} is an empty range"));
    }
    Ok(ports)
}

/// Reads a uid or gid. The highest number is none: the kernel refuses it.
fn read_id(text: &str) -> Result<u32, String> {
    match read(text, "uid or gid")? {
        u32::MAX => Err(format!("{text} is no uid or gid")),
        id => Ok(id),
    }
}
