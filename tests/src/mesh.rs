//! What the mesh's own tool installs: the iptables chains of any settings.
//!
//! Written from what the tool does, in its order, and shares no code with
//! Interceptor's policy, so that the two can be compared.

pub mod random;

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
};

use serde_json::{Value, json};

use crate::iptables::Version;

/// How inbound connections are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By REDIRECT.
    Redirect,
    /// By TPROXY.
    Tproxy,
    /// Not at all, and outbound ones neither.
    None,
}

/// Which DNS is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dns {
    /// None.
    Off,
    /// That to these servers.
    Servers(Vec<IpAddr>),
    /// All.
    All,
}

/// What the tool is told. Lists are as on its command line, but already split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// `-u`
    pub uids: Vec<u32>,
    /// `-g`
    pub gids: Vec<u32>,
    /// `-m`
    pub mode: Mode,
    /// `-e`; none if the chains don't know of tunnels.
    pub tunnel_port: Option<u16>,
    /// `-b`: `*`, or ports
    pub inbound_ports: Vec<String>,
    /// `-d`
    pub excluded_inbound_ports: Vec<String>,
    /// `-i`: `*`, or CIDRs
    pub cidrs: Vec<String>,
    /// `-x`
    pub excluded_cidrs: Vec<String>,
    /// `-q`
    pub outbound_ports: Vec<String>,
    /// `-o`
    pub excluded_outbound_ports: Vec<String>,
    /// `-c`
    pub excluded_interfaces: Vec<String>,
    /// The IPv4 addresses called localhost.
    pub loopback: String,
    /// The owner groups captured; none for all.
    pub only_groups: Vec<u32>,
    /// The owner groups not captured.
    pub except_groups: Vec<u32>,
    /// `--redirect-dns`, `--capture-all-dns`
    pub dns: Dns,
    /// `--drop-invalid`
    pub drop_invalid: bool,
}

impl Default for Mesh {
    /// The tool when it is told nothing.
    fn default() -> Self {
        Self {
            uids: vec![1337],
            gids: vec![1337],
            mode: Mode::Redirect,
            tunnel_port: Some(15008),
            inbound_ports: Vec::new(),
            excluded_inbound_ports: Vec::new(),
            cidrs: Vec::new(),
            excluded_cidrs: Vec::new(),
            outbound_ports: Vec::new(),
            excluded_outbound_ports: Vec::new(),
            excluded_interfaces: Vec::new(),
            loopback: "127.0.0.1/32".to_owned(),
            only_groups: Vec::new(),
            except_groups: Vec::new(),
            dns: Dns::Off,
            drop_invalid: false,
        }
    }
}

/// The rules of a table, with the chains that they are in.
struct Table {
    name: &'static str,
    rules: Vec<(String, String)>,
}

impl Table {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            rules: Vec::new(),
        }
    }

    fn append(&mut self, chain: &str, rule: impl fmt::Display) {
        self.rules.push((chain.to_owned(), rule.to_string()));
    }

    /// As iptables-restore reads it.
    fn text(&self) -> String {
        const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
        if self.rules.is_empty() {
            return String::new();
        }
        let mut chains: Vec<&str> = Vec::new();
        for (chain, rule) in &self.rules {
            // A chain that is jumped to exists, even without rules.
            let target = rule.split(' ').skip_while(|word| *word != "-j").nth(1);
            let target = target.filter(|target| target.starts_with("ISTIO_"));
            for chain in std::iter::once(chain.as_str()).chain(target) {
                if !chains.contains(&chain) {
                    chains.push(chain);
                }
            }
        }
        let mut text = format!("*{}\n", self.name);
        for chain in chains {
            let policy = if BUILT_IN.contains(&chain) {
                "ACCEPT"
            } else {
                "-"
            };
            let _ = writeln!(text, ":{chain} {policy} [0:0]");
        }
        for (chain, rule) in &self.rules {
            let _ = writeln!(text, "-A {chain} {rule}");
        }
        text.push_str("COMMIT\n");
        text
    }
}

impl Mesh {
    /// The tool as the injector runs it.
    pub fn injected() -> Self {
        Self {
            inbound_ports: strings(&["*"]),
            excluded_inbound_ports: strings(&["15090", "15021", "15020"]),
            cidrs: strings(&["*"]),
            ..Self::default()
        }
    }

    /// Whether DNS is captured at all.
    fn redirects_dns(&self) -> bool {
        match &self.dns {
            Dns::Off => false,
            Dns::Servers(servers) => !servers.is_empty(),
            Dns::All => true,
        }
    }

    fn servers(&self, version: Version) -> Vec<IpAddr> {
        match &self.dns {
            Dns::Servers(servers) => servers
                .iter()
                .copied()
                .filter(|server| server.is_ipv6() == (version == Version::V6))
                .collect(),
            Dns::Off | Dns::All => Vec::new(),
        }
    }

    /// All tables, as iptables-restore or ip6tables-restore reads them.
    pub fn chains(&self, version: Version) -> String {
        if self.mode == Mode::None {
            return String::new();
        }
        [self.raw(version), self.mangle(version), self.nat(version)].concat()
    }

    /// The nat table.
    pub fn nat(&self, version: Version) -> String {
        let mut nat = Table::new("nat");
        if self.mode == Mode::None {
            nat.append("OUTPUT", "-j ACCEPT");
            return nat.text();
        }
        let (localhost, passthrough) = match version {
            Version::V4 => (self.loopback.as_str(), "127.0.0.6/32"),
            Version::V6 => ("::1/128", "::6/128"),
        };
        for interface in &self.excluded_interfaces {
            nat.append("PREROUTING", format!("-i {interface} -j RETURN"));
            nat.append("OUTPUT", format!("-o {interface} -j RETURN"));
        }
        if let Some(port) = self.tunnel_port {
            let rule = format!("-p tcp -m tcp --dport {port} -j RETURN");
            nat.append("ISTIO_INBOUND", rule);
        }
        let redirect = "-p tcp -j REDIRECT --to-ports";
        nat.append("ISTIO_REDIRECT", format!("{redirect} 15001"));
        nat.append("ISTIO_IN_REDIRECT", format!("{redirect} 15006"));
        if self.mode == Mode::Redirect && !self.inbound_ports.is_empty() {
            nat.append("PREROUTING", "-p tcp -j ISTIO_INBOUND");
            if self.inbound_ports == ["*"] {
                for port in &self.excluded_inbound_ports {
                    let rule = format!("-p tcp -m tcp --dport {port} -j RETURN");
                    nat.append("ISTIO_INBOUND", rule);
                }
                nat.append("ISTIO_INBOUND", "-p tcp -j ISTIO_IN_REDIRECT");
            } else {
                for port in &self.inbound_ports {
                    let rule = format!("-p tcp -m tcp --dport {port} -j ISTIO_IN_REDIRECT");
                    nat.append("ISTIO_INBOUND", rule);
                }
            }
        }
        nat.append("OUTPUT", "-j ISTIO_OUTPUT");
        for port in &self.excluded_outbound_ports {
            for protocol in ["tcp", "udp"] {
                let rule = format!("-p {protocol} -m {protocol} --dport {port} -j RETURN");
                nat.append("ISTIO_OUTPUT", rule);
            }
        }
        nat.append("ISTIO_OUTPUT", format!("-o lo -s {passthrough} -j RETURN"));

        let is_loopback = |cidr: &String| cidr.starts_with("127.") || cidr.starts_with("::1/");
        let has_loopback = self.cidrs.iter().any(is_loopback);
        let dns = self.redirects_dns();
        for uid in &self.uids {
            let ports = match (self.tunnel_port, dns) {
                (Some(tunnel), true) => format!("-m multiport ! --dports 53,{tunnel} "),
                (Some(tunnel), false) => format!("-m tcp ! --dport {tunnel} "),
                (None, true) => "-m tcp ! --dport 53 ".to_owned(),
                (None, false) => String::new(),
            };
            nat.append(
                "ISTIO_OUTPUT",
                format!(
                    "-o lo ! -d {localhost} -p tcp {ports}-m owner --uid-owner {uid} -j ISTIO_IN_REDIRECT"
                ),
            );
            if !has_loopback {
                let not_dns = if dns {
                    "-p tcp -m tcp ! --dport 53 "
                } else {
                    ""
                };
                nat.append(
                    "ISTIO_OUTPUT",
                    format!("-o lo {not_dns}-m owner ! --uid-owner {uid} -j RETURN"),
                );
            }
            nat.append(
                "ISTIO_OUTPUT",
                format!("-m owner --uid-owner {uid} -j RETURN"),
            );
        }
        for gid in &self.gids {
            let port = match self.tunnel_port {
                Some(tunnel) => format!("-m tcp ! --dport {tunnel} "),
                None => String::new(),
            };
            nat.append(
                "ISTIO_OUTPUT",
                format!(
                    "-o lo ! -d {localhost} -p tcp {port}-m owner --gid-owner {gid} -j ISTIO_IN_REDIRECT"
                ),
            );
            if !has_loopback {
                let not_dns = if dns {
                    "-p tcp -m tcp ! --dport 53 "
                } else {
                    ""
                };
                nat.append(
                    "ISTIO_OUTPUT",
                    format!("-o lo {not_dns}-m owner ! --gid-owner {gid} -j RETURN"),
                );
            }
            nat.append(
                "ISTIO_OUTPUT",
                format!("-m owner --gid-owner {gid} -j RETURN"),
            );
        }

        if !self.only_groups.is_empty() {
            let mut rule = String::new();
            for gid in &self.only_groups {
                let _ = write!(rule, "-m owner ! --gid-owner {gid} ");
            }
            nat.append("ISTIO_OUTPUT", format!("{rule}-j RETURN"));
        }
        for gid in &self.except_groups {
            nat.append(
                "ISTIO_OUTPUT",
                format!("-m owner --gid-owner {gid} -j RETURN"),
            );
        }

        let servers = self.servers(version);
        if self.dns == Dns::All || !servers.is_empty() {
            nat.append("ISTIO_OUTPUT", "-j ISTIO_OUTPUT_DNS");
            for protocol in ["tcp", "udp"] {
                let redirect =
                    format!("-p {protocol} -m {protocol} --dport 53 -j REDIRECT --to-ports 15053");
                if self.dns == Dns::All {
                    nat.append("ISTIO_OUTPUT_DNS", &redirect);
                }
                for server in &servers {
                    nat.append("ISTIO_OUTPUT_DNS", format!("-d {server} {redirect}"));
                }
            }
        }

        nat.append("ISTIO_OUTPUT", format!("-d {localhost} -j RETURN"));
        for cidr in of(version, &self.excluded_cidrs) {
            nat.append("ISTIO_OUTPUT", format!("-d {cidr} -j RETURN"));
        }
        for port in &self.outbound_ports {
            nat.append(
                "ISTIO_OUTPUT",
                format!("-p tcp -m tcp --dport {port} -j ISTIO_REDIRECT"),
            );
        }
        if self.cidrs == ["*"] {
            nat.append("ISTIO_OUTPUT", "-j ISTIO_REDIRECT");
        } else {
            for cidr in of(version, &self.cidrs) {
                nat.append("ISTIO_OUTPUT", format!("-d {cidr} -j ISTIO_REDIRECT"));
            }
        }
        nat.text()
    }

    fn mangle(&self, version: Version) -> String {
        let mut mangle = Table::new("mangle");
        let (localhost, passthrough) = match version {
            Version::V4 => (self.loopback.as_str(), "127.0.0.6/32"),
            Version::V6 => ("::1/128", "::6/128"),
        };
        let tproxy = self.mode == Mode::Tproxy;
        if tproxy {
            for interface in &self.excluded_interfaces {
                mangle.append("PREROUTING", format!("-i {interface} -j RETURN"));
                mangle.append("OUTPUT", format!("-o {interface} -j RETURN"));
            }
        }
        if self.drop_invalid {
            mangle.append("PREROUTING", "-m conntrack --ctstate INVALID -j ISTIO_DROP");
            mangle.append("ISTIO_DROP", "-j DROP");
        }
        if !tproxy {
            return mangle.text();
        }
        // Those that the tool inserts at the chain's head.
        mangle.append("ISTIO_INBOUND", "-p tcp -m mark --mark 1337 -j RETURN");
        mangle.append(
            "ISTIO_INBOUND",
            format!("-p tcp -s {passthrough} -i lo -j RETURN"),
        );
        mangle.append(
            "ISTIO_INBOUND",
            "-p tcp -i lo -m mark ! --mark 1338 -j RETURN",
        );
        if !self.inbound_ports.is_empty() {
            mangle.append("ISTIO_DIVERT", "-j MARK --set-mark 1337");
            mangle.append("ISTIO_DIVERT", "-j ACCEPT");
            mangle.append(
                "ISTIO_TPROXY",
                format!(
                    "! -d {localhost} -p tcp -j TPROXY --tproxy-mark 1337/0xffffffff --on-port 15006"
                ),
            );
            mangle.append("PREROUTING", "-p tcp -j ISTIO_INBOUND");
            let established = "-m conntrack --ctstate RELATED,ESTABLISHED";
            if self.inbound_ports == ["*"] {
                for port in &self.excluded_inbound_ports {
                    let rule = format!("-p tcp -m tcp --dport {port} -j RETURN");
                    mangle.append("ISTIO_INBOUND", rule);
                }
                mangle.append(
                    "ISTIO_INBOUND",
                    format!("-p tcp {established} -j ISTIO_DIVERT"),
                );
                mangle.append("ISTIO_INBOUND", "-p tcp -j ISTIO_TPROXY");
            } else {
                for port in &self.inbound_ports {
                    let port = format!("-p tcp -m tcp --dport {port}");
                    mangle.append(
                        "ISTIO_INBOUND",
                        format!("{port} {established} -j ISTIO_DIVERT"),
                    );
                    mangle.append("ISTIO_INBOUND", format!("{port} -j ISTIO_TPROXY"));
                }
            }
        }
        mangle.append(
            "PREROUTING",
            "-p tcp -m mark --mark 1337 -j CONNMARK --save-mark",
        );
        mangle.append("OUTPUT", "-p tcp -o lo -m mark --mark 1337 -j RETURN");
        for (option, ids) in [("--uid-owner", &self.uids), ("--gid-owner", &self.gids)] {
            for id in ids {
                mangle.append(
                    "OUTPUT",
                    format!(
                        "! -d {localhost} -p tcp -o lo -m owner {option} {id} -j MARK --set-mark 1338"
                    ),
                );
            }
        }
        mangle.append(
            "OUTPUT",
            "-p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark",
        );
        mangle.text()
    }

    /// Keeps both sides' DNS apart in conntrack.
    fn raw(&self, version: Version) -> String {
        let mut raw = Table::new("raw");
        if !self.redirects_dns() {
            return String::new();
        }
        raw.append("OUTPUT", "-j ISTIO_OUTPUT_DNS");
        for (option, ids) in [("--uid-owner", &self.uids), ("--gid-owner", &self.gids)] {
            for id in ids {
                for (port, zone) in [("--dport 53", 1), ("--sport 15053", 2)] {
                    raw.append(
                        "ISTIO_OUTPUT_DNS",
                        format!("-p udp {port} -m owner {option} {id} -j CT --zone {zone}"),
                    );
                }
            }
        }
        let servers = self.servers(version);
        let any = self.dns == Dns::All;
        if any || !servers.is_empty() {
            raw.append("PREROUTING", "-j ISTIO_INBOUND");
        }
        let requests = if any {
            vec![(String::new(), String::new())]
        } else {
            servers
                .iter()
                .map(|server| (format!(" -d {server}"), format!(" -s {server}")))
                .collect()
        };
        for (to, from) in requests {
            raw.append(
                "ISTIO_OUTPUT_DNS",
                format!("-p udp --dport 53{to} -j CT --zone 2"),
            );
            raw.append(
                "ISTIO_INBOUND",
                format!("-p udp --sport 53{from} -j CT --zone 1"),
            );
        }
        raw.text()
    }

    /// The same settings as Interceptor's flags.
    pub fn flags(&self) -> Vec<String> {
        let ids = |ids: &[u32]| {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            ids.join(",")
        };
        let mode = match self.mode {
            Mode::Redirect => "REDIRECT",
            Mode::Tproxy => "TPROXY",
            Mode::None => "NONE",
        };
        let dns = match &self.dns {
            Dns::Off => "off".to_owned(),
            Dns::All => "all".to_owned(),
            Dns::Servers(servers) => servers
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(","),
        };
        let mut flags = vec![
            format!("--proxy-uid={}", ids(&self.uids)),
            format!("--proxy-gid={}", ids(&self.gids)),
            format!("--mode={mode}"),
            format!("--tunnel-port={}", self.tunnel_port.unwrap_or(0)),
            format!("--include-inbound-ports={}", self.inbound_ports.join(",")),
            format!(
                "--exclude-inbound-ports={}",
                self.excluded_inbound_ports.join(",")
            ),
            format!("--include-outbound-cidrs={}", self.cidrs.join(",")),
            format!("--exclude-outbound-cidrs={}", self.excluded_cidrs.join(",")),
            format!("--include-outbound-ports={}", self.outbound_ports.join(",")),
            format!(
                "--exclude-outbound-ports={}",
                self.excluded_outbound_ports.join(",")
            ),
            format!(
                "--exclude-interfaces={}",
                self.excluded_interfaces.join(",")
            ),
            format!("--loopback-cidr={}", self.loopback),
            format!("--dns={dns}"),
        ];
        if !self.only_groups.is_empty() {
            flags.push(format!("--include-owner-groups={}", ids(&self.only_groups)));
        } else {
            flags.push(format!(
                "--exclude-owner-groups={}",
                ids(&self.except_groups)
            ));
        }
        flags
    }

    /// The same settings as Interceptor's own, in JSON.
    pub fn json(&self) -> Value {
        let ports = |ports: &[String]| -> Vec<String> {
            ports.iter().map(|port| port.replace(':', "-")).collect()
        };
        json!({
            "proxy_uids": self.uids,
            "proxy_gids": self.gids,
            "mode": match self.mode {
                Mode::Redirect => "REDIRECT",
                Mode::Tproxy => "TPROXY",
                Mode::None => "NONE",
            },
            "tunnel_port": self.tunnel_port,
            "inbound_ports": ports(&self.inbound_ports).join(","),
            "excluded_inbound_ports": ports(&self.excluded_inbound_ports),
            "outbound_cidrs": self.cidrs.join(","),
            "excluded_outbound_cidrs": self.excluded_cidrs,
            "outbound_ports": ports(&self.outbound_ports),
            "excluded_outbound_ports": ports(&self.excluded_outbound_ports),
            "excluded_interfaces": self.excluded_interfaces,
            "loopback_cidr": self.loopback,
            "owner_groups": if self.only_groups.is_empty() {
                json!({"except": self.except_groups})
            } else {
                json!({"only": self.only_groups})
            },
            "dns": match &self.dns {
                Dns::Off => json!("off"),
                Dns::All => json!("all"),
                Dns::Servers(servers) => json!({"servers": servers}),
            },
            "drop_invalid": self.drop_invalid,
        })
    }
}

/// The CIDRs of a list that are of this version.
fn of(version: Version, cidrs: &[String]) -> impl Iterator<Item = &String> {
    cidrs
        .iter()
        .filter(move |cidr| *cidr != "*" && cidr.contains(':') == (version == Version::V6))
}

/// Owned strings.
pub fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(|item| (*item).to_owned()).collect()
}
