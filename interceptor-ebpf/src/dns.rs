//! DNS over UDP: requests to port 53 go to the proxy's DNS server, and its answers
//! seem to come from the server asked.
//!
//! Attached only to pods that capture DNS. (DNS over TCP is a connection like any
//! other.)

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::{debug, warn};
use interceptor_common::{
    chains::{DNS, OutputFacts, Owner, Verdict, output},
    config::{LOCALHOST_V4, LOCALHOST_V6, Settings},
    conn::{Address, Endpoint, Role, UDP},
    counters::Event,
    listeners::ProxyPort,
    routes::{RouteKind, effective_destination},
};

use crate::{
    context::{asked_v4, asked_v6, bound, read, set_source_v4, set_source_v6, set_v4, set_v6},
    kernel,
    maps::{self, ListMap, asked, origins},
    outbound::{ALLOW, REFUSE, bind, forgotten, out_interface, unbind},
};

#[cgroup_sock_addr(connect4)]
pub(crate) fn udp_connect4(ctx: SockAddrContext) -> i32 {
    if read!(ctx.sock_addr, protocol) != UDP {
        return ALLOW;
    }
    let mut endpoint = asked_v4(ctx.sock_addr);
    match connect(&ctx, &mut endpoint) {
        Redirect::No => {}
        Redirect::Yes => set_v4(ctx.sock_addr, &endpoint),
        Redirect::Impossible => return REFUSE,
    }
    ALLOW
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn udp_connect6(ctx: SockAddrContext) -> i32 {
    if read!(ctx.sock_addr, protocol) != UDP {
        return ALLOW;
    }
    let mut endpoint = asked_v6(ctx.sock_addr);
    match connect(&ctx, &mut endpoint) {
        Redirect::No => {}
        Redirect::Yes => set_v6(ctx.sock_addr, &endpoint),
        Redirect::Impossible => return REFUSE,
    }
    ALLOW
}

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn udp_sendmsg4(ctx: SockAddrContext) -> i32 {
    let mut endpoint = asked_v4(ctx.sock_addr);
    if endpoint.port != DNS || read!(ctx.sock_addr, protocol) != UDP {
        return ALLOW;
    }
    let bound = Address::from_be32(read!(ctx.sock_addr, msg_src_ip4));
    let mut source = bound;
    match send(&ctx, &mut endpoint, &mut source) {
        Redirect::No => {}
        Redirect::Yes => {
            set_v4(ctx.sock_addr, &endpoint);
            if bound.is_unspecified() && !source.is_unspecified() {
                set_source_v4(ctx.sock_addr, &source);
            }
        }
        Redirect::Impossible => return REFUSE,
    }
    ALLOW
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn udp_sendmsg6(ctx: SockAddrContext) -> i32 {
    let mut endpoint = asked_v6(ctx.sock_addr);
    if endpoint.port != DNS || read!(ctx.sock_addr, protocol) != UDP {
        return ALLOW;
    }
    let bound = Address::from_be32s([
        read!(ctx.sock_addr, msg_src_ip6[0]),
        read!(ctx.sock_addr, msg_src_ip6[1]),
        read!(ctx.sock_addr, msg_src_ip6[2]),
        read!(ctx.sock_addr, msg_src_ip6[3]),
    ]);
    let mut source = bound;
    match send(&ctx, &mut endpoint, &mut source) {
        Redirect::No => {}
        Redirect::Yes => {
            set_v6(ctx.sock_addr, &endpoint);
            if bound.is_unspecified() && !source.is_unspecified() {
                set_source_v6(ctx.sock_addr, &source);
            }
        }
        Redirect::Impossible => return REFUSE,
    }
    ALLOW
}

#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn udp_recvmsg4(ctx: SockAddrContext) -> i32 {
    if let Some(server) = server_asked(&ctx, &asked_v4(ctx.sock_addr)) {
        set_v4(ctx.sock_addr, server);
    }
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn udp_recvmsg6(ctx: SockAddrContext) -> i32 {
    if let Some(server) = server_asked(&ctx, &asked_v6(ctx.sock_addr)) {
        set_v6(ctx.sock_addr, server);
    }
    ALLOW
}

/// What becomes of a request.
enum Redirect {
    /// It goes where it was meant to go.
    No,
    /// It goes to the proxy's DNS server.
    Yes,
    /// It should, but there is no memory to remember which server was asked.
    Impossible,
}

/// connect(): decides, and on a redirect changes `endpoint` to the proxy's.
#[inline(never)]
fn connect(ctx: &SockAddrContext, endpoint: &mut Endpoint) -> Redirect {
    let Some(sk) = socket(ctx) else {
        return Redirect::No;
    };
    let previous = origins::get(sk);
    if endpoint.port != DNS && previous.is_none() {
        return Redirect::No;
    }
    if kernel::AFTER_ANOTHER.load() && endpoint.port != DNS {
        // What the other one decided stands.
        return Redirect::No;
    }
    let source_was_chosen = matches!(previous, Some(origin) if origin.source_chosen != 0);
    let mut local = bound(sk);
    if source_was_chosen {
        local.address = Address::UNSPECIFIED;
    }
    let unbound = local.address.is_unspecified();
    let mut source = local.address;
    let asked = endpoint.address;
    let Some(server) = captured(ctx, sk, endpoint, &mut source) else {
        if source_was_chosen {
            unbind(ctx.sock_addr, sk, &asked);
        }
        if previous.is_some() {
            origins::forget(sk);
        }
        return Redirect::No;
    };
    let source_chosen = unbound && !source.is_unspecified() && bind(ctx.sock_addr, sk, source);
    if unbound && !source_chosen {
        maps::count(Event::SourceNotKept);
    }
    if origins::set(sk, &server, Role::Client, u32::from(source_chosen)) {
        Redirect::Yes
    } else {
        impossible(ctx)
    }
}

/// sendto(): decides, and on a redirect changes `endpoint` to the proxy's, and an
/// unspecified `source` to that which the request would have had.
#[inline(never)]
fn send(ctx: &SockAddrContext, endpoint: &mut Endpoint, source: &mut Address) -> Redirect {
    let Some(sk) = socket(ctx) else {
        return Redirect::No;
    };
    let Some(server) = captured(ctx, sk, endpoint, source) else {
        return Redirect::No;
    };
    if asked::set(sk, &server) {
        Redirect::Yes
    } else {
        impossible(ctx)
    }
}

fn impossible(ctx: &SockAddrContext) -> Redirect {
    maps::count(Event::OriginLost);
    warn!(ctx, "no memory for the address of a DNS server");
    Redirect::Impossible
}

/// The server that a request is for, if it is captured; then `endpoint` becomes
/// the proxy's, and an unspecified `source` that which the request would have had.
#[inline(always)]
fn captured(
    ctx: &SockAddrContext,
    sk: *mut bpf_sock,
    endpoint: &mut Endpoint,
    source: &mut Address,
) -> Option<Endpoint> {
    if endpoint.port != DNS || !kernel::in_pod_by_copy(sk) {
        return None;
    }
    let settings = maps::settings()?;
    let destination = effective_destination(&endpoint.address, source);
    let route = maps::route(&destination);
    let over_loopback = matches!(route, Some(route) if route.is(RouteKind::Local));
    let (route_source, route_interface) = match route {
        Some(route) if !route.is(RouteKind::Unreachable) => (route.source, route.out_interface),
        // The kernel's own error.
        _ => return None,
    };
    if source.is_unspecified() {
        *source = route_source;
    }
    let facts = OutputFacts {
        protocol: UDP,
        source: *source,
        destination,
        destination_port: endpoint.port,
        over_loopback,
        out_interface: out_interface(sk, over_loopback, route_interface),
        owner: kernel::owner_by_copy(sk).unwrap_or(Owner::NONE),
        // Of TCP only.
        mark: 0,
    };
    if !facts.enter_chains() {
        return None;
    }
    let decision = forgotten(settings, output(settings, &ListMap, &facts));
    maps::count_decision(&decision, &destination);
    debug!(
        ctx,
        "DNS to {:i}: ISTIO_OUTPUT rule {}", destination.octets, decision.rule
    );
    if decision.verdict != Verdict::Dns {
        return None;
    }
    if maps::passes(ProxyPort::Dns) {
        maps::count(Event::PassedAtStart);
        return None;
    }
    *endpoint = server_of_proxy(settings, destination.is_v4());
    Some(Endpoint::new(destination, DNS))
}

/// Where the proxy's DNS server listens.
#[inline(always)]
fn server_of_proxy(settings: &Settings, v4: bool) -> Endpoint {
    let address = if v4 {
        LOCALHOST_V4.into()
    } else {
        LOCALHOST_V6.into()
    };
    Endpoint::new(address, settings.dns_port)
}

/// The server that a socket asked, if `from` is the proxy's DNS server.
#[inline(always)]
fn server_asked(ctx: &SockAddrContext, from: &Endpoint) -> Option<&'static Endpoint> {
    let settings = maps::settings()?;
    if *from != server_of_proxy(settings, from.address.is_v4()) {
        return None;
    }
    let sk = socket(ctx)?;
    match asked::get(sk) {
        Some(server) => Some(server),
        None => origins::get(sk).map(|origin| &origin.original_destination),
    }
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> Option<*mut bpf_sock> {
    let context: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: the union's only member.
    let sk = unsafe { (*context).__bindgen_anon_1.sk };
    if sk.is_null() { None } else { Some(sk) }
}
