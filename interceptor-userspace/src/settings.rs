//! A pod's settings as people write them: all that the mesh's own tool can be
//! told, checked when they are read.

mod annotations;
mod chains;
mod compile;
mod import;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

pub use annotations::annotated;
pub(crate) use annotations::is_read;
pub use chains::{ChainRule, Family};
pub use compile::{Compiled, IdMap, Place, Prefix, PrefixTable};
pub use import::{NoEqual, import};
use interceptor_common::config::{
    MAX_CIDRS, MAX_GROUPS, MAX_INTERFACES, MAX_OWNERS, MAX_PORT_RANGES,
};

use crate::{Error, Result};

/// The settings of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where outbound connections are redirected to (`-p`).
    pub outbound_port: u16,
    /// Where inbound connections are redirected to (`-z`).
    pub inbound_port: u16,
    /// The port of other proxies' tunnels, which is never captured inbound
    /// (`-e`).
    pub tunnel_port: Option<u16>,
    /// Where DNS is redirected to.
    pub dns_port: u16,
    /// Uids whose connections are the proxy's own (`-u`).
    pub proxy_uids: Vec<u32>,
    /// Gids whose connections are the proxy's own (`-g`).
    pub proxy_gids: Vec<u32>,
    /// How inbound connections are captured (`-m`).
    pub mode: Mode,
    /// Inbound ports that are captured (`-b`).
    pub inbound_ports: Ports,
    /// Inbound ports that are not captured when all others are (`-d`).
    pub excluded_inbound_ports: Vec<PortRange>,
    /// Outbound destinations that are captured (`-i`).
    pub outbound_cidrs: Cidrs,
    /// Outbound destinations that are not captured (`-x`).
    pub excluded_outbound_cidrs: Vec<IpNet>,
    /// Outbound ports that are captured wherever they lead (`-q`).
    pub outbound_ports: Vec<PortRange>,
    /// Outbound ports that are never captured (`-o`).
    pub excluded_outbound_ports: Vec<PortRange>,
    /// Interfaces that are left alone in both directions (`-c`); a `+` at the
    /// end of a name stands for any end.
    pub excluded_interfaces: Vec<String>,
    /// Which IPv4 addresses the chains call localhost.
    pub loopback_cidr: Ipv4Net,
    /// Whose connections are captured, by group.
    pub owner_groups: OwnerGroups,
    /// Which DNS is captured.
    pub dns: Dns,
    /// Whether IPv6 has chains.
    pub ipv6: bool,
    /// Whether packets that conntrack finds invalid are dropped. Without
    /// conntrack there are none.
    pub drop_invalid: bool,
    /// The mark of TPROXY (`-t`).
    pub tproxy_mark: u32,
    /// The routing table of TPROXY (`-r`).
    pub tproxy_table: u32,
}

/// How inbound connections are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// As by iptables' REDIRECT.
    Redirect,
    /// As by iptables' TPROXY.
    Tproxy,
    /// Nothing is captured, in neither direction.
    None,
}

/// Ports to capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Ports {
    /// `*`
    All,
    /// These; perhaps none.
    List(Vec<PortRange>),
}

/// Destinations to capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Cidrs {
    /// `*`
    All,
    /// These; perhaps none.
    List(Vec<IpNet>),
}

/// Whose connections are captured, by the group of the socket's owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnerGroups {
    /// Only those of these groups.
    Only(Vec<u32>),
    /// All but those of these groups; perhaps none.
    Except(Vec<u32>),
}

/// Which DNS (UDP and TCP to port 53) is captured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dns {
    /// None.
    Off,
    /// That to these servers: those of the pod's resolv.conf.
    Servers(Vec<IpAddr>),
    /// All.
    All,
}

impl Dns {
    /// Whether any is captured. The mesh's own tool takes an empty list of
    /// servers for none.
    pub fn is_on(&self) -> bool {
        match self {
            Self::Off => false,
            Self::Servers(servers) => !servers.is_empty(),
            Self::All => true,
        }
    }
}

/// Ports from one to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The lowest.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The highest.
    pub const fn last(self) -> u16 {
        self.last
    }
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }
}

impl FromStr for PortRange {
    type Err = Error;

    /// Reads `80`, `8000-8010` or, as iptables writes it, `8000:8010`.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = || {
            Error::setting(
                "port",
                text,
                "is no port: give a number from 0 to 65535, or two with a `-` between, \
                 the lower one first",
            )
        };
        let port = |text: &str| text.parse().map_err(|_| invalid());
        let (first, last) = match text.split_once(['-', ':']) {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if first > last {
            return Err(invalid());
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl TryFrom<String> for PortRange {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

/// Splits a list at its commas; an empty one has no items.
pub fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

/// Checks the names of excluded interfaces.
///
/// # Errors
///
/// If there are too many, or one can't be an interface's.
fn check_interfaces(names: &[String]) -> Result<()> {
    at_most("exclude-interfaces", names.len(), MAX_INTERFACES)?;
    for name in names {
        // IFNAMSIZ is 16, with the zero at its end.
        let fits = (1..16).contains(&name.len());
        if !fits || name.contains(['/', ' ', '!']) || name.contains(char::is_whitespace) {
            return Err(Error::setting(
                "exclude-interfaces",
                name,
                "is no interface's name: give 1 to 15 characters without `/` and spaces",
            ));
        }
    }
    Ok(())
}

/// Reads a list of ports.
///
/// # Errors
///
/// If one isn't a port or a range.
pub fn port_list(text: &str) -> Result<Vec<PortRange>> {
    items(text).map(str::parse).collect()
}

/// Reads a list of CIDRs; an address alone stands for itself.
///
/// # Errors
///
/// If one isn't a CIDR.
pub fn cidr_list(text: &str) -> Result<Vec<IpNet>> {
    items(text)
        .map(|item| {
            item.parse()
                .or_else(|_| item.parse::<IpAddr>().map(IpNet::from))
                .map_err(|_| {
                    Error::setting(
                        "CIDR",
                        item,
                        "is no CIDR: give an address and a prefix length, such as 10.0.0.0/8",
                    )
                })
        })
        .collect()
}

fn joined(items: &[impl fmt::Display]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

impl FromStr for Ports {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text.trim() {
            "*" => Self::All,
            list => Self::List(port_list(list)?),
        })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::List(list) => f.write_str(&joined(list)),
        }
    }
}

impl TryFrom<String> for Ports {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Ports> for String {
    fn from(ports: Ports) -> Self {
        ports.to_string()
    }
}

impl FromStr for Cidrs {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text.trim() {
            "*" => Self::All,
            list => Self::List(cidr_list(list)?),
        })
    }
}

impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::List(list) => f.write_str(&joined(list)),
        }
    }
}

impl TryFrom<String> for Cidrs {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Cidrs> for String {
    fn from(cidrs: Cidrs) -> Self {
        cidrs.to_string()
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "" | "REDIRECT" => Ok(Self::Redirect),
            "TPROXY" => Ok(Self::Tproxy),
            "NONE" => Ok(Self::None),
            _ => Err(Error::setting(
                "mode",
                text,
                "is unknown: give REDIRECT, TPROXY or NONE",
            )),
        }
    }
}

/// The settings that something starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// Those of the sidecar chains that Interceptor was made for.
    Default,
    /// Those that the mesh's injector passes to its own tool.
    Injected,
    /// Those of the mesh's CNI plugin.
    Cni,
}

impl Settings {
    /// Those of the mesh's own tool when it is told nothing: nothing is
    /// captured but what the proxy connects to its own pod.
    pub fn tool() -> Self {
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            tunnel_port: Some(15008),
            dns_port: 15053,
            proxy_uids: vec![1337],
            proxy_gids: vec![1337],
            mode: Mode::Redirect,
            inbound_ports: Ports::List(Vec::new()),
            excluded_inbound_ports: Vec::new(),
            outbound_cidrs: Cidrs::List(Vec::new()),
            excluded_outbound_cidrs: Vec::new(),
            outbound_ports: Vec::new(),
            excluded_outbound_ports: Vec::new(),
            excluded_interfaces: Vec::new(),
            loopback_cidr: Ipv4Net::from(Ipv4Addr::LOCALHOST),
            owner_groups: OwnerGroups::Except(Vec::new()),
            dns: Dns::Off,
            ipv6: true,
            drop_invalid: false,
            tproxy_mark: 1337,
            tproxy_table: 133,
        }
    }

    /// Those of a profile.
    pub fn of(profile: Profile) -> Self {
        let ports = |ports: &[u16]| ports.iter().copied().map(PortRange::from).collect();
        let all = Self {
            inbound_ports: Ports::All,
            outbound_cidrs: Cidrs::All,
            ..Self::tool()
        };
        match profile {
            Profile::Default => Self {
                tunnel_port: None,
                excluded_inbound_ports: ports(&[22, 15090, 15020]),
                ..all
            },
            Profile::Injected => Self {
                excluded_inbound_ports: ports(&[15090, 15021, 15020]),
                ..all
            },
            Profile::Cni => Self {
                excluded_inbound_ports: ports(&annotations::CNI_EXCLUDED_INBOUND),
                excluded_outbound_ports: ports(&[15020]),
                ..all
            },
        }
    }

    /// Whether anything is captured.
    pub fn captures(&self) -> bool {
        self.mode != Mode::None
    }

    /// Checks what no single value shows.
    ///
    /// # Errors
    ///
    /// If the settings can't be: the error names the value and the fix.
    pub fn check(&self) -> Result<()> {
        let mut ports = vec![
            ("outbound-port", self.outbound_port),
            ("inbound-port", self.inbound_port),
        ];
        if self.dns.is_on() {
            ports.push(("dns-port", self.dns_port));
        }
        for (index, (name, port)) in ports.iter().enumerate() {
            if *port == 0 {
                return Err(Error::setting(*name, port, "is no port: give 1 to 65535"));
            }
            if let Some((other, _)) = ports[..index].iter().find(|(_, other)| other == port) {
                return Err(Error::setting(
                    *name,
                    port,
                    format!("is {other}, too: the proxy can't tell its connections apart"),
                ));
            }
        }
        if self.tunnel_port == Some(0) {
            return Err(Error::setting(
                "tunnel-port",
                0,
                "is no port: give 1 to 65535, or nothing",
            ));
        }
        for (name, ids) in [
            ("proxy-uid", &self.proxy_uids),
            ("proxy-gid", &self.proxy_gids),
        ] {
            at_most(name, ids.len(), MAX_OWNERS)?;
            valid_ids(name, ids)?;
        }
        let (OwnerGroups::Only(groups) | OwnerGroups::Except(groups)) = &self.owner_groups;
        at_most("owner-groups", groups.len(), MAX_GROUPS)?;
        valid_ids("owner-groups", groups)?;
        if matches!(&self.owner_groups, OwnerGroups::Only(groups) if groups.is_empty()) {
            return Err(Error::setting(
                "owner-groups",
                "",
                "would capture nobody: give groups, or `*` for everybody",
            ));
        }
        if let Ports::List(list) = &self.inbound_ports {
            at_most("include-inbound-ports", list.len(), MAX_PORT_RANGES)?;
        }
        for (name, list) in [
            ("exclude-inbound-ports", &self.excluded_inbound_ports),
            ("include-outbound-ports", &self.outbound_ports),
            ("exclude-outbound-ports", &self.excluded_outbound_ports),
        ] {
            at_most(name, list.len(), MAX_PORT_RANGES)?;
        }
        let none = Vec::new();
        let captured = match &self.outbound_cidrs {
            Cidrs::All => &none,
            Cidrs::List(list) => list,
        };
        for (name, list) in [
            ("include-outbound-cidrs", captured),
            ("exclude-outbound-cidrs", &self.excluded_outbound_cidrs),
        ] {
            let v4 = list.iter().filter(|cidr| cidr.addr().is_ipv4()).count();
            at_most(name, v4, MAX_CIDRS)?;
            at_most(name, list.len() - v4, MAX_CIDRS)?;
        }
        if let Dns::Servers(servers) = &self.dns {
            at_most("dns", servers.len(), MAX_CIDRS)?;
        }
        check_interfaces(&self.excluded_interfaces)?;
        if !self.loopback_cidr.addr().is_loopback() || self.loopback_cidr.prefix_len() < 8 {
            return Err(Error::setting(
                "loopback-cidr",
                self.loopback_cidr,
                "is not in 127.0.0.0/8",
            ));
        }
        Ok(())
    }

    /// Whether a CIDR to capture begins with a loopback address. The mesh's own
    /// tool then leaves out the rules that return what goes over `lo`.
    pub(crate) fn captures_loopback(&self) -> bool {
        match &self.outbound_cidrs {
            Cidrs::All => false,
            Cidrs::List(list) => list.iter().any(|cidr| cidr.addr().is_loopback()),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::of(Profile::Default)
    }
}

fn at_most(name: &str, given: usize, most: usize) -> Result<()> {
    if given <= most {
        return Ok(());
    }
    Err(Error::setting(
        name,
        format!("{given} of them"),
        format!("are too many: give at most {most}"),
    ))
}

fn valid_ids(name: &str, ids: &[u32]) -> Result<()> {
    if ids.contains(&u32::MAX) {
        return Err(Error::setting(
            name,
            u32::MAX,
            "is nobody's: no process can have it",
        ));
    }
    Ok(())
}

/// Reads a list of gids and group names.
///
/// # Errors
///
/// If there is no such group on this machine.
pub fn group_list(text: &str) -> Result<Vec<u32>> {
    items(text)
        .map(|item| {
            if let Ok(gid) = item.parse() {
                return Ok(gid);
            }
            match nix::unistd::Group::from_name(item) {
                Ok(Some(group)) => Ok(group.gid.as_raw()),
                _ => Err(Error::setting(
                    "owner-groups",
                    item,
                    "is no group here: give its number",
                )),
            }
        })
        .collect()
}

/// What `include` and `exclude` say together: `*` and nothing, `*` and groups,
/// or groups and nothing.
///
/// # Errors
///
/// If both name groups, or a group doesn't exist.
pub fn owner_groups(include: &str, exclude: &str) -> Result<OwnerGroups> {
    let (include, exclude) = (include.trim(), exclude.trim());
    if include == "*" || include.is_empty() {
        return Ok(OwnerGroups::Except(group_list(exclude)?));
    }
    if exclude.is_empty() {
        return Ok(OwnerGroups::Only(group_list(include)?));
    }
    Err(Error::setting(
        "owner-groups",
        format!("{include} but not {exclude}"),
        "can't be both: give those to capture, or those not to capture",
    ))
}

/// Refuses virtual interfaces whose traffic would have to be captured.
///
/// # Errors
///
/// If there are any.
pub fn refuse_virtual_interfaces(names: &str) -> Result<()> {
    if items(names).next().is_none() {
        return Ok(());
    }
    Err(Error::setting(
        "virtual-interfaces",
        names,
        "can't be captured: their traffic is forwarded, not the pod's own, and a proxy would need \
         IP_TRANSPARENT on its listener to answer it; leave the setting out and keep the mesh's \
         own tool for such pods",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_written() {
        for (text, first, last) in [
            ("80", 80, 80),
            ("0", 0, 0),
            ("8000-8010", 8000, 8010),
            ("8000:8010", 8000, 8010),
            ("65535", 65535, 65535),
        ] {
            assert_eq!(
                text.parse::<PortRange>().unwrap(),
                PortRange { first, last }
            );
        }
        for text in [
            "",
            "-",
            "80-",
            "90-80",
            "65536",
            "a",
            "80-90-100",
            "-1",
            "+80-",
        ] {
            let error = text.parse::<PortRange>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
        let range: PortRange = "8000:8010".parse().unwrap();
        assert_eq!(range.to_string(), "8000-8010");
    }

    #[test]
    fn the_profiles_are_valid_and_differ() {
        let all = [Profile::Default, Profile::Injected, Profile::Cni].map(Settings::of);
        for settings in &all {
            settings.check().unwrap();
            let json = serde_json::to_string(settings).unwrap();
            assert_eq!(&serde_json::from_str::<Settings>(&json).unwrap(), settings);
        }
        assert_ne!(all[0], all[1]);
        assert_ne!(all[1], all[2]);
        Settings::tool().check().unwrap();
    }

    #[test]
    fn what_can_not_be_is_named() {
        let default = Settings::default;
        for (settings, words) in [
            (
                Settings {
                    inbound_port: 15001,
                    ..default()
                },
                "`15001` is outbound-port, too",
            ),
            (
                Settings {
                    outbound_port: 0,
                    ..default()
                },
                "`0` is no port",
            ),
            (
                Settings {
                    dns: Dns::All,
                    dns_port: 15006,
                    ..default()
                },
                "`15006` is inbound-port, too",
            ),
            (
                Settings {
                    proxy_uids: vec![1; 9],
                    ..default()
                },
                "at most 8",
            ),
            (
                Settings {
                    proxy_gids: vec![u32::MAX],
                    ..default()
                },
                "`4294967295` is nobody's",
            ),
            (
                Settings {
                    owner_groups: OwnerGroups::Except(vec![1; 65]),
                    ..default()
                },
                "at most 64",
            ),
            (
                Settings {
                    owner_groups: OwnerGroups::Only(vec![]),
                    ..default()
                },
                "nobody",
            ),
            (
                Settings {
                    excluded_interfaces: vec!["a b".to_owned()],
                    ..default()
                },
                "`a b` is no interface's name",
            ),
            (
                Settings {
                    loopback_cidr: "10.0.0.0/8".parse().unwrap(),
                    ..default()
                },
                "`10.0.0.0/8` is not in 127.0.0.0/8",
            ),
        ] {
            let error = settings.check().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn owner_groups_are_one_or_the_other() {
        assert_eq!(owner_groups("*", "").unwrap(), OwnerGroups::Except(vec![]));
        assert_eq!(
            owner_groups("*", "5,root").unwrap(),
            OwnerGroups::Except(vec![5, 0])
        );
        assert_eq!(owner_groups("7", "").unwrap(), OwnerGroups::Only(vec![7]));
        assert!(owner_groups("7", "8").is_err());
        assert!(owner_groups("no such group", "").is_err());
    }
}
