//! What would happen to a connection, and why: the policy's own answer, from the
//! pod's live maps.

use std::net::{IpAddr, SocketAddr};

use aya::maps::{LpmTrie, MapData, MapError, lpm_trie::Key};
use interceptor_common::{
    chains::{Chain, Decision, InboundFacts, OutputFacts, Owner, Verdict, inbound, output},
    config::{List, Lists, PrefixKey},
    conn::{Address, TCP, UDP},
    listeners::ProxyPort,
    routes::{Route, RouteKind, effective_destination},
};
use serde::Serialize;

use super::{pins::Pins, plain::Plain, routes, view::Opened};
use crate::{Error, Result, pod::PodName, settings::Family};

/// A connection to explain.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The address that it comes from: where the socket is bound, or the other
    /// host; none for an unbound socket of the pod's.
    pub from: Option<IpAddr>,
    /// Where it goes.
    pub to: SocketAddr,
    /// Whose the socket is, as this machine numbers them.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Whether it is of UDP.
    pub udp: bool,
}

/// What happens to a connection.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// `outbound` if a process of the pod makes it, `inbound` if it arrives.
    pub direction: &'static str,
    /// What happens: `direct`, `proxy`, `refused` (it would go to the proxy, but
    /// none listens) or `unreachable`.
    pub outcome: &'static str,
    /// The proxy's port that it goes to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The chain whose rule decides.
    pub chain: String,
    /// The rule's number; 0 if the connection isn't in the chain, or comes to its
    /// end.
    pub rule: u32,
    /// The rule in the words of iptables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The facts that the rules were asked about.
    pub facts: Vec<String>,
}

/// The lists in a pod's maps.
pub(crate) struct LiveLists(LpmTrie<MapData, Plain<PrefixKey>, u32>);

impl LiveLists {
    pub(crate) fn of(opened: &Opened) -> Result<Self> {
        opened.map("PREFIXES").map(Self)
    }
}

impl Lists for LiveLists {
    fn rule(&self, generation: u32, version: u32, list: List, key: &Address) -> u32 {
        let key = PrefixKey::new(generation, version, list, *key);
        let bits = PrefixKey::BITS_BEFORE + 128;
        self.0.get(&Key::new(bits, Plain(key)), 0).unwrap_or(0)
    }
}

/// The routes in a pod's maps.
pub(crate) struct LiveRoutes(LpmTrie<MapData, Plain<Address>, Plain<Route>>);

impl LiveRoutes {
    pub(crate) fn of(opened: &Opened) -> Result<Self> {
        opened.map("ROUTES").map(Self)
    }

    /// What is known of the way to `address`.
    pub(crate) fn to(&self, address: Address) -> Result<Option<Route>> {
        match self.0.get(&Key::new(128, Plain(address)), 0) {
            Ok(route) => Ok(Some(route.0)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(Error::map("reading", "ROUTES")(error)),
        }
    }
}

/// Says which rule decides about a connection of an attached pod.
///
/// # Errors
///
/// If the pod isn't attached.
pub fn explain(pins: &Pins, pod: &PodName, question: &Question) -> Result<Explanation> {
    let opened = Opened::of(pins, pod)?;
    let lists = LiveLists::of(&opened)?;
    let routes = LiveRoutes::of(&opened)?;
    let is_local =
        |route: &Option<Route>| matches!(route, Some(route) if route.is(RouteKind::Local));
    let arrives = match question.from {
        Some(from) => !from.is_unspecified() && !is_local(&routes.to(from.into())?),
        None => false,
    };
    if arrives {
        return explain_inbound(&opened, &lists, question);
    }
    let bound = question.from.map_or(Address::UNSPECIFIED, Address::from);
    let to = effective_destination(&question.to.ip().into(), &bound);
    let route = routes.to(to)?;
    let to = IpAddr::from(to);
    let source = match (question.from, &route) {
        (Some(from), _) => from.into(),
        (None, Some(route)) => route.source,
        (None, None) => Address::UNSPECIFIED,
    };
    let over_loopback = is_local(&route);
    let facts = OutputFacts {
        protocol: if question.udp { UDP } else { TCP },
        source,
        destination: to.into(),
        destination_port: question.to.port(),
        over_loopback,
        out_interface: route.map_or(0, |route| route.out_interface),
        owner: Owner {
            uid: question.uid,
            gid: question.gid,
        },
        mark: 0,
    };
    let enters = facts.enter_chains();
    let decision = if enters {
        output(&opened.compiled, &lists, &facts)
    } else {
        Decision {
            verdict: Verdict::Direct,
            chain: Chain::Output,
            rule: 0,
        }
    };
    let interface = match &opened.netns().and_then(|netns| routes::interfaces(&netns)) {
        Ok(interfaces) => interfaces
            .iter()
            .find(|(_, index)| *index == facts.out_interface)
            .map(|(name, _)| name.clone()),
        Err(_) => None,
    };
    // One that is bound to an interface needs no scope, but bind() isn't asked about.
    let without_scope = matches!(question.to, SocketAddr::V6(to)
        if to.ip().is_unicast_link_local() && to.scope_id() == 0);
    let lines = vec![
        format!("to {to} port {}", question.to.port()),
        match &route {
            _ if without_scope => "a link-local address needs a scope, as in fe80::1%2".to_owned(),
            Some(route) if route.is(RouteKind::Unreachable) => "no route leads there".to_owned(),
            None => "no route is known".to_owned(),
            Some(_) if over_loopback => "the address is the pod's own: over lo".to_owned(),
            Some(_) => format!("out of {}", interface.as_deref().unwrap_or("the pod")),
        },
        format!("from {}", IpAddr::from(source)),
        format!("owned by uid {}, gid {}", question.uid, question.gid),
    ];
    let unreachable = !matches!(&route, Some(route) if !route.is(RouteKind::Unreachable))
        || !enters && !question.udp
        || without_scope;
    answer(&opened, "outbound", to, decision, lines, unreachable)
}

fn explain_inbound(opened: &Opened, lists: &LiveLists, question: &Question) -> Result<Explanation> {
    let to = question.to.ip().to_canonical();
    let facts = InboundFacts {
        protocol: if question.udp { UDP } else { TCP },
        destination: to.into(),
        destination_port: question.to.port(),
        in_interface: 0,
        from_inside: false,
    };
    let decision = inbound(&opened.compiled, lists, &facts);
    let mut lines = vec![
        format!("arrives at {to} port {}", question.to.port()),
        "the sender's address is not the pod's own".to_owned(),
    ];
    if !opened.settings.excluded_interfaces.is_empty() {
        lines.push(format!(
            "unless it arrives by {}, which is left alone",
            opened.settings.excluded_interfaces.join(" or ")
        ));
    }
    answer(opened, "inbound", to, decision, lines, false)
}

fn answer(
    opened: &Opened,
    direction: &'static str,
    to: IpAddr,
    decision: Decision,
    facts: Vec<String>,
    unreachable: bool,
) -> Result<Explanation> {
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let settings = &opened.settings;
    let text = decision
        .rule
        .checked_sub(1)
        .and_then(|index| {
            settings
                .rules(decision.chain, family)
                .get(index as usize)
                .cloned()
        })
        .map(|rule| rule.to_string());
    let proxy = match decision.verdict {
        Verdict::Direct => None,
        Verdict::Outbound => Some((settings.outbound_port, ProxyPort::Outbound)),
        Verdict::Inbound => Some((settings.inbound_port, ProxyPort::Inbound)),
        Verdict::Dns => Some((settings.dns_port, ProxyPort::Dns)),
    };
    let listens = match proxy {
        Some((_, port)) if direction == "inbound" || decision.chain != Chain::Inbound => {
            opened.listeners(port)? > 0
        }
        _ => true,
    };
    Ok(Explanation {
        direction,
        outcome: match proxy {
            _ if unreachable => "unreachable",
            None => "direct",
            Some(_) if listens => "proxy",
            Some(_) => "refused",
        },
        port: proxy.map(|(port, _)| port),
        chain: decision.chain.to_string(),
        rule: decision.rule,
        text,
        facts,
    })
}
