//! The way in: which listener gets a new connection.

use aya_ebpf::{
    bindings::{
        BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{bpf_sk_assign, bpf_sk_release},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use aya_log_ebpf::{debug, warn};
use interceptor_common::{
    chains::{Chain, InboundFacts, Verdict, inbound},
    config::Settings,
    conn::{Endpoint, Handshake, TCP, is_proxy_address_v4},
    counters::Event,
    listeners::{ProxyPort, SLOTS, accepts},
    routes::RouteKind,
};

use crate::{
    context::{bound_address, looked_up, read, unknown_to_verifier},
    listeners::proxy_port,
    maps::{self, handshakes},
};

/// What a new connection gets.
enum Choice {
    /// What the kernel's own look-up finds.
    Kernels,
    /// Nothing: it is refused.
    Nothing,
    /// A listener of the proxy.
    Listener(ProxyPort),
}

#[sk_lookup]
pub(crate) fn find_listener(ctx: SkLookupContext) -> u32 {
    if read!(ctx.lookup, protocol) != TCP {
        return SK_PASS;
    }
    let Some(settings) = maps::settings() else {
        return SK_DROP;
    };
    let (local, remote) = looked_up(ctx.lookup);
    let inside =
        matches!(maps::route(&remote.address), Some(route) if route.is(RouteKind::Local));
    let choice = if inside {
        from_inside(settings, local, remote)
    } else {
        from_outside(&ctx, settings, local, remote)
    };
    let port = match choice {
        Choice::Kernels => return SK_PASS,
        Choice::Nothing => return SK_DROP,
        Choice::Listener(port) => port,
    };
    // With no listener known, the kernel's own look-up decides on a connection
    // from inside: it refuses, or finds one that can't be registered.
    if assign(ctx.lookup, port.first_slot(), inside.into()) != 0 || inside {
        return SK_PASS;
    }
    // To the kernel another program's choice counts for more than a refusal,
    // and a refusal can't take it back.
    maps::count(Event::NoInboundListener);
    warn!(ctx, "refused, no proxy listens: port {}", local.port);
    SK_DROP
}

/// A connection that arrives: `ISTIO_INBOUND`.
#[inline(always)]
fn from_outside(
    ctx: &SkLookupContext,
    settings: &Settings,
    local: Endpoint,
    remote: Endpoint,
) -> Choice {
    let mut decision = inbound(
        settings,
        &InboundFacts {
            protocol: TCP,
            destination_port: local.port,
            from_inside: false,
        },
    );
    decision.rule = unknown_to_verifier(decision.rule, read!(ctx.lookup, protocol) ^ TCP);
    maps::count_decision(Chain::Inbound, &decision);
    debug!(
        ctx,
        "connection from {:i} to port {}: ISTIO_INBOUND rule {}",
        remote.address.octets,
        local.port,
        decision.rule
    );
    if decision.verdict == Verdict::Direct {
        Choice::Kernels
    } else {
        Choice::Listener(ProxyPort::Inbound)
    }
}

/// A connection of the pod with itself: `ISTIO_OUTPUT` has decided, and here
/// it finds the proxy whichever local address that listens on.
#[inline(always)]
fn from_inside(settings: &Settings, local: Endpoint, remote: Endpoint) -> Choice {
    let Some(port) = proxy_port(settings, local.port) else {
        return Choice::Kernels;
    };
    let handshake = Handshake {
        client: remote,
        proxy: local,
    };
    if handshakes::get(&handshake).is_some() {
        Choice::Listener(port)
    } else if is_proxy_address_v4(&local.address) {
        // Its original destination is lost.
        Choice::Nothing
    } else {
        Choice::Kernels
    }
}

/// Gives the connection to the first listener that is for it, of the [`SLOTS`]
/// from `first_slot` on; 0 if there is none.
///
/// A global function, as BPF calls it: the verifier walks it once, whichever way
/// it is come to.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn assign(context: *mut bpf_sk_lookup, first_slot: u32, from_inside: u32) -> u32 {
    (0..SLOTS)
        .any(|slot| assign_slot(context, first_slot + slot, from_inside) != 0)
        .into()
}

/// Gives the connection to the listener in a slot; 0 if there is none, or if it
/// is for others.
///
/// Replaces another program's choice: REDIRECT also comes before any look-up
/// of a socket.
///
/// A global function too: it is walked once, and not once for each slot.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn assign_slot(context: *mut bpf_sk_lookup, slot: u32, from_inside: u32) -> u32 {
    let sk = maps::listeners::get(slot);
    if sk.is_null() {
        return 0;
    }
    let assigned = accepts(&bound_address(sk), from_inside != 0)
        // SAFETY: the program's own context and a socket that it holds.
        && unsafe {
            bpf_sk_assign(
                context.cast(),
                sk.cast(),
                u64::from(BPF_SK_LOOKUP_F_REPLACE),
            )
        } == 0;
    // SAFETY: `sk` is held, and is not used after this.
    unsafe {
        bpf_sk_release(sk.cast());
    }
    assigned.into()
}
