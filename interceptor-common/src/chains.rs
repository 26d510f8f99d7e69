//! The rules: what happens to a connection, and which rule decides it.
//!
//! [`output`] and [`inbound`] are the sidecar's iptables chains `ISTIO_OUTPUT`
//! and `ISTIO_INBOUND`, rule by rule in their order. A chain's quirks (a rule
//! that hides a later one) are part of the answer. Nothing else decides: the
//! kernel programs only gather the facts and carry out the verdict.

use core::fmt;

use crate::{
    config::{MAX_EXCLUDED_PORTS, MAX_OWNERS, Settings},
    conn::{Address, TCP},
};

/// A chain of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chain {
    /// Connections that processes of the pod make.
    Output,
    /// Connections that arrive at the pod.
    Inbound,
}

impl Chain {
    /// The most rules that settings can give the chain.
    pub const fn most_rules(self) -> usize {
        match self {
            Self::Output => 3 + 2 * 3 * MAX_OWNERS,
            Self::Inbound => MAX_EXCLUDED_PORTS + 1,
        }
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Output => "ISTIO_OUTPUT",
            Self::Inbound => "ISTIO_INBOUND",
        })
    }
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes where it meant to go.
    Direct,
    /// To the proxy's outbound port (15001).
    Outbound,
    /// To the proxy's inbound port (15006).
    Inbound,
}

/// A verdict and the rule that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// The deciding rule, numbered from 1 in its chain as `iptables -L
    /// --line-numbers` does; 0 if the connection never enters the chain.
    pub rule: u32,
}

impl Decision {
    const NOT_IN_CHAIN: Self = Self {
        verdict: Verdict::Direct,
        rule: 0,
    };
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
    /// What no list of owners can hold: the kernel's invalid uid and gid.
    const NONE: Self = Self {
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
    /// Whether the packet goes out through `lo`: the destination is local to
    /// the pod's network namespace.
    pub over_loopback: bool,
    /// Whose socket it is; `None` for a socket without a file, which matches
    /// no `--uid-owner` and every `! --uid-owner`.
    pub owner: Option<Owner>,
}

/// The facts of a connection that arrives at the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboundFacts {
    /// The IP protocol number.
    pub protocol: u32,
    /// The port asked for, in host byte order.
    pub destination_port: u16,
    /// Whether it comes from the pod itself. NAT asks one chain per
    /// connection, and that was `ISTIO_OUTPUT`.
    pub from_inside: bool,
}

/// `ISTIO_OUTPUT`, reached from `OUTPUT` by `-p tcp`:
///
/// ```text
///  1      -s 127.0.0.6/32 -o lo -j RETURN
///  for each proxy uid:
///  2      ! -d 127.0.0.1/32 -o lo -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
///  3      -o lo -m owner ! --uid-owner 1337 -j RETURN
///  4      -m owner --uid-owner 1337 -j RETURN
///  for each proxy gid:
///  5 6 7  the same with --gid-owner
///  8      -d 127.0.0.1/32 -j RETURN
///  9      -j ISTIO_REDIRECT
/// ```
#[inline(always)]
pub fn output(settings: &Settings, facts: &OutputFacts) -> Decision {
    if facts.protocol != TCP {
        return Decision::NOT_IN_CHAIN;
    }
    let lo = facts.over_loopback;
    if lo && (facts.source == settings.passthrough_v4 || facts.source == settings.passthrough_v6) {
        return direct(1);
    }
    let localhost =
        facts.destination == settings.localhost_v4 || facts.destination == settings.localhost_v6;

    let owner = facts.owner.unwrap_or(Owner::NONE);
    let mut rule = 2;
    for uid in settings.proxy_uids.iter() {
        let owned = owner.uid == uid;
        if let Some(decision) = owner_rules(rule, lo, localhost, owned) {
            return decision;
        }
        rule += 3;
    }
    for gid in settings.proxy_gids.iter() {
        let owned = owner.gid == gid;
        if let Some(decision) = owner_rules(rule, lo, localhost, owned) {
            return decision;
        }
        rule += 3;
    }
    if localhost {
        return direct(rule);
    }
    Decision {
        verdict: Verdict::Outbound,
        rule: rule + 1,
    }
}

/// The three rules that each proxy uid or gid has, the first numbered `first`.
#[inline(always)]
const fn owner_rules(first: u32, lo: bool, localhost: bool, owned: bool) -> Option<Decision> {
    match (lo, owned) {
        (true, true) if !localhost => Some(Decision {
            verdict: Verdict::Inbound,
            rule: first,
        }),
        (true, false) => Some(direct(first + 1)),
        (_, true) => Some(direct(first + 2)),
        (false, false) => None,
    }
}

/// `ISTIO_INBOUND`, reached from `PREROUTING` by `-p tcp`: one `--dport PORT -j
/// RETURN` for each excluded port, then `-j ISTIO_IN_REDIRECT`.
#[inline(always)]
pub fn inbound(settings: &Settings, facts: &InboundFacts) -> Decision {
    if facts.protocol != TCP || facts.from_inside {
        return Decision::NOT_IN_CHAIN;
    }
    let mut rule = 1;
    for port in settings.excluded_inbound_ports.iter() {
        if port == facts.destination_port {
            return direct(rule);
        }
        rule += 1;
    }
    Decision {
        verdict: Verdict::Inbound,
        rule,
    }
}

#[inline(always)]
const fn direct(rule: u32) -> Decision {
    Decision {
        verdict: Verdict::Direct,
        rule,
    }
}
