//! Settings as iptables chains: what the mesh's own tool would install for the
//! same answers.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use interceptor_common::chains::Chain;
use ipnet::IpNet;

use super::{Cidrs, Dns, Mode, OwnerGroups, PortRange, Ports, Settings};

/// An address family, each of which has chains of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4: iptables.
    V4,
    /// IPv6: ip6tables.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The CIDRs that are of this family.
    pub(super) fn of(self, cidrs: &[IpNet]) -> Vec<IpNet> {
        cidrs
            .iter()
            .copied()
            .filter(|cidr| cidr.addr().is_ipv4() == (self == Self::V4))
            .collect()
    }

    /// The source address with which the proxy passes inbound connections on.
    pub const fn passthrough(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6)),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A rule of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainRule {
    /// What it matches, in the words of iptables; empty for everything.
    pub matches: String,
    /// Its target, with the target's options.
    pub target: String,
}

impl ChainRule {
    fn new(matches: impl Into<String>, target: impl Into<String>) -> Self {
        Self {
            matches: matches.into(),
            target: target.into(),
        }
    }
}

impl fmt::Display for ChainRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.matches.is_empty() {
            write!(f, "{} ", self.matches)?;
        }
        write!(f, "-j {}", self.target)
    }
}

const REDIRECT: &str = "ISTIO_REDIRECT";
const IN_REDIRECT: &str = "ISTIO_IN_REDIRECT";
const OUTPUT_DNS: &str = "ISTIO_OUTPUT_DNS";
const RETURN: &str = "RETURN";

/// The conntrack zone of DNS between the proxy and the servers.
const SERVER_ZONE: &str = "CT --zone 1";
/// That of DNS between the application and the proxy.
const CLIENT_ZONE: &str = "CT --zone 2";

/// The mark of the proxy's connections to its own pod under TPROXY.
const TO_ITSELF_MARK: &str = "MARK --set-xmark 0x53a/0xffffffff";

/// `--dport`, as iptables-save writes it.
fn dport(range: PortRange) -> String {
    if range.first() == range.last() {
        format!("--dport {}", range.first())
    } else {
        format!("--dport {}:{}", range.first(), range.last())
    }
}

fn tcp_port(range: PortRange) -> String {
    format!("-p tcp -m tcp {}", dport(range))
}

/// The chains of one table, in the order in which they are declared.
type Table = Vec<(&'static str, Vec<ChainRule>)>;

impl Settings {
    /// Whether a family has chains.
    pub fn has_chains(&self, family: Family) -> bool {
        self.captures() && (family == Family::V4 || self.ipv6)
    }

    /// The rules of a chain, in their order.
    pub fn rules(&self, chain: Chain, family: Family) -> Vec<ChainRule> {
        if !self.has_chains(family) {
            return Vec::new();
        }
        match chain {
            Chain::Out => self.excluded("-o"),
            Chain::In => self.excluded("-i"),
            Chain::Output => self.output_rules(family),
            Chain::Inbound => self.inbound_rules(family),
        }
    }

    /// The rules of both families that the mesh's own tool would install, as
    /// iptables-restore and ip6tables-restore read them.
    pub fn iptables_restore(&self, family: Family) -> String {
        let mut text = String::new();
        if !self.has_chains(family) {
            return text;
        }
        for (name, built_in, table) in [
            ("raw", &["PREROUTING", "OUTPUT"][..], self.raw_table(family)),
            (
                "mangle",
                &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
                self.mangle_table(family),
            ),
            (
                "nat",
                &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"],
                self.nat_table(family),
            ),
        ] {
            if table.iter().all(|(_, rules)| rules.is_empty()) {
                continue;
            }
            // Writing to a string can't fail.
            let _ = writeln!(text, "*{name}");
            for chain in built_in {
                let _ = writeln!(text, ":{chain} ACCEPT [0:0]");
            }
            for (chain, _) in &table {
                if !built_in.contains(chain) {
                    let _ = writeln!(text, ":{chain} - [0:0]");
                }
            }
            for (chain, rules) in &table {
                for rule in rules {
                    let _ = writeln!(text, "-A {chain} {rule}");
                }
            }
            text.push_str("COMMIT\n");
        }
        text
    }

    fn excluded(&self, option: &str) -> Vec<ChainRule> {
        self.excluded_interfaces
            .iter()
            .map(|name| ChainRule::new(format!("{option} {name}"), RETURN))
            .collect()
    }

    pub(crate) fn captures_inbound(&self) -> bool {
        self.inbound_ports != Ports::List(Vec::new())
    }

    fn nat_table(&self, family: Family) -> Table {
        let redirect = |port: u16| {
            vec![ChainRule::new(
                "-p tcp",
                format!("REDIRECT --to-ports {port}"),
            )]
        };
        let tproxy = self.mode == Mode::Tproxy;
        let mut prerouting = self.excluded("-i");
        if self.captures_inbound() && !tproxy {
            prerouting.push(ChainRule::new("-p tcp", "ISTIO_INBOUND"));
        }
        let mut out = self.excluded("-o");
        // Only DNS is captured of what isn't TCP.
        let tcp = if self.dns.is_on() { "" } else { "-p tcp" };
        out.push(ChainRule::new(tcp, "ISTIO_OUTPUT"));
        let inbound = if tproxy || !self.captures_inbound() {
            Vec::new()
        } else {
            self.inbound_rules(family)
        };
        let mut table = vec![
            ("PREROUTING", prerouting),
            ("OUTPUT", out),
            ("ISTIO_INBOUND", inbound),
            (IN_REDIRECT, redirect(self.inbound_port)),
            ("ISTIO_OUTPUT", self.output_rules(family)),
        ];
        if self.dns_jump(family) {
            table.push((OUTPUT_DNS, self.dns_rules(family)));
        }
        table.push((REDIRECT, redirect(self.outbound_port)));
        table
    }

    fn inbound_rules(&self, family: Family) -> Vec<ChainRule> {
        let mut rules = Vec::new();
        let tproxy = self.mode == Mode::Tproxy;
        let mark = self.tproxy_mark;
        if tproxy {
            rules.push(ChainRule::new(
                format!("-p tcp -m mark --mark {mark:#x}"),
                RETURN,
            ));
            let passthrough = IpNet::from(family.passthrough());
            rules.push(ChainRule::new(
                format!("-s {passthrough} -i lo -p tcp"),
                RETURN,
            ));
            rules.push(ChainRule::new(
                "-i lo -p tcp -m mark ! --mark 0x53a",
                RETURN,
            ));
        } else if let Some(port) = self.tunnel_port {
            rules.push(ChainRule::new(tcp_port(port.into()), RETURN));
        }
        let target = if tproxy { "ISTIO_TPROXY" } else { IN_REDIRECT };
        let established = "-m conntrack --ctstate RELATED,ESTABLISHED";
        match &self.inbound_ports {
            Ports::All => {
                rules.extend(
                    self.excluded_inbound_ports
                        .iter()
                        .map(|port| ChainRule::new(tcp_port(*port), RETURN)),
                );
                if tproxy {
                    rules.push(ChainRule::new(
                        format!("-p tcp {established}"),
                        "ISTIO_DIVERT",
                    ));
                }
                rules.push(ChainRule::new("-p tcp", target));
            }
            Ports::List(ports) => {
                for port in ports {
                    let matches = tcp_port(*port);
                    if tproxy {
                        rules.push(ChainRule::new(
                            format!("{matches} {established}"),
                            "ISTIO_DIVERT",
                        ));
                    }
                    rules.push(ChainRule::new(matches, target));
                }
            }
        }
        rules
    }

    fn localhost(&self, family: Family) -> IpNet {
        match family {
            Family::V4 => self.loopback_cidr.trunc().into(),
            Family::V6 => IpAddr::from(Ipv6Addr::LOCALHOST).into(),
        }
    }

    fn output_rules(&self, family: Family) -> Vec<ChainRule> {
        let mut rules = Vec::new();
        for port in &self.excluded_outbound_ports {
            rules.push(ChainRule::new(tcp_port(*port), RETURN));
            let dport = dport(*port);
            rules.push(ChainRule::new(format!("-p udp -m udp {dport}"), RETURN));
        }
        let passthrough = IpNet::from(family.passthrough());
        rules.push(ChainRule::new(format!("-s {passthrough} -o lo"), RETURN));
        let localhost = self.localhost(family);
        let dns = self.dns.is_on();
        for (option, owners, leaves_dns_alone) in [
            ("--uid-owner", &self.proxy_uids, dns),
            ("--gid-owner", &self.proxy_gids, false),
        ] {
            let ports = match (self.tunnel_port, leaves_dns_alone) {
                (None, false) => "",
                (None, true) => " -p tcp -m tcp ! --dport 53",
                (Some(port), false) => &format!(" -p tcp -m tcp ! --dport {port}"),
                (Some(port), true) => &format!(" -p tcp -m multiport ! --dports 53,{port}"),
            };
            for owner in owners {
                rules.push(ChainRule::new(
                    format!("! -d {localhost} -o lo{ports} -m owner {option} {owner}"),
                    IN_REDIRECT,
                ));
                if !self.captures_loopback() {
                    let not_dns = if dns {
                        " -p tcp -m tcp ! --dport 53"
                    } else {
                        ""
                    };
                    rules.push(ChainRule::new(
                        format!("-o lo{not_dns} -m owner ! {option} {owner}"),
                        RETURN,
                    ));
                }
                rules.push(ChainRule::new(format!("-m owner {option} {owner}"), RETURN));
            }
        }
        match &self.owner_groups {
            OwnerGroups::Only(groups) => {
                let none_of: Vec<String> = groups
                    .iter()
                    .map(|group| format!("-m owner ! --gid-owner {group}"))
                    .collect();
                rules.push(ChainRule::new(none_of.join(" "), RETURN));
            }
            OwnerGroups::Except(groups) => rules.extend(
                groups
                    .iter()
                    .map(|group| ChainRule::new(format!("-m owner --gid-owner {group}"), RETURN)),
            ),
        }
        if self.dns_jump(family) {
            rules.push(ChainRule::new("", OUTPUT_DNS));
        }
        rules.push(ChainRule::new(format!("-d {localhost}"), RETURN));
        let to = |cidr: &IpNet| match cidr.trunc() {
            // iptables writes no condition that everything meets.
            all if all.prefix_len() == 0 => String::new(),
            cidr => format!("-d {cidr}"),
        };
        for cidr in family.of(&self.excluded_outbound_cidrs) {
            rules.push(ChainRule::new(to(&cidr), RETURN));
        }
        for port in &self.outbound_ports {
            rules.push(ChainRule::new(tcp_port(*port), REDIRECT));
        }
        match &self.outbound_cidrs {
            Cidrs::All => rules.push(ChainRule::new("", REDIRECT)),
            Cidrs::List(cidrs) => {
                for cidr in family.of(cidrs) {
                    rules.push(ChainRule::new(to(&cidr), REDIRECT));
                }
            }
        }
        rules
    }

    /// The servers whose DNS is captured; `None` for all.
    fn dns_servers(&self, family: Family) -> Option<Vec<IpNet>> {
        match &self.dns {
            Dns::Off => Some(Vec::new()),
            Dns::Servers(servers) => {
                let servers: Vec<_> = servers.iter().copied().map(IpNet::from).collect();
                Some(family.of(&servers))
            }
            Dns::All => None,
        }
    }

    /// Whether `ISTIO_OUTPUT` leads to `ISTIO_OUTPUT_DNS`.
    fn dns_jump(&self, family: Family) -> bool {
        self.dns_servers(family)
            .is_none_or(|servers| !servers.is_empty())
    }

    /// What matches DNS, for each protocol: to each server or to all.
    fn dns_matches(&self, family: Family, protocol: &str) -> Vec<String> {
        let port = format!("-p {protocol} -m {protocol} --dport 53");
        match self.dns_servers(family) {
            None => vec![port],
            Some(servers) => servers
                .iter()
                .map(|server| format!("-d {server} {port}"))
                .collect(),
        }
    }

    fn dns_rules(&self, family: Family) -> Vec<ChainRule> {
        ["tcp", "udp"]
            .into_iter()
            .flat_map(|protocol| self.dns_matches(family, protocol))
            .map(|matches| {
                ChainRule::new(matches, format!("REDIRECT --to-ports {}", self.dns_port))
            })
            .collect()
    }

    /// Keeps the application's DNS and the proxy's apart in conntrack.
    fn raw_table(&self, family: Family) -> Table {
        if !self.dns.is_on() {
            return Vec::new();
        }
        let mut dns = Vec::new();
        for (option, owners) in [
            ("--uid-owner", &self.proxy_uids),
            ("--gid-owner", &self.proxy_gids),
        ] {
            for owner in owners {
                for (port, zone) in [
                    ("--dport 53".to_owned(), SERVER_ZONE),
                    (format!("--sport {}", self.dns_port), CLIENT_ZONE),
                ] {
                    dns.push(ChainRule::new(
                        format!("-p udp -m udp {port} -m owner {option} {owner}"),
                        zone,
                    ));
                }
            }
        }
        let requests = self.dns_matches(family, "udp");
        dns.extend(
            requests
                .iter()
                .map(|matches| ChainRule::new(matches, CLIENT_ZONE)),
        );
        let answers: Vec<ChainRule> = requests
            .iter()
            .map(|matches| {
                let matches = matches.replace("-d ", "-s ").replace("--dport", "--sport");
                ChainRule::new(matches, SERVER_ZONE)
            })
            .collect();
        let mut table = Table::new();
        if !answers.is_empty() {
            table.push(("PREROUTING", vec![ChainRule::new("", "ISTIO_INBOUND")]));
        }
        table.push(("OUTPUT", vec![ChainRule::new("", OUTPUT_DNS)]));
        if !answers.is_empty() {
            table.push(("ISTIO_INBOUND", answers));
        }
        table.push((OUTPUT_DNS, dns));
        table
    }

    fn mangle_table(&self, family: Family) -> Table {
        let mut table = Table::new();
        let mut prerouting = Vec::new();
        let mut out = Vec::new();
        let tproxy = self.mode == Mode::Tproxy;
        if tproxy {
            prerouting.extend(self.excluded("-i"));
            out.extend(self.excluded("-o"));
        }
        if self.drop_invalid {
            prerouting.push(ChainRule::new(
                "-m conntrack --ctstate INVALID",
                "ISTIO_DROP",
            ));
        }
        let mark = self.tproxy_mark;
        let localhost = self.localhost(family);
        if tproxy {
            if self.captures_inbound() {
                prerouting.push(ChainRule::new("-p tcp", "ISTIO_INBOUND"));
            }
            prerouting.push(ChainRule::new(
                format!("-p tcp -m mark --mark {mark:#x}"),
                "CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
            ));
            out.push(ChainRule::new(
                format!("-o lo -p tcp -m mark --mark {mark:#x}"),
                RETURN,
            ));
            for (option, owners) in [
                ("--uid-owner", &self.proxy_uids),
                ("--gid-owner", &self.proxy_gids),
            ] {
                for owner in owners {
                    out.push(ChainRule::new(
                        format!("! -d {localhost} -o lo -p tcp -m owner {option} {owner}"),
                        TO_ITSELF_MARK,
                    ));
                }
            }
            out.push(ChainRule::new(
                format!("-p tcp -m connmark --mark {mark:#x}"),
                "CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
            ));
        }
        table.push(("PREROUTING", prerouting));
        table.push(("OUTPUT", out));
        if self.drop_invalid {
            table.push(("ISTIO_DROP", vec![ChainRule::new("", "DROP")]));
        }
        if tproxy {
            table.push((
                "ISTIO_DIVERT",
                vec![
                    ChainRule::new("", format!("MARK --set-xmark {mark:#x}/0xffffffff")),
                    ChainRule::new("", "ACCEPT"),
                ],
            ));
            if self.captures_inbound() {
                table.push(("ISTIO_INBOUND", self.inbound_rules(family)));
                table.push((
                    "ISTIO_TPROXY",
                    vec![ChainRule::new(
                        format!("! -d {localhost} -p tcp"),
                        format!(
                            "TPROXY --on-port {} --tproxy-mark {mark:#x}/0xffffffff",
                            self.inbound_port
                        ),
                    )],
                ));
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_seed_chains() {
        let seed = include_str!("../../../tests/oracle/seed-rules.v4");
        let text = Settings::default().iptables_restore(Family::V4);
        let rules = |text: &str| -> Vec<String> {
            let mut rules: Vec<_> = text
                .lines()
                .filter(|line| line.starts_with("-A "))
                .map(str::to_owned)
                .collect();
            // Chains may stand in any order, rules may not.
            rules.sort_by_key(|rule| rule.split(' ').nth(1).unwrap().to_owned());
            rules
        };
        assert_eq!(rules(&text), rules(seed));
    }

    #[test]
    fn rules_have_the_numbers_that_the_programs_are_told() {
        use crate::settings::Place;
        let settings = Settings {
            excluded_outbound_ports: vec![1.into(), 2.into()],
            outbound_ports: vec![3.into()],
            owner_groups: OwnerGroups::Except(vec![7, 8]),
            dns: Dns::All,
            outbound_cidrs: Cidrs::All,
            excluded_outbound_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
            ..Settings::tool()
        };
        let compiled = settings.compile(&Place::default(), 0).unwrap().settings.v4;
        let rules = settings.rules(Chain::Output, Family::V4);
        for (number, matches) in [
            (compiled.passthrough_rule, "-s 127.0.0.6/32 -o lo"),
            (compiled.groups_rule, "-m owner --gid-owner 7"),
            (compiled.dns_rule, ""),
            (compiled.localhost_rule, "-d 127.0.0.1/32"),
            (compiled.outbound_all_rule, ""),
        ] {
            assert_eq!(rules[number as usize - 1].matches, matches, "{rules:?}");
        }
        assert_eq!(compiled.outbound_all_rule as usize, rules.len());
    }
}
