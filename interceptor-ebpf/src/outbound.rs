//! The way out: connect(), and the original destination's way from the
//! client's socket to the proxy's.

use core::ptr::from_mut;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{
        bpf_bind, bpf_get_prandom_u32, bpf_set_retval, bpf_setsockopt, bpf_sock_ops_cb_flags_set,
    },
    macros::{cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockOpsContext},
};
use aya_log_ebpf::{debug, warn};
use interceptor_common::{
    chains::{Chain, Decision, OutputFacts, Owner, Verdict, output},
    config::{LOCALHOST_V6, Settings, stages},
    conn::{
        Address, DestinationNumber, Endpoint, Handshake, PROXY_NETWORK_V6, Role, TCP,
        is_proxy_address, unnumbered_proxy_address,
    },
    counters::Event,
    listeners::ProxyPort,
    routes::{LOOPBACK, RouteKind, effective_destination},
};

use crate::{
    context::{
        AF_INET, SockAddrIn, SockAddrIn6, asked_v4, asked_v6, bound, ends, forget, opaque, read,
        remote_address, set_v4, set_v6,
    },
    kernel, listeners,
    maps::{self, ListMap, destinations, handshakes, origins},
};

pub(crate) const REFUSE: i32 = 0;
pub(crate) const ALLOW: i32 = 1;

const ECONNREFUSED: i32 = 111;

/// What connect() shall do.
#[derive(Clone, Copy)]
enum Connect {
    /// What the application asked for.
    AsAsked,
    /// Go to the proxy.
    Redirected,
    /// Fail with `ECONNREFUSED`.
    Refused,
}

/// What connect() found out before it decides.
struct Found {
    destination: Endpoint,
    source: Address,
    owner: Owner,
    out_interface: u32,
    local_port: u16,
    over_loopback: bool,
    unreachable: bool,
    bound_to_any: bool,
    source_was_chosen: bool,
    connected_before: bool,
}

#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
    let context = ctx.sock_addr;
    if read!(context, protocol) != TCP {
        return ALLOW;
    }
    let mut endpoint = asked_v4(context);
    match connect(&ctx, &mut endpoint) {
        Connect::AsAsked => ALLOW,
        Connect::Redirected => {
            set_v4(context, &endpoint);
            ALLOW
        }
        Connect::Refused => refuse(),
    }
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
    let context = ctx.sock_addr;
    if read!(context, protocol) != TCP {
        return ALLOW;
    }
    let mut endpoint = asked_v6(context);
    match connect(&ctx, &mut endpoint) {
        Connect::AsAsked => ALLOW,
        Connect::Redirected => {
            set_v6(context, &endpoint);
            ALLOW
        }
        Connect::Refused => refuse(),
    }
}

#[inline(always)]
fn refuse() -> i32 {
    if kernel::HAS_SET_RETVAL.load() {
        // SAFETY: sets what connect() returns instead of EPERM.
        unsafe {
            bpf_set_retval(-ECONNREFUSED);
        }
    }
    REFUSE
}

/// Decides, and on a redirect changes `endpoint` from what the application asked
/// for to the proxy's.
///
/// A function of its own, with its own part of the stack, which is 512 bytes.
#[inline(never)]
fn connect(ctx: &SockAddrContext, endpoint: &mut Endpoint) -> Connect {
    // SAFETY: the union's only member.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if sk.is_null() {
        return Connect::AsAsked;
    }
    let Some(sock) = kernel::tcp_sock(sk) else {
        return Connect::AsAsked;
    };
    if !kernel::in_pod(sock) {
        return Connect::AsAsked;
    }
    let Some(settings) = maps::settings() else {
        return Connect::Refused;
    };

    // A socket may connect more than once: after a failure, or after AF_UNSPEC.
    let previous = origins::get(sk);
    if kernel::AFTER_ANOTHER.load()
        && (matches!(previous, Some(origin) if origin.role == Role::Client as u32)
            || DestinationNumber::of(&endpoint.address).is_some())
        && listeners::proxy_port(settings, endpoint.port).is_some()
    {
        // What the other one decided stands.
        return Connect::AsAsked;
    }
    let mut local = bound(sk);
    let source_was_chosen = match previous {
        Some(origin) => origin.source_chosen != 0,
        // An earlier connect() to a destination with a number. (Who binds an address
        // most often binds a port, too.)
        None => local.port == 0 && DestinationNumber::of(&remote_address(sk)).is_some(),
    };
    if source_was_chosen {
        local.address = Address::UNSPECIFIED;
    }

    let destination = Endpoint::new(
        effective_destination(&endpoint.address, &local.address),
        endpoint.port,
    );
    let route = maps::route(&destination.address);
    let over_loopback = matches!(route, Some(route) if route.is(RouteKind::Local));
    let unreachable = !matches!(route, Some(route) if !route.is(RouteKind::Unreachable));
    let (route_source, route_interface) = match route {
        Some(route) => (route.source, route.out_interface),
        None => (Address::UNSPECIFIED, 0),
    };
    let out_interface = out_interface(sk, over_loopback, route_interface);
    let bound_to_any = local.address.is_unspecified();
    let source = if bound_to_any {
        route_source
    } else {
        local.address
    };
    let mut found = Found {
        destination,
        source,
        owner: kernel::owner(sock).unwrap_or(Owner::NONE),
        out_interface,
        local_port: local.port,
        over_loopback,
        unreachable,
        bound_to_any,
        source_was_chosen,
        connected_before: previous.is_some(),
    };
    forget(&mut found);
    let Found {
        destination,
        source,
        owner,
        out_interface,
        local_port,
        over_loopback,
        unreachable,
        bound_to_any,
        source_was_chosen,
        connected_before,
    } = found;

    let facts = OutputFacts {
        protocol: TCP,
        source,
        destination: destination.address,
        destination_port: destination.port,
        over_loopback,
        out_interface,
        owner,
        mark: read!(sk, mark),
    };
    let verdict = if !facts.enter_chains() {
        Verdict::Direct
    } else {
        let decision = forgotten(settings, output(settings, &ListMap, &facts));
        let decision = forgotten(settings, unless_passing(decision));
        if !unreachable {
            maps::count_decision(&decision, &destination.address);
        }
        debug!(
            ctx,
            "connect to {:i} port {}: ISTIO_OUTPUT rule {}",
            destination.address.octets,
            destination.port,
            decision.rule
        );
        decision.verdict
    };

    let port = match verdict {
        // One that dials a proxy address itself must be known as such where
        // unknown ones are refused.
        Verdict::Direct if is_proxy_address(&destination.address) => destination.port,
        Verdict::Direct => {
            if source_was_chosen {
                unbind(ctx.sock_addr, sk, &endpoint.address);
            }
            if from_elsewhere(settings, &facts, bound_to_any) {
                return if origins::set(sk, &destination, Role::FromElsewhere, 0) {
                    Connect::AsAsked
                } else {
                    Connect::Refused
                };
            }
            if connected_before {
                origins::forget(sk);
            }
            return Connect::AsAsked;
        }
        _ if unreachable => {
            if source_was_chosen {
                unbind(ctx.sock_addr, sk, &endpoint.address);
            }
            return if origins::set(sk, &destination, Role::Unroutable, 0) {
                Connect::AsAsked
            } else {
                Connect::Refused
            };
        }
        Verdict::Outbound => settings.outbound_port,
        Verdict::Inbound => settings.inbound_port,
        Verdict::Dns => settings.dns_port,
    };

    let is_v4 = destination.address.is_v4();
    let number = if bound_to_any
        && !connected_before
        && local_port == 0
        && !source.is_unspecified()
        && !is_proxy_address(&destination.address)
        && (is_v4 || has_proxy_addresses_v6(sk, &source))
    {
        destinations::number(&destination)
    } else {
        None
    };
    let address = if is_proxy_address(&destination.address) {
        destination.address
    } else if let Some(number) = number {
        number.proxy_address(is_v4, random())
    } else if is_v4 {
        unnumbered_proxy_address(true, random())
    } else {
        proxy_address_for(sk, &source, bound_to_any)
    };
    *endpoint = Endpoint::new(address, port);
    let mut source_chosen = 0;
    if bound_to_any {
        if source.is_unspecified() {
            maps::count(Event::SourceNotKept);
        } else if source.is_v4() {
            if local_port != 0 {
                // A port bound to any address can't be bound again. To the
                // source address itself, that is the source.
                endpoint.address = source;
            } else if bind(ctx.sock_addr, sk, source) {
                source_chosen = 1;
            } else {
                maps::count(Event::SourceNotKept);
            }
        }
    }
    if number.is_some() {
        return Connect::Redirected;
    }

    if origins::set(sk, &destination, Role::Client, source_chosen) {
        Connect::Redirected
    } else {
        maps::count(Event::OriginLost);
        warn!(ctx, "no memory for an original destination");
        Connect::Refused
    }
}

/// The decision, but for a connection that passes because its proxy has not begun to
/// listen.
#[inline(always)]
fn unless_passing(decision: Decision) -> Decision {
    match ProxyPort::of(decision.verdict) {
        Some(port) if maps::passes(port) => {
            maps::count(Event::PassedAtStart);
            Decision {
                verdict: Verdict::Direct,
                ..decision
            }
        }
        _ => decision,
    }
}

/// The proxy's address for an IPv6 connection from `source`, to which the kernel
/// gives that source by itself: bind() would make an `AF_INET6` socket IPv6's alone
/// for ever.
#[inline(always)]
fn proxy_address_for(sk: *const bpf_sock, source: &Address, bound_to_any: bool) -> Address {
    if source.is_unspecified() || source.is_link_local_v6() && !bound_to_any {
        return LOCALHOST_V6.into();
    }
    if has_proxy_addresses_v6(sk, source) {
        unnumbered_proxy_address(false, random())
    } else {
        // To ::1 the kernel would send what it answers without a socket (an ACK
        // in TIME_WAIT, a reset) out of the source's interface.
        *source
    }
}

/// Whether an IPv6 connection to one of the proxy's addresses has this source.
#[inline(always)]
fn has_proxy_addresses_v6(sk: *const bpf_sock, source: &Address) -> bool {
    match maps::route(&PROXY_NETWORK_V6.into()) {
        // Bound to an interface, it would not find the route, which is `lo`'s.
        Some(route) => {
            route.is(RouteKind::Local) && route.source == *source && read!(sk, bound_dev_if) == 0
        }
        None => false,
    }
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// Whether a connection to the pod itself would seem to arrive from another host:
/// see [`Role::FromElsewhere`].
#[inline(always)]
fn from_elsewhere(settings: &Settings, facts: &OutputFacts, bound_to_any: bool) -> bool {
    settings.family(&facts.destination).has(stages::TPROXY)
        && facts.over_loopback
        && !bound_to_any
        && !matches!(maps::route(&facts.source), Some(route) if route.is(RouteKind::Local))
}

/// The decision, about which the verifier knows nothing any more.
#[inline(always)]
pub(crate) fn forgotten(settings: &Settings, decision: Decision) -> Decision {
    let number = |value| opaque(value, settings.generation);
    let verdict = number(decision.verdict as u32);
    Decision {
        verdict: match verdict {
            1 => Verdict::Outbound,
            2 => Verdict::Inbound,
            3 => Verdict::Dns,
            _ => Verdict::Direct,
        },
        chain: match number(decision.chain as u32) {
            0 => Chain::Out,
            2 => Chain::In,
            3 => Chain::Inbound,
            _ => Chain::Output,
        },
        rule: number(decision.rule),
    }
}

/// The index of the interface that a connection goes out through, whose route's
/// is `of_route`.
#[inline(always)]
pub(crate) fn out_interface(sk: *const bpf_sock, over_loopback: bool, of_route: u32) -> u32 {
    match read!(sk, bound_dev_if) {
        _ if over_loopback => LOOPBACK,
        0 => of_route,
        device => device,
    }
}

/// Binds the socket to `source` and to no port; false if the kernel won't.
#[inline(always)]
pub(crate) fn bind(context: *mut bpf_sock_addr, sk: *const bpf_sock, source: Address) -> bool {
    let endpoint = Endpoint::new(source, 0);
    if read!(sk, family) == AF_INET {
        bind_to(context, SockAddrIn::from(endpoint))
    } else {
        bind_to(context, SockAddrIn6::from(endpoint))
    }
}

#[inline(always)]
fn bind_to<T>(context: *mut bpf_sock_addr, mut address: T) -> bool {
    // SAFETY: the program's own context, and an address of the length given.
    unsafe {
        bpf_bind(
            context,
            from_mut(&mut address).cast(),
            size_of::<T>() as i32,
        ) == 0
    }
}

/// Takes back the source address that an earlier connect() was given.
#[inline(always)]
pub(crate) fn unbind(context: *mut bpf_sock_addr, sk: *const bpf_sock, asked: &Address) {
    let any = if asked.is_v4() {
        Address::v4([0; 4])
    } else {
        Address::UNSPECIFIED
    };
    if !bind(context, sk, any) {
        maps::count(Event::SourceNotKept);
    }
}

// What sock_ops is called for (enum in linux/bpf.h).
const TCP_CONNECT_CB: u32 = 3;
const PASSIVE_ESTABLISHED_CB: u32 = 5;
const STATE_CB: u32 = 10;
const TCP_LISTEN_CB: u32 = 11;
const STATE_CB_FLAG: i32 = 1 << 2;
const TCP_CLOSE: u32 = 7;

const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;

#[sock_ops]
pub(crate) fn sock_ops(ctx: SockOpsContext) -> u32 {
    match read!(ctx.ops, op) {
        TCP_CONNECT_CB => connecting(&ctx),
        PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        STATE_CB => {
            // SAFETY: the union's plain numbers.
            if unsafe { (*ctx.ops).__bindgen_anon_1.args[1] } == TCP_CLOSE {
                closed(&ctx);
            }
        }
        TCP_LISTEN_CB => listeners::listening(&ctx),
        _ => {}
    }
    1
}

/// The client's SYN is about to leave: both ends are known now.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() {
        return;
    }
    let Some(origin) = origins::get(sk) else {
        return;
    };
    if origin.role == Role::Unroutable as u32 {
        stop(ctx);
        return;
    }
    let (client, proxy) = ends(ctx.ops);
    if origin.role != Role::FromElsewhere as u32
        && !proxy.address.is_loopback()
        && proxy.address != client.address
        && !is_proxy_address(&proxy.address)
    {
        // The address was the pod's when the routes were read.
        stop(ctx);
        return;
    }
    let key = Handshake { client, proxy };
    if handshakes::insert(&key, &origin.original_destination).is_err() {
        maps::count(Event::OriginLost);
        warn!(ctx, "too many handshakes in flight");
        return;
    }
    // Another program may have set flags of its own.
    let flags = read!(ctx.ops, bpf_sock_ops_cb_flags).cast_signed() | STATE_CB_FLAG;
    // SAFETY: the program's own context.
    unsafe {
        bpf_sock_ops_cb_flags_set(ctx.ops, flags);
    }
}

/// Keeps a connection from leaving the pod: bound to `lo`, it must find another
/// route, and there is none. (sock_ops can't make connect() fail.)
#[inline(always)]
fn stop(ctx: &SockOpsContext) {
    let mut device = *b"lo\0\0";
    // SAFETY: the program's own context, and a value of the length given.
    unsafe {
        bpf_setsockopt(
            ctx.ops.cast(),
            SOL_SOCKET,
            SO_BINDTODEVICE,
            from_mut(&mut device).cast(),
            device.len() as i32,
        );
    }
    maps::count(Event::RoutesChanged);
    warn!(ctx, "stopped: the routes have changed since they were read");
}

/// The proxy's socket, or the application's, is established, and not yet returned
/// by accept().
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let Some(settings) = maps::settings() else {
        return;
    };
    let port = read!(ctx.ops, local_port);
    let is_proxys = port == u32::from(settings.outbound_port)
        || port == u32::from(settings.inbound_port)
        || port == u32::from(settings.dns_port);
    // Under TPROXY it may be the application's, of a connection that seems to
    // arrive from elsewhere.
    if !is_proxys && (settings.v4.stages | settings.v6.stages) & stages::TPROXY == 0 {
        return;
    }
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() || !kernel::tcp_sock(sk).is_some_and(kernel::in_pod) {
        return;
    }
    let (proxy, client) = ends(ctx.ops);
    let key = Handshake { client, proxy };
    let Some(original_destination) = handshakes::get(&key) else {
        return;
    };
    if is_proxys && !origins::set(sk, original_destination, Role::Accepted, 0) {
        maps::count(Event::OriginLost);
    }
    handshakes::remove(&key);
}

/// The client's socket is closed; if its handshake never came to an end, the
/// entry is still there.
#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let (client, proxy) = ends(ctx.ops);
    let key = Handshake { client, proxy };
    // Most often it is not: looking takes no lock.
    if handshakes::get(&key).is_some() {
        handshakes::remove(&key);
    }
}
