//! Reading the contexts that the kernel hands to programs: one field at a time,
//! each with its byte order made plain.

use core::{
    arch::asm,
    mem::offset_of,
    ptr::{addr_of_mut, from_mut, from_ref},
};

use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops},
    helpers::generated::bpf_probe_read_kernel,
};
use interceptor_common::conn::{Address, Endpoint};

pub(crate) const AF_INET: u32 = 2;
pub(crate) const AF_INET6: u32 = 10;

/// Reads one context field. Volatile, because the compiler would join
/// neighbouring reads to wider ones, which the verifier refuses.
macro_rules! read {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the kernel hands a valid context to the program, and the
        // verifier checks each access.
        unsafe { ::core::ptr::read_volatile(::core::ptr::addr_of!((*$context).$($field)+)) }
    };
}
pub(crate) use read;

/// Reads the word at the offset `OFFSET` of a context.
///
/// In assembly, because the compiler would make one read with a computed offset
/// of two that stand in two branches, and the verifier refuses that.
#[inline(always)]
fn word<const OFFSET: usize, T>(context: *const T) -> u32 {
    let word: u64;
    // SAFETY: the kernel hands a valid context to the program, and the verifier
    // checks the access.
    unsafe {
        asm!(
            "{word} = *(u32 *)({context} + {offset})",
            word = out(reg) word,
            context = in(reg) context,
            offset = const OFFSET,
            options(nostack, readonly, preserves_flags),
        );
    }
    #[expect(clippy::cast_possible_truncation, reason = "the upper half is zero")]
    {
        word as u32
    }
}

/// `value`, about which the verifier knows nothing any more.
///
/// It walks every way through what comes after a decision, once for each value
/// that it can tell apart: without this, once for each rule. `unknown` must be
/// a number from a map, which the verifier doesn't know.
#[inline(always)]
pub(crate) fn opaque(value: u32, unknown: u32) -> u32 {
    let mut value = u64::from(value);
    // SAFETY: adds a number and takes it away again.
    unsafe {
        asm!(
            "{value} += {unknown}",
            "{value} -= {unknown}",
            value = inout(reg) value,
            unknown = in(reg) u64::from(unknown),
            options(nomem, nostack, preserves_flags),
        );
    }
    #[expect(clippy::cast_possible_truncation, reason = "it was a word")]
    {
        value as u32
    }
}

/// Has the verifier forget what it knows of a value on the stack, so that it
/// walks what follows once, and not for each way in which the value came about.
#[inline(always)]
pub(crate) fn forget<T>(value: &mut T) {
    // SAFETY: copies the value onto itself.
    unsafe {
        bpf_probe_read_kernel(
            from_mut(value).cast(),
            size_of::<T>() as u32,
            from_ref(value).cast(),
        );
    }
}

/// Reads an IPv4 address.
macro_rules! read_v4 {
    ($context:expr, $type:ty, $field:ident) => {
        Address::from_be32(word::<{ offset_of!($type, $field) }, $type>($context))
    };
}

/// Reads an IPv6 address.
macro_rules! read_v6 {
    ($context:expr, $type:ty, $field:ident) => {
        Address::from_be32s([
            word::<{ offset_of!($type, $field) }, $type>($context),
            word::<{ offset_of!($type, $field) + 4 }, $type>($context),
            word::<{ offset_of!($type, $field) + 8 }, $type>($context),
            word::<{ offset_of!($type, $field) + 12 }, $type>($context),
        ])
    };
}

/// The destination that an `AF_INET` connect() asks for.
#[inline(always)]
pub(crate) fn asked_v4(context: *const bpf_sock_addr) -> Endpoint {
    Endpoint::new(
        read_v4!(context, bpf_sock_addr, user_ip4),
        user_port(context),
    )
}

/// The destination that an `AF_INET6` connect() asks for.
#[inline(always)]
pub(crate) fn asked_v6(context: *const bpf_sock_addr) -> Endpoint {
    Endpoint::new(
        read_v6!(context, bpf_sock_addr, user_ip6),
        user_port(context),
    )
}

#[inline(always)]
fn user_port(context: *const bpf_sock_addr) -> u16 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a __be16 in the low half of a word"
    )]
    u16::from_be(read!(context, user_port) as u16)
}

/// Makes connect() or getpeername() mean `endpoint`; `AF_INET`.
#[inline(always)]
pub(crate) fn set_v4(context: *mut bpf_sock_addr, endpoint: &Endpoint) {
    // SAFETY: a valid context; the verifier checks that the fields are writable.
    unsafe {
        addr_of_mut!((*context).user_ip4).write_volatile(endpoint.address.to_be32());
        addr_of_mut!((*context).user_port).write_volatile(u32::from(endpoint.port.to_be()));
    }
}

/// Makes connect() or getpeername() mean `endpoint`; `AF_INET6`.
#[inline(always)]
pub(crate) fn set_v6(context: *mut bpf_sock_addr, endpoint: &Endpoint) {
    let words = endpoint.address.to_be32s();
    // SAFETY: as in `set_v4`.
    unsafe {
        addr_of_mut!((*context).user_ip6[0]).write_volatile(words[0]);
        addr_of_mut!((*context).user_ip6[1]).write_volatile(words[1]);
        addr_of_mut!((*context).user_ip6[2]).write_volatile(words[2]);
        addr_of_mut!((*context).user_ip6[3]).write_volatile(words[3]);
        addr_of_mut!((*context).user_port).write_volatile(u32::from(endpoint.port.to_be()));
    }
}

/// Makes a datagram come from `source`; `AF_INET`.
#[inline(always)]
pub(crate) fn set_source_v4(context: *mut bpf_sock_addr, source: &Address) {
    // SAFETY: as in `set_v4`.
    unsafe {
        addr_of_mut!((*context).msg_src_ip4).write_volatile(source.to_be32());
    }
}

/// Makes a datagram come from `source`; `AF_INET6`.
#[inline(always)]
pub(crate) fn set_source_v6(context: *mut bpf_sock_addr, source: &Address) {
    let words = source.to_be32s();
    // SAFETY: as in `set_v4`.
    unsafe {
        addr_of_mut!((*context).msg_src_ip6[0]).write_volatile(words[0]);
        addr_of_mut!((*context).msg_src_ip6[1]).write_volatile(words[1]);
        addr_of_mut!((*context).msg_src_ip6[2]).write_volatile(words[2]);
        addr_of_mut!((*context).msg_src_ip6[3]).write_volatile(words[3]);
    }
}

/// The local address and port of a socket: what it is bound to.
#[inline(always)]
pub(crate) fn bound(sk: *const bpf_sock) -> Endpoint {
    #[expect(clippy::cast_possible_truncation, reason = "a port in a word")]
    let port = read!(sk, src_port) as u16;
    Endpoint::new(bound_address(sk), port)
}

/// The local address of a socket.
#[inline(always)]
pub(crate) fn bound_address(sk: *const bpf_sock) -> Address {
    if read!(sk, family) == AF_INET6 {
        read_v6!(sk, bpf_sock, src_ip6)
    } else {
        read_v4!(sk, bpf_sock, src_ip4)
    }
}

/// The remote address of a socket; of one that isn't connected, the last one that it
/// tried to connect to.
#[inline(always)]
pub(crate) fn remote_address(sk: *const bpf_sock) -> Address {
    if read!(sk, family) == AF_INET6 {
        read_v6!(sk, bpf_sock, dst_ip6)
    } else {
        read_v4!(sk, bpf_sock, dst_ip4)
    }
}

/// The local and the remote end of the connection of a sock_ops call.
#[inline(always)]
pub(crate) fn ends(context: *const bpf_sock_ops) -> (Endpoint, Endpoint) {
    #[expect(clippy::cast_possible_truncation, reason = "a port in a word")]
    let local_port = read!(context, local_port) as u16;
    // A __be32 whose upper half in network order is the port.
    #[expect(clippy::cast_possible_truncation, reason = "a port in a word")]
    let remote_port = u32::from_be(read!(context, remote_port)) as u16;
    let (local, remote) = if read!(context, family) == AF_INET {
        (
            read_v4!(context, bpf_sock_ops, local_ip4),
            read_v4!(context, bpf_sock_ops, remote_ip4),
        )
    } else {
        (
            read_v6!(context, bpf_sock_ops, local_ip6),
            read_v6!(context, bpf_sock_ops, remote_ip6),
        )
    };
    (
        Endpoint::new(local, local_port),
        Endpoint::new(remote, remote_port),
    )
}

/// The local and the remote end of the connection that sk_lookup is asked for.
#[inline(always)]
pub(crate) fn looked_up(context: *const bpf_sk_lookup) -> (Endpoint, Endpoint) {
    #[expect(clippy::cast_possible_truncation, reason = "a port in a word")]
    let local_port = read!(context, local_port) as u16;
    let remote_port = u16::from_be(read!(context, remote_port));
    let (local, remote) = if read!(context, family) == AF_INET {
        (
            read_v4!(context, bpf_sk_lookup, local_ip4),
            read_v4!(context, bpf_sk_lookup, remote_ip4),
        )
    } else {
        (
            read_v6!(context, bpf_sk_lookup, local_ip6),
            read_v6!(context, bpf_sk_lookup, remote_ip6),
        )
    };
    (
        Endpoint::new(local, local_port),
        Endpoint::new(remote, remote_port),
    )
}

/// `struct sockaddr_in`, in network byte order but for the family.
#[repr(C)]
pub(crate) struct SockAddrIn {
    family: u16,
    port: u16,
    address: u32,
    zero: [u32; 2],
}

impl From<Endpoint> for SockAddrIn {
    #[inline(always)]
    fn from(endpoint: Endpoint) -> Self {
        Self {
            family: AF_INET as u16,
            port: endpoint.port.to_be(),
            address: endpoint.address.to_be32(),
            zero: [0; 2],
        }
    }
}

/// `struct sockaddr_in6`, in network byte order but for the family.
#[repr(C)]
pub(crate) struct SockAddrIn6 {
    family: u16,
    port: u16,
    flow_info: u32,
    address: [u32; 4],
    /// The interface of a link-local address.
    pub(crate) scope_id: u32,
}

impl From<Endpoint> for SockAddrIn6 {
    #[inline(always)]
    fn from(endpoint: Endpoint) -> Self {
        Self {
            family: AF_INET6 as u16,
            port: endpoint.port.to_be(),
            flow_info: 0,
            address: endpoint.address.to_be32s(),
            scope_id: 0,
        }
    }
}
