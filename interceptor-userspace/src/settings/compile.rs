//! Settings as the kernel programs read them.

use std::collections::BTreeMap;

use interceptor_common::{
    config::{self, Filter, List, Lists, MAX_INTERFACES, id_key, port_key, stages},
    conn::Address,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Cidrs, Dns, Family, Mode, OwnerGroups, PortRange, Ports, Settings};
use crate::{Error, Result};

/// What settings mean depends on where the pod is.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The names and indexes of its interfaces.
    pub interfaces: Vec<(String, u32)>,
    /// How its user namespace numbers uids.
    pub uids: IdMap,
    /// How its user namespace numbers gids.
    pub gids: IdMap,
}

/// A user namespace's uids or gids: lines of the form "first id inside, first id
/// outside, how many", as in `/proc/PID/uid_map`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap(pub Vec<(u32, u32, u32)>);

impl Default for IdMap {
    /// That of the initial user namespace: every id is itself.
    fn default() -> Self {
        Self(vec![(0, 0, u32::MAX)])
    }
}

impl IdMap {
    /// Outside's number of the id; `None` if the namespace doesn't have it.
    pub fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|&(inside, outside, count)| {
            let offset = id.checked_sub(inside)?;
            (offset < count).then(|| outside.checked_add(offset))?
        })
    }
}

/// A prefix of one of the lists, and the number of the first rule that matches
/// all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The list.
    pub list: List,
    /// 4 or 6; 0 if both families have the list.
    pub version: u32,
    /// The address, or the port or gid as a key.
    pub key: Address,
    /// How many of the key's bits count.
    pub bits: u8,
    /// The rule's number.
    pub rule: u32,
}

impl Prefix {
    fn covers(&self, key: &Address) -> bool {
        let number = |key: &Address| u128::from_be_bytes(key.octets);
        let differ = number(&self.key) ^ number(key);
        self.bits == 0 || differ >> (128 - u32::from(self.bits)) == 0
    }
}

/// Settings as the kernel programs read them.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// For the `SETTINGS` map.
    pub settings: config::Settings,
    /// For the `PREFIXES` map.
    pub prefixes: PrefixTable,
}

/// The `PREFIXES` map, here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixTable(pub Vec<Prefix>);

impl Lists for PrefixTable {
    fn rule(&self, _generation: u32, version: u32, list: List, key: &Address) -> u32 {
        self.0
            .iter()
            .filter(|entry| entry.list == list && entry.version == version && entry.covers(key))
            .max_by_key(|entry| entry.bits)
            .map_or(0, |entry| entry.rule)
    }
}

impl PrefixTable {
    /// Adds a list of prefixes, each with its rule: each prefix gets the first
    /// rule of those that match all of it.
    fn add(&mut self, list: List, version: u32, entries: &[(Address, u8, u32)]) {
        let entries: Vec<Prefix> = entries
            .iter()
            .map(|&(key, bits, rule)| Prefix {
                list,
                version,
                key,
                bits,
                rule,
            })
            .collect();
        let mut first = BTreeMap::new();
        for entry in &entries {
            let rule = entries
                .iter()
                .filter(|other| other.bits <= entry.bits && other.covers(&entry.key))
                .map(|other| other.rule)
                .min()
                .unwrap_or(entry.rule);
            first.insert((entry.key.octets, entry.bits), Prefix { rule, ..*entry });
        }
        self.0.extend(first.into_values());
    }

    /// Adds a list of CIDRs whose rules are numbered from `first`, or have all
    /// the same one.
    fn add_cidrs(&mut self, list: List, version: u32, cidrs: &[IpNet], first: u32, each: u32) {
        let entries: Vec<_> = (0..)
            .zip(cidrs)
            .map(|(index, cidr)| {
                let before = if cidr.addr().is_ipv4() { 96 } else { 0 };
                (
                    cidr.network().into(),
                    before + cidr.prefix_len(),
                    first + index * each,
                )
            })
            .collect();
        self.add(list, version, &entries);
    }

    /// Adds a list of ids, the first with the rule `first`, `each` further.
    fn add_ids(&mut self, list: List, ids: &[u32], first: u32, each: u32) {
        let entries: Vec<_> = (0..)
            .zip(ids)
            .map(|(index, id)| (id_key(*id), 32, first + index * each))
            .collect();
        self.add(list, 0, &entries);
    }

    /// Adds a list of ports, the first with the rule `first`, `each` further.
    fn add_ports(&mut self, list: List, version: u32, ranges: &[PortRange], first: u32, each: u32) {
        let entries: Vec<_> = (0..)
            .zip(ranges)
            .flat_map(|(index, range)| {
                prefixes_of(*range)
                    .into_iter()
                    .map(move |(port, bits)| (port_key(port), bits, first + index * each))
            })
            .collect();
        self.add(list, version, &entries);
    }
}

/// The fewest prefixes that cover a range of ports.
fn prefixes_of(range: PortRange) -> Vec<(u16, u8)> {
    let mut prefixes = Vec::new();
    let (mut next, last) = (u32::from(range.first()), u32::from(range.last()));
    while next <= last {
        let mut bits = 16u8;
        // As long as the next larger block begins here and ends in the range.
        while bits > 0 {
            let size = 1u32 << (16 - bits + 1);
            if next % size != 0 || next + size - 1 > last {
                break;
            }
            bits -= 1;
        }
        #[expect(clippy::cast_possible_truncation, reason = "a port")]
        prefixes.push((next as u16, bits));
        next += 1 << (16 - bits);
    }
    prefixes
}

fn filter(ranges: &[PortRange]) -> Filter {
    Filter::new(
        ranges
            .iter()
            .map(|range| (range.first().into(), range.last().into())),
    )
}

/// Counts the rules of a chain as they are added.
struct Numbers(u32);

impl Numbers {
    /// The number of the first of `count` further rules.
    fn next(&mut self, count: usize) -> u32 {
        let first = self.0;
        self.0 += u32::try_from(count).unwrap_or(u32::MAX);
        first
    }
}

impl Settings {
    /// Makes of the settings what the kernel programs read, for one generation.
    ///
    /// # Errors
    ///
    /// If they can't be, or name ids that the pod's user namespace doesn't have.
    pub fn compile(&self, place: &Place, generation: u32) -> Result<Compiled> {
        self.check()?;
        let (OwnerGroups::Only(groups) | OwnerGroups::Except(groups)) = &self.owner_groups;
        let inbound_ports = match &self.inbound_ports {
            Ports::All => &self.excluded_inbound_ports,
            Ports::List(ports) => ports,
        };
        let mut prefixes = PrefixTable::default();
        let v4 = self.compile_family(Family::V4, &mut prefixes);
        let v6 = self.compile_family(Family::V6, &mut prefixes);
        let tproxy = self.mode == Mode::Tproxy;
        let mut numbers = Numbers(1);
        // Those against loops, in the mangle table.
        numbers.next(if tproxy { 3 } else { 0 });
        let tunnel = self.tunnel_port.filter(|_| !tproxy);
        let tunnel_rule = match tunnel {
            Some(_) => numbers.next(1),
            None => 0,
        };
        // Before the rule that captures one for what is established already.
        let established = u32::from(tproxy);
        match self.inbound_ports {
            Ports::All => {
                let first = numbers.next(inbound_ports.len());
                prefixes.add_ports(List::InboundPorts, 0, inbound_ports, first, 1);
            }
            Ports::List(_) => prefixes.add_ports(
                List::InboundPorts,
                0,
                inbound_ports,
                numbers.0 + established,
                1 + established,
            ),
        }
        let excluded_ports = &self.excluded_outbound_ports;
        prefixes.add_ports(List::ExcludedOutboundPorts, 0, excluded_ports, 1, 2);
        let groups = outside(&place.gids, "owner-groups", groups)?;
        prefixes.add_ids(List::Groups, &groups, v4.groups_rule, 1);
        let uids = outside(&place.uids, "proxy-uid", &self.proxy_uids)?;
        prefixes.add_ids(List::ProxyUids, &uids, 1, self.rules_per_owner());
        let gids = outside(&place.gids, "proxy-gid", &self.proxy_gids)?;
        prefixes.add_ids(List::ProxyGids, &gids, 1, self.rules_per_owner());
        prefixes.add(List::ExcludedInterfaces, 0, &self.interfaces(place)?);
        let ids = |ids: &[u32]| Filter::new(ids.iter().map(|id| (*id, *id)));
        let settings = config::Settings {
            outbound_port: self.outbound_port,
            inbound_port: self.inbound_port,
            dns_port: self.dns_port,
            tunnel_port: self.tunnel_port.unwrap_or(0),
            generation,
            proxy_uids: count(&uids),
            proxy_gids: count(&gids),
            rules_per_owner: self.rules_per_owner(),
            proxy_uid: ids(&uids),
            proxy_gid: ids(&gids),
            excluded_outbound_ports: filter(excluded_ports),
            outbound_ports: filter(&self.outbound_ports),
            inbound_ports: filter(inbound_ports),
            tunnel_rule,
            inbound_all_rule: numbers.0 + established,
            tproxy_mark: self.tproxy_mark,
            reserved: 0,
            v4,
            v6,
        };
        Ok(Compiled { settings, prefixes })
    }

    fn rules_per_owner(&self) -> u32 {
        if self.captures_loopback() { 2 } else { 3 }
    }

    fn compile_family(&self, family: Family, prefixes: &mut PrefixTable) -> config::Family {
        let (localhost, localhost_mask) = match family {
            Family::V4 => (
                self.loopback_cidr.network().into(),
                mask(self.loopback_cidr.into()),
            ),
            Family::V6 => (
                config::LOCALHOST_V6.into(),
                mask(Ipv6Net::from(config::LOCALHOST_V6).into()),
            ),
        };
        let version = match family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        let mut bits = 0;
        let mut stage = |stage: u32, there: bool| {
            if there {
                bits |= stage;
            }
        };
        let (captured_all, captured) = match &self.outbound_cidrs {
            Cidrs::All => (true, Vec::new()),
            Cidrs::List(list) => (false, family.of(list)),
        };
        let excluded = family.of(&self.excluded_outbound_cidrs);
        let servers: Vec<IpNet> = match &self.dns {
            Dns::Servers(servers) => {
                family.of(&servers.iter().copied().map(IpNet::from).collect::<Vec<_>>())
            }
            Dns::Off | Dns::All => Vec::new(),
        };
        stage(
            stages::CHAINS,
            self.captures() && (family == Family::V4 || self.ipv6),
        );
        stage(
            stages::EXCLUDED_INTERFACES,
            !self.excluded_interfaces.is_empty(),
        );
        stage(
            stages::EXCLUDED_OUTBOUND_PORTS,
            !self.excluded_outbound_ports.is_empty(),
        );
        stage(stages::RETURN_OVER_LO, !self.captures_loopback());
        stage(stages::DNS, self.dns.is_on());
        stage(stages::DNS_TO_ALL, self.dns == Dns::All);
        stage(stages::DNS_TO_SERVERS, !servers.is_empty());
        let group_rules = match &self.owner_groups {
            OwnerGroups::Only(_) => {
                stage(stages::GROUPS_ONLY, true);
                1
            }
            OwnerGroups::Except(groups) => {
                stage(stages::GROUPS_EXCEPT, !groups.is_empty());
                groups.len()
            }
        };
        stage(stages::EXCLUDED_CIDRS, !excluded.is_empty());
        stage(stages::OUTBOUND_PORTS, !self.outbound_ports.is_empty());
        stage(stages::OUTBOUND_ALL, captured_all);
        stage(stages::OUTBOUND_CIDRS, !captured.is_empty());
        let inbound_all = self.inbound_ports == Ports::All;
        stage(
            stages::INBOUND,
            self.captures()
                && (family == Family::V4 || self.ipv6)
                && self.inbound_ports != Ports::List(Vec::new()),
        );
        stage(stages::INBOUND_ALL, inbound_all);
        stage(
            stages::TPROXY,
            self.mode == Mode::Tproxy && self.inbound_ports != Ports::List(Vec::new()),
        );

        let mut numbers = Numbers(1);
        numbers.next(2 * self.excluded_outbound_ports.len());
        let passthrough_rule = numbers.next(1);
        let owners = self.proxy_uids.len() + self.proxy_gids.len();
        let owners_rule = numbers.next(owners * self.rules_per_owner() as usize);
        let groups_rule = numbers.next(group_rules);
        let dns = self.dns == Dns::All || !servers.is_empty();
        let dns_rule = numbers.next(usize::from(dns));
        let localhost_rule = numbers.next(1);
        prefixes.add_cidrs(List::DnsServers, version, &servers, dns_rule, 0);
        let first = numbers.next(excluded.len());
        prefixes.add_cidrs(List::ExcludedOutbound, version, &excluded, first, 1);
        let first = numbers.next(self.outbound_ports.len());
        prefixes.add_ports(List::OutboundPorts, version, &self.outbound_ports, first, 1);
        prefixes.add_cidrs(List::Outbound, version, &captured, numbers.0, 1);
        config::Family {
            stages: bits,
            version,
            passthrough: Address::from(family.passthrough()),
            localhost,
            localhost_mask,
            passthrough_rule,
            owners_rule,
            groups_rule,
            dns_rule,
            localhost_rule,
            outbound_all_rule: numbers.0,
        }
    }

    /// The interfaces of the place that are excluded, as entries of their list.
    fn interfaces(&self, place: &Place) -> Result<Vec<(Address, u8, u32)>> {
        let found: Vec<_> = place
            .interfaces
            .iter()
            .filter_map(|(name, index)| {
                let (rule, _) = (1..).zip(&self.excluded_interfaces).find(|(_, pattern)| {
                    match pattern.strip_suffix('+') {
                        Some(start) => name.starts_with(start),
                        None => *pattern == name,
                    }
                })?;
                Some((id_key(*index), 32, rule))
            })
            .collect();
        super::at_most("exclude-interfaces", found.len(), MAX_INTERFACES)?;
        Ok(found)
    }
}

fn count(list: &[u32]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

fn outside(map: &IdMap, name: &str, ids: &[u32]) -> Result<Vec<u32>> {
    ids.iter()
        .map(|id| {
            map.outside(*id).ok_or_else(|| {
                Error::setting(
                    name,
                    id,
                    "is no id of the pod's user namespace: give one that its uid_map and gid_map \
                     have",
                )
            })
        })
        .collect()
}

/// The mask of a prefix of the addresses in their common form.
fn mask(prefix: IpNet) -> Address {
    match prefix {
        IpNet::V4(prefix) => {
            let mut octets = [0xff; 16];
            octets[12..].copy_from_slice(&Ipv4Net::netmask(&prefix).octets());
            Address::v6(octets)
        }
        IpNet::V6(prefix) => prefix.netmask().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_the_first_rule_that_matches_all_of_it() {
        let cidrs: Vec<IpNet> = ["10.1.0.0/16", "10.0.0.0/8", "10.1.2.0/24", "10.0.0.0/8"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let mut table = PrefixTable::default();
        table.add_cidrs(List::Outbound, 4, &cidrs, 20, 1);
        assert_eq!(table.0.len(), 3);
        for (address, rule) in [
            ("10.1.2.3", 20),
            ("10.1.0.1", 20),
            ("10.2.0.1", 21),
            ("11.0.0.0", 0),
        ] {
            let address: std::net::IpAddr = address.parse().unwrap();
            assert_eq!(table.rule(0, 4, List::Outbound, &address.into()), rule);
        }
    }

    #[test]
    fn ports_are_looked_up_as_their_list_is_read() {
        for list in [
            "80,8000-8010,8005-9000,0-65535",
            "1-65534,0",
            "0-0,65535",
            "100-199,150-160,1-99",
        ] {
            let ranges = super::super::port_list(list).unwrap();
            let mut table = PrefixTable::default();
            table.add_ports(List::InboundPorts, 0, &ranges, 5, 2);
            assert!(table.0.len() <= 30 * ranges.len());
            for port in 0..=u16::MAX {
                let first = (0..)
                    .zip(&ranges)
                    .find(|(_, range)| (range.first()..=range.last()).contains(&port))
                    .map_or(0, |(index, _)| 5 + 2 * index);
                let found = table.rule(0, 0, List::InboundPorts, &port_key(port));
                assert_eq!(found, first, "{list} {port}");
            }
        }
    }

    #[test]
    fn ids_are_translated() {
        let map = IdMap(vec![(0, 100_000, 1000), (1337, 5, 1)]);
        assert_eq!(map.outside(0), Some(100_000));
        assert_eq!(map.outside(999), Some(100_999));
        assert_eq!(map.outside(1000), None);
        assert_eq!(map.outside(1337), Some(5));
        assert_eq!(IdMap::default().outside(1337), Some(1337));
    }
}
