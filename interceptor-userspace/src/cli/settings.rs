//! The settings as flags and environment variables, for the commands that take
//! them.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::ValueEnum;
use interceptor_userspace::{
    Error,
    settings::{
        self, Cidrs, Dns, Mode, PortRange, Ports, Profile, Settings, annotated, cidr_list, items,
        port_list, refuse_virtual_interfaces,
    },
};
use ipnet::Ipv4Net;

/// A list whose items are checked when it is read.
#[derive(Clone, Debug, PartialEq)]
struct List<T>(Vec<T>);

fn ports(text: &str) -> Result<List<PortRange>, Error> {
    port_list(text).map(List)
}

fn cidrs(text: &str) -> Result<List<ipnet::IpNet>, Error> {
    cidr_list(text).map(List)
}

fn ids(text: &str) -> Result<List<u32>, String> {
    id_list(text).map(List)
}

/// Reads uids or gids with commas between.
pub(super) fn id_list(text: &str) -> Result<Vec<u32>, String> {
    items(text)
        .map(|id| {
            id.parse().map_err(|_| {
                format!("`{id}` is no id: give numbers from 0 to 4294967294 with commas between")
            })
        })
        .collect()
}

fn dns(text: &str) -> Result<Dns, String> {
    Ok(match text {
        "off" => Dns::Off,
        "all" => Dns::All,
        "resolv.conf" => Dns::Servers(resolv_conf()?),
        servers => Dns::Servers(
            items(servers)
                .map(|server| {
                    server.parse().map_err(|_| {
                        format!(
                            "`{server}` is no address: give `off`, `all`, `resolv.conf` or the \
                             servers' addresses with commas between"
                        )
                    })
                })
                .collect::<Result<_, _>>()?,
        ),
    })
}

/// The servers of this machine's (or container's) `/etc/resolv.conf`.
pub(super) fn resolv_conf() -> Result<Vec<IpAddr>, String> {
    const PATH: &str = "/etc/resolv.conf";
    let text = fs::read_to_string(PATH).map_err(|error| format!("reading {PATH}: {error}"))?;
    Ok(text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|server| {
            // An interface may stand behind an address.
            let address = server.trim().split('%').next().unwrap_or_default();
            address.parse().ok()
        })
        .collect())
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum ProfileName {
    /// The sidecar chains that Interceptor was made for.
    Default,
    /// What the mesh's injector passes to its own tool.
    Injected,
    /// What the mesh's CNI plugin sets.
    Cni,
}

impl From<ProfileName> for Profile {
    fn from(name: ProfileName) -> Self {
        match name {
            ProfileName::Default => Self::Default,
            ProfileName::Injected => Self::Injected,
            ProfileName::Cni => Self::Cni,
        }
    }
}

/// The settings, each only if it was given.
#[derive(Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Settings")]
pub(super) struct SettingsArgs {
    /// Where the settings start from; the annotations and the flags come over it.
    #[arg(long, value_name = "PROFILE", env = "INTERCEPTOR_PROFILE")]
    profile: Option<ProfileName>,

    /// The pod's annotations, a JSON object of strings; `-` reads standard input.
    #[arg(long, value_name = "FILE|-")]
    annotations: Option<PathBuf>,

    /// Uids whose connections are the proxy's own.
    #[arg(long, value_name = "UIDS", value_parser = ids, env = "INTERCEPTOR_PROXY_UID")]
    proxy_uid: Option<List<u32>>,

    /// Gids whose connections are the proxy's own.
    #[arg(long, value_name = "GIDS", value_parser = ids, env = "INTERCEPTOR_PROXY_GID")]
    proxy_gid: Option<List<u32>>,

    /// The proxy's port for connections that the pod makes.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..), env = "INTERCEPTOR_OUTBOUND_PORT")]
    outbound_port: Option<u16>,

    /// The proxy's port for connections that arrive at the pod.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..), env = "INTERCEPTOR_INBOUND_PORT")]
    inbound_port: Option<u16>,

    /// The port at which other proxies' tunnels arrive, which is never captured; 0 for none.
    #[arg(long, value_name = "PORT", env = "INTERCEPTOR_TUNNEL_PORT")]
    tunnel_port: Option<u16>,

    /// The port of the proxy's DNS server.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..), env = "INTERCEPTOR_DNS_PORT")]
    dns_port: Option<u16>,

    /// How arriving connections are captured: REDIRECT, TPROXY or NONE (nothing is, either way).
    #[arg(long, value_name = "MODE", env = "INTERCEPTOR_MODE")]
    mode: Option<Mode>,

    /// Ports at which arriving connections are captured: `*`, or ports and ranges (80,8000-8010).
    #[arg(long, value_name = "PORTS", env = "INTERCEPTOR_INCLUDE_INBOUND_PORTS")]
    include_inbound_ports: Option<Ports>,

    /// Ports at which arriving connections are left alone while all others are captured; an empty
    /// value leaves none alone.
    #[arg(long, value_name = "PORTS", value_parser = ports, env = "INTERCEPTOR_EXCLUDE_INBOUND_PORTS")]
    exclude_inbound_ports: Option<List<PortRange>>,

    /// Destinations to which connections are captured: `*`, or CIDRs.
    #[arg(long, value_name = "CIDRS", env = "INTERCEPTOR_INCLUDE_OUTBOUND_CIDRS")]
    include_outbound_cidrs: Option<Cidrs>,

    /// Destinations to which connections are left alone.
    #[arg(long, value_name = "CIDRS", value_parser = cidrs, env = "INTERCEPTOR_EXCLUDE_OUTBOUND_CIDRS")]
    exclude_outbound_cidrs: Option<List<ipnet::IpNet>>,

    /// Ports to which connections are captured, whatever the destination, unless it is excluded.
    #[arg(long, value_name = "PORTS", value_parser = ports, env = "INTERCEPTOR_INCLUDE_OUTBOUND_PORTS")]
    include_outbound_ports: Option<List<PortRange>>,

    /// Ports to which connections are left alone, before all else.
    #[arg(long, value_name = "PORTS", value_parser = ports, env = "INTERCEPTOR_EXCLUDE_OUTBOUND_PORTS")]
    exclude_outbound_ports: Option<List<PortRange>>,

    /// Interfaces of which neither direction is captured; `net+` means all that begin with net.
    #[arg(long, value_name = "NAMES", env = "INTERCEPTOR_EXCLUDE_INTERFACES")]
    exclude_interfaces: Option<String>,

    /// Interfaces whose forwarded traffic would be captured: not supported, and refused.
    #[arg(long, value_name = "NAMES", hide = true)]
    virtual_interfaces: Option<String>,

    /// The IPv4 addresses that are called localhost.
    #[arg(long, value_name = "CIDR", env = "INTERCEPTOR_LOOPBACK_CIDR")]
    loopback_cidr: Option<Ipv4Net>,

    /// Groups whose connections alone are captured: `*`, or names and numbers.
    #[arg(long, value_name = "GROUPS", env = "INTERCEPTOR_INCLUDE_OWNER_GROUPS")]
    include_owner_groups: Option<String>,

    /// Groups whose connections are left alone.
    #[arg(long, value_name = "GROUPS", env = "INTERCEPTOR_EXCLUDE_OWNER_GROUPS")]
    exclude_owner_groups: Option<String>,

    /// Which DNS goes to the proxy's DNS server: `off`, `all`, `resolv.conf` (that to the servers of
    /// /etc/resolv.conf), or servers' addresses.
    #[arg(long, value_name = "WHICH", value_parser = dns, env = "INTERCEPTOR_DNS")]
    dns: Option<Dns>,

    /// Whether IPv6 is captured.
    #[arg(long, value_name = "BOOL", env = "INTERCEPTOR_IPV6")]
    ipv6: Option<bool>,
}

impl SettingsArgs {
    /// Whether nothing was given.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The profile that was given.
    pub(super) fn profile(&self) -> Option<Profile> {
        self.profile.map(Profile::from)
    }

    /// The same, whatever the profile.
    pub(super) fn without_profile(self) -> Self {
        Self {
            profile: None,
            ..self
        }
    }

    /// The settings that were given, over `base`, or over the profile if one was
    /// named.
    pub(super) fn over(&self, base: &Settings) -> anyhow::Result<Settings> {
        let profile = Profile::from(self.profile.unwrap_or(ProfileName::Default));
        let mut settings = match self.profile {
            Some(_) => Settings::of(profile),
            None => base.clone(),
        };
        // Before the annotations, which change what a profile makes of them.
        if let Some(dns) = &self.dns {
            settings.dns = dns.clone();
        }
        if let Some(List(uids)) = &self.proxy_uid {
            settings.proxy_uids.clone_from(uids);
        }
        if let Some(List(gids)) = &self.proxy_gid {
            settings.proxy_gids.clone_from(gids);
        }
        if let Some(path) = &self.annotations {
            settings = annotated(profile, settings, &annotations(path)?)?;
        }
        set(&mut settings.outbound_port, self.outbound_port.as_ref());
        set(&mut settings.inbound_port, self.inbound_port.as_ref());
        set(&mut settings.dns_port, self.dns_port.as_ref());
        set(&mut settings.mode, self.mode.as_ref());
        set(
            &mut settings.inbound_ports,
            self.include_inbound_ports.as_ref(),
        );
        set(
            &mut settings.excluded_inbound_ports,
            self.exclude_inbound_ports.as_ref().map(|list| &list.0),
        );
        set(
            &mut settings.outbound_cidrs,
            self.include_outbound_cidrs.as_ref(),
        );
        set(
            &mut settings.excluded_outbound_cidrs,
            self.exclude_outbound_cidrs.as_ref().map(|list| &list.0),
        );
        set(
            &mut settings.outbound_ports,
            self.include_outbound_ports.as_ref().map(|list| &list.0),
        );
        set(
            &mut settings.excluded_outbound_ports,
            self.exclude_outbound_ports.as_ref().map(|list| &list.0),
        );
        set(&mut settings.loopback_cidr, self.loopback_cidr.as_ref());
        set(&mut settings.ipv6, self.ipv6.as_ref());
        if let Some(port) = self.tunnel_port {
            settings.tunnel_port = (port != 0).then_some(port);
        }
        if let Some(names) = &self.exclude_interfaces {
            settings.excluded_interfaces = items(names).map(str::to_owned).collect();
        }
        if let Some(names) = &self.virtual_interfaces {
            refuse_virtual_interfaces(names)?;
        }
        if self.include_owner_groups.is_some() || self.exclude_owner_groups.is_some() {
            settings.owner_groups = settings::owner_groups(
                self.include_owner_groups.as_deref().unwrap_or("*"),
                self.exclude_owner_groups.as_deref().unwrap_or_default(),
            )?;
        }
        settings.check()?;
        Ok(settings)
    }
}

fn set<T: Clone>(setting: &mut T, given: Option<&T>) {
    if let Some(given) = given {
        setting.clone_from(given);
    }
}

fn annotations(path: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let read = || -> anyhow::Result<_> {
        serde_json::from_str(&super::read_text(path)?)
            .context("give one JSON object whose values are strings")
    };
    read().with_context(|| format!("--annotations {}", path.display()))
}
