//! The pod's routes, read from the kernel: which prefixes are local (the
//! chains' `-o lo`) or unreachable, and which source address leads to each.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use interceptor_common::{
    conn::{Address, PROXY_NETWORK_V6, PROXY_NETWORK_V6_LENGTH, is_proxy_address},
    routes::{LOOPBACK, MAX_ROUTES, Route, RouteKind},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use procfs::{
    FromReadSI as _, current_system_info,
    net::{TcpNetEntries, TcpState},
};
use rtnetlink::{
    AddressMessageBuilder, Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        link::LinkAttribute,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use crate::{
    Error, Result,
    pod::netns::Netns,
    settings::{Family, Mode, Settings},
};

/// The routes of a pod, by prefix.
pub(crate) type Routes = BTreeMap<IpNet, Route>;

/// `fe80::/10` (RFC 4291, section 2.5.6).
const LINK_LOCAL_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);

/// Reads the routes of `netns`. The routing rule of `tproxy` leads only the proxy's
/// own connections elsewhere.
pub(crate) fn read(netns: &Netns, tproxy: Option<Tproxy>) -> Result<Routes> {
    with_netlink(netns, async |handle| {
        let mut prefixes: BTreeMap<IpNet, Candidate> = BTreeMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let mut messages = Box::pin(handle.route().get(request).execute());
            while let Some(message) = messages
                .try_next()
                .await
                .map_err(failed("reading routes"))?
            {
                if let Some((prefix, candidate)) = candidate(&message) {
                    prefixes
                        .entry(prefix)
                        .and_modify(|best| {
                            if candidate.rank < best.rank {
                                *best = candidate;
                            }
                        })
                        .or_insert(candidate);
                }
            }
        }
        // The kernel enters an IPv6 address into its table of local routes a
        // little after it was added to an interface.
        for (_, address) in addresses(handle).await? {
            if address.is_ipv6() {
                prefixes.insert(address.into(), Candidate::local(address));
            }
        }
        if prefixes.len() > MAX_ROUTES as usize {
            return Err(Error::TooManyRoutes {
                given: prefixes.len(),
                most: MAX_ROUTES,
            });
        }
        if routes_by_rule(handle, tproxy).await? {
            // Which table a connection's route is in can't be told here: none
            // is taken to be unreachable.
            prefixes.retain(|_, candidate| candidate.kind != RouteKind::Unreachable);
            for prefix in [IpNet::from(Ipv4Net::default()), Ipv6Net::default().into()] {
                prefixes.entry(prefix).or_insert(Candidate::remote());
            }
        }
        // In the map, IPv4 addresses lie below the prefix of all IPv6 ones. And no
        // default route leads to a link-local address: connect() to one needs an
        // interface, whose route is longer.
        for prefix in [Ipv4Net::default().into(), LINK_LOCAL_V6.into()] {
            prefixes.entry(prefix).or_insert(Candidate {
                kind: RouteKind::Unreachable,
                ..Candidate::remote()
            });
        }
        let all: Vec<IpNet> = prefixes.keys().copied().collect();
        let mut routes = Routes::new();
        for (prefix, candidate) in prefixes {
            let source = match (candidate.kind, candidate.source) {
                (RouteKind::Unreachable, _) => None,
                (_, Some(source)) => Some(source),
                (_, None) => match inside(&prefix, &all) {
                    Some(destination) => ask_source(handle, destination).await,
                    None => None,
                },
            };
            let source = source.map_or(Address::UNSPECIFIED, Address::from);
            let interface = match candidate.kind {
                RouteKind::Local => LOOPBACK,
                RouteKind::Remote | RouteKind::Unreachable => candidate.out_interface,
            };
            routes.insert(prefix, Route::new(candidate.kind, source, interface));
        }
        Ok(routes)
    })
}

/// A route of the kernel's that may be the one for its prefix.
#[derive(Clone, Copy)]
struct Candidate {
    kind: RouteKind,
    source: Option<IpAddr>,
    /// 0 if it isn't one.
    out_interface: u32,
    /// The table's place in the order of look-up, then the metric: the least
    /// wins.
    rank: (u8, u32),
}

impl Candidate {
    const fn local(source: IpAddr) -> Self {
        Self {
            kind: RouteKind::Local,
            source: Some(source),
            out_interface: LOOPBACK,
            rank: (0, 0),
        }
    }

    const fn remote() -> Self {
        Self {
            kind: RouteKind::Remote,
            source: None,
            out_interface: 0,
            rank: (u8::MAX, u32::MAX),
        }
    }
}

/// Whether rules choose between tables by more than their order: any rule but
/// the kernel's own three and that of `tproxy`.
async fn routes_by_rule(handle: &Handle, tproxy: Option<Tproxy>) -> Result<bool> {
    for version in [IpVersion::V4, IpVersion::V6] {
        for rule in rules(handle, version).await? {
            if tproxy.is_some_and(|tproxy| tproxy.is_rule(&rule)) {
                continue;
            }
            let standard = rule.header.action == RuleAction::ToTable
                && order_of_table(u32::from(rule.header.table)).is_some()
                && rule.header.src_len == 0
                && rule.header.dst_len == 0
                && !rule.attributes.iter().any(|attribute| {
                    matches!(
                        attribute,
                        RuleAttribute::FwMark(_)
                            | RuleAttribute::Iifname(_)
                            | RuleAttribute::Oifname(_)
                    )
                });
            if !standard {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

async fn rules(handle: &Handle, version: IpVersion) -> Result<Vec<RuleMessage>> {
    let request = handle.rule().get(version).execute();
    request.try_collect().await.map_err(failed("reading rules"))
}

/// A table's place in the order in which the kernel's own rules ask it.
fn order_of_table(table: u32) -> Option<u8> {
    [
        libc::RT_TABLE_LOCAL,
        libc::RT_TABLE_MAIN,
        libc::RT_TABLE_DEFAULT,
    ]
    .iter()
    .zip(0..)
    .find(|(known, _)| u32::from(**known) == table)
    .map(|(_, order)| order)
}

/// Whether `lo` has the IPv6 passthrough address.
pub(crate) fn has_passthrough(netns: &Netns, address: Ipv6Addr) -> Result<bool> {
    with_netlink(netns, async |handle| {
        let request = handle
            .address()
            .get()
            .set_link_index_filter(LOOPBACK)
            .set_address_filter(address.into());
        let mut answers = Box::pin(request.execute());
        answers
            .try_next()
            .await
            .map(|answer| answer.is_some())
            .map_err(failed("reading addresses"))
    })
}

/// Adds the IPv6 passthrough address to `lo`, as the mesh's own tool does: the
/// proxy can't bind to it otherwise. False if it was there, or if the
/// namespace has no IPv6.
pub(crate) fn add_passthrough(netns: &Netns, address: Ipv6Addr) -> Result<bool> {
    with_netlink(netns, async |handle| {
        let request = handle.address().add(LOOPBACK, address.into(), 128);
        match request.execute().await {
            Ok(()) => {
                // The kernel enters it into its local table a little later.
                for _ in 0..1000 {
                    let route = ask_route(handle, address.into()).await;
                    if route.is_some_and(|route| route.header.kind == RouteType::Local) {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Ok(true)
            }
            Err(error)
                if is_errno(
                    &error,
                    &[libc::EEXIST, libc::EACCES, libc::EOPNOTSUPP, libc::EPERM],
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(failed(&format!("adding {address} to lo"))(error)),
        }
    })
}

/// Removes what [`add_passthrough`] added.
pub(crate) fn remove_passthrough(netns: &Netns, address: Ipv6Addr) -> Result<()> {
    with_netlink(netns, async |handle| {
        let message = AddressMessageBuilder::<Ipv6Addr>::new()
            .index(LOOPBACK)
            .address(address, 128)
            .build();
        match handle.address().del(message).execute().await {
            Err(error) if !is_errno(&error, &[libc::EADDRNOTAVAIL]) => {
                Err(failed(&format!("removing {address} from lo"))(error))
            }
            _ => Ok(()),
        }
    })
}

/// Whether somebody else has made the proxy's IPv6 addresses local.
pub(crate) fn has_others_proxy_route(netns: &Netns) -> Result<bool> {
    with_netlink(netns, async |handle| {
        let route = ask_route(handle, PROXY_NETWORK_V6.into()).await;
        Ok(route.is_some_and(|route| {
            route.header.kind == RouteType::Local && route.header.protocol != PROXY_ROUTE_PROTOCOL
        }))
    })
}

/// Adds the route that makes the proxy's IPv6 addresses the pod's own. Connections to
/// them come from the source address of those that leave the pod. False if there is
/// none, or if the kernel refuses it (one that it is still looking for duplicates of).
pub(crate) fn add_proxy_route(netns: &Netns) -> Result<bool> {
    with_netlink(netns, async |handle| {
        // Of nobody (RFC 3849): where most connections go, by the default route.
        let elsewhere = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        let Some(IpAddr::V6(source)) = ask_source(handle, elsewhere.into()).await else {
            return Ok(false);
        };
        let message = proxy_route().pref_source(source).build();
        match handle.route().add(message).execute().await {
            Ok(()) => Ok(true),
            // Connections have kept it since an earlier attachment.
            Err(error) if is_errno(&error, &[libc::EEXIST]) => Ok(true),
            Err(error) if is_errno(&error, &[libc::EINVAL, libc::EACCES, libc::EOPNOTSUPP]) => {
                Ok(false)
            }
            Err(error) => Err(failed("adding the route of the proxy's IPv6 addresses")(
                error,
            )),
        }
    })
}

/// Removes what [`add_proxy_route`] added, unless connections need it.
pub(crate) fn remove_proxy_route(netns: &Netns) -> Result<()> {
    with_netlink(netns, async |handle| {
        if proxy_addresses_in_use()? {
            return Ok(());
        }
        let request = handle.route().del(proxy_route().build());
        removed(
            request.execute().await,
            "removing the route of the proxy's IPv6 addresses",
        )
    })
}

fn proxy_route() -> RouteMessageBuilder<Ipv6Addr> {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(PROXY_NETWORK_V6, PROXY_NETWORK_V6_LENGTH)
        .kind(RouteType::Local)
        .table_id(u32::from(libc::RT_TABLE_LOCAL))
        .output_interface(LOOPBACK)
        .protocol(PROXY_ROUTE_PROTOCOL)
}

/// Whose route it is, as `ip route` shows it; a number that nobody else uses
/// (rt_protos of iproute2).
const PROXY_ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(150);

/// Whether this thread's network namespace has a connection to an IPv6 address of the
/// proxy's. (`TIME_WAIT` needs no route any more.)
fn proxy_addresses_in_use() -> Result<bool> {
    let path = "/proc/thread-self/net/tcp6";
    let file = match File::open(path) {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.map_err(Error::system(format!("reading {path}")))?,
    };
    let sockets = TcpNetEntries::from_read(file, current_system_info())
        .map_err(io::Error::other)
        .map_err(Error::system(format!("reading {path}")))?;
    Ok(sockets.0.iter().any(|socket| {
        socket.state != TcpState::TimeWait && is_proxy_address(&socket.local_address.ip().into())
    }))
}

/// By what the answers come back to connections that the proxy makes from its
/// client's address: the rule `fwmark MARK lookup TABLE` and in that table the
/// route `local default dev lo`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tproxy {
    mark: u32,
    table: u32,
}

impl Tproxy {
    /// Those of the settings; none if they capture nothing by TPROXY.
    pub(crate) fn of(settings: &Settings) -> Option<Self> {
        (settings.mode == Mode::Tproxy && settings.captures_inbound()).then_some(Self {
            mark: settings.tproxy_mark,
            table: settings.tproxy_table,
        })
    }

    fn is_rule(self, rule: &RuleMessage) -> bool {
        let has = |wanted: &dyn Fn(&RuleAttribute) -> bool| rule.attributes.iter().any(wanted);
        rule.header.action == RuleAction::ToTable
            && (rule.header.src_len, rule.header.dst_len) == (0, 0)
            && has(&|attribute| *attribute == RuleAttribute::FwMark(self.mark))
            && has(&|attribute| *attribute == RuleAttribute::Table(self.table))
            && !has(&|attribute| {
                matches!(
                    attribute,
                    RuleAttribute::Iifname(_) | RuleAttribute::Oifname(_)
                )
            })
    }

    fn is_route(self, route: &RouteMessage) -> bool {
        route.header.kind == RouteType::Local
            && route.header.destination_prefix_length == 0
            && route
                .attributes
                .contains(&RouteAttribute::Table(self.table))
    }

    fn rule(self, family: Family) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = address_family(family);
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::FwMark(self.mark),
            RuleAttribute::Table(self.table),
        ];
        rule
    }

    fn route(self, family: Family) -> RouteMessage {
        let mut route = match family {
            Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new()
                .output_interface(LOOPBACK)
                .table_id(self.table)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .build(),
            Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new()
                .output_interface(LOOPBACK)
                .table_id(self.table)
                .kind(RouteType::Local)
                .build(),
        };
        route.header.destination_prefix_length = 0;
        route
    }
}

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Whether there is the rule and the route of `tproxy` in this family.
pub(crate) fn has_tproxy(netns: &Netns, tproxy: Tproxy, family: Family) -> Result<(bool, bool)> {
    with_netlink(netns, async |handle| {
        let version = match family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let rules = rules(handle, version).await?;
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        let routes: Vec<RouteMessage> = handle
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .map_err(failed("reading routes"))?;
        Ok((
            rules.iter().any(|rule| tproxy.is_rule(rule)),
            routes.iter().any(|route| tproxy.is_route(route)),
        ))
    })
}

/// Adds the rule of `tproxy`; false if the namespace has no such family.
pub(crate) fn add_rule(netns: &Netns, tproxy: Tproxy, family: Family) -> Result<bool> {
    with_netlink(netns, async |handle| {
        let mut request = handle.rule().add();
        *request.message_mut() = tproxy.rule(family);
        added(request.execute().await, family, "adding TPROXY's rule")
    })
}

/// Adds the route of `tproxy`; false if the namespace has no such family.
pub(crate) fn add_route(netns: &Netns, tproxy: Tproxy, family: Family) -> Result<bool> {
    with_netlink(netns, async |handle| {
        let request = handle.route().add(tproxy.route(family));
        added(request.execute().await, family, "adding TPROXY's route")
    })
}

fn added(
    result: std::result::Result<(), rtnetlink::Error>,
    family: Family,
    operation: &str,
) -> Result<bool> {
    const NO_IPV6: [i32; 3] = [libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EACCES];
    match result {
        Ok(()) => Ok(true),
        Err(error) if family == Family::V6 && is_errno(&error, &NO_IPV6) => Ok(false),
        Err(error) => Err(failed(operation)(error)),
    }
}

/// Removes what [`add_rule`] added.
pub(crate) fn remove_rule(netns: &Netns, tproxy: Tproxy, family: Family) -> Result<()> {
    with_netlink(netns, async |handle| {
        let request = handle.rule().del(tproxy.rule(family));
        removed(request.execute().await, "removing TPROXY's rule")
    })
}

/// Removes what [`add_route`] added.
pub(crate) fn remove_route(netns: &Netns, tproxy: Tproxy, family: Family) -> Result<()> {
    with_netlink(netns, async |handle| {
        let request = handle.route().del(tproxy.route(family));
        removed(request.execute().await, "removing TPROXY's route")
    })
}

/// What isn't there any more needs no removing.
fn removed(result: std::result::Result<(), rtnetlink::Error>, operation: &str) -> Result<()> {
    match result {
        Err(error) if !is_errno(&error, &[libc::ENOENT, libc::ESRCH]) => {
            Err(failed(operation)(error))
        }
        _ => Ok(()),
    }
}

/// Whether the mesh's own tool would give the namespace IPv6 chains: if the first
/// address that isn't its own alone is of IPv6; with `dual_stack`, if any is.
///
/// # Errors
///
/// If the addresses can't be read.
pub fn has_ipv6(netns: &Netns, dual_stack: bool) -> Result<bool> {
    with_netlink(netns, async |handle| {
        let mut others = addresses(handle)
            .await?
            .into_iter()
            .filter_map(|(index, address)| {
                let only_here = match address {
                    IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
                    IpAddr::V6(v6) => {
                        v6.is_loopback() || v6.is_unicast_link_local() || index == LOOPBACK
                    }
                };
                (!only_here).then_some(address)
            });
        Ok(if dual_stack {
            others.any(|address| address.is_ipv6())
        } else {
            others.next().is_some_and(|address| address.is_ipv6())
        })
    })
}

/// The namespace's addresses, each with its interface's index.
async fn addresses(handle: &Handle) -> Result<Vec<(u32, IpAddr)>> {
    let messages: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("reading addresses"))?;
    Ok(messages
        .iter()
        .filter_map(|message| {
            let attributes = &message.attributes;
            let address = attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })?;
            Some((message.header.index, address))
        })
        .collect())
}

/// The names and indexes of the namespace's interfaces.
pub(crate) fn interfaces(netns: &Netns) -> Result<Vec<(String, u32)>> {
    with_netlink(netns, async |handle| {
        let messages: Vec<_> = handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("reading interfaces"))?;
        Ok(messages
            .iter()
            .filter_map(|message| {
                let attributes = &message.attributes;
                let name = attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                })?;
                Some((name, message.header.index))
            })
            .collect())
    })
}

/// Runs `work` with a netlink socket of the namespace.
fn with_netlink<T: Send>(
    netns: &Netns,
    work: impl AsyncFnOnce(&Handle) -> Result<T> + Send,
) -> Result<T> {
    netns.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::system("starting a runtime for netlink"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(Error::system("opening a netlink socket"))?;
            let connection = tokio::spawn(connection);
            let result = work(&handle).await;
            connection.abort();
            result
        })
    })
}

/// The prefix of a route, and what it says of it.
fn candidate(message: &RouteMessage) -> Option<(IpNet, Candidate)> {
    let kind = match message.header.kind {
        RouteType::Local | RouteType::Anycast => RouteKind::Local,
        RouteType::Unicast => RouteKind::Remote,
        RouteType::Broadcast
        | RouteType::BlackHole
        | RouteType::Unreachable
        | RouteType::Prohibit
        | RouteType::Throw => RouteKind::Unreachable,
        _ => return None,
    };
    let table = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or_else(|| u32::from(message.header.table));
    let metric = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        })
        .unwrap_or_default();
    let out_interface = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
        .unwrap_or_default();
    let prefix = prefix_of(message)?;
    let source = source_of(message).or(match (prefix, kind) {
        // A local IPv6 address is its own source (RFC 6724, section 5, rule 1).
        (IpNet::V6(prefix), RouteKind::Local) if prefix.prefix_len() == 128 => {
            Some(prefix.addr().into())
        }
        _ => None,
    });
    Some((
        prefix,
        Candidate {
            kind,
            source,
            out_interface,
            rank: (order_of_table(table)?, metric),
        },
    ))
}

fn prefix_of(message: &RouteMessage) -> Option<IpNet> {
    let length = message.header.destination_prefix_length;
    let destination = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        });
    let destination = match (destination, message.header.address_family) {
        (Some(destination), _) => destination,
        (None, AddressFamily::Inet) => Ipv4Addr::UNSPECIFIED.into(),
        (None, AddressFamily::Inet6) => Ipv6Addr::UNSPECIFIED.into(),
        (None, _) => return None,
    };
    Some(IpNet::new(destination, length).ok()?.trunc())
}

/// The source address that a route message names.
fn source_of(message: &RouteMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        })
}

/// An address for which `prefix` is the longest of `all` that match.
fn inside(prefix: &IpNet, all: &[IpNet]) -> Option<IpAddr> {
    let candidates: Vec<IpAddr> = match prefix {
        IpNet::V4(prefix) => probes(32 - prefix.prefix_len())
            .filter_map(|host| u32::try_from(host).ok())
            .map(|host| Ipv4Addr::from_bits(prefix.network().to_bits() | host).into())
            .collect(),
        IpNet::V6(prefix) => probes(128 - prefix.prefix_len())
            .map(|host| Ipv6Addr::from_bits(prefix.network().to_bits() | host).into())
            .collect(),
    };
    candidates.into_iter().find(|candidate| {
        !candidate.is_multicast()
            && !candidate.is_unspecified()
            && all
                .iter()
                .filter(|other| other.contains(candidate))
                .all(|other| other.prefix_len() <= prefix.prefix_len())
    })
}

/// Host parts of an address with `bits` host bits, spread over all of them.
fn probes(bits: u8) -> impl Iterator<Item = u128> {
    let one = u128::from(bits > 0);
    (0..bits)
        .rev()
        .map(move |bit| (1u128 << bit) | one)
        .chain([one, 0])
}

/// The source address that the kernel gives a socket that connects to
/// `destination`; `None` if it has no route.
async fn ask_source(handle: &Handle, destination: IpAddr) -> Option<IpAddr> {
    source_of(&ask_route(handle, destination).await?)
}

/// The route to `destination`; `None` if the kernel has none.
async fn ask_route(handle: &Handle, destination: IpAddr) -> Option<RouteMessage> {
    let request = match destination {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .build(),
        IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(address, 128)
            .build(),
    };
    let mut answers = Box::pin(handle.route().get(request).execute());
    answers.try_next().await.ok()?
}

fn failed(operation: &str) -> impl FnOnce(rtnetlink::Error) -> Error {
    let operation = operation.to_owned();
    move |source| Error::Netlink {
        operation,
        source: Box::new(source),
    }
}

fn is_errno(error: &rtnetlink::Error, errnos: &[i32]) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if errnos.contains(&-message.raw_code()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_probe_lies_in_its_prefix_and_in_none_longer() {
        let all = nets(&[
            "0.0.0.0/0",
            "10.77.0.0/24",
            "10.77.0.2/32",
            "10.0.0.0/8",
            "128.0.0.0/1",
            "::/0",
            "fd00:77::/64",
            "8000::/1",
        ]);
        for prefix in &all {
            let probe = inside(prefix, &all).unwrap();
            let longest = all
                .iter()
                .filter(|net| net.contains(&probe))
                .max_by_key(|net| net.prefix_len())
                .unwrap();
            assert_eq!(longest, prefix, "{probe}");
        }
    }

    #[test]
    fn a_prefix_that_longer_ones_cover_has_no_probe() {
        let all = nets(&["10.0.0.0/31", "10.0.0.0/32", "10.0.0.1/32"]);
        assert_eq!(inside(&all[0], &all), None);
    }
}
