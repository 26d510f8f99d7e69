//! What the application sees: getpeername() names the destination that it
//! asked for, never the proxy.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use interceptor_common::conn::{Endpoint, Role};

use crate::{
    context::{asked_v4, asked_v6, set_v4, set_v6},
    kernel, listeners,
    maps::{self, destinations, origins},
};

const CONTINUE: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some(destination) = asked_destination(&ctx, &asked_v4(ctx.sock_addr)) {
        set_v4(ctx.sock_addr, destination);
    }
    CONTINUE
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(destination) = asked_destination(&ctx, &asked_v6(ctx.sock_addr)) {
        set_v6(ctx.sock_addr, destination);
    }
    CONTINUE
}

/// Where the socket meant to connect to, if it was redirected.
#[inline(always)]
fn asked_destination(ctx: &SockAddrContext, peer: &Endpoint) -> Option<&'static Endpoint> {
    // SAFETY: the union's only member.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if sk.is_null() {
        return None;
    }
    match origins::get(sk) {
        Some(origin) if origin.role == Role::Client as u32 => {
            return Some(&origin.original_destination);
        }
        Some(_) => return None,
        None => {}
    }
    let destination = destinations::behind(&peer.address)?;
    if listeners::proxy_port(maps::settings()?, peer.port).is_some() && kernel::in_pod_by_copy(sk) {
        Some(destination)
    } else {
        None
    }
}
