//! What the proxy asks: getsockopt(SO_ORIGINAL_DST).

use core::ptr::addr_of_mut;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sockopt},
    macros::cgroup_sockopt,
    programs::SockoptContext,
};
use interceptor_common::{
    config::stages,
    conn::{Endpoint, Role, TCP, is_proxy_address},
};

use crate::{
    context::{SockAddrIn, SockAddrIn6, bound, read, remote_address},
    kernel,
    listeners::proxy_port,
    maps::{self, destinations, origins},
};

const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` at `SOL_IP`, `IP6T_SO_ORIGINAL_DST` at `SOL_IPV6`.
const SO_ORIGINAL_DST: i32 = 80;

const EINVAL: i32 = 22;
const TCP_LISTEN: u32 = 10;

const CONTINUE: i32 = 1;

#[cgroup_sockopt(getsockopt)]
pub(crate) fn getsockopt(ctx: SockoptContext) -> i32 {
    let context = ctx.sockopt;
    leave_long_buffer(context);
    if read!(context, optname) != SO_ORIGINAL_DST {
        return CONTINUE;
    }
    // By the level asked, never by the socket's family: AF_INET6 sockets with
    // IPv4 peers are asked at SOL_IP.
    let level = read!(context, level);
    if level != SOL_IP && level != SOL_IPV6 {
        return CONTINUE;
    }
    // SAFETY: the union's only member that matters.
    let sk = unsafe { (*context).__bindgen_anon_1.sk };
    if sk.is_null() || read!(sk, protocol) != TCP {
        return CONTINUE;
    }
    let Some(destination) = original_destination(context, sk) else {
        return CONTINUE;
    };
    if level == SOL_IP && destination.address.is_v4() {
        answer(context, SockAddrIn::from(destination));
    } else if level == SOL_IPV6 && !destination.address.is_v4() {
        let mut address = SockAddrIn6::from(destination);
        if destination.address.is_link_local_v6() {
            address.scope_id = read!(sk, bound_dev_if);
        }
        answer(context, address);
    }
    CONTINUE
}

/// Has the kernel keep to what it has done itself with a buffer that is longer than
/// what the program is given of it.
///
/// A length of zero says so (Documentation/bpf/prog_cgroup_sockopt.rst). Otherwise
/// kernels such as 5.10 fail the call with `EFAULT`, whatever its option.
#[inline(always)]
fn leave_long_buffer(context: *mut bpf_sockopt) {
    if read!(context, optlen) > kernel::PAGE_SIZE.load().cast_signed() {
        // SAFETY: a valid context, whose field is writable.
        unsafe {
            addr_of_mut!((*context).optlen).write_volatile(0);
        }
    }
}

/// What conntrack would say of this socket.
#[inline(always)]
fn original_destination(context: *const bpf_sockopt, sk: *mut bpf_sock) -> Option<Endpoint> {
    if let Some(origin) = origins::get(sk)
        && origin.role != Role::Unroutable as u32
    {
        return Some(origin.original_destination);
    }
    let remote_port = u16::from_be(read!(sk, dst_port));
    let connected = remote_port != 0 && read!(sk, state) != TCP_LISTEN;
    if !connected || !kernel::in_pod_by_copy(sk) {
        return None;
    }
    let mut local = bound(sk);
    if local.port == 0 {
        // After a reset the socket has given its number back.
        local.port = kernel::source_port(sk);
    }
    // A number counts for more than what conntrack has answered, which follows the
    // rewritten connection.
    let settings = maps::settings()?;
    if is_proxy_address(&local.address) && proxy_port(settings, local.port).is_some() {
        // Without a number it was forgotten for want of memory: no answer, because
        // the proxy would connect to itself.
        return destinations::behind(&local.address).copied();
    }
    if proxy_port(settings, remote_port).is_some()
        && let Some(destination) = destinations::behind(&remote_address(sk))
    {
        return Some(*destination);
    }
    // Not redirected: where it arrived, unless conntrack has answered, or there is
    // none without chains.
    if read!(context, retval) == 0 || !settings.family(&local.address).has(stages::CHAINS) {
        return None;
    }
    Some(local)
}

/// Writes the answer and success; `EINVAL` if the caller's buffer is too small.
#[inline(always)]
fn answer<T>(context: *mut bpf_sockopt, value: T) {
    // SAFETY: the verifier checks the bounds of the buffer, which need not be
    // aligned. Volatile, so that two fields of the context are not written as
    // one.
    unsafe {
        let buffer = (*context).__bindgen_anon_2.optval.cast::<T>();
        let end = (*context).__bindgen_anon_3.optval_end.cast::<T>();
        if buffer.add(1) > end {
            addr_of_mut!((*context).retval).write_volatile(-EINVAL);
            return;
        }
        buffer.write_unaligned(value);
        addr_of_mut!((*context).optlen).write_volatile(size_of::<T>() as i32);
        addr_of_mut!((*context).retval).write_volatile(0);
    }
}
