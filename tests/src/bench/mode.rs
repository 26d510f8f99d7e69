//! What is compared: ways of intercepting a pod's connections, and none.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::Result;

use super::{load::Targets, pair};
use crate::{
    cli::Cli,
    command::run,
    iptables::{self, Flavour},
    pod::{PEER_V4, PEER_V6, POD_V4, Pod},
};

/// A way to intercept a pod's connections, or not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// No interception: the client dials the proxy itself. What the others are
    /// compared with.
    Direct,
    /// The same once more, in a pod of its own. By how much it differs from the
    /// first is the noise.
    DirectAgain,
    /// The chains of live iptables.
    Iptables(Flavour),
    /// Interceptor: how the mode is called, and the flags of `attach` for it.
    Interceptor(&'static str, &'static [&'static str]),
}

impl Mode {
    /// All of them. Whatever mode `interceptor attach` offers has a line here.
    pub(crate) const ALL: [Self; 5] = [
        Self::Direct,
        Self::DirectAgain,
        Self::Iptables(Flavour::Nft),
        Self::Iptables(Flavour::Legacy),
        Self::Interceptor("interceptor", &[]),
    ];

    /// Whether connections are intercepted.
    pub(crate) const fn intercepts(self) -> bool {
        !matches!(self, Self::Direct | Self::DirectAgain)
    }

    /// Starts to intercept the pod's connections. What is returned ends that
    /// when it is dropped; chains go with the pod's network namespace.
    pub(crate) fn install(self, pod: &Pod) -> Result<Option<Cli>> {
        match self {
            Self::Direct | Self::DirectAgain => Ok(None),
            Self::Iptables(flavour) => {
                iptables::install(pod, flavour)?;
                // The kernel's own default: the suites have less.
                pod.netns()
                    .sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", "120")?;
                Ok(None)
            }
            Self::Interceptor(_, flags) => {
                let cli = Cli::new()?;
                run(cli.attach_command(pod)?.args(flags))?;
                Ok(Some(cli))
            }
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::DirectAgain => "direct-again",
            Self::Iptables(Flavour::Nft) => "iptables-nft",
            Self::Iptables(Flavour::Legacy) => "iptables-legacy",
            Self::Interceptor(name, _) => name,
        })
    }
}

/// From where to where connections go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Path {
    /// From the pod's application to its proxy's port 15001.
    Outbound,
    /// The same over IPv6.
    OutboundV6,
    /// From the peer to the pod's proxy's port 15006.
    Inbound,
    /// From a pod's application through its proxy, and through another pod's
    /// proxy, to that pod's application.
    Pair,
}

impl Path {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Outbound, Self::OutboundV6, Self::Inbound, Self::Pair];

    /// What it is called.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::OutboundV6 => "outbound-ipv6",
            Self::Inbound => "inbound",
            Self::Pair => "pair",
        }
    }

    /// Where the client connects to.
    pub(crate) fn targets(self, mode: Mode) -> Targets {
        let (address, port): (IpAddr, u16) = match (self, mode.intercepts()) {
            (Self::Outbound | Self::Pair, false) => (Ipv4Addr::LOCALHOST.into(), 15001),
            (Self::Outbound, true) => (PEER_V4, 8080),
            (Self::OutboundV6, false) => (Ipv6Addr::LOCALHOST.into(), 15001),
            (Self::OutboundV6, true) => (PEER_V6, 8080),
            (Self::Inbound, false) => (POD_V4, 15006),
            (Self::Inbound, true) => (POD_V4, 8080),
            (Self::Pair, true) => (pair::SERVER.into(), pair::APP_PORT),
        };
        Targets::one(address, port)
    }

    /// Where it connects to, if that is to be many destinations. (Without
    /// interception it is the proxy's address all the same.)
    pub(crate) fn many_targets(self, mode: Mode) -> Targets {
        if mode.intercepts() {
            Targets {
                count: 1000,
                ..Targets::one(Ipv4Addr::new(10, 99, 0, 1), 8080)
            }
        } else {
            self.targets(mode)
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
