//! The way in: which listener gets a new connection.

use aya_ebpf::{
    bindings::{
        BPF_SK_LOOKUP_F_REPLACE,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{bpf_sk_assign, bpf_sk_release},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use aya_log_ebpf::{debug, warn};
use interceptor_common::{
    chains::{InboundFacts, Verdict, inbound},
    config::Settings,
    conn::{Endpoint, Handshake, TCP, is_proxy_address_v4},
    counters::Event,
    listeners::{ProxyPort, SLOTS, accepts},
    routes::RouteKind,
};

use crate::{
    context::{bound_address, looked_up, read},
    kernel,
    listeners::proxy_port,
    maps::{self, ListMap, handshakes},
};

#[sk_lookup]
pub(crate) fn find_listener(ctx: SkLookupContext) -> u32 {
    if read!(ctx.lookup, protocol) != TCP {
        return SK_PASS;
    }
    let Some(settings) = maps::settings() else {
        return SK_DROP;
    };
    let (local, remote) = looked_up(ctx.lookup);
    if matches!(maps::route(&remote.address), Some(route) if route.is(RouteKind::Local)) {
        from_inside(&ctx, settings, local, remote)
    } else {
        from_outside(&ctx, settings, local, remote)
    }
}

/// A connection that arrives: `ISTIO_INBOUND`.
#[inline(always)]
fn from_outside(
    ctx: &SkLookupContext,
    settings: &Settings,
    local: Endpoint,
    remote: Endpoint,
) -> u32 {
    let decision = inbound(
        settings,
        &ListMap,
        &InboundFacts {
            protocol: TCP,
            destination: local.address,
            destination_port: local.port,
            in_interface: in_interface(ctx),
            from_inside: false,
        },
    );
    maps::count_decision(&decision, &local.address);
    debug!(
        ctx,
        "connection from {:i} to port {}: ISTIO_INBOUND rule {}",
        remote.address.octets,
        local.port,
        decision.rule
    );
    if decision.verdict == Verdict::Direct || assign(ctx, ProxyPort::Inbound, false) {
        return SK_PASS;
    }
    // To the kernel another program's choice counts for more than a refusal,
    // and a refusal can't take it back.
    maps::count(Event::NoInboundListener);
    warn!(ctx, "refused, no proxy listens: port {}", local.port);
    SK_DROP
}

/// The index of the interface that a connection arrives by; 0 where the kernel
/// doesn't say.
#[inline(always)]
fn in_interface(ctx: &SkLookupContext) -> u32 {
    if kernel::HAS_INGRESS_IFINDEX.load() {
        read!(ctx.lookup, ingress_ifindex)
    } else {
        0
    }
}

/// A connection of the pod with itself: `ISTIO_OUTPUT` has decided, and here
/// it finds the proxy whichever local address that listens on.
#[inline(always)]
fn from_inside(
    ctx: &SkLookupContext,
    settings: &Settings,
    local: Endpoint,
    remote: Endpoint,
) -> u32 {
    let Some(port) = proxy_port(settings, local.port) else {
        return SK_PASS;
    };
    let handshake = Handshake {
        client: remote,
        proxy: local,
    };
    if handshakes::get(&handshake).is_some() {
        // With no listener known, the kernel's own look-up decides: it refuses,
        // or finds one that can't be registered.
        assign(ctx, port, true);
        SK_PASS
    } else if is_proxy_address_v4(&local.address) {
        // Its original destination is lost.
        SK_DROP
    } else {
        SK_PASS
    }
}

/// Gives the connection to a listener of the proxy; false if there is none.
///
/// Replaces another program's choice: REDIRECT also comes before any look-up
/// of a socket.
#[inline(always)]
fn assign(ctx: &SkLookupContext, port: ProxyPort, from_inside: bool) -> bool {
    for slot in 0..SLOTS {
        let sk = maps::listeners::get(port.first_slot() + slot);
        if sk.is_null() {
            continue;
        }
        let assigned = accepts(&bound_address(sk), from_inside)
            // SAFETY: the program's own context and a socket that it holds.
            && unsafe {
                bpf_sk_assign(
                    ctx.lookup.cast(),
                    sk.cast(),
                    u64::from(BPF_SK_LOOKUP_F_REPLACE),
                )
            } == 0;
        // SAFETY: `sk` is held, and is not used after this.
        unsafe {
            bpf_sk_release(sk.cast());
        }
        if assigned {
            return true;
        }
    }
    false
}
