//! The rules: what happens to a connection, and which rule decides it.
//!
//! [`output`] and [`inbound`] are the sidecar's iptables chains `ISTIO_OUTPUT`
//! and `ISTIO_INBOUND`, with the rules in `OUTPUT` and `PREROUTING` that come
//! before them, stage by stage in their order. A chain's quirks (a rule that
//! hides a later one) are part of the answer. Nothing else decides: the kernel
//! programs only gather the facts and carry out the verdict.

use core::fmt;

use crate::{
    config::{
        Family, Filter, List, Lists, MAX_CIDRS, MAX_GROUPS, MAX_INTERFACES, MAX_OWNERS,
        MAX_PORT_RANGES, Settings, id_key, port_key, stages,
    },
    conn::{Address, TCP, UDP},
};

/// The port of DNS.
pub const DNS: u16 = 53;

/// A chain of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Chain {
    /// The kernel's own `OUTPUT`.
    Out,
    /// `ISTIO_OUTPUT`: connections that processes of the pod make.
    Output,
    /// The kernel's own `PREROUTING`.
    In,
    /// `ISTIO_INBOUND`: connections that arrive at the pod.
    Inbound,
}

impl Chain {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Out, Self::In, Self::Inbound, Self::Output];

    /// The most rules that settings can give the chain.
    pub const fn most_rules(self) -> usize {
        match self {
            Self::Out | Self::In => MAX_INTERFACES + 1,
            Self::Output => {
                // The excluded ports, passthrough, owners, groups, DNS,
                // localhost, excluded CIDRs, ports and CIDRs.
                2 * MAX_PORT_RANGES
                    + 1
                    + 2 * 3 * MAX_OWNERS
                    + MAX_GROUPS
                    + 2
                    + MAX_CIDRS
                    + MAX_PORT_RANGES
                    + MAX_CIDRS
            }
            Self::Inbound => 3 + 2 * MAX_PORT_RANGES + 2,
        }
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Out => "OUTPUT",
            Self::Output => "ISTIO_OUTPUT",
            Self::In => "PREROUTING",
            Self::Inbound => "ISTIO_INBOUND",
        })
    }
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// It goes where it meant to go.
    Direct,
    /// To the proxy's outbound port (15001).
    Outbound,
    /// To the proxy's inbound port (15006).
    Inbound,
    /// To the port of the proxy's DNS server (15053).
    Dns,
}

/// A verdict and the rule that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// The deciding rule's chain.
    pub chain: Chain,
    /// The deciding rule, numbered from 1 in its chain as `iptables -L
    /// --line-numbers` does; 0 if none decides: the connection never enters the
    /// chain, or comes to its end.
    pub rule: u32,
}

/// The uid and gid that a socket belongs to, as xt_owner sees them: the fsuid
/// and fsgid of the credentials that opened the socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The fsuid, as the initial user namespace numbers it.
    pub uid: u32,
    /// The fsgid, as the initial user namespace numbers it.
    pub gid: u32,
}

impl Owner {
    /// What no list of owners can hold, the kernel's invalid uid and gid: a socket
    /// without a file has it, which matches no `--uid-owner` and every `!
    /// --uid-owner`.
    pub const NONE: Self = Self {
        uid: u32::MAX,
        gid: u32::MAX,
    };
}

/// The facts of a connection that a process of the pod makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputFacts {
    /// The IP protocol number.
    pub protocol: u32,
    /// The source address that the first packet will have.
    pub source: Address,
    /// The destination address asked for.
    pub destination: Address,
    /// The port asked for, in host byte order.
    pub destination_port: u16,
    /// Whether the packet goes out through `lo`: the destination is local to
    /// the pod's network namespace.
    pub over_loopback: bool,
    /// The index of the interface that the packet goes out through; 0 if that
    /// isn't known.
    pub out_interface: u32,
    /// Whose socket it is.
    pub owner: Owner,
    /// The socket's mark (`SO_MARK`); 0 if it has none.
    pub mark: u32,
}

impl OutputFacts {
    /// Whether any chain is asked. To some addresses, and from some, the kernel
    /// sends nothing, and its own error stands. Of UDP that is broadcast, but for
    /// what `SO_BROADCAST` allows; and IPv6 multicast leaves the pod, whatever
    /// REDIRECT does to it.
    #[inline(always)]
    pub fn enter_chains(&self) -> bool {
        let destination = &self.destination;
        if self.protocol == UDP {
            return *destination != Address::v4([255; 4])
                && (destination.is_v4() || !destination.is_never_reachable());
        }
        let leaves_from_loopback =
            self.source.is_v4() && self.source.is_loopback() && !self.over_loopback;
        !destination.is_never_reachable() && !leaves_from_loopback
    }
}

/// The facts of a connection that arrives at the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboundFacts {
    /// The IP protocol number.
    pub protocol: u32,
    /// The address asked for.
    pub destination: Address,
    /// The port asked for, in host byte order.
    pub destination_port: u16,
    /// The index of the interface that it comes in through; 0 if that isn't
    /// known.
    pub in_interface: u32,
    /// Whether it comes from the pod itself. NAT asks one chain per
    /// connection, and that was `ISTIO_OUTPUT`.
    pub from_inside: bool,
}

/// `OUTPUT` and `ISTIO_OUTPUT`:
///
/// ```text
///  OUTPUT, for each excluded interface:
///         -o eth1 -j RETURN
///  ISTIO_OUTPUT, for each excluded port:
///         -p tcp --dport 25 -j RETURN
///         -p udp --dport 25 -j RETURN
///  1      -s 127.0.0.6/32 -o lo -j RETURN
///  for each proxy uid:
///  2      ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
///  3      -o lo -m owner ! --uid-owner 1337 -j RETURN
///  4      -m owner --uid-owner 1337 -j RETURN
///  for each proxy gid:
///  5 6 7  the same with --gid-owner
///  for each excluded owner group:
///         -m owner --gid-owner 202 -j RETURN
///  or once:
///         -m owner ! --gid-owner 202 ... -j RETURN
///  with DNS, to ports 53:
///         -j ISTIO_OUTPUT_DNS
///  8      -d 127.0.0.1/32 -j RETURN
///  for each excluded CIDR:
///         -d 10.1.0.0/16 -j RETURN
///  for each port:
///         -p tcp --dport 9000 -j ISTIO_REDIRECT
///  9      -j ISTIO_REDIRECT
///  or for each CIDR:
///         -d 10.0.0.0/8 -j ISTIO_REDIRECT
/// ```
///
/// Rule 3 is absent if a CIDR to capture is a loopback one. With DNS, rule 2
/// (of a uid) and rule 3 leave port 53 alone, and rule 3 looks at TCP only.
///
/// Under TPROXY the mangle table marks what the proxy's uids and gids connect over
/// `lo`, but not to localhost, and not what has TPROXY's own mark already. What
/// these rules leave alone of it then comes to `ISTIO_INBOUND`, like a connection
/// that arrives.
#[inline(always)]
pub fn output(settings: &Settings, lists: &impl Lists, facts: &OutputFacts) -> Decision {
    let family = settings.family(&facts.destination);
    let decision = nat_output(settings, family, lists, facts);
    if !family.has(stages::TPROXY)
        || decision.verdict as u32 != Verdict::Direct as u32
        || !facts.over_loopback
        || family.is_localhost(&facts.destination)
        || facts.source == family.passthrough
        || facts.mark == settings.tproxy_mark
    {
        return decision;
    }
    let owner = facts.owner;
    if proxy_owner(settings, lists, List::ProxyUids, owner.uid) == 0
        && proxy_owner(settings, lists, List::ProxyGids, owner.gid) == 0
    {
        return decision;
    }
    let marked = inbound(
        settings,
        lists,
        &InboundFacts {
            protocol: facts.protocol,
            destination: facts.destination,
            destination_port: facts.destination_port,
            in_interface: facts.out_interface,
            from_inside: false,
        },
    );
    if marked.verdict as u32 == Verdict::Inbound as u32 {
        marked
    } else {
        decision
    }
}

/// The number of the first rule of a proxy's uid or gid, from 1 for the first; 0
/// if it isn't one.
#[inline(always)]
fn proxy_owner(settings: &Settings, lists: &impl Lists, list: List, id: u32) -> u32 {
    let filter = match list {
        List::ProxyUids => settings.proxy_uid,
        _ => settings.proxy_gid,
    };
    if filter.may_have(id) {
        lists.rule(settings.generation, 0, list, &id_key(id))
    } else {
        0
    }
}

#[inline(always)]
fn nat_output(
    settings: &Settings,
    family: &Family,
    lists: &impl Lists,
    facts: &OutputFacts,
) -> Decision {
    let tcp = facts.protocol == TCP;
    // Without DNS no rule captures anything but TCP.
    if !family.has(stages::CHAINS) || !(tcp || facts.protocol == UDP && family.has(stages::DNS)) {
        return direct(Chain::Output, 0);
    }
    if family.has(stages::EXCLUDED_INTERFACES) {
        let rule = excluded_interface(settings, lists, facts.out_interface);
        if rule != 0 {
            return direct(Chain::Out, rule);
        }
    }
    let port = facts.destination_port;
    if family.has(stages::EXCLUDED_OUTBOUND_PORTS) {
        let list = List::ExcludedOutboundPorts;
        let filter = settings.excluded_outbound_ports;
        let rule = port_rule(settings, filter, lists, 0, list, port);
        if rule != 0 {
            return direct(Chain::Output, if tcp { rule } else { rule + 1 });
        }
    }
    let lo = facts.over_loopback;
    if lo && facts.source == family.passthrough {
        return direct(Chain::Output, family.passthrough_rule);
    }

    let owner = facts.owner;
    let localhost = family.is_localhost(&facts.destination);
    let dns = family.has(stages::DNS) && port == DNS;
    let to_itself = tcp && lo && !localhost && (port != settings.tunnel_port || port == 0);
    let over_lo =
        lo && family.has(stages::RETURN_OVER_LO) && (!family.has(stages::DNS) || tcp && !dns);
    let rules = OwnerRules {
        to_itself: to_itself && !dns,
        over_lo,
        each: settings.rules_per_owner,
    };
    let rule = proxy_owner(settings, lists, List::ProxyUids, owner.uid);
    let before = family.owners_rule - 1;
    if let Some(decision) = rules.decide(settings.proxy_uids, before, rule) {
        return decision;
    }
    let rules = OwnerRules { to_itself, ..rules };
    let rule = proxy_owner(settings, lists, List::ProxyGids, owner.gid);
    let before = before + settings.proxy_uids * settings.rules_per_owner;
    if let Some(decision) = rules.decide(settings.proxy_gids, before, rule) {
        return decision;
    }

    if family.has(stages::GROUPS_ONLY | stages::GROUPS_EXCEPT) {
        let rule = lists.rule(settings.generation, 0, List::Groups, &id_key(owner.gid));
        if family.has(stages::GROUPS_ONLY) {
            if rule == 0 {
                return direct(Chain::Output, family.groups_rule);
            }
        } else if rule != 0 {
            return direct(Chain::Output, rule);
        }
    }
    if dns && dns_captured(settings, family, lists, &facts.destination) {
        return Decision {
            verdict: Verdict::Dns,
            chain: Chain::Output,
            rule: family.dns_rule,
        };
    }
    if localhost {
        return direct(Chain::Output, family.localhost_rule);
    }
    if family.has(stages::EXCLUDED_CIDRS) {
        let list = List::ExcludedOutbound;
        let rule = lists.rule(
            settings.generation,
            family.version,
            list,
            &facts.destination,
        );
        if rule != 0 {
            return direct(Chain::Output, rule);
        }
    }
    if !tcp {
        return direct(Chain::Output, 0);
    }
    let rule = captured_by(settings, family, lists, facts);
    Decision {
        verdict: if rule == 0 {
            Verdict::Direct
        } else {
            Verdict::Outbound
        },
        chain: Chain::Output,
        rule,
    }
}

/// The number of the rule, of those at the chain's end, that captures a TCP
/// connection; 0 if none does.
#[inline(always)]
fn captured_by(
    settings: &Settings,
    family: &Family,
    lists: &impl Lists,
    facts: &OutputFacts,
) -> u32 {
    if family.has(stages::OUTBOUND_PORTS) {
        let (list, port) = (List::OutboundPorts, facts.destination_port);
        let filter = settings.outbound_ports;
        let rule = port_rule(settings, filter, lists, family.version, list, port);
        if rule != 0 {
            return rule;
        }
    }
    if family.has(stages::OUTBOUND_ALL) {
        family.outbound_all_rule
    } else if family.has(stages::OUTBOUND_CIDRS) {
        lists.rule(
            settings.generation,
            family.version,
            List::Outbound,
            &facts.destination,
        )
    } else {
        0
    }
}

#[inline(always)]
fn dns_captured(
    settings: &Settings,
    family: &Family,
    lists: &impl Lists,
    server: &Address,
) -> bool {
    family.has(stages::DNS_TO_ALL)
        || family.has(stages::DNS_TO_SERVERS)
            && lists.rule(
                settings.generation,
                family.version,
                List::DnsServers,
                server,
            ) != 0
}

/// What of the rules of the proxy's uids or gids holds whosever the connection
/// is.
#[derive(Clone, Copy)]
struct OwnerRules {
    /// The first rule of each captures what the owner connects.
    to_itself: bool,
    /// The second rule of each returns what isn't the owner's.
    over_lo: bool,
    /// How many rules each has: without the second, two.
    each: u32,
}

impl OwnerRules {
    /// Asks the rules of `owners` uids or gids, which stand after the rule
    /// numbered `before`. `first` is the number, from 1 here, of the first rule
    /// of the first that is the connection's; 0 if none is.
    #[inline(always)]
    const fn decide(self, owners: u32, before: u32, first: u32) -> Option<Decision> {
        if self.over_lo && owners != 0 && first != 1 {
            // Whoever isn't the first is returned by its second rule.
            Some(direct(Chain::Output, before + 2))
        } else if first == 0 {
            None
        } else if self.to_itself {
            Some(Decision {
                verdict: Verdict::Inbound,
                chain: Chain::Output,
                rule: before + first,
            })
        } else {
            Some(direct(Chain::Output, before + first + self.each - 1))
        }
    }
}

/// `PREROUTING` and `ISTIO_INBOUND`: one `-i INTERFACE -j RETURN` for each
/// excluded interface; then one `--dport PORT -j RETURN` for the tunnel port and
/// for each excluded port, and `-j ISTIO_IN_REDIRECT`; or one `--dport PORT -j
/// ISTIO_IN_REDIRECT` for each port.
#[inline(always)]
pub fn inbound(settings: &Settings, lists: &impl Lists, facts: &InboundFacts) -> Decision {
    let family = settings.family(&facts.destination);
    if facts.protocol != TCP || facts.from_inside || !family.has(stages::INBOUND) {
        return direct(Chain::Inbound, 0);
    }
    if family.has(stages::EXCLUDED_INTERFACES) {
        let rule = excluded_interface(settings, lists, facts.in_interface);
        if rule != 0 {
            return direct(Chain::In, rule);
        }
    }
    let port = facts.destination_port;
    if settings.tunnel_rule != 0 && port == settings.tunnel_port {
        return direct(Chain::Inbound, settings.tunnel_rule);
    }
    let list = List::InboundPorts;
    let rule = port_rule(settings, settings.inbound_ports, lists, 0, list, port);
    let (verdict, rule) = match (family.has(stages::INBOUND_ALL), rule) {
        (true, 0) => (Verdict::Inbound, settings.inbound_all_rule),
        (true, rule) => (Verdict::Direct, rule),
        (false, 0) => (Verdict::Direct, 0),
        (false, rule) => (Verdict::Inbound, rule),
    };
    Decision {
        verdict,
        chain: Chain::Inbound,
        rule,
    }
}

#[inline(always)]
const fn direct(chain: Chain, rule: u32) -> Decision {
    Decision {
        verdict: Verdict::Direct,
        chain,
        rule,
    }
}

/// The number of the rule of an excluded interface; 0 if it isn't one.
#[inline(always)]
fn excluded_interface(settings: &Settings, lists: &impl Lists, index: u32) -> u32 {
    lists.rule(
        settings.generation,
        0,
        List::ExcludedInterfaces,
        &id_key(index),
    )
}

/// The number of the first rule of a list of ports that matches `port`; 0 if none
/// does. `version` is 0 for a list that both families have.
#[inline(always)]
fn port_rule(
    settings: &Settings,
    filter: Filter,
    lists: &impl Lists,
    version: u32,
    list: List,
    port: u16,
) -> u32 {
    if filter.may_have(port.into()) {
        lists.rule(settings.generation, version, list, &port_key(port))
    } else {
        0
    }
}
