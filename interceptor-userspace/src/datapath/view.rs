//! What is attached, read from the pins alone: nothing has to run for it.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use interceptor_common::{
    chains::Chain,
    config::Settings,
    conn::{Address, Endpoint, Handshake},
    counters::{COUNTERS, Event, rule_index},
    listeners::{ProxyPort, SLOTS},
    pod::Attachment,
    routes::Route,
};
use serde::Serialize;

use super::{
    attach::need_root,
    bpf::{Link, LinkTarget},
    object::{LINKS, MAPS, has_set_retval},
    pins::{Pins, link_pin, map_pin},
    plain::Plain,
};
use crate::{
    Error, Result,
    pod::{PodName, cgroup},
};

/// An attached pod, seen through its pins.
#[derive(Debug)]
pub(crate) struct Opened {
    pod: PodName,
    directory: PathBuf,
    pub(crate) attachment: Attachment,
    pub(crate) settings: Settings,
}

/// A pod's attachment.
#[derive(Debug, Serialize)]
pub struct PodView {
    /// Its name.
    pub pod: String,
    /// The number of its cgroup.
    pub cgroup_id: u64,
    /// The path of its cgroup; none if that is gone.
    pub cgroup: Option<PathBuf>,
    /// The inode of its network namespace.
    pub netns_inode: u64,
    /// Uids that are the proxy's.
    pub proxy_uids: Vec<u32>,
    /// Gids that are the proxy's.
    pub proxy_gids: Vec<u32>,
    /// Where outbound connections go.
    pub outbound_port: u16,
    /// Where inbound connections go.
    pub inbound_port: u16,
    /// Inbound ports left alone.
    pub excluded_inbound_ports: Vec<u16>,
    /// The level of the programs' log, 0 (off) to 5 (trace).
    pub log_level: u64,
    /// Where its pins lie.
    pub pins: PathBuf,
    /// Its programs.
    pub links: Vec<LinkView>,
    /// The proxy's listeners that are registered.
    pub listeners: ListenerView,
    /// Redirected connections that no proxy has accepted yet.
    pub handshakes: usize,
    /// How many routes are known.
    pub routes: usize,
    /// With which error a redirected connect() fails for want of memory:
    /// `ECONNREFUSED`, or `EPERM` where the kernel has no `bpf_set_retval`
    /// (before Linux 5.18).
    pub refusal: &'static str,
    /// What happened beside the rules' decisions.
    pub events: Vec<EventView>,
}

/// An attached program.
#[derive(Debug, Serialize)]
pub struct LinkView {
    /// Its name.
    pub program: &'static str,
    /// The kernel's number of the link.
    pub link_id: u32,
    /// The kernel's number of the program.
    pub program_id: u32,
}

/// How many listeners of the proxy are registered.
#[derive(Debug, Serialize)]
pub struct ListenerView {
    /// On the outbound port.
    pub outbound: usize,
    /// On the inbound port.
    pub inbound: usize,
}

/// How often an event happened.
#[derive(Debug, Serialize)]
pub struct EventView {
    /// What happened.
    pub event: &'static str,
    /// How often.
    pub count: u64,
}

/// A chain with its counters.
#[derive(Debug, Serialize)]
pub struct ChainView {
    /// The chain's name.
    pub chain: String,
    /// From which of the kernel's chains it is reached.
    pub from: &'static str,
    /// Its rules in order.
    pub rules: Vec<RuleView>,
}

/// A rule with its counter.
#[derive(Debug, Serialize)]
pub struct RuleView {
    /// Its number in the chain, from 1.
    pub number: u32,
    /// What happens to a connection that matches.
    pub target: &'static str,
    /// What it matches, in the words of iptables.
    pub text: String,
    /// How many connections it has decided.
    pub hits: u64,
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
    let settings = &opened.settings;
    let handshakes: HashMap<MapData, Plain<Handshake>, Plain<Endpoint>> =
        opened.map("HANDSHAKES")?;
    let routes: LpmTrie<MapData, Plain<Address>, Plain<Route>> = opened.map("ROUTES")?;
    let counters = opened.counters()?;
    Ok(PodView {
        pod: pod.to_string(),
        cgroup_id: opened.attachment.cgroup_id,
        cgroup: cgroup::path_of(opened.attachment.cgroup_id),
        netns_inode: opened.attachment.netns_inode,
        proxy_uids: settings.proxy_uids.iter().collect(),
        proxy_gids: settings.proxy_gids.iter().collect(),
        outbound_port: settings.outbound_port,
        inbound_port: settings.inbound_port,
        excluded_inbound_ports: settings.excluded_inbound_ports.iter().collect(),
        log_level: opened.attachment.log_level,
        links,
        listeners: ListenerView {
            outbound: opened.listeners(ProxyPort::Outbound)?,
            inbound: opened.listeners(ProxyPort::Inbound)?,
        },
        handshakes: handshakes.keys().count(),
        routes: routes.keys().count(),
        refusal: if has_set_retval() {
            "ECONNREFUSED"
        } else {
            "EPERM"
        },
        events: Event::ALL
            .into_iter()
            .map(|event| EventView {
                event: event_words(event),
                count: counters[event.index() as usize],
            })
            .collect(),
        pins: opened.directory,
    })
}

/// A pod's chains, with the connections that each rule has decided.
///
/// # Errors
///
/// If the pod is not attached, or its pins are not whole.
pub fn chains(pins: &Pins, pod: &PodName) -> Result<Vec<ChainView>> {
    let opened = Opened::of(pins, pod)?;
    let counters = opened.counters()?;
    Ok([(Chain::Output, "OUTPUT"), (Chain::Inbound, "PREROUTING")]
        .into_iter()
        .map(|(chain, from)| ChainView {
            chain: chain.to_string(),
            from,
            rules: rules(&opened.settings, chain)
                .into_iter()
                .zip(1..)
                .map(|((text, target), number)| RuleView {
                    number,
                    target,
                    text,
                    hits: counters[rule_index(chain, number) as usize],
                })
                .collect(),
        })
        .collect())
}

impl Opened {
    fn of(pins: &Pins, pod: &PodName) -> Result<Self> {
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

    /// Opens the pins in `directory`.
    pub(crate) fn open(pod: &PodName, directory: &Path) -> Result<Self> {
        let mut opened = Self {
            pod: pod.clone(),
            directory: directory.to_owned(),
            attachment: bytemuck::Zeroable::zeroed(),
            settings: Settings::default(),
        };
        let attachments: Array<MapData, Plain<Attachment>> = opened.map("ATTACHMENT")?;
        opened.attachment = attachments
            .get(&0, 0)
            .map_err(Error::map("reading", "ATTACHMENT"))?
            .0;
        let settings: Array<MapData, Plain<Settings>> = opened.map("SETTINGS")?;
        opened.settings = settings
            .get(&0, 0)
            .map_err(Error::map("reading", "SETTINGS"))?
            .0;
        Ok(opened)
    }

    /// Checks that every pin is there and that every link is attached to what
    /// the attachment says.
    pub(crate) fn check(&self) -> Result<Vec<LinkView>> {
        for name in MAPS {
            self.open_map(name)?;
        }
        LINKS
            .iter()
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
                    program: hook.program,
                    link_id: info.id,
                    program_id: info.program_id,
                })
            })
            .collect()
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

    fn damaged(&self, missing: String) -> Error {
        Error::Damaged {
            pod: self.pod.clone(),
            path: self.directory.clone(),
            missing,
        }
    }

    /// All counters, summed over the CPUs.
    fn counters(&self) -> Result<Vec<u64>> {
        let map: PerCpuArray<MapData, u64> = self.map("COUNTERS")?;
        (0..COUNTERS)
            .map(|index| {
                map.get(&index, 0)
                    .map(|values| values.iter().sum())
                    .map_err(Error::map("reading", "COUNTERS"))
            })
            .collect()
    }

    fn listeners(&self, port: ProxyPort) -> Result<usize> {
        let map = self.open_map("LISTENERS")?;
        Ok((port.first_slot()..port.first_slot() + SLOTS)
            .filter(|slot| super::bpf::socket_cookie(map.fd().as_fd(), *slot).is_some())
            .count())
    }
}

/// A chain's rules: what each matches in the words of iptables, and its target.
fn rules(settings: &Settings, chain: Chain) -> Vec<(String, &'static str)> {
    let mut rules = Vec::new();
    match chain {
        Chain::Output => {
            let localhost = settings.localhost_v4;
            rules.push((format!("-s {}/32 -o lo", settings.passthrough_v4), "RETURN"));
            for (option, owners) in [
                ("--uid-owner", settings.proxy_uids),
                ("--gid-owner", settings.proxy_gids),
            ] {
                for owner in owners.iter() {
                    rules.push((
                        format!("! -d {localhost}/32 -o lo -m owner {option} {owner}"),
                        "ISTIO_IN_REDIRECT",
                    ));
                    rules.push((format!("-o lo -m owner ! {option} {owner}"), "RETURN"));
                    rules.push((format!("-m owner {option} {owner}"), "RETURN"));
                }
            }
            rules.push((format!("-d {localhost}/32"), "RETURN"));
            rules.push((String::new(), "ISTIO_REDIRECT"));
        }
        Chain::Inbound => {
            for port in settings.excluded_inbound_ports.iter() {
                rules.push((format!("-p tcp -m tcp --dport {port}"), "RETURN"));
            }
            rules.push(("-p tcp".to_owned(), "ISTIO_IN_REDIRECT"));
        }
    }
    rules
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_in_words_are_the_seed_chains() {
        let text = include_str!("../../../tests/oracle/seed-rules.v4");
        for chain in [Chain::Output, Chain::Inbound] {
            let prefix = format!("-A {chain} ");
            let expected: Vec<&str> = text
                .lines()
                .filter_map(|line| line.strip_prefix(&prefix))
                .collect();
            let ours: Vec<String> = rules(&Settings::default(), chain)
                .into_iter()
                .map(|(text, target)| format!("{text} -j {target}").trim().to_owned())
                .collect();
            assert_eq!(ours, expected);
        }
    }

    #[test]
    fn a_chain_has_no_more_rules_than_counters() {
        use interceptor_common::config::{MAX_EXCLUDED_PORTS, MAX_OWNERS, Owners, Ports};
        let settings = Settings {
            proxy_uids: Owners::new(&[1; MAX_OWNERS]).unwrap(),
            proxy_gids: Owners::new(&[1; MAX_OWNERS]).unwrap(),
            excluded_inbound_ports: Ports::new(&[1; MAX_EXCLUDED_PORTS]).unwrap(),
            ..Settings::default()
        };
        for chain in [Chain::Output, Chain::Inbound] {
            assert_eq!(rules(&settings, chain).len(), chain.most_rules());
        }
    }
}
