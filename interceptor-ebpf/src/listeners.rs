//! The proxy's listeners, registered when they start to listen. The loader
//! registers those that are older than the attachment.

use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::{info, warn};
use interceptor_common::{
    config::Settings,
    counters::Event,
    listeners::{ProxyPort, SLOTS},
};

use crate::{
    context::{opaque, read},
    kernel, maps,
};

const EEXIST: i64 = 17;

/// Which of the proxy's ports `port` (host byte order) is.
#[inline(always)]
pub(crate) fn proxy_port(settings: &Settings, port: u16) -> Option<ProxyPort> {
    if port == settings.outbound_port {
        Some(ProxyPort::Outbound)
    } else if port == settings.inbound_port {
        Some(ProxyPort::Inbound)
    } else if port == settings.dns_port {
        Some(ProxyPort::Dns)
    } else {
        None
    }
}

/// A socket of the pod's cgroup started to listen.
#[inline(always)]
pub(crate) fn listening(ctx: &SockOpsContext) {
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
    let first = opaque(proxy_port.first_slot(), settings.generation);
    maps::end_passing(proxy_port);
    let registered = register(first, |slot| maps::listeners::insert(slot, ctx.ops));
    if registered {
        info!(ctx, "the proxy listens on port {}", port);
    } else {
        warn!(ctx, "a listener on port {} can't be registered", port);
    }
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
