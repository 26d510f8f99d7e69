//! Live iptables: the sidecar's chains, installed in a pod.

use std::{
    io::{Seek, Write},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{cases::Family, command::run, mesh::Mesh, pod::Pod};

/// The sidecar's IPv4 chains.
pub const RULES_V4: &str = include_str!("../oracle/seed-rules.v4");
/// The sidecar's IPv6 chains.
pub const RULES_V6: &str = include_str!("../oracle/seed-rules.v6");

/// Which implementation of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The kernel's `ip_tables`.
    Legacy,
    /// On top of `nf_tables`.
    Nft,
}

impl Flavour {
    const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }
}

/// Which version of IP: each has tables of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// iptables.
    V4,
    /// ip6tables.
    V6,
}

impl Version {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    const fn command(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }
}

/// Installs the sidecar's chains in the pod, and the address `::6` as the mesh's
/// own tool does.
///
/// # Errors
///
/// If iptables is missing or refuses them.
pub fn install(pod: &Pod, flavour: Flavour) -> Result<()> {
    // A client's port that is still in use by an ended connection to another
    // destination would be renumbered: rare, but the tables have no such rows.
    pod.netns()
        .sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", "1")?;
    pod.netns().ip("-6 addr add ::6/128 dev lo")?;
    restore(pod, flavour, Version::V4, RULES_V4)?;
    restore(pod, flavour, Version::V6, RULES_V6)
}

/// Gives the pod what chains that the mesh's own tool makes of any settings need:
/// what its tool adds, too, for TPROXY.
///
/// # Errors
///
/// If it can't be.
pub fn prepare(pod: &Pod) -> Result<()> {
    let netns = pod.netns();
    // An ended connection's port is renumbered only until it is forgotten.
    for (name, value) in [
        ("netfilter/nf_conntrack_tcp_timeout_time_wait", "1"),
        ("netfilter/nf_conntrack_udp_timeout", "1"),
        ("netfilter/nf_conntrack_udp_timeout_stream", "1"),
    ] {
        netns.sysctl(name, value)?;
    }
    netns.ip("-6 addr add ::6/128 dev lo")?;
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} rule add fwmark 1337 lookup 133"))?;
        netns.ip(&format!(
            "{family} route add local default dev lo table 133"
        ))?;
    }
    Ok(())
}

/// Replaces the pod's chains by those that the mesh's own tool makes of settings.
///
/// # Errors
///
/// If iptables is missing or refuses them.
pub fn replace(pod: &Pod, flavour: Flavour, mesh: &Mesh) -> Result<()> {
    for version in Version::BOTH {
        let rules = format!(
            "*raw\nCOMMIT\n*mangle\nCOMMIT\n*nat\nCOMMIT\n{}",
            mesh.chains(version)
        );
        restore(pod, flavour, version, &rules)?;
    }
    Ok(())
}

/// Makes the pod's tables those of the text, which replaces what the tables that
/// it names held.
///
/// # Errors
///
/// If iptables is missing or refuses them.
pub fn restore(pod: &Pod, flavour: Flavour, version: Version, rules: &str) -> Result<()> {
    let mut input = tempfile::tempfile().context("make a temporary file")?;
    input.write_all(rules.as_bytes())?;
    input.rewind()?;
    pod.netns().enter(|| {
        run(
            Command::new(format!("{}-{}-restore", version.command(), flavour.name()))
                .args(["--wait", "10"])
                .stdin(input),
        )
        .with_context(|| format!("install the chains (Debian: apt-get install iptables)\n{rules}"))
        .map(drop)
    })
}

/// All the pod's tables, as `iptables-save` or `ip6tables-save` prints them.
///
/// # Errors
///
/// If iptables fails.
pub fn save_all(pod: &Pod, flavour: Flavour, version: Version) -> Result<String> {
    pod.netns().enter(|| {
        run(&mut Command::new(format!(
            "{}-{}-save",
            version.command(),
            flavour.name()
        )))
    })
}

/// The pod's NAT chains and their counters, as `iptables-save -c` prints them.
///
/// # Errors
///
/// If iptables fails.
pub fn save(pod: &Pod, flavour: Flavour, family: Family) -> Result<String> {
    let command = match family {
        Family::V4 | Family::Mapped => "iptables",
        Family::V6 => "ip6tables",
    };
    pod.netns().enter(|| {
        run(Command::new(format!("{command}-{}-save", flavour.name())).args(["-c", "-t", "nat"]))
    })
}
