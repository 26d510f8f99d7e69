//! Random settings, and connections on both sides of every boundary that they
//! have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{Dns, Mesh, Mode, strings};
use crate::pod::{Credentials, PEER_V4, PEER_V6};

/// The CIDRs that random settings name. The peer has every address of
/// `10.78.0.0/15` and `fd00:78::/31`. None has the multicast groups beside it to
/// which every host belongs: whose answer comes first is chance.
const CIDRS: [&str; 22] = [
    "10.78.0.0/16",
    "10.78.4.0/22",
    "10.78.4.128/25",
    "10.78.5.5/32",
    "10.79.0.0/17",
    "10.77.0.0/24",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "127.0.0.0/8",
    "10.77.0.255/32",
    "169.254.0.0/16",
    "224.0.0.251/32",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "ff02::fb/128",
    "fd00:78::/32",
    "fd00:78:4::/47",
    "fd00:78:4::/49",
    "fd00:78:5::5/128",
    "fd00:77::/64",
    "::/0",
    "::1/128",
];

/// The ports that random settings name.
const PORTS: [&str; 9] = [
    "8080",
    "8081",
    "8000:8090",
    "8085:9000",
    "53",
    "9000",
    "15008",
    "15090",
    "1:65535",
];

/// The uids and gids that random settings name.
const IDS: [u32; 5] = [1337, 3, 4, 0, 2000];

/// DNS servers that random settings name.
const SERVERS: [&str; 13] = [
    "10.77.0.1",
    "10.78.0.53",
    "127.0.0.53",
    "127.0.0.1",
    "0.0.0.0",
    "10.77.0.255",
    "224.0.0.251",
    "255.255.255.255",
    "fd00:77::1",
    "fd00:78::53",
    "::1",
    "::",
    "ff02::fb",
];

fn list(pool: &'static [&'static str], most: usize) -> impl Strategy<Value = Vec<String>> {
    prop_oneof![
        2 => Just(Vec::new()),
        3 => vec(select(pool), 0..=most).prop_map(|items| strings(&items)),
    ]
}

fn all_or(pool: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    prop_oneof![
        3 => Just(strings(&["*"])),
        3 => vec(select(pool), 1..=4).prop_map(|items| strings(&items)),
        1 => Just(Vec::new()),
    ]
}

fn ids(most: usize) -> impl Strategy<Value = Vec<u32>> {
    vec(select(&IDS[..]), 0..=most)
}

fn dns() -> impl Strategy<Value = Dns> {
    let servers = vec(select(&SERVERS[..]), 0..=3).prop_map(|servers| {
        Dns::Servers(
            servers
                .iter()
                .map(|server| server.parse().expect("an address"))
                .collect(),
        )
    });
    prop_oneof![3 => Just(Dns::Off), 2 => servers, 2 => Just(Dns::All)]
}

/// Any settings with one of these modes.
pub fn settings(modes: &'static [Mode]) -> impl Strategy<Value = Mesh> {
    let owners = (
        prop_oneof![3 => Just(vec![1337]), 2 => ids(3)],
        prop_oneof![3 => Just(vec![1337]), 2 => ids(3)],
        prop_oneof![
            3 => Just((Vec::new(), Vec::new())),
            1 => vec(select(&IDS[..]), 1..=3).prop_map(|only| (only, Vec::new())),
            1 => ids(3).prop_map(|except| (Vec::new(), except)),
        ],
    );
    let inbound = (
        select(modes),
        option::weighted(0.8, Just(15008)),
        all_or(&PORTS),
        list(&PORTS, 4),
    );
    let outbound = (
        all_or(&CIDRS),
        list(&CIDRS, 4),
        list(&PORTS, 3),
        list(&PORTS, 3),
    );
    let others = (
        select(
            &[
                "127.0.0.1/32",
                "127.0.0.1/32",
                "127.0.0.0/8",
                "127.0.0.0/30",
            ][..],
        ),
        prop_oneof![
            4 => Just(Vec::new()),
            1 => Just(strings(&["eth1"])),
            1 => Just(strings(&["eth2", "eth1"])),
        ],
        dns(),
    );
    (owners, inbound, outbound, others).prop_map(
        |(
            (uids, gids, (only_groups, except_groups)),
            (mode, tunnel_port, inbound_ports, excluded_inbound_ports),
            (cidrs, excluded_cidrs, outbound_ports, excluded_outbound_ports),
            (loopback, excluded_interfaces, dns),
        )| Mesh {
            // The mesh's chains tell the answers of its DNS server by its uid.
            uids: if uids.is_empty() && dns != Dns::Off {
                vec![1337]
            } else {
                uids
            },
            gids,
            mode,
            tunnel_port,
            inbound_ports,
            excluded_inbound_ports,
            cidrs,
            excluded_cidrs,
            outbound_ports,
            excluded_outbound_ports,
            excluded_interfaces,
            loopback: loopback.to_owned(),
            only_groups,
            except_groups,
            dns,
            drop_invalid: false,
        },
    )
}

impl Mesh {
    /// The ports that the settings tell apart: each end of each range, and the
    /// port beside it.
    pub fn ports(&self) -> Vec<u16> {
        let mut ports = vec![8080, 53, 15001, 15006, 15008, 15053];
        for range in [
            &self.inbound_ports,
            &self.excluded_inbound_ports,
            &self.outbound_ports,
            &self.excluded_outbound_ports,
        ]
        .into_iter()
        .flatten()
        {
            let (first, last) = range.split_once(':').unwrap_or((range, range));
            for end in [first, last].into_iter().filter_map(|end| end.parse().ok()) {
                let end: u16 = end;
                ports.extend([end.saturating_sub(1), end, end.saturating_add(1)]);
            }
        }
        sorted(ports.into_iter().filter(|port| *port != 0).collect())
    }

    /// The addresses that the settings tell apart: each end of each CIDR, and the
    /// address beside it.
    pub fn destinations(&self) -> Vec<IpAddr> {
        let mut addresses = vec![PEER_V4, PEER_V6];
        let servers = match &self.dns {
            Dns::Servers(servers) => servers.clone(),
            Dns::Off | Dns::All => Vec::new(),
        };
        addresses.extend(&servers);
        for cidr in self.cidrs.iter().chain(&self.excluded_cidrs) {
            let Ok(cidr) = cidr.parse::<IpNet>() else {
                continue;
            };
            let (first, last) = (cidr.network(), cidr.broadcast());
            addresses.extend([
                before(first),
                first,
                last,
                before(last),
                after(first),
                after(last),
            ]);
        }
        sorted(addresses)
    }

    /// The owners that the settings tell apart: each id and the one beside it.
    pub fn owners(&self) -> Vec<Credentials> {
        let mut ids = vec![1337, 2000, 0];
        for id in [
            &self.uids,
            &self.gids,
            &self.only_groups,
            &self.except_groups,
        ]
        .into_iter()
        .flatten()
        {
            ids.extend([id.saturating_sub(1), *id, id + 1]);
        }
        let ids = sorted(ids);
        ids.iter()
            .flat_map(|&uid| ids.iter().map(move |&gid| Credentials { uid, gid }))
            .filter(|Credentials { uid, gid }| {
                uid == gid || [uid, gid].into_iter().any(|id| [1337, 2000].contains(id))
            })
            .collect()
    }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items.dedup();
    items
}

fn before(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_sub(1)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_sub(1)).into(),
    }
}

fn after(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_add(1)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_add(1)).into(),
    }
}
