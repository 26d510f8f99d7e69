//! Attaching and detaching a pod: all or nothing.

use std::{
    borrow::{Borrow, BorrowMut},
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
    thread,
    time::Duration,
};

use aya::maps::{Array, LpmTrie, MapData, PerCpuArray, PerCpuValues, lpm_trie::Key};
use interceptor_common::{
    conn::Address,
    counters::Event,
    listeners::{PLACES, ProxyPort},
    pod::{Attachment, LAYOUT},
    routes::Route,
};

use super::{
    additions::{self, Additions},
    adopt::moving_pin,
    bpf::{self, Link},
    object::{DNS_LINKS, Hook, LINKS, Loading, LogLevel, MAPS, Maps, Object, all_hooks},
    pins::{self, NOTE, Pins, Staging, link_pin},
    plain::Plain,
    policy,
    routes::{self, Routes, Tproxy},
    view::Opened,
};
use crate::{
    Error, Result,
    pod::{
        PodName,
        cgroup::{self, Cgroup},
        listeners::{self, Listener},
        netns::Netns,
    },
    settings::Settings,
};

/// A pod to attach, and how.
#[derive(Debug)]
pub struct Request<'a> {
    /// Under which name its pins lie.
    pub pod: &'a PodName,
    /// Its cgroup.
    pub cgroup: &'a Cgroup,
    /// Its network namespace.
    pub netns: &'a Netns,
    /// What the chains compare connections with.
    pub settings: &'a Settings,
    /// What the kernel programs log.
    pub log_level: LogLevel,
    /// Whether the root cgroup and the machine's own network namespace are
    /// meant.
    pub allow_host: bool,
    /// What who attaches wants to find again: pinned beside the rest.
    pub note: Option<&'a str>,
    /// Whether connections pass until the proxy has begun to listen; otherwise they are
    /// refused. For a pod that isn't attached yet.
    pub pass_at_start: bool,
}

/// How an attachment went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// The pod was not attached before.
    Newly,
    /// The pod was attached in the same way; its routes and
    /// interfaces were read anew.
    Already,
}

/// Attaches a pod. Nothing has to keep running afterwards.
///
/// # Errors
///
/// If any step fails; nothing is left behind then.
pub fn attach(pins: &Pins, request: &Request<'_>) -> Result<Attached> {
    need_root()?;
    refuse_host(request)?;
    let _lock = pins.lock()?;
    remove_leftovers(pins, request.pod)?;

    let directory = pins.pod(request.pod);
    if directory.exists() {
        return attach_again(request, &directory);
    }

    let settings = request.settings;
    let place = policy::place(settings, request.netns)?;
    let missing = additions::missing(request.netns, settings)?;
    let hooks = || {
        let dns = settings.dns.is_on().then_some(&DNS_LINKS);
        LINKS.iter().chain(dns.into_iter().flatten())
    };
    let mut object = Object::load(
        Loading {
            netns: request.netns.id(),
            log_level: request.log_level,
            maps: Maps::New {
                counters: policy::counters(settings),
            },
            after_another: false,
            may_pass: request.pass_at_start,
        },
        hooks(),
    )?;
    write_attachment(&mut object, request, missing)?;

    // From here on, what a kill leaves tells `take_apart` what to take back.
    let staging = Staging::make(pins.attaching(request.pod))?;
    for name in MAPS {
        let path = staging.map(name);
        object.map(name).pin(&path).map_err(|error| {
            Error::system(format!("pinning {}", path.display()))(io::Error::other(error))
        })?;
    }
    policy::write_first(&mut object, &pins.attaching(request.pod), settings, &place)?;
    if let Some(note) = request.note {
        let path = staging.map(NOTE);
        bpf::pin_text(note, &path).map_err(Error::system(format!("pinning {}", path.display())))?;
    }
    if request.pass_at_start {
        let mut passing = object.map_mut("PASSING")?;
        ProxyPort::ALL
            .into_iter()
            .try_for_each(|port| set_passing(&mut passing, port, true))?;
    }
    let additions = Additions::add(request.netns, settings, missing)?;
    if additions.bits() != missing {
        write_attachment(&mut object, request, additions.bits())?;
    }
    write_routes(
        &mut object.map_mut("ROUTES")?,
        &routes::read(request.netns, Tproxy::of(settings))?,
    )?;

    // Pinned when all are attached: until then a kill detaches them all.
    let mut links = Vec::new();
    for hook in hooks() {
        links.push(object.attach(hook, request.cgroup, request.netns)?);
        if hook.program == "sock_ops" {
            // New listeners register themselves from here on; nothing looks
            // for them yet.
            let found = register_listeners(object.listeners(), request)?;
            count(&mut object.map_mut("COUNTERS")?, &found.kept_out)?;
            if request.pass_at_start {
                end_passing(&mut object.map_mut("PASSING")?, &found.ports)?;
            }
        }
    }
    for (hook, link) in hooks().zip(&links) {
        let path = staging.link(hook.program);
        link.pin(&path)
            .map_err(Error::system(format!("pinning {}", path.display())))?;
    }
    staging.keep_as(&directory)?;
    additions.keep();
    Ok(Attached::Newly)
}

/// Detaches a pod and removes its pins.
///
/// # Errors
///
/// If there is no such pod, or its pins can't be removed.
pub fn detach(pins: &Pins, pod: &PodName) -> Result<()> {
    need_root()?;
    let _lock = pins.lock()?;
    remove_leftovers(pins, pod)?;
    let directory = pins.pod(pod);
    if !directory.exists() {
        return Err(Error::NotAttached {
            pod: pod.clone(),
            path: directory,
        });
    }
    let detaching = pins.detaching(pod);
    fs::rename(&directory, &detaching).map_err(Error::system(format!(
        "renaming {} to {}",
        directory.display(),
        detaching.display()
    )))?;
    take_apart(pod, &detaching)
}

/// Removes what a process that was killed has left of `pod`.
pub(crate) fn remove_leftovers(pins: &Pins, pod: &PodName) -> Result<()> {
    for directory in [pins.attaching(pod), pins.detaching(pod)] {
        if directory.exists() {
            take_apart(pod, &directory)?;
        }
    }
    Ok(())
}

/// How long connections that were just redirected, outbound and then inbound ones, have
/// to reach the proxy and be asked about.
const ON_THE_WAY: Duration = Duration::from_millis(50);

/// Detaches what is pinned in `directory` and removes it. May be interrupted
/// and begun again.
fn take_apart(pod: &PodName, directory: &Path) -> Result<()> {
    // A damaged attachment can be taken apart too, and one of another layout.
    let opened = Opened::open(pod, directory)
        .or_else(|_| Opened::open_attachment(pod, directory))
        .ok();
    let proxy_runs = opened.as_ref().is_some_and(Opened::has_listeners);
    // First what redirects, last what redirected connections need.
    for hook in all_hooks().rev() {
        // Where it was being moved to another cgroup, there may be two.
        for path in [
            link_pin(directory, hook.program),
            moving_pin(directory, hook),
        ] {
            match Link::open(&path).and_then(|link| link.detach()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::system(format!("detaching {}", path.display()))(
                        error,
                    ));
                }
                _ => {}
            }
        }
        if proxy_runs && ["connect4", "find_listener"].contains(&hook.program) {
            thread::sleep(ON_THE_WAY);
        }
    }
    if let Some(opened) = opened
        && opened.attachment.added != 0
        && let Some(netns) = Netns::find(opened.netns_id())
    {
        additions::remove(&netns, &opened.settings, opened.attachment.added)?;
    }
    pins::remove(directory)
}

/// The pod has a directory of pins: the same attachment is done, another one
/// is refused.
fn attach_again(request: &Request<'_>, directory: &Path) -> Result<Attached> {
    let opened = Opened::open(request.pod, directory)?;
    opened.check()?;
    let wanted = attachment(request, opened.attachment.added);
    let differs = if opened.attachment.cgroup_id != wanted.cgroup_id {
        Some("cgroup")
    } else if opened.netns_id() != request.netns.id() {
        Some("network namespace")
    } else if opened.attachment.log_level != wanted.log_level {
        Some("log level")
    } else if opened.settings != *request.settings {
        Some("settings")
    } else {
        None
    };
    if let Some(what) = differs {
        return Err(Error::AttachedOtherwise {
            pod: request.pod.clone(),
            what,
        });
    }
    let listeners = opened.open_map("LISTENERS")?;
    let found = register_listeners(listeners.fd().as_fd(), request)?;
    count(&mut opened.map("COUNTERS")?, &found.kept_out)?;
    end_passing(&mut opened.map("PASSING")?, &found.ports)?;
    read_surroundings(&opened, request.netns)?;
    Ok(Attached::Already)
}

/// Reads an attached pod's routes and interfaces anew: they have changed.
///
/// # Errors
///
/// If the pod isn't attached to `netns`, or they can't be read; what is known of
/// them stays then.
pub fn follow(pins: &Pins, pod: &PodName, netns: &Netns) -> Result<()> {
    need_root()?;
    let _lock = pins.lock()?;
    let opened = Opened::of(pins, pod)?;
    if opened.netns_id() != netns.id() {
        return Err(opened.damaged("it is attached to another network namespace".to_owned()));
    }
    read_surroundings(&opened, netns)
}

fn read_surroundings(opened: &Opened, netns: &Netns) -> Result<()> {
    let routes = routes::read(netns, Tproxy::of(&opened.settings))?;
    let mut map: RoutesMap<MapData> = opened.map("ROUTES")?;
    write_routes(&mut map, &routes)?;
    // Interfaces may have come and gone.
    policy::change_to(opened, &opened.settings).map(drop)
}

/// Removes what processes that were killed have left half made or half removed;
/// says of which pods.
///
/// # Errors
///
/// If something can't be removed.
pub fn remove_all_leftovers(pins: &Pins) -> Result<Vec<PodName>> {
    need_root()?;
    let _lock = pins.lock()?;
    let pods = pins.leftovers()?;
    for pod in &pods {
        remove_leftovers(pins, pod)?;
    }
    Ok(pods)
}

/// Attaches the programs for DNS over UDP to a pod that is attached without them.
pub(crate) fn attach_dns(opened: &Opened, netns: &Netns) -> Result<()> {
    let missing: Vec<&Hook> = DNS_LINKS
        .iter()
        .filter(|hook| !opened.has_link(hook))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let path = cgroup::path_of(opened.attachment.cgroup_id)
        .ok_or_else(|| opened.damaged("its cgroup is gone".to_owned()))?;
    let cgroup = Cgroup::open(&path)?;
    let object = Object::load(
        Loading {
            netns: netns.id(),
            log_level: LogLevel::from_number(opened.attachment.log_level),
            maps: Maps::Pinned(&opened.directory),
            after_another: false,
            may_pass: opened.passes()?,
        },
        missing.iter().copied(),
    )?;
    for hook in missing {
        let path = link_pin(&opened.directory, hook.program);
        object
            .attach(hook, &cgroup, netns)?
            .pin(&path)
            .map_err(Error::system(format!("pinning {}", path.display())))?;
    }
    Ok(())
}

/// The proxy's listeners that were there.
#[derive(Default)]
struct Found {
    /// On which ports.
    ports: Vec<ProxyPort>,
    /// What kept some from being registered.
    kept_out: Vec<Event>,
}

/// Registers the proxy's listeners that nothing has registered yet: those that
/// are older than the attachment, and those for which there was no place.
fn register_listeners(map: BorrowedFd<'_>, request: &Request<'_>) -> Result<Found> {
    let mut all = Found::default();
    let ports = [
        (request.settings.outbound_port, ProxyPort::Outbound),
        (request.settings.inbound_port, ProxyPort::Inbound),
        (request.settings.dns_port, ProxyPort::Dns),
    ];
    let found = listeners::find(request.cgroup, request.netns, &ports.map(|(port, _)| port))?;
    if found.is_empty() {
        return Ok(all);
    }
    let registered: Vec<u64> = (0..ProxyPort::COUNT * PLACES)
        .filter_map(|slot| bpf::socket_cookie(map, slot))
        .collect();
    for listener in found {
        let cookie = rustix::net::sockopt::socket_cookie(&listener.socket)
            .map_err(|errno| Error::system("asking for a socket's cookie")(errno.into()))?;
        let Some((_, port)) = ports.iter().find(|(port, _)| *port == listener.port) else {
            continue;
        };
        all.ports.push(*port);
        if !registered.contains(&cookie) {
            all.kept_out.extend(register(map, *port, &listener)?);
        }
    }
    Ok(all)
}

/// Sets whether connections pass that should go to this port of the proxy.
fn set_passing<T>(passing: &mut Array<T, u32>, port: ProxyPort, passes: bool) -> Result<()>
where
    T: Borrow<MapData> + BorrowMut<MapData>,
{
    passing
        .set(port.index(), u32::from(passes), 0)
        .map_err(Error::map("writing", "PASSING"))
}

/// The proxy listens on `ports`: nothing passes there any more.
fn end_passing<T>(passing: &mut Array<T, u32>, ports: &[ProxyPort]) -> Result<()>
where
    T: Borrow<MapData> + BorrowMut<MapData>,
{
    ProxyPort::ALL
        .into_iter()
        .filter(|other| ports.iter().any(|port| port.ends_passing(*other)))
        .try_for_each(|port| set_passing(passing, port, false))
}

/// Puts a listener into the first free slot; returns what kept it out, if
/// something did.
fn register(map: BorrowedFd<'_>, port: ProxyPort, listener: &Listener) -> Result<Option<Event>> {
    for slot in port.first_slot()..port.holding_slot() {
        match bpf::insert_socket(map, slot, listener.socket.as_fd()) {
            Ok(()) => return Ok(None),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => {}
                Some(libc::EOPNOTSUPP) => return Ok(Some(Event::ListenerUnsuitable)),
                _ => {
                    return Err(Error::system(format!(
                        "registering the proxy's listener on port {}",
                        listener.port
                    ))(error));
                }
            },
        }
    }
    Ok(Some(Event::ListenerSlotsFull))
}

/// Counts events as the kernel programs do. One that they count at the same
/// moment may be lost.
fn count<T>(counters: &mut PerCpuArray<T, u64>, events: &[Event]) -> Result<()>
where
    T: Borrow<MapData> + BorrowMut<MapData>,
{
    for event in events {
        let index = event.index();
        let values = counters
            .get(&index, 0)
            .map_err(Error::map("reading", "COUNTERS"))?;
        let mut values = values.to_vec();
        values[0] += 1;
        let values = PerCpuValues::try_from(values).map_err(Error::system("counting an event"))?;
        counters
            .set(index, values, 0)
            .map_err(Error::map("writing", "COUNTERS"))?;
    }
    Ok(())
}

fn attachment(request: &Request<'_>, added: u32) -> Attachment {
    let netns = request.netns.id();
    Attachment {
        layout: LAYOUT,
        added,
        netns_device: netns.device,
        netns_inode: netns.inode,
        cgroup_id: request.cgroup.id(),
        log_level: u64::from(request.log_level as u8),
    }
}

fn write_attachment(object: &mut Object, request: &Request<'_>, added: u32) -> Result<()> {
    let mut attachments: Array<_, Plain<Attachment>> = object.map_mut("ATTACHMENT")?;
    attachments
        .set(0, Plain(attachment(request, added)), 0)
        .map_err(Error::map("writing", "ATTACHMENT"))
}

type RoutesMap<T> = LpmTrie<T, Plain<Address>, Plain<Route>>;

/// Makes the map hold `routes` and no others. New ones come first, so that no
/// destination is without its route meanwhile.
fn write_routes<T>(map: &mut RoutesMap<T>, routes: &Routes) -> Result<()>
where
    T: Borrow<MapData> + BorrowMut<MapData>,
{
    let wanted: Vec<_> = routes
        .iter()
        .map(|(prefix, route)| {
            let bits = u32::from(prefix.prefix_len());
            let bits = if prefix.addr().is_ipv4() {
                96 + bits
            } else {
                bits
            };
            ((bits, prefix.addr().into()), *route)
        })
        .collect();
    for ((bits, address), route) in &wanted {
        map.insert(&Key::new(*bits, Plain(*address)), Plain(*route), 0)
            .map_err(Error::map("writing", "ROUTES"))?;
    }
    let present: Vec<Key<Plain<Address>>> = map
        .keys()
        .collect::<Result<_, _>>()
        .map_err(Error::map("reading", "ROUTES"))?;
    for key in present {
        if !wanted
            .iter()
            .any(|((bits, address), _)| *bits == key.prefix_len() && *address == key.data().0)
        {
            map.remove(&key).map_err(Error::map("writing", "ROUTES"))?;
        }
    }
    Ok(())
}

/// Whether this process may attach programs.
///
/// # Errors
///
/// If it isn't root's.
pub fn need_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        Ok(())
    } else {
        Err(Error::NotRoot)
    }
}

fn refuse_host(request: &Request<'_>) -> Result<()> {
    if request.allow_host {
        Ok(())
    } else if request.cgroup.is_root() {
        Err(Error::RootCgroup {
            path: request.cgroup.path().to_owned(),
        })
    } else if request.netns.is_host() {
        Err(Error::HostNetns {
            given: request.netns.given().to_owned(),
        })
    } else {
        Ok(())
    }
}
