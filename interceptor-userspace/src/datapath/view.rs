//! What is attached, read from the pins alone: nothing has to run for it.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use interceptor_common::{
    chains::Chain,
    config,
    conn::{Address, Endpoint, Handshake},
    counters::{Event, rule_index},
    listeners::ProxyPort,
    pod::{Attachment, LAYOUT},
    routes::Route,
};
use serde::{Deserialize, Serialize};

use super::{
    attach::need_root,
    bpf::{Link, LinkTarget, socket_cookie},
    object::{DNS_LINKS, Hook, LINKS, MAPS, has_set_retval},
    pins::{Pins, link_pin, map_pin},
    plain::Plain,
    policy,
    startup::UntilProxyListens,
};
use crate::{
    Error, Result,
    pod::{
        PodName, cgroup,
        netns::{Netns, NetnsId},
    },
    settings::{ChainRule, Family, Settings},
};

/// An attached pod, seen through its pins.
#[derive(Debug)]
pub(crate) struct Opened {
    pod: PodName,
    pub(crate) directory: PathBuf,
    pub(crate) attachment: Attachment,
    /// What people wrote.
    pub(crate) settings: Settings,
    /// What the programs read.
    pub(crate) compiled: config::Settings,
}

/// A pod's attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodView {
    /// Its name.
    pub pod: String,
    /// The number of its cgroup.
    pub cgroup_id: u64,
    /// The path of its cgroup; none if that is gone.
    pub cgroup: Option<PathBuf>,
    /// The inode of its network namespace.
    pub netns_inode: u64,
    /// Its settings.
    pub settings: Settings,
    /// The level of the programs' log, 0 (off) to 5 (trace).
    pub log_level: u64,
    /// Where its pins lie.
    pub pins: PathBuf,
    /// Its programs.
    pub links: Vec<LinkView>,
    /// The proxy's listeners that are registered.
    pub listeners: ListenerView,
    /// What becomes of connections that arrive while the proxy doesn't listen.
    pub until_proxy_listens: UntilProxyListens,
    /// Redirected connections that no proxy has accepted yet, to destinations without a number.
    pub handshakes: usize,
    /// How many original destinations have a number.
    pub numbered_destinations: usize,
    /// How many routes are known.
    pub routes: usize,
    /// With which error a redirected connect() fails for want of memory:
    /// `ECONNREFUSED`, or `EPERM` where the kernel has no `bpf_set_retval`
    /// (before Linux 5.18).
    pub refusal: String,
    /// What happened beside the rules' decisions.
    pub events: Vec<EventView>,
}

/// An attached program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkView {
    /// Its name.
    pub program: String,
    /// The kernel's number of the link.
    pub link_id: u32,
    /// The kernel's number of the program.
    pub program_id: u32,
}

/// How many listeners of the proxy are registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerView {
    /// On the outbound port.
    pub outbound: usize,
    /// On the inbound port.
    pub inbound: usize,
    /// On the port for DNS over TCP.
    pub dns: usize,
}

/// How often an event happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// What happened.
    pub event: String,
    /// How often.
    pub count: u64,
}

/// A chain with its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainView {
    /// The chain's name.
    pub chain: String,
    /// Whose it is: of `IPv4`, of `IPv6`, or of `both` if they have the same
    /// rules.
    pub family: String,
    /// From which of the kernel's chains it is reached.
    pub from: String,
    /// Its rules in order.
    pub rules: Vec<RuleView>,
}

/// A rule with its counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleView {
    /// Its number in the chain, from 1.
    pub number: u32,
    /// What happens to a connection that matches.
    pub target: String,
    /// What it matches, in the words of iptables.
    pub text: String,
    /// How many connections it has decided; none for a rule that came after the
    /// pod was attached and for which there is no counter.
    pub hits: Option<u64>,
}

/// The attached pods' names.
///
/// # Errors
///
/// If the pins can't be read.
pub fn pods(pins: &Pins) -> Result<Vec<PodName>> {
    need_root()?;
    pins.pods()
}

/// What is attached for a pod.
///
/// # Errors
///
/// If the pod is not attached, or its pins are not whole.
pub fn view(pins: &Pins, pod: &PodName) -> Result<PodView> {
    let opened = Opened::of(pins, pod)?;
    let links = opened.check()?;
    let handshakes: HashMap<MapData, Plain<Handshake>, Plain<Endpoint>> =
        opened.map("HANDSHAKES")?;
    let destinations: HashMap<MapData, u32, Plain<Endpoint>> = opened.map("DESTINATIONS")?;
    let routes: LpmTrie<MapData, Plain<Address>, Plain<Route>> = opened.map("ROUTES")?;
    let counters = opened.counters()?;
    Ok(PodView {
        pod: pod.to_string(),
        cgroup_id: opened.attachment.cgroup_id,
        cgroup: cgroup::path_of(opened.attachment.cgroup_id),
        netns_inode: opened.attachment.netns_inode,
        settings: opened.settings.clone(),
        log_level: opened.attachment.log_level,
        links,
        listeners: opened.all_listeners()?,
        until_proxy_listens: opened.until_proxy_listens()?,
        handshakes: handshakes.keys().count(),
        numbered_destinations: destinations.keys().count(),
        routes: routes.keys().count(),
        refusal: if has_set_retval() {
            "ECONNREFUSED"
        } else {
            "EPERM"
        }
        .to_owned(),
        events: Event::ALL
            .into_iter()
            .map(|event| EventView {
                event: event_words(event).to_owned(),
                count: counters[event.index() as usize],
            })
            .collect(),
        pins: opened.directory,
    })
}

/// What a pod's programs have counted and hold.
#[derive(Debug)]
pub struct Counts {
    /// The chains, with the connections that each rule has decided.
    pub chains: Vec<ChainView>,
    /// What happened beside that: in one word, and how often.
    pub events: Vec<(&'static str, u64)>,
    /// The proxy's listeners that are registered.
    pub listeners: ListenerView,
    /// Redirected connections that no proxy has accepted yet.
    pub handshakes: usize,
}

/// What a pod's programs have counted and hold now.
///
/// # Errors
///
/// If the pod is not attached, or its pins are not whole.
pub fn counts(pins: &Pins, pod: &PodName) -> Result<Counts> {
    let opened = Opened::of(pins, pod)?;
    let handshakes: HashMap<MapData, Plain<Handshake>, Plain<Endpoint>> =
        opened.map("HANDSHAKES")?;
    let counters = opened.counters()?;
    Ok(Counts {
        chains: chains_of(&opened, &counters),
        events: Event::ALL
            .into_iter()
            .map(|event| (event_name(event), counters[event.index() as usize]))
            .collect(),
        listeners: opened.all_listeners()?,
        handshakes: handshakes.keys().count(),
    })
}

/// A pod's chains, with the connections that each rule has decided.
///
/// # Errors
///
/// If the pod is not attached, or its pins are not whole.
pub fn chains(pins: &Pins, pod: &PodName) -> Result<Vec<ChainView>> {
    let opened = Opened::of(pins, pod)?;
    Ok(chains_of(&opened, &opened.counters()?))
}

fn chains_of(opened: &Opened, counters: &[u64]) -> Vec<ChainView> {
    let hits = |chain, number, family| -> Option<u64> {
        let index = rule_index(chain, number, family == Family::V4);
        counters.get(index as usize).copied()
    };
    let mut views = Vec::new();
    for (chain, from) in [
        (Chain::Out, ""),
        (Chain::Output, "OUTPUT"),
        (Chain::In, ""),
        (Chain::Inbound, "PREROUTING"),
    ] {
        let [v4, v6] = Family::ALL.map(|family| opened.settings.rules(chain, family));
        let view = |rules: &[ChainRule], families: &[Family], family: &str| ChainView {
            chain: chain.to_string(),
            family: String::from(family),
            from: from.to_owned(),
            rules: (1..)
                .zip(rules)
                .map(|(number, rule)| RuleView {
                    number,
                    target: rule.target.clone(),
                    text: rule.matches.clone(),
                    hits: families
                        .iter()
                        .map(|family| hits(chain, number, *family))
                        .sum(),
                })
                .collect(),
        };
        if twins(&v4, &v6) {
            if !v4.is_empty() {
                views.push(view(&v4, &Family::ALL, "both"));
            }
            continue;
        }
        for (rules, family, name) in [(v4, Family::V4, "IPv4"), (v6, Family::V6, "IPv6")] {
            if !rules.is_empty() {
                views.push(view(&rules, &[family], name));
            }
        }
    }
    views
}

/// Whether the rules differ only in what each family calls localhost.
fn twins(v4: &[ChainRule], v6: &[ChainRule]) -> bool {
    let as_v6 = |rule: &ChainRule| {
        rule.matches
            .replace("127.0.0.1/32", "::1/128")
            .replace("127.0.0.6/32", "::6/128")
    };
    v4.len() == v6.len()
        && v4
            .iter()
            .zip(v6)
            .all(|(v4, v6)| v4.target == v6.target && as_v6(v4) == v6.matches)
}

impl Opened {
    pub(crate) fn of(pins: &Pins, pod: &PodName) -> Result<Self> {
        need_root()?;
        let directory = pins.pod(pod);
        if !directory.exists() {
            return Err(Error::NotAttached {
                pod: pod.clone(),
                path: directory,
            });
        }
        Self::open(pod, &directory)
    }

    /// Opens the pins in `directory`, of whatever layout, as far as the attachment.
    pub(crate) fn open_attachment(pod: &PodName, directory: &Path) -> Result<Self> {
        let mut opened = Self {
            pod: pod.clone(),
            directory: directory.to_owned(),
            attachment: bytemuck::Zeroable::zeroed(),
            settings: Settings::default(),
            compiled: bytemuck::Zeroable::zeroed(),
        };
        opened.attachment = opened.read_attachment()?;
        Ok(opened)
    }

    /// Opens the pins in `directory`.
    pub(crate) fn open(pod: &PodName, directory: &Path) -> Result<Self> {
        let mut opened = Self::open_attachment(pod, directory)?;
        if opened.attachment.layout != LAYOUT {
            return Err(Error::Layout {
                pod: pod.clone(),
                found: opened.attachment.layout,
                ours: LAYOUT,
            });
        }
        let generation = policy::generation(&opened)?;
        let settings: Array<MapData, Plain<config::Settings>> = opened.map("SETTINGS")?;
        opened.compiled = settings
            .get(&generation, 0)
            .map_err(Error::map("reading", "SETTINGS"))?
            .0;
        opened.settings = policy::read_declared(directory, generation)
            .map_err(|missing| opened.damaged(missing))?;
        Ok(opened)
    }

    fn read_attachment(&self) -> Result<Attachment> {
        let attachments: Array<MapData, Plain<Attachment>> = self.map("ATTACHMENT")?;
        attachments
            .get(&0, 0)
            .map(|attachment| attachment.0)
            .map_err(Error::map("reading", "ATTACHMENT"))
    }

    /// Checks that every pin is there and that every link is attached to what
    /// the attachment says.
    pub(crate) fn check(&self) -> Result<Vec<LinkView>> {
        for name in MAPS {
            self.open_map(name)?;
        }
        // Those for DNS may have been attached later, or never.
        let dns = DNS_LINKS
            .iter()
            .filter(|hook| self.settings.dns.is_on() || self.has_link(hook));
        LINKS
            .iter()
            .chain(dns)
            .map(|hook| {
                let path = link_pin(&self.directory, hook.program);
                let info = Link::open(&path)
                    .and_then(|link| link.info())
                    .map_err(|error| self.damaged(format!("links/{}: {error}", hook.program)))?;
                let attached_to = match info.target {
                    // Gone with its cgroup or network namespace: the link is
                    // still ours.
                    LinkTarget::Cgroup(0) | LinkTarget::Netns(0) => true,
                    LinkTarget::Cgroup(id) => id == self.attachment.cgroup_id,
                    LinkTarget::Netns(inode) => inode == self.attachment.netns_inode,
                };
                if !attached_to {
                    return Err(
                        self.damaged(format!("links/{} is attached elsewhere", hook.program))
                    );
                }
                Ok(LinkView {
                    program: hook.program.to_owned(),
                    link_id: info.id,
                    program_id: info.program_id,
                })
            })
            .collect()
    }

    /// Whether there is a pin of the hook's link.
    pub(crate) fn has_link(&self, hook: &Hook) -> bool {
        link_pin(&self.directory, hook.program).exists()
    }

    /// Which network namespace it is attached to.
    pub(crate) const fn netns_id(&self) -> NetnsId {
        NetnsId {
            device: self.attachment.netns_device,
            inode: self.attachment.netns_inode,
        }
    }

    /// The pod's network namespace.
    pub(crate) fn netns(&self) -> Result<Netns> {
        Netns::find(self.netns_id())
            .ok_or_else(|| self.damaged("its network namespace is gone".to_owned()))
    }

    /// A pinned map.
    pub(crate) fn map<T: TryFrom<Map, Error = MapError>>(&self, name: &'static str) -> Result<T> {
        let data = self.open_map(name)?;
        Map::from_map_data(data)
            .and_then(T::try_from)
            .map_err(Error::map("opening", name))
    }

    pub(crate) fn open_map(&self, name: &'static str) -> Result<MapData> {
        MapData::from_pin(map_pin(&self.directory, name))
            .map_err(|error| self.damaged(format!("maps/{name}: {error}")))
    }

    pub(crate) fn damaged(&self, missing: String) -> Error {
        Error::Damaged {
            pod: self.pod.clone(),
            path: self.directory.clone(),
            missing,
        }
    }

    /// All counters, summed over the CPUs.
    fn counters(&self) -> Result<Vec<u64>> {
        let map: PerCpuArray<MapData, u64> = self.map("COUNTERS")?;
        (0..map.len())
            .map(|index| {
                map.get(&index, 0)
                    .map(|values| values.iter().sum())
                    .map_err(Error::map("reading", "COUNTERS"))
            })
            .collect()
    }

    /// Whether the proxy listens.
    pub(crate) fn has_listeners(&self) -> bool {
        self.all_listeners()
            .is_ok_and(|listeners| listeners.outbound + listeners.inbound > 0)
    }

    fn all_listeners(&self) -> Result<ListenerView> {
        Ok(ListenerView {
            outbound: self.listeners(ProxyPort::Outbound)?,
            inbound: self.listeners(ProxyPort::Inbound)?,
            dns: self.listeners(ProxyPort::Dns)?,
        })
    }

    /// Whether connections pass on a port of the proxy, because that doesn't listen yet.
    pub(crate) fn passes(&self) -> Result<bool> {
        let passing: Array<MapData, u32> = self.map("PASSING")?;
        for port in ProxyPort::ALL {
            let passes = passing
                .get(&port.index(), 0)
                .map_err(Error::map("reading", "PASSING"))?;
            if passes != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn until_proxy_listens(&self) -> Result<UntilProxyListens> {
        let listeners = self.open_map("LISTENERS")?;
        let holding = ProxyPort::Inbound.holding_slot();
        Ok(if self.passes()? {
            UntilProxyListens::Pass
        } else if socket_cookie(listeners.fd().as_fd(), holding).is_some() {
            UntilProxyListens::Hold
        } else {
            UntilProxyListens::Refuse
        })
    }

    pub(crate) fn listeners(&self, port: ProxyPort) -> Result<usize> {
        let map = self.open_map("LISTENERS")?;
        Ok((port.first_slot()..port.holding_slot())
            .filter(|slot| socket_cookie(map.fd().as_fd(), *slot).is_some())
            .count())
    }
}

const fn event_name(event: Event) -> &'static str {
    match event {
        Event::NoInboundListener => "no_inbound_listener",
        Event::OriginLost => "origin_lost",
        Event::ListenerSlotsFull => "listener_slots_full",
        Event::ListenerUnsuitable => "listener_unsuitable",
        Event::SourceNotKept => "source_not_kept",
        Event::RoutesChanged => "routes_changed",
        Event::PassedAtStart => "passed_at_start",
    }
}

const fn event_words(event: Event) -> &'static str {
    match event {
        Event::NoInboundListener => "inbound connections refused because no proxy listened",
        Event::OriginLost => "connections refused because their original destination was lost",
        Event::ListenerSlotsFull => "listeners not registered because all slots were taken",
        Event::ListenerUnsuitable => {
            "listeners not registered because the kernel takes none such (MPTCP)"
        }
        Event::SourceNotKept => "connections whose source address was not kept",
        Event::RoutesChanged => {
            "connections stopped because the routes have changed: attach the pod again"
        }
        Event::PassedAtStart => {
            "connections that went past the proxy because it had not begun to listen"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_both_families_are_one_if_they_say_the_same() {
        let rules =
            |settings: &Settings| Family::ALL.map(|family| settings.rules(Chain::Output, family));
        let [v4, v6] = rules(&Settings::default());
        assert!(twins(&v4, &v6));
        let [v4, v6] = rules(&Settings {
            excluded_outbound_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
            ..Settings::default()
        });
        assert!(!twins(&v4, &v6));
    }
}
