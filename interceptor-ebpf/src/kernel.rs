//! What of the running kernel the programs must be told: the loader sets these
//! read-only globals before the programs are verified.

use core::{ffi::c_void, ptr::from_mut};

use aya_ebpf::{
    Global,
    bindings::bpf_sock,
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_probe_read_kernel, bpf_skc_to_tcp_sock},
    macros::btf_map,
};
use interceptor_common::{
    chains::Owner,
    conn::{Address, Endpoint},
};

use crate::context::AF_INET;

/// The inode of the pod's network namespace.
#[unsafe(no_mangle)]
static NETNS_INODE: Global<u32> = Global::new(0);

/// Whether the kernel has `bpf_set_retval` (Linux 5.18). Where it hasn't, the
/// verifier removes the branch.
#[unsafe(no_mangle)]
pub(crate) static HAS_SET_RETVAL: Global<bool> = Global::new(false);

/// Whether sk_lookup is told the interface (Linux 5.17). Where it isn't, the
/// verifier removes the branch.
#[unsafe(no_mangle)]
pub(crate) static HAS_INGRESS_IFINDEX: Global<bool> = Global::new(false);

/// How many bytes of a caller's buffer getsockopt programs are given at most.
#[unsafe(no_mangle)]
pub(crate) static PAGE_SIZE: Global<u32> = Global::new(0);

/// Whether the same program runs before this one, on a cgroup below: while a pod
/// is moved from a cgroup above its own to its own. Where it doesn't, the verifier
/// removes the branch.
#[unsafe(no_mangle)]
pub(crate) static AFTER_ANOTHER: Global<bool> = Global::new(false);

/// Whether connections pass until the proxy listens: only then is the `PASSING` map looked
/// at.
#[unsafe(no_mangle)]
pub(crate) static MAY_PASS: Global<bool> = Global::new(false);

// Offsets in bytes of fields of kernel structures, from the kernel's BTF.
/// `sock_common`: an `unsigned short`.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_FAMILY: Global<u32> = Global::new(0);
/// An `unsigned char`.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_STATE: Global<u32> = Global::new(0);
/// The local address, network byte order.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_RCV_SADDR: Global<u32> = Global::new(0);
/// The remote address, network byte order.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_DADDR: Global<u32> = Global::new(0);
/// The local address of an `AF_INET6` socket, network byte order.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_V6_RCV_SADDR: Global<u32> = Global::new(0);
/// The remote one.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_V6_DADDR: Global<u32> = Global::new(0);
/// The local port, host byte order.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_NUM: Global<u32> = Global::new(0);
/// The remote port, network byte order.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_DPORT: Global<u32> = Global::new(0);
/// An `int`.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_BOUND_DEV_IF: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCK_SK_MARK: Global<u32> = Global::new(0);
/// The interface that multicast leaves by. TCP has no multicast, and keeps there
/// which interface the SYN of an accepted connection arrived by.
#[unsafe(no_mangle)]
static INET_SOCK_MC_INDEX: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static INET_SOCK_PINET6: Global<u32> = Global::new(0);
/// The same as `INET_SOCK_MC_INDEX` of an IPv6 connection.
#[unsafe(no_mangle)]
static IPV6_PINFO_MCAST_OIF: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCK_SK_SOCKET: Global<u32> = Global::new(0);
/// `sock_common.skc_net.net`.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_NET: Global<u32> = Global::new(0);
/// `net.ns.inum`.
#[unsafe(no_mangle)]
static NET_NS_INUM: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCKET_FILE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FILE_F_CRED: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CRED_FSUID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CRED_FSGID: Global<u32> = Global::new(0);
/// `inet_sock.inet_sport`: the local port, network byte order.
#[unsafe(no_mangle)]
static INET_SOCK_INET_SPORT: Global<u32> = Global::new(0);

/// Reads the field at `offset` of the kernel structure at `base`.
///
/// # Safety
///
/// `base` must be a pointer whose type the verifier knows from BTF, so that it
/// checks the access; a fault reads as zero.
#[inline(always)]
unsafe fn field<T>(base: *const u8, offset: &Global<u32>) -> T {
    // SAFETY: the caller's promise; the offset is a constant to the verifier.
    unsafe { base.add(offset.load() as usize).cast::<T>().read() }
}

/// A TCP socket as the kernel's own `struct tcp_sock`, which begins with a
/// `struct sock`, which begins with a `struct sock_common`. The verifier knows
/// its type, and those of the structures it leads to.
#[derive(Clone, Copy)]
pub(crate) struct TcpSock(*const u8);

/// The kernel's view of the socket that a context gave; `None` if it isn't a
/// full TCP socket.
#[inline(always)]
pub(crate) fn tcp_sock(sk: *mut bpf_sock) -> Option<TcpSock> {
    // SAFETY: the verifier admits only a socket from the context, checked not
    // to be null.
    let sock = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    if sock.is_null() {
        None
    } else {
        Some(TcpSock(sock.cast_const().cast()))
    }
}

/// Whether the socket is in the pod's network namespace. A process of the pod's
/// cgroup may be in another.
#[inline(always)]
pub(crate) fn in_pod(sock: TcpSock) -> bool {
    // SAFETY: as the type promises; a socket's namespace lives as long as it.
    let inode: u32 = unsafe {
        let net: *const u8 = field(sock.0, &SOCK_COMMON_SKC_NET);
        if net.is_null() {
            return false;
        }
        field(net, &NET_NS_INUM)
    };
    inode == NETNS_INODE.load()
}

/// Who opened the file of the socket: what xt_owner compares.
#[inline(always)]
pub(crate) fn owner(sock: TcpSock) -> Option<Owner> {
    let sock = sock.0;
    // SAFETY: as the type promises.
    unsafe {
        let socket: *const u8 = field(sock, &SOCK_SK_SOCKET);
        if socket.is_null() {
            return None;
        }
        let file: *const u8 = field(socket, &SOCKET_FILE);
        if file.is_null() {
            return None;
        }
        let cred: *const u8 = field(file, &FILE_F_CRED);
        if cred.is_null() {
            return None;
        }
        Some(Owner {
            uid: field(cred, &CRED_FSUID),
            gid: field(cred, &CRED_FSGID),
        })
    }
}

/// The local and the remote end of the socket's connection.
#[inline(always)]
pub(crate) fn ends(sock: TcpSock) -> (Endpoint, Endpoint) {
    let sock = sock.0;
    // SAFETY: as the type promises.
    unsafe {
        let family: u16 = field(sock, &SOCK_COMMON_SKC_FAMILY);
        let (local, remote) = if u32::from(family) == AF_INET {
            (
                Address::from_be32(field(sock, &SOCK_COMMON_SKC_RCV_SADDR)),
                Address::from_be32(field(sock, &SOCK_COMMON_SKC_DADDR)),
            )
        } else {
            (
                address_v6(sock, &SOCK_COMMON_SKC_V6_RCV_SADDR),
                address_v6(sock, &SOCK_COMMON_SKC_V6_DADDR),
            )
        };
        (
            Endpoint::new(local, field(sock, &SOCK_COMMON_SKC_NUM)),
            Endpoint::new(remote, u16::from_be(field(sock, &SOCK_COMMON_SKC_DPORT))),
        )
    }
}

/// The IPv6 address at `offset` of the kernel structure at `base`, read word by word
/// as far as the verifier is concerned.
///
/// # Safety
///
/// As of [`field`].
#[inline(always)]
unsafe fn address_v6(base: *const u8, offset: &Global<u32>) -> Address {
    // SAFETY: the caller's promise, for each of the structure's four words.
    unsafe {
        let words = base.add(offset.load() as usize).cast::<u32>();
        Address::from_be32s([
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ])
    }
}

/// The state that TCP has the socket in.
#[inline(always)]
pub(crate) fn state(sock: TcpSock) -> u32 {
    // SAFETY: as the type promises.
    u32::from(unsafe { field::<u8>(sock.0, &SOCK_COMMON_SKC_STATE) })
}

/// The socket's mark.
#[inline(always)]
pub(crate) fn mark(sock: TcpSock) -> u32 {
    // SAFETY: as the type promises.
    unsafe { field(sock.0, &SOCK_SK_MARK) }
}

/// The index of the interface that the socket is bound to; 0 if there is none.
#[inline(always)]
pub(crate) fn bound_interface(sock: TcpSock) -> u32 {
    // SAFETY: as the type promises.
    unsafe { field(sock.0, &SOCK_COMMON_SKC_BOUND_DEV_IF) }
}

/// The index of the interface that the SYN of an accepted connection arrived by; 0
/// if the socket connected itself (`tcp_v4_syn_recv_sock`, `tcp_v6_syn_recv_sock`).
#[inline(always)]
pub(crate) fn in_interface(sock: TcpSock) -> u32 {
    let sock = sock.0;
    // SAFETY: as the type promises.
    unsafe {
        let v4: u32 = field(sock, &INET_SOCK_MC_INDEX);
        if v4 != 0 {
            return v4;
        }
        let v6: *const u8 = field(sock, &INET_SOCK_PINET6);
        if v6.is_null() {
            return 0;
        }
        field(v6, &IPV6_PINFO_MCAST_OIF)
    }
}

/// The most bytes of a `struct inet_sock` up to its `inet_sport`.
const INET_SOCK_LEN: usize = 2048;

/// Where a socket's first bytes are copied to.
#[btf_map]
static SCRATCH: PerCpuArray<[u8; INET_SOCK_LEN], 1> = PerCpuArray::new();

/// A socket in a program of a type that has no helper for [`tcp_sock`]: its
/// bytes up to and with the field at `offset` are copied, and the field is read
/// from the copy.
#[inline(always)]
fn copied_field<T: Copy>(sk: *mut bpf_sock, offset: &Global<u32>) -> Option<T> {
    let offset = offset.load() as usize;
    let scratch = SCRATCH.get_ptr_mut(0)?;
    if offset > INET_SOCK_LEN - size_of::<T>() {
        return None;
    }
    // SAFETY: the helper writes no more than the scratch's length and checks
    // what it reads; the field lies within what it wrote.
    unsafe {
        #[expect(clippy::cast_possible_truncation, reason = "at most INET_SOCK_LEN")]
        let read = bpf_probe_read_kernel(
            scratch.cast(),
            (offset + size_of::<T>()) as u32,
            sk.cast_const().cast(),
        );
        if read != 0 {
            return None;
        }
        Some((*scratch).as_ptr().add(offset).cast::<T>().read_unaligned())
    }
}

/// [`in_pod`] by copying.
#[inline(always)]
pub(crate) fn in_pod_by_copy(sk: *mut bpf_sock) -> bool {
    let Some(net) = copied_field::<u64>(sk, &SOCK_COMMON_SKC_NET) else {
        return false;
    };
    probed::<u32>(net, &NET_NS_INUM) == Some(NETNS_INODE.load())
}

/// [`owner`] by copying.
#[inline(always)]
pub(crate) fn owner_by_copy(sk: *mut bpf_sock) -> Option<Owner> {
    let socket = copied_field::<u64>(sk, &SOCK_SK_SOCKET)?;
    let file = probed::<u64>(socket, &SOCKET_FILE)?;
    let cred = probed::<u64>(file, &FILE_F_CRED)?;
    Some(Owner {
        uid: probed(cred, &CRED_FSUID)?,
        gid: probed(cred, &CRED_FSGID)?,
    })
}

/// The field at `offset` of the kernel structure at `base`; `None` if it can't
/// be read.
#[inline(always)]
fn probed<T: Copy + Default>(base: u64, offset: &Global<u32>) -> Option<T> {
    let mut value = T::default();
    // SAFETY: the helper checks what it reads and writes no more than the value.
    let read = unsafe {
        bpf_probe_read_kernel(
            from_mut(&mut value).cast(),
            size_of::<T>() as u32,
            (base + u64::from(offset.load())) as *const c_void,
        )
    };
    if base != 0 && read == 0 {
        Some(value)
    } else {
        None
    }
}

/// The local port (host byte order) that a socket had before it was closed; 0
/// if it can't be told. `bpf_sock.src_port` reads as zero then, but
/// `inet_sock.inet_sport` stays.
#[inline(always)]
pub(crate) fn source_port(sk: *mut bpf_sock) -> u16 {
    copied_field::<u16>(sk, &INET_SOCK_INET_SPORT).map_or(0, u16::from_be)
}
