//! What of the running kernel the programs must be told: the loader sets these
//! read-only globals before the programs are verified.

use aya_ebpf::{
    Global,
    bindings::bpf_sock,
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_probe_read_kernel, bpf_skc_to_tcp_sock},
    macros::btf_map,
};
use interceptor_common::chains::Owner;

/// The cookie of the pod's network namespace (`SO_NETNS_COOKIE`).
#[unsafe(no_mangle)]
pub(crate) static NETNS_COOKIE: Global<u64> = Global::new(0);

// Offsets in bytes of fields of kernel structures, from the kernel's BTF.
#[unsafe(no_mangle)]
static SOCK_SK_SOCKET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCKET_FILE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FILE_F_CRED: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CRED_FSUID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CRED_FSGID: Global<u32> = Global::new(0);
/// `sock_common.skc_num`: the local port, host byte order.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_NUM: Global<u32> = Global::new(0);
/// `sock_common.skc_state`.
#[unsafe(no_mangle)]
static SOCK_COMMON_SKC_STATE: Global<u32> = Global::new(0);
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

/// Who opened the file of the socket: what xt_owner compares.
#[inline(always)]
pub(crate) fn owner(sk: *mut bpf_sock) -> Option<Owner> {
    // SAFETY: `sk` comes from the context; every pointer that follows is one
    // that the verifier types by BTF, from `struct tcp_sock`, whose first
    // member is a `struct sock`, on.
    unsafe {
        let sock = bpf_skc_to_tcp_sock(sk.cast()).cast_const().cast::<u8>();
        if sock.is_null() {
            return None;
        }
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

/// The local port (host byte order) and the TCP state of a `struct sock_common`.
///
/// # Safety
///
/// `sock` must be a `struct sock_common` whose type the verifier knows.
#[inline(always)]
pub(crate) unsafe fn port_and_state(sock: *const u8) -> (u16, u8) {
    // SAFETY: the caller's promise.
    unsafe {
        (
            field(sock, &SOCK_COMMON_SKC_NUM),
            field(sock, &SOCK_COMMON_SKC_STATE),
        )
    }
}

/// The most bytes of a `struct inet_sock` up to its `inet_sport`.
const INET_SOCK_LEN: usize = 2048;

/// Where a socket's first bytes are copied to.
#[btf_map]
static SCRATCH: PerCpuArray<[u8; INET_SOCK_LEN], 1> = PerCpuArray::new();

/// The local port (host byte order) that a socket had before it was closed; 0
/// if it can't be told. `bpf_sock.src_port` reads as zero then, but
/// `inet_sock.inet_sport` stays.
///
/// This type of program has no helper that types a socket by BTF, so the
/// socket is copied from its start.
#[inline(always)]
pub(crate) fn source_port(sk: *mut bpf_sock) -> u16 {
    let offset = INET_SOCK_INET_SPORT.load() as usize;
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    if offset == 0 || offset > INET_SOCK_LEN - size_of::<u16>() {
        return 0;
    }
    // SAFETY: the helper writes no more than the scratch's length and checks
    // what it reads; the port is read within that length.
    unsafe {
        let read = bpf_probe_read_kernel(
            scratch.cast(),
            (offset + size_of::<u16>()) as u32,
            sk.cast_const().cast(),
        );
        if read != 0 {
            return 0;
        }
        u16::from_be((*scratch).as_ptr().add(offset).cast::<u16>().read())
    }
}
