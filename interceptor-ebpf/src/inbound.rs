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
    config::{Settings, stages},
    conn::{Address, Endpoint, Handshake, TCP, is_proxy_address},
    counters::Event,
    listeners::{PLACES, ProxyPort, accepts},
    routes::RouteKind,
};

use crate::{
    context::{bound_address, forget, looked_up, read},
    kernel,
    listeners::proxy_port,
    maps::{self, ListMap, destinations, handshakes},
    outbound::forgotten,
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

/// Which listener a connection gets, by itself on the stack for the verifier.
struct Wanted {
    first_slot: u32,
    /// 1 for a connection of the pod with itself, 0 for one that arrives.
    from_inside: u32,
    /// The port asked for.
    port: u16,
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
    let inside = matches!(maps::route(&remote.address), Some(route) if route.is(RouteKind::Local))
        || seems_from_elsewhere(settings, local, remote);
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
    let mut wanted = Wanted {
        first_slot: port.first_slot(),
        from_inside: inside.into(),
        port: local.port,
    };
    forget(&mut wanted);
    // With no listener known, the kernel's own look-up decides on a connection
    // from inside: it refuses, or finds one that can't be registered.
    if assign(&ctx, &wanted) || wanted.from_inside != 0 {
        return SK_PASS;
    }
    if maps::passes(ProxyPort::Inbound) {
        maps::count(Event::PassedAtStart);
        return SK_PASS;
    }
    // To the kernel another program's choice counts for more than a refusal,
    // and a refusal can't take it back.
    maps::count(Event::NoInboundListener);
    warn!(ctx, "refused, no proxy listens: port {}", wanted.port);
    SK_DROP
}

/// Whether the connection is of the pod with itself, although its source isn't an
/// address of the pod: under TPROXY, the proxy's from its client's address.
#[inline(always)]
fn seems_from_elsewhere(settings: &Settings, local: Endpoint, remote: Endpoint) -> bool {
    let handshake = Handshake {
        client: remote,
        proxy: local,
    };
    settings.family(&local.address).has(stages::TPROXY) && handshakes::get(&handshake).is_some()
}

/// A connection that arrives: `ISTIO_INBOUND`.
#[inline(always)]
fn from_outside(
    ctx: &SkLookupContext,
    settings: &Settings,
    local: Endpoint,
    remote: Endpoint,
) -> Choice {
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
    let decision = forgotten(settings, decision);
    maps::count_decision(&decision, &local.address);
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
fn from_inside(settings: &Settings, local: Endpoint, remote: Endpoint) -> Choice {
    let Some(port) = proxy_port(settings, local.port) else {
        return Choice::Kernels;
    };
    let handshake = Handshake {
        client: remote,
        proxy: local,
    };
    if destinations::behind(&local.address).is_some() || handshakes::get(&handshake).is_some() {
        Choice::Listener(port)
    } else if is_proxy_address(&local.address) {
        // Its original destination is lost.
        Choice::Nothing
    } else {
        Choice::Kernels
    }
}

/// Gives the connection to a listener of the proxy; false if there is none.
///
/// Replaces another program's choice: REDIRECT also comes before any look-up
/// of a socket.
#[inline(always)]
fn assign(ctx: &SkLookupContext, wanted: &Wanted) -> bool {
    for slot in 0..PLACES {
        let sk = maps::listeners::get(wanted.first_slot + slot);
        if sk.is_null() {
            continue;
        }
        let [one, two, three, four] = bound_address(sk).to_be32s();
        let assigned = is_for(one, two, three, four, wanted.from_inside) != 0
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

/// [`accepts`] for an address in four words, whose bytes are in network order.
///
/// A global function, as BPF calls it: the verifier walks it once, and not once
/// for each slot. (With a context among its arguments Linux 5.10 refuses it.)
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_for(one: u32, two: u32, three: u32, four: u32, from_inside: u32) -> u32 {
    let address = Address::from_be32s([one, two, three, four]);
    accepts(&address, from_inside != 0).into()
}
