//! The settings of one pod as the kernel programs read them: what the chains
//! compare connections with, and the numbers of their rules.
//!
//! User space compiles these from the settings that people write. A pod has
//! two places for them, [`GENERATIONS`], of which one is in force, so that they
//! change at once.

use core::net::{Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

use crate::conn::Address;

/// The most proxy uids, and the most proxy gids, that a pod may have.
pub const MAX_OWNERS: usize = 8;
/// The most owner groups, as the mesh's own tool has it.
pub const MAX_GROUPS: usize = 64;
/// The most ports and port ranges in one list.
pub const MAX_PORT_RANGES: usize = 64;
/// The most interfaces that may be excluded.
pub const MAX_INTERFACES: usize = 8;
/// The most CIDRs of one address family in one list.
pub const MAX_CIDRS: usize = 256;

/// How many sets of settings a pod has room for: one in force, and one that is
/// being written.
pub const GENERATIONS: u32 = 2;

/// What of a list of ports or ids is quickly told: a bit for each number modulo
/// 64. Numbers whose bit is not set are not in the list, so that most need no
/// look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Filter {
    /// The bits.
    pub bits: u64,
}

impl Filter {
    /// The filter of ranges of numbers, of which both ends are included.
    pub fn new(ranges: impl Iterator<Item = (u32, u32)>) -> Self {
        let mut bits = 0u64;
        for (first, last) in ranges {
            bits |= match last.saturating_sub(first) {
                63.. => u64::MAX,
                further => ((1u64 << (further + 1)) - 1).rotate_left(first % 64),
            };
        }
        Self { bits }
    }

    /// Whether `number` may be in the list.
    #[inline(always)]
    pub const fn may_have(self, number: u32) -> bool {
        self.bits >> (number % 64) & 1 != 0
    }
}

/// Which stages of the chains there are, as bits of [`Family::stages`]. The
/// programs skip those that a pod doesn't have.
pub mod stages {
    /// The address family has chains at all.
    pub const CHAINS: u32 = 1;
    /// Interfaces are excluded.
    pub const EXCLUDED_INTERFACES: u32 = 1 << 1;
    /// Outbound ports are excluded.
    pub const EXCLUDED_OUTBOUND_PORTS: u32 = 1 << 2;
    /// Each proxy uid and gid has the rule `-o lo ! owned -j RETURN`.
    pub const RETURN_OVER_LO: u32 = 1 << 3;
    /// DNS is captured, of whichever family.
    pub const DNS: u32 = 1 << 4;
    /// DNS to any server is captured.
    pub const DNS_TO_ALL: u32 = 1 << 5;
    /// DNS to the servers of the list is captured.
    pub const DNS_TO_SERVERS: u32 = 1 << 6;
    /// Only the owner groups of the list are captured.
    pub const GROUPS_ONLY: u32 = 1 << 7;
    /// The owner groups of the list are not captured.
    pub const GROUPS_EXCEPT: u32 = 1 << 8;
    /// CIDRs are excluded.
    pub const EXCLUDED_CIDRS: u32 = 1 << 9;
    /// Outbound ports are captured to wherever they lead.
    pub const OUTBOUND_PORTS: u32 = 1 << 10;
    /// All that is left of outbound connections is captured.
    pub const OUTBOUND_ALL: u32 = 1 << 11;
    /// Outbound connections to CIDRs are captured.
    pub const OUTBOUND_CIDRS: u32 = 1 << 12;
    /// Arriving connections are asked about at all.
    pub const INBOUND: u32 = 1 << 13;
    /// All but the inbound ports of the list are captured; without this, only
    /// they are.
    pub const INBOUND_ALL: u32 = 1 << 14;
    /// Inbound connections are captured as by TPROXY: the proxy's connections to
    /// its own pod that `OUTPUT` left alone are asked about, too.
    pub const TPROXY: u32 = 1 << 15;
}

/// What the chains of one address family compare with, and the numbers of
/// their rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Family {
    /// Bits of [`stages`].
    pub stages: u32,
    /// 4 or 6: part of the keys of this family's lists in the `PREFIXES` map.
    pub version: u32,
    /// The source address with which the proxy passes inbound connections on.
    pub passthrough: Address,
    /// What the chains call localhost: this address,
    pub localhost: Address,
    /// as far as the bits of this mask go.
    pub localhost_mask: Address,
    /// The number of the rule `-s PASSTHROUGH -o lo`.
    pub passthrough_rule: u32,
    /// The number of the first rule of the first proxy uid or gid.
    pub owners_rule: u32,
    /// The number of the rule that returns what is of no owner group.
    pub groups_rule: u32,
    /// The number of the rule that leads to `ISTIO_OUTPUT_DNS`.
    pub dns_rule: u32,
    /// The number of the rule `-d LOCALHOST`.
    pub localhost_rule: u32,
    /// The number of the rule that captures all that is left.
    pub outbound_all_rule: u32,
}

impl Family {
    /// Whether the chains have this stage.
    #[inline(always)]
    pub const fn has(&self, stage: u32) -> bool {
        self.stages & stage != 0
    }

    /// Whether the chains call `address` localhost.
    #[inline(always)]
    pub fn is_localhost(&self, address: &Address) -> bool {
        let (a, b) = (address.to_be32s(), self.localhost.to_be32s());
        let mask = self.localhost_mask.to_be32s();
        ((a[0] ^ b[0]) & mask[0])
            | ((a[1] ^ b[1]) & mask[1])
            | ((a[2] ^ b[2]) & mask[2])
            | ((a[3] ^ b[3]) & mask[3])
            == 0
    }
}

/// The settings of one pod, as they lie in the `SETTINGS` map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// Where outbound connections are redirected to; host byte order.
    pub outbound_port: u16,
    /// Where inbound connections are redirected to; host byte order.
    pub inbound_port: u16,
    /// Where DNS is redirected to; host byte order.
    pub dns_port: u16,
    /// The port at which other proxies' tunnels arrive, never captured; host
    /// byte order, 0 if there is none.
    pub tunnel_port: u16,
    /// In which of the [`GENERATIONS`] this lies: part of the keys of the
    /// `PREFIXES` map.
    pub generation: u32,
    /// How many uids are the proxy's own.
    pub proxy_uids: u32,
    /// How many gids are the proxy's own.
    pub proxy_gids: u32,
    /// How many rules each proxy uid and gid has.
    pub rules_per_owner: u32,
    /// Uids whose connections are the proxy's own.
    pub proxy_uid: Filter,
    /// Gids whose connections are the proxy's own.
    pub proxy_gid: Filter,
    /// Outbound ports that are never captured.
    pub excluded_outbound_ports: Filter,
    /// Outbound ports that are captured to wherever they lead.
    pub outbound_ports: Filter,
    /// Inbound ports: those not captured, or those captured.
    pub inbound_ports: Filter,
    /// The number of the rule for the tunnel port.
    pub tunnel_rule: u32,
    /// The number of the rule that captures all that is left.
    pub inbound_all_rule: u32,
    /// The mark of TPROXY: connections that have it are the proxy's, from its
    /// client's address to its own pod.
    pub tproxy_mark: u32,
    /// Always zero, so that the type has no padding.
    pub reserved: u32,
    /// IPv4.
    pub v4: Family,
    /// IPv6.
    pub v6: Family,
}

impl Settings {
    /// What applies to connections to `address`.
    #[inline(always)]
    pub fn family(&self, address: &Address) -> &Family {
        if address.is_v4() { &self.v4 } else { &self.v6 }
    }
}

/// `127.0.0.1`.
pub const LOCALHOST_V4: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// `::1`.
pub const LOCALHOST_V6: Ipv6Addr = Ipv6Addr::LOCALHOST;

/// The lists whose look-up must take the same time however long they are. All
/// are in the `PREFIXES` map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum List {
    /// Servers whose DNS is captured; by address, of each family.
    DnsServers = 0,
    /// Outbound destinations that are not captured; by address, of each family.
    ExcludedOutbound = 1,
    /// Outbound destinations that are captured; by address, of each family.
    Outbound = 2,
    /// Outbound ports that are never captured; by port. The rule is the one for
    /// TCP, which that for UDP follows.
    ExcludedOutboundPorts = 3,
    /// Outbound ports that are captured; by port, of each family.
    OutboundPorts = 4,
    /// Inbound ports; by port.
    InboundPorts = 5,
    /// Owner groups; by gid. Where they are captured, the number is any but 0.
    Groups = 6,
    /// Uids whose connections are the proxy's own; by uid. The rule is the first
    /// of each, numbered from 1 for the first uid, because it stands at another
    /// place in each family.
    ProxyUids = 7,
    /// The same for gids.
    ProxyGids = 8,
    /// Interfaces that are left alone; by index. The rule is the one in `OUTPUT`
    /// and in `PREROUTING`.
    ExcludedInterfaces = 9,
}

/// The most prefixes that all lists of all generations can have together: those
/// of CIDRs, the up to 30 of each port range, and the ids and interfaces.
#[expect(clippy::cast_possible_truncation, reason = "some thousands")]
pub const MAX_PREFIXES: u32 = GENERATIONS
    * (3 * 2 * MAX_CIDRS + 4 * 30 * MAX_PORT_RANGES + MAX_GROUPS + 2 * MAX_OWNERS + MAX_INTERFACES)
        as u32;

/// The key of the `PREFIXES` map, a longest-prefix trie. Its value is the number
/// of the first rule of the list that matches all that the prefix covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PrefixKey {
    /// [`Settings::generation`].
    pub generation: u8,
    /// A [`List`], as its number.
    pub list: u8,
    /// [`Family::version`]; 0 for a list that both families have.
    pub version: u8,
    /// Always zero.
    pub reserved: u8,
    /// An address, a [`port_key`] or an [`id_key`].
    pub key: Address,
}

impl PrefixKey {
    /// How many bits stand before the address, port or id.
    pub const BITS_BEFORE: u32 = 32;

    /// The key for an address, port or id.
    #[inline(always)]
    pub const fn new(generation: u32, version: u32, list: List, key: Address) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "small numbers")]
        Self {
            generation: generation as u8,
            list: list as u8,
            version: version as u8,
            reserved: 0,
            key,
        }
    }
}

/// A port (host byte order) as a key: its bits come first.
#[inline(always)]
pub fn port_key(port: u16) -> Address {
    Address::from_be32s([(u32::from(port) << 16).to_be(), 0, 0, 0])
}

/// A uid, a gid or an interface's index as a key: its bits come first.
#[inline(always)]
pub fn id_key(id: u32) -> Address {
    Address::from_be32s([id.to_be(), 0, 0, 0])
}

/// The lists of a pod: the `PREFIXES` map.
pub trait Lists {
    /// The number of the list's first rule that matches `key`; 0 if none does.
    /// `version` is 0 for a list that both families have.
    fn rule(&self, generation: u32, version: u32, list: List, key: &Address) -> u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_lets_all_of_its_numbers_through() {
        let ranges = [(22, 22), (60, 70), (15020, 15021)];
        let filter = Filter::new(ranges.into_iter());
        for port in 0..=65535 {
            let there = ranges
                .iter()
                .any(|(first, last)| (*first..=*last).contains(&port));
            assert!(filter.may_have(port) || !there, "{port}");
        }
        assert!(!filter.may_have(8080));
        let all = Filter::new([(0, 65535)].into_iter());
        assert!((0..=65535).all(|port| all.may_have(port)));
        assert!((0..64).all(|n| Filter::new([(5, 68)].into_iter()).may_have(n)));
        assert_eq!(Filter::new([(5, 67)].into_iter()).bits.count_ones(), 63);
        assert_eq!(Filter::new([].into_iter()).bits, 0);
    }
}
