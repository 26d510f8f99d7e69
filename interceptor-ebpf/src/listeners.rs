//! The proxy's listeners: registered when they start to listen, or found by
//! an iterator when they are older than the attachment.

use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::{info, warn};
use interceptor_common::{
    config::Settings,
    counters::Event,
    listeners::{ProxyPort, SLOTS},
};

use crate::{
    context::{read, unknown_to_verifier},
    kernel, maps,
};

const EEXIST: i64 = 17;
const TCP_LISTEN: u8 = 10;

/// Which of the proxy's ports `port` (host byte order) is.
#[inline(always)]
pub(crate) fn proxy_port(settings: &Settings, port: u16) -> Option<ProxyPort> {
    if port == settings.outbound_port {
        Some(ProxyPort::Outbound)
    } else if port == settings.inbound_port {
        Some(ProxyPort::Inbound)
    } else {
        None
    }
}

/// A socket of the pod's cgroup started to listen. `zero` is one that the
/// verifier doesn't know.
#[inline(always)]
pub(crate) fn listening(ctx: &SockOpsContext, zero: u32) {
    let Some(settings) = maps::settings() else {
        return;
    };
    #[expect(clippy::cast_possible_truncation, reason = "a port in a word")]
    let port = read!(ctx.ops, local_port) as u16;
    let Some(proxy_port) = proxy_port(settings, port) else {
        return;
    };
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() || !kernel::tcp_sock(sk).is_some_and(kernel::in_pod) {
        return;
    }
    let first = unknown_to_verifier(proxy_port.first_slot(), zero);
    let registered = register(first, |slot| maps::listeners::insert(slot, ctx.ops));
    if registered {
        info!(ctx, "the proxy listens on port {}", port);
    } else {
        warn!(ctx, "a listener on port {} can't be registered", port);
    }
}

/// `struct bpf_iter__tcp`: the context of an `iter/tcp` program.
#[repr(C)]
pub(crate) struct TcpIterator {
    meta: *const u8,
    sock_common: *mut u8,
}

/// Called for each TCP socket of a network namespace when the loader reads
/// from the iterator.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub(crate) extern "C" fn register_listeners(context: *const TcpIterator) -> i32 {
    let sock = read!(context, sock_common);
    if sock.is_null() {
        return 0;
    }
    let Some(settings) = maps::settings() else {
        return 0;
    };
    // SAFETY: the iterator hands out a `struct sock_common`.
    let (port, state) = unsafe { kernel::port_and_state(sock) };
    if state != TCP_LISTEN {
        return 0;
    }
    if let Some(proxy_port) = proxy_port(settings, port) {
        register(proxy_port.first_slot(), |slot| {
            maps::listeners::insert_held(slot, sock)
        });
    }
    0
}

/// Puts a listener into the first free slot from `first` on; `insert` returns 0, or an errno
/// below zero. False if the listener was not registered.
#[inline(always)]
fn register(first: u32, insert: impl Fn(u32) -> i64) -> bool {
    for slot in 0..SLOTS {
        match insert(first + slot) {
            0 => return true,
            error if error == -EEXIST => {}
            _ => {
                maps::count(Event::ListenerUnsuitable);
                return false;
            }
        }
    }
    maps::count(Event::ListenerSlotsFull);
    false
}
