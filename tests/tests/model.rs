//! Interceptor's policy against an interpreter of the chains' own text: the seed
//! chains for every combination of what they look at, and the chains that the
//! mesh's own tool makes of random settings for what those tell apart.

#![expect(clippy::print_stdout, reason = "says how much was compared")]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use interceptor_common::chains::{self, Chain, Decision, InboundFacts, OutputFacts, Verdict};
use interceptor_tests::{
    interpreter::{Ending, Origin, Outcome, Owner, Packet, ParseError, Step, Table},
    iptables::Version,
    mesh::{Dns, Mesh, Mode, random, strings},
};
use interceptor_userspace::settings::{Compiled, Place, Settings};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, FileFailurePersistence},
};

const SEED_RULES: &str = include_str!("../oracle/seed-rules.v4");
const OBSERVED: &str = include_str!("../oracle/observed.tsv");

const TCP: u8 = 6;
const UDP: u8 = 17;
/// None, ICMP, TCP, UDP, ICMPv6, SCTP and the highest.
const PROTOCOLS: [u8; 7] = [0, 1, TCP, UDP, 58, 132, 255];
const INTERFACES: [&str; 2] = ["lo", "eth0"];
/// The mesh's uid and gid, their neighbours, root, an application and the
/// number that is no id.
const IDS: [u32; 6] = [1337, 1336, 1338, 0, 2000, u32::MAX];
/// The ports that the chains name, an application's and the ends.
const PORTS: [u16; 8] = [22, 15090, 15020, 15001, 15006, 8080, 0, 65535];

const POD: &str = "10.77.0.2";

/// The interfaces of the place that settings are compiled for, by their indexes.
const ALL_INTERFACES: [&str; 4] = ["lo", "eth0", "eth1", "eth2"];

fn index_of(interface: &str) -> u32 {
    let index = ALL_INTERFACES.iter().position(|name| *name == interface);
    u32::try_from(index.unwrap() + 1).unwrap()
}

fn compile(settings: &Settings) -> Compiled {
    let place = Place {
        interfaces: ALL_INTERFACES
            .iter()
            .map(|name| ((*name).to_owned(), index_of(name)))
            .collect(),
        ..Place::default()
    };
    settings.compile(&place, 0).unwrap()
}

#[derive(Clone, Copy, Debug)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn sources(self) -> Vec<IpAddr> {
        addresses(match self {
            Self::V4 => &[
                "127.0.0.6",
                "127.0.0.5",
                "127.0.0.7",
                "127.0.0.1",
                POD,
                "10.77.0.1",
            ],
            // The last two hold the bits of 127.0.0.6 and of ::6 elsewhere.
            Self::V6 => &[
                "::6", "::5", "::7", "::1", "fd77::2", "fd77::1", "::7f00:6", "6::",
            ],
        })
    }

    fn destinations(self) -> Vec<IpAddr> {
        addresses(match self {
            Self::V4 => &[
                "127.0.0.1",
                "127.0.0.0",
                "127.0.0.2",
                "127.255.255.255",
                POD,
                "10.77.0.1",
            ],
            Self::V6 => &["::1", "::", "::2", "fd77::2", "fd77::1", "::7f00:1", "1::1"],
        })
    }

    /// The rules' text for this family.
    fn of_v4(self, text: &str) -> String {
        match self {
            Self::V4 => text.to_owned(),
            Self::V6 => text
                .replace("127.0.0.6/32", "::6/128")
                .replace("127.0.0.1/32", "::1/128"),
        }
    }
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// No owner, and every pair of a uid and a gid from `ids`.
fn owners(ids: &BTreeSet<u32>) -> Vec<Option<Owner>> {
    let pairs = ids
        .iter()
        .flat_map(|&uid| ids.iter().map(move |&gid| Owner { uid, gid }));
    std::iter::once(None).chain(pairs.map(Some)).collect()
}

/// The ports and those beside them.
fn with_neighbours(ports: impl IntoIterator<Item = u16>) -> BTreeSet<u16> {
    ports
        .into_iter()
        .flat_map(|port| [port.checked_sub(1), Some(port), port.checked_add(1)])
        .flatten()
        .collect()
}

fn table(text: &str) -> Table {
    text.parse().unwrap_or_else(|e: ParseError| panic!("{e}"))
}

/// What the table decided, and by which rule.
fn decision(table: &Table, outcome: &Outcome<'_>) -> Decision {
    let (verdict, step) = match outcome.ending {
        // RETURN ends a chain; a jump that came back has decided nothing.
        Ending::Accept => (
            Verdict::Direct,
            outcome.trace.iter().rfind(|step| !table.is_jump(**step)),
        ),
        Ending::Redirect { port } => (
            match port {
                15001 | 16001 => Verdict::Outbound,
                15006 | 16006 => Verdict::Inbound,
                15053 => Verdict::Dns,
                other => panic!("redirected to {other}"),
            },
            outcome.trace.iter().rev().nth(1),
        ),
    };
    let Some(step) = step else {
        return NO_RULE;
    };
    Decision {
        verdict,
        chain: match step.chain {
            "OUTPUT" => Chain::Out,
            "ISTIO_OUTPUT" => Chain::Output,
            "PREROUTING" => Chain::In,
            "ISTIO_INBOUND" => Chain::Inbound,
            other => panic!("decided in {other}"),
        },
        rule: step.rule,
    }
}

const NO_RULE: Decision = Decision {
    verdict: Verdict::Direct,
    chain: Chain::Output,
    rule: 0,
};

/// The decision; without a rule it has no chain.
fn normal(decision: Decision) -> Decision {
    if decision
        == (Decision {
            chain: decision.chain,
            ..NO_RULE
        })
    {
        NO_RULE
    } else {
        decision
    }
}

/// How the table must end a connection with this verdict.
fn ending(compiled: &Compiled, verdict: Verdict) -> Ending {
    let settings = &compiled.settings;
    match verdict {
        Verdict::Direct => Ending::Accept,
        Verdict::Outbound => Ending::Redirect {
            port: settings.outbound_port,
        },
        Verdict::Inbound => Ending::Redirect {
            port: settings.inbound_port,
        },
        Verdict::Dns => Ending::Redirect {
            port: settings.dns_port,
        },
    }
}

/// The policy's answer for the packet of a connection that the pod makes.
fn policy_output(compiled: &Compiled, packet: &Packet<'_>) -> Decision {
    let Origin::Inside {
        out_interface,
        owner,
    } = packet.origin
    else {
        panic!("not from inside: {packet:?}");
    };
    let facts = OutputFacts {
        protocol: packet.protocol.into(),
        source: packet.source.into(),
        destination: packet.destination.into(),
        destination_port: packet.destination_port,
        over_loopback: out_interface == "lo",
        out_interface: index_of(out_interface),
        owner: owner.map_or(chains::Owner::NONE, |Owner { uid, gid }| chains::Owner {
            uid,
            gid,
        }),
        mark: 0,
    };
    normal(chains::output(
        &compiled.settings,
        &compiled.prefixes,
        &facts,
    ))
}

/// The policy's answer for the packet of a connection that arrives.
fn policy_inbound(compiled: &Compiled, packet: &Packet<'_>) -> Decision {
    let facts = InboundFacts {
        protocol: packet.protocol.into(),
        destination: packet.destination.into(),
        destination_port: packet.destination_port,
        in_interface: match packet.origin {
            Origin::Inside { .. } => index_of("lo"),
            Origin::Outside { in_interface } => index_of(in_interface),
        },
        from_inside: matches!(packet.origin, Origin::Inside { .. }),
    };
    normal(chains::inbound(
        &compiled.settings,
        &compiled.prefixes,
        &facts,
    ))
}

/// Compares all connections that the pod can make; returns how many.
fn compare_output(
    table: &Table,
    compiled: &Compiled,
    family: Family,
    ids: &BTreeSet<u32>,
    ports: &BTreeSet<u16>,
) -> usize {
    let (sources, destinations, owners) = (family.sources(), family.destinations(), owners(ids));
    let mut comparisons = 0;
    for protocol in PROTOCOLS {
        for out_interface in INTERFACES {
            for &source in &sources {
                for &destination in &destinations {
                    for &owner in &owners {
                        for &destination_port in ports {
                            let packet = Packet {
                                protocol,
                                origin: Origin::Inside {
                                    out_interface,
                                    owner,
                                },
                                source,
                                destination,
                                destination_port,
                            };
                            let outcome = table.connection(&packet);
                            let policy = policy_output(compiled, &packet);
                            assert_eq!(policy, decision(table, &outcome), "{packet:?}");
                            assert_eq!(
                                ending(compiled, policy.verdict),
                                outcome.ending,
                                "{packet:?}"
                            );
                            comparisons += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(
        comparisons,
        PROTOCOLS.len()
            * INTERFACES.len()
            * sources.len()
            * destinations.len()
            * owners.len()
            * ports.len()
    );
    comparisons
}

/// Compares connections that arrive, for every port; returns how many. Those
/// that arrive over `lo` come from inside.
fn compare_inbound(table: &Table, compiled: &Compiled, family: Family) -> usize {
    let origins = INTERFACES.map(|interface| match interface {
        "lo" => Origin::Inside {
            out_interface: interface,
            owner: None,
        },
        _ => Origin::Outside {
            in_interface: interface,
        },
    });
    let (sources, destinations) = (family.sources(), family.destinations());
    let mut comparisons = 0;
    for protocol in PROTOCOLS {
        for origin in origins {
            for &source in &sources {
                for &destination in &destinations {
                    for destination_port in 0..=u16::MAX {
                        let packet = Packet {
                            protocol,
                            origin,
                            source,
                            destination,
                            destination_port,
                        };
                        let policy = policy_inbound(compiled, &packet);
                        if matches!(origin, Origin::Outside { .. }) {
                            let outcome = table.connection(&packet);
                            assert_eq!(policy, decision(table, &outcome), "{packet:?}");
                            assert_eq!(
                                ending(compiled, policy.verdict),
                                outcome.ending,
                                "{packet:?}"
                            );
                        } else {
                            assert_eq!(policy, NO_RULE, "{packet:?}");
                        }
                        comparisons += 1;
                    }
                }
            }
        }
    }
    assert_eq!(
        comparisons,
        PROTOCOLS.len() * origins.len() * sources.len() * destinations.len() * 65_536
    );
    comparisons
}

fn compare_seed_output(family: Family) {
    let table = table(&family.of_v4(SEED_RULES));
    let ports = with_neighbours(PORTS);
    let n = compare_output(
        &table,
        &compile(&Settings::default()),
        family,
        &BTreeSet::from(IDS),
        &ports,
    );
    println!("{n} comparisons of ISTIO_OUTPUT, {family:?}");
}

fn compare_seed_inbound(family: Family) {
    let table = table(&family.of_v4(SEED_RULES));
    let n = compare_inbound(&table, &compile(&Settings::default()), family);
    println!("{n} comparisons of ISTIO_INBOUND, {family:?}");
}

#[test]
fn the_output_chain_v4() {
    compare_seed_output(Family::V4);
}

#[test]
fn the_output_chain_v6() {
    compare_seed_output(Family::V6);
}

#[test]
fn the_inbound_chain_v4() {
    compare_seed_inbound(Family::V4);
}

#[test]
fn the_inbound_chain_v6() {
    compare_seed_inbound(Family::V6);
}

/// Settings of the mesh's own tool as Interceptor's.
fn settings(mesh: &Mesh) -> Settings {
    serde_json::from_value(mesh.json()).unwrap()
}

/// Compares one connection, for the table that the mesh's own tool would make;
/// false if they differ.
fn same(mesh: &Mesh, table: &Table, compiled: &Compiled, packet: &Packet<'_>) -> bool {
    let outcome = table.connection(packet);
    let policy = match packet.origin {
        Origin::Inside { .. } => policy_output(compiled, packet),
        Origin::Outside { .. } => policy_inbound(compiled, packet),
    };
    // Packets that nothing captures walk the mesh's chains in vain.
    let walks = match packet.origin {
        Origin::Inside { .. } => {
            packet.protocol == TCP || packet.protocol == UDP && mesh.dns != Dns::Off
        }
        Origin::Outside { .. } => packet.protocol == TCP && !mesh.inbound_ports.is_empty(),
    };
    let same_rule = !walks
        || mesh.mode == Mode::None
        || matches!(&mesh.dns, Dns::Servers(servers) if servers.is_empty())
        || policy == decision(table, &outcome);
    same_rule && ending(compiled, policy.verdict) == outcome.ending
}

/// A random choice among what some settings tell apart.
fn connection(mesh: &Mesh, random: [usize; 7]) -> Packet<'static> {
    fn one<T: Clone>(from: &[T], random: usize) -> T {
        from[random % from.len()].clone()
    }
    let [
        inside,
        interface,
        owner,
        protocol,
        source,
        destination,
        port,
    ] = random;
    let mut destinations = mesh.destinations();
    destinations.extend(
        [
            "127.0.0.1",
            "127.0.0.2",
            "127.0.0.4",
            "127.1.0.0",
            POD,
            "::1",
            "fd00:77::2",
        ]
        .map(|address| address.parse::<IpAddr>().unwrap()),
    );
    let destination = one(&destinations, destination);
    let source = if destination.is_ipv4() {
        one(&["127.0.0.6", "127.0.0.7", POD, "10.77.0.1"], source)
    } else {
        one(&["::6", "::7", "fd00:77::2", "fd00:77::1"], source)
    };
    let protocols = [TCP, TCP, TCP, UDP, 1];
    let origin = if inside % 3 != 0 {
        let owner = one(&mesh.owners(), owner);
        Origin::Inside {
            out_interface: one(&ALL_INTERFACES, interface),
            owner: (owner.uid != 1338).then_some(Owner {
                uid: owner.uid,
                gid: owner.gid,
            }),
        }
    } else {
        Origin::Outside {
            in_interface: one(&ALL_INTERFACES[1..], interface),
        }
    };
    Packet {
        protocol: one(&protocols, protocol),
        origin,
        source: source.parse().unwrap(),
        destination,
        destination_port: one(&mesh.ports(), port),
    }
}

/// Those whose rules are all in the nat table.
const MODES: [Mode; 6] = [
    Mode::Redirect,
    Mode::Redirect,
    Mode::Redirect,
    Mode::Redirect,
    Mode::Redirect,
    Mode::None,
];

/// Connections for each random settings.
const CONNECTIONS: usize = 200;

proptest! {
    #![proptest_config(Config {
        cases: 1000,
        max_shrink_iters: 100,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..Config::default()
    })]

    #[test]
    fn random_settings(
        mesh in random::settings(&MODES),
        choices in prop::collection::vec(any::<[usize; 7]>(), CONNECTIONS),
    ) {
        let compiled = compile(&settings(&mesh));
        let [v4, v6] = Version::BOTH.map(|version| table(&mesh.nat(version)));
        for choice in choices {
            let packet = connection(&mesh, choice);
            let table = if packet.destination.is_ipv4() { &v4 } else { &v6 };
            prop_assert!(
                same(&mesh, table, &compiled, &packet),
                "{:?}\npolicy: {:?}\nchains: {:?}\n{}",
                packet,
                match packet.origin {
                    Origin::Inside { .. } => policy_output(&compiled, &packet),
                    Origin::Outside { .. } => policy_inbound(&compiled, &packet),
                },
                table.connection(&packet),
                mesh.nat(if packet.destination.is_ipv4() { Version::V4 } else { Version::V6 }),
            );
        }
    }

    /// The chains that `--dry-run` shows do what the mesh's own would.
    #[test]
    fn the_equivalent_chains(
        mesh in random::settings(&MODES),
        choices in prop::collection::vec(any::<[usize; 7]>(), 50),
    ) {
        use interceptor_userspace::settings::Family;
        let settings = settings(&mesh);
        let tables = [(Version::V4, Family::V4), (Version::V6, Family::V6)].map(|(version, family)| {
            let text = settings.iptables_restore(family);
            let ours = match text.find("*nat") {
                Some(start) => table(&text[start..]),
                None => table("*nat\nCOMMIT\n"),
            };
            (table(&mesh.nat(version)), ours)
        });
        for choice in choices {
            let packet = connection(&mesh, choice);
            let (mesh, ours) = &tables[usize::from(packet.destination.is_ipv6())];
            prop_assert_eq!(
                mesh.connection(&packet).ending,
                ours.connection(&packet).ending,
                "{:?}",
                packet
            );
        }
    }
}

/// As many of everything as there may be.
#[test]
fn the_largest_settings() {
    let ids = |first: u32, count: u32| (first..first + count).collect::<Vec<_>>();
    let ports = |first: u16| -> Vec<String> {
        (0..64)
            .map(|n| format!("{}:{}", first + 20 * n, first + 20 * n + 9))
            .collect()
    };
    let cidrs = |first: u8| -> Vec<String> {
        (0..=255)
            .map(|n| format!("10.{first}.{n}.0/25"))
            .chain((0..=255).map(|n| format!("fd00:{first}:{n:x}::/65")))
            .collect()
    };
    let mesh = Mesh {
        uids: ids(11, 8),
        gids: ids(21, 8),
        inbound_ports: ports(1000),
        cidrs: cidrs(79),
        excluded_cidrs: cidrs(78),
        outbound_ports: ports(3000),
        excluded_outbound_ports: ports(5000),
        except_groups: ids(100, 64),
        excluded_interfaces: strings(&["eth1", "eth2", "a", "b", "c", "d", "e", "f"]),
        dns: Dns::All,
        ..Mesh::default()
    };
    let compiled = compile(&settings(&mesh));
    let tables = Version::BOTH.map(|version| table(&mesh.nat(version)));
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let choices = any::<[usize; 7]>();
    for _ in 0..2000 {
        let choice = choices.new_tree(&mut runner).unwrap().current();
        let packet = connection(&mesh, choice);
        let table = &tables[usize::from(packet.destination.is_ipv6())];
        assert!(same(&mesh, table, &compiled, &packet), "{packet:?}");
    }
}

#[test]
fn the_default_settings_are_those_of_the_seed() {
    let seed = Mesh {
        tunnel_port: None,
        excluded_inbound_ports: strings(&["22", "15090", "15020"]),
        ..Mesh::injected()
    };
    assert_eq!(settings(&seed), Settings::default());
}

/// A packet from the other host to a port of the pod.
fn arriving(destination_port: u16) -> Packet<'static> {
    Packet {
        protocol: TCP,
        origin: Origin::Outside {
            in_interface: "eth0",
        },
        source: Ipv4Addr::new(10, 77, 0, 1).into(),
        destination: Ipv4Addr::new(10, 77, 0, 2).into(),
        destination_port,
    }
}

/// A packet that leaves a socket of the pod.
fn leaving(
    owner: Option<(u32, u32)>,
    source: &str,
    out_interface: &'static str,
    destination: &str,
) -> Packet<'static> {
    Packet {
        protocol: TCP,
        origin: Origin::Inside {
            out_interface,
            owner: owner.map(|(uid, gid)| Owner { uid, gid }),
        },
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        destination_port: 8080,
    }
}

/// What a real kernel did, as neither the interpreter nor the policy knows it.
#[test]
fn both_agree_with_a_real_kernel() {
    let table = table(SEED_RULES);
    let settings = compile(&Settings::default());
    let rows = OBSERVED
        .lines()
        .filter(|line| !line.starts_with('#'))
        .skip(1);
    let mut n = 0;
    for row in rows {
        let columns: Vec<&str> = row.split('\t').collect();
        let [case, client, destination, served_by, _, local_name, ..] = columns[..] else {
            panic!("too few columns: {row}");
        };
        let (destination, port) = destination.split_once(':').unwrap();
        let packet = if case.starts_with("peer->") {
            arriving(port.parse().unwrap())
        } else {
            let ids: Vec<&str> = client.split('/').collect();
            let over_lo = destination.starts_with("127.") || destination == POD;
            // A connection that was refused has no name left.
            let source = local_name.split_once(':').map_or(POD, |(ip, _)| ip);
            Packet {
                destination_port: port.parse().unwrap(),
                ..leaving(
                    Some((ids[0].parse().unwrap(), ids[1].parse().unwrap())),
                    source,
                    if over_lo { "lo" } else { "eth0" },
                    destination,
                )
            }
        };
        let seen = match served_by {
            "APP" | "PEER" | "REFUSED" => Ending::Accept,
            proxy => Ending::Redirect {
                port: proxy.strip_prefix("PROXY:").unwrap().parse().unwrap(),
            },
        };
        assert_eq!(table.connection(&packet).ending, seen, "interpreter: {row}");
        let policy = match packet.origin {
            Origin::Inside { .. } => policy_output(&settings, &packet),
            Origin::Outside { .. } => policy_inbound(&settings, &packet),
        };
        assert_eq!(ending(&settings, policy.verdict), seen, "policy: {row}");
        n += 1;
    }
    assert_eq!(n, 26, "rows of observed.tsv");
}

/// The rule that decides, found by reading the chains.
#[test]
fn the_interpreter_finds_the_rules() {
    const APP: Option<(u32, u32)> = Some((2000, 2000));
    const PROXY: Option<(u32, u32)> = Some((1337, 2000));
    const BY_GROUP: Option<(u32, u32)> = Some((2000, 1337));
    const PEER: &str = "10.77.0.1";
    let table = table(SEED_RULES);
    for (owner, source, interface, destination, rule, verdict) in [
        (APP, "127.0.0.6", "lo", POD, 1, Verdict::Direct),
        (PROXY, "127.0.0.6", "lo", POD, 1, Verdict::Direct),
        (APP, "127.0.0.6", "eth0", PEER, 9, Verdict::Outbound),
        (PROXY, POD, "lo", POD, 2, Verdict::Inbound),
        (PROXY, "127.0.0.1", "lo", "127.0.0.2", 2, Verdict::Inbound),
        (APP, POD, "lo", POD, 3, Verdict::Direct),
        (APP, "127.0.0.1", "lo", "127.0.0.1", 3, Verdict::Direct),
        // The first uid hides the rules of the gid.
        (BY_GROUP, POD, "lo", POD, 3, Verdict::Direct),
        (PROXY, "127.0.0.1", "lo", "127.0.0.1", 4, Verdict::Direct),
        (PROXY, POD, "eth0", PEER, 4, Verdict::Direct),
        (BY_GROUP, POD, "eth0", PEER, 7, Verdict::Direct),
        (APP, POD, "eth0", "127.0.0.1", 8, Verdict::Direct),
        (APP, POD, "eth0", PEER, 9, Verdict::Outbound),
        // A socket without a file is nobody's.
        (None, POD, "lo", POD, 3, Verdict::Direct),
        (None, POD, "eth0", PEER, 9, Verdict::Outbound),
    ] {
        let packet = leaving(owner, source, interface, destination);
        let outcome = table.connection(&packet);
        let expected = Decision {
            verdict,
            chain: Chain::Output,
            rule,
        };
        assert_eq!(decision(&table, &outcome), expected, "{packet:?}");
    }
    for (port, rule, verdict) in [
        (22, 1, Verdict::Direct),
        (15090, 2, Verdict::Direct),
        (15020, 3, Verdict::Direct),
        (15006, 4, Verdict::Inbound),
        (0, 4, Verdict::Inbound),
    ] {
        let outcome = table.connection(&arriving(port));
        let expected = Decision {
            verdict,
            chain: Chain::Inbound,
            rule,
        };
        assert_eq!(decision(&table, &outcome), expected, "{port}");
    }
    for packet in [
        arriving(8080),
        leaving(PROXY, POD, "lo", POD),
        leaving(APP, POD, "eth0", PEER),
    ] {
        let udp = Packet {
            protocol: UDP,
            ..packet
        };
        let untouched = Outcome {
            ending: Ending::Accept,
            trace: Vec::new(),
        };
        assert_eq!(table.connection(&udp), untouched, "{udp:?}");
    }
}

#[test]
fn the_trace_names_every_rule_that_matched() {
    let table = table(SEED_RULES);
    let step = |chain, rule| Step { chain, rule };
    let outcome = table.connection(&leaving(Some((1337, 0)), POD, "lo", POD));
    // Not PREROUTING, though the packet comes back in.
    assert_eq!(
        outcome.trace,
        [
            step("OUTPUT", 1),
            step("ISTIO_OUTPUT", 2),
            step("ISTIO_IN_REDIRECT", 1)
        ]
    );
    let outcome = table.connection(&arriving(15090));
    assert_eq!(
        outcome.trace,
        [step("PREROUTING", 1), step("ISTIO_INBOUND", 2)]
    );
}

/// The declarations and rules as a table: chains A and B and the built-in ones.
fn nat(rules: &str) -> String {
    format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n{rules}\nCOMMIT\n"
    )
}

/// The rules that match the packet, as `CHAIN RULE`.
fn trace(rules: &str, packet: &Packet<'_>) -> (Ending, Vec<String>) {
    let table = table(&nat(rules));
    let Outcome { ending, trace } = table.connection(packet);
    let steps = trace.iter().map(|s| format!("{} {}", s.chain, s.rule));
    (ending, steps.collect())
}

#[test]
fn chains_return_where_they_were_called() {
    let packet = arriving(80);
    let (ending, steps) = trace(
        "-A PREROUTING -j A\n-A PREROUTING -p tcp -j REDIRECT --to-ports 1\n\
         -A A -s 10.0.0.0/8 -j B\n-A A -j RETURN\n-A A -j ACCEPT\n-A B -d 1.2.3.4 -j ACCEPT",
        &packet,
    );
    assert_eq!(ending, Ending::Redirect { port: 1 });
    assert_eq!(steps, ["PREROUTING 1", "A 1", "A 2", "PREROUTING 2"]);

    // ACCEPT ends it all; RETURN from a built-in chain is its policy.
    let (ending, steps) = trace(
        "-A PREROUTING -j A\n-A PREROUTING -p tcp -j REDIRECT --to-ports 1\n-A A -j ACCEPT",
        &packet,
    );
    assert_eq!((ending, steps.len()), (Ending::Accept, 2));
    let (ending, steps) = trace(
        "-A PREROUTING -j RETURN\n-A PREROUTING -p tcp -j REDIRECT --to-ports 1",
        &packet,
    );
    assert_eq!((ending, steps.len()), (Ending::Accept, 1));
}

#[test]
fn conditions_match_as_iptables_says() {
    let arriving = arriving(80);
    let leaving = leaving(Some((5, 6)), POD, "lo", "127.0.0.1");
    let nobody = Packet {
        origin: Origin::Inside {
            out_interface: "lo",
            owner: None,
        },
        ..leaving
    };
    for (condition, packet, matches) in [
        ("-p tcp", &arriving, true),
        ("-p 6", &arriving, true),
        ("-p udp", &arriving, false),
        ("! -p udp", &arriving, true),
        ("-s 10.77.0.1", &arriving, true),
        ("-s 10.77.0.0/31", &arriving, true),
        ("-s 10.77.0.2/31", &arriving, false),
        // Bits behind the prefix don't count.
        ("-s 10.77.0.99/24", &arriving, true),
        ("! -s 10.77.0.0/24", &arriving, false),
        ("-s 0.0.0.0/0", &arriving, true),
        ("-s ::/0", &arriving, false),
        ("-d 10.77.0.2/32", &arriving, true),
        ("-d 10.77.0.3/32", &arriving, false),
        ("-i eth0", &arriving, true),
        ("! -i eth0", &arriving, false),
        ("! -i lo", &arriving, true),
        ("-o eth0", &arriving, false),
        ("! -o eth0", &arriving, true),
        ("-o lo", &leaving, true),
        ("-i lo", &leaving, false),
        ("-p tcp -m tcp --dport 80", &arriving, true),
        ("-p tcp -m tcp --dport 79:80", &arriving, true),
        ("-p tcp -m tcp --dport 81:65535", &arriving, false),
        ("-p tcp -m tcp ! --dport 80", &arriving, false),
        ("-m owner --uid-owner 5", &leaving, true),
        ("-m owner --uid-owner 6", &leaving, false),
        ("-m owner ! --uid-owner 6", &leaving, true),
        ("-m owner --gid-owner 6", &leaving, true),
        ("-m owner --gid-owner 5", &leaving, false),
        ("-m owner ! --gid-owner 5", &leaving, true),
        ("-m owner --uid-owner 5 --gid-owner 6", &leaving, true),
        ("-m owner --uid-owner 5 --gid-owner 5", &leaving, false),
        ("-m owner --uid-owner 5", &nobody, false),
        ("-m owner ! --uid-owner 5", &nobody, true),
        ("-m owner --gid-owner 6", &nobody, false),
        ("-m owner ! --gid-owner 6", &nobody, true),
    ] {
        let chain = match packet.origin {
            Origin::Inside { .. } => "OUTPUT",
            Origin::Outside { .. } => "PREROUTING",
        };
        let (_, steps) = trace(&format!("-A {chain} {condition} -j RETURN"), packet);
        assert_eq!(!steps.is_empty(), matches, "{condition}: {packet:?}");
    }
}

/// Lines that are wrong, and why.
const WRONG: &str = r#"
-A OUTPUT => no target
-A OUTPUT -p tcp => no target
-A OUTPUT -j => nothing after -j
-A OUTPUT ! => nothing after !
-A OUTPUT -s => nothing after -s
-A OUTPUT ! -j RETURN => unknown option ! -j
-A OUTPUT ! -m owner -j RETURN => unknown option ! -m
-A OUTPUT --sport 1 -j RETURN => unknown option --sport
-A OUTPUT -g A => unknown option -g
-A OUTPUT -m mark --mark 1 -j RETURN => unknown match mark
-A OUTPUT -m tcp --dport 1 -j RETURN => -m tcp needs -p tcp
-A OUTPUT ! -p tcp -m tcp -j RETURN => -m tcp needs -p tcp
-A OUTPUT -p tcp --dport 1 -j RETURN => unknown option --dport
-A OUTPUT --uid-owner 1 -j RETURN => unknown option --uid-owner
-A OUTPUT -p tcp -p udp -j RETURN => -p is given twice
-A OUTPUT -s 1.2.3.4 ! -s 1.2.3.5 -j RETURN => -s is given twice
-A OUTPUT -p gre -j RETURN => "gre" is not a protocol
-A OUTPUT -p 0 -j RETURN => unknown protocol 0
-A OUTPUT -s 1.2.3 -j RETURN => "1.2.3" is not a network
-A OUTPUT -d ::/129 -j RETURN => "::/129" is not a network
-A OUTPUT -o eth+ -j RETURN => unknown: an interface name that ends in +
-A OUTPUT -p tcp -m tcp --dport 65536 -j RETURN => "65536" is not a port
-A OUTPUT -p tcp -m tcp --dport 1: -j RETURN => "" is not a port
-A OUTPUT -p tcp -m tcp --dport 2:1 -j RETURN => 2:1 is an empty range
-A OUTPUT -m owner --uid-owner root -j RETURN => "root" is not a uid or gid
-A OUTPUT -m owner --gid-owner 4294967295 -j RETURN => 4294967295 is no uid or gid
-A OUTPUT -j DROP => unknown target DROP
-A OUTPUT -j ISTIO => unknown target ISTIO
-A A -j OUTPUT => unknown target OUTPUT
-A A -j A => jumping to A makes a loop
-A OUTPUT -p tcp -j REDIRECT => REDIRECT without --to-ports
-A OUTPUT -p tcp -j REDIRECT --to-ports => "" is not a port
-A OUTPUT -p tcp -j REDIRECT --to-ports 1-2 => "1-2" is not a port
-A OUTPUT -j REDIRECT --to-ports 1 => REDIRECT to a port needs -p tcp or -p udp
-A OUTPUT -j RETURN -p tcp => unexpected -p after the target
-A C -j RETURN => chain C is not declared
-I OUTPUT -j RETURN => neither a chain nor a rule
*filter => neither a chain nor a rule
:A - [0:0] => chain A is declared twice
:C - => not NAME POLICY [PACKETS:BYTES]
:C - [0] => [0] is not [PACKETS:BYTES]
:C ACCEPT [0:0] => policy ACCEPT where only - is known
:INPUT DROP [0:0] => policy DROP where only ACCEPT is known
"#;

#[test]
fn what_the_interpreter_does_not_know_is_an_error() {
    for row in WRONG.trim().lines() {
        let (rule, problem) = row.split_once(" => ").unwrap();
        let error = nat(rule).parse::<Table>().unwrap_err();
        let expected = ParseError {
            line: 6,
            text: rule.to_owned(),
            problem: problem.to_owned(),
        };
        assert_eq!(error, expected);
        assert_eq!(error.to_string(), format!("line 6: {problem}: {rule}"));
    }
    for (text, line, problem) in [
        ("", 0, "the text ends before COMMIT"),
        ("# nothing", 1, "the text ends before COMMIT"),
        ("*nat\n:A - [0:0]", 2, "the text ends before COMMIT"),
        ("# a\n\n*filter\nCOMMIT", 3, "not the nat table"),
        ("COMMIT", 1, "not the nat table"),
        ("*nat\nCOMMIT\n# b\n*nat", 4, "something after COMMIT"),
        (
            "*nat\n:A - [0:0]\n:B - [0:0]\n-A A -j B\n-A B -j A\nCOMMIT",
            5,
            "jumping to A makes a loop",
        ),
    ] {
        let error = text.parse::<Table>().unwrap_err();
        assert_eq!((error.line, error.problem.as_str()), (line, problem));
    }
}
