//! All live connections of a pod, told when somebody asks: iterators over the
//! kernel's own lists (Documentation/bpf/bpf_iterators.rst, Linux 5.9). They are
//! loaded for that, and attached to nothing.

use core::ptr::from_ref;

use aya_ebpf::{
    bindings::{bpf_sock, seq_file},
    helpers::generated::bpf_seq_write,
};
use interceptor_common::{
    chains::Owner,
    conn::{DestinationNumber, Endpoint, LiveSocket, Origin},
};

use crate::{
    context::read,
    kernel::{self, TcpSock},
};

const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;

const CONTINUE: i32 = 0;

/// `struct bpf_iter_meta`, as far as it is used.
#[repr(C)]
struct Meta {
    sequence: *mut seq_file,
}

/// `struct bpf_iter__bpf_sk_storage_map`.
#[repr(C)]
struct StorageContext {
    meta: *const Meta,
    map: *const u8,
    sk: *mut bpf_sock,
    value: *const Origin,
}

/// `struct bpf_iter__tcp`, as far as it is used.
#[repr(C)]
struct TcpContext {
    meta: *const Meta,
    sk: *mut bpf_sock,
}

/// Called for each socket that remembers an original destination: a map's, which
/// user space names.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
extern "C" fn redirected(ctx: *const StorageContext) -> i32 {
    let (sk, value) = (read!(ctx, sk), read!(ctx, value));
    if sk.is_null() || value.is_null() {
        return CONTINUE;
    }
    if let Some(sock) = kernel::tcp_sock(sk) {
        let original_destination = Endpoint {
            address: read!(value, original_destination.address),
            port: read!(value, original_destination.port),
            reserved: 0,
        };
        tell(
            read!(ctx, meta),
            sock,
            original_destination,
            read!(value, role),
        );
    }
    CONTINUE
}

/// Called for each TCP socket of a network namespace, that of who asks: tells of those
/// that were accepted, and of clients whose original destination has a number.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn connected(ctx: *const TcpContext) -> i32 {
    let sk = read!(ctx, sk);
    if sk.is_null() {
        return CONTINUE;
    }
    // One in TIME_WAIT is none.
    if let Some(sock) = kernel::tcp_sock(sk)
        && (kernel::in_interface(sock) != 0
            || DestinationNumber::of(&kernel::ends(sock).1.address).is_some())
    {
        let nowhere = bytemuck::Zeroable::zeroed();
        tell(read!(ctx, meta), sock, nowhere, 0);
    }
    CONTINUE
}

/// Writes down a socket, unless it has no connection.
#[inline(always)]
fn tell(meta: *const Meta, sock: TcpSock, original_destination: Endpoint, role: u32) {
    let state = kernel::state(sock);
    if state == TCP_CLOSE || state == TCP_LISTEN {
        return;
    }
    let (local, remote) = kernel::ends(sock);
    let owner = kernel::owner(sock).unwrap_or(Owner::NONE);
    let socket = LiveSocket {
        local,
        remote,
        original_destination,
        role,
        state,
        uid: owner.uid,
        gid: owner.gid,
        mark: kernel::mark(sock),
        bound_interface: kernel::bound_interface(sock),
        in_interface: kernel::in_interface(sock),
    };
    let sequence = read!(meta, sequence);
    // SAFETY: the kernel's own file, and a value of the length given. If it has no
    // room, the kernel empties it and calls once more.
    unsafe {
        bpf_seq_write(
            sequence,
            from_ref(&socket).cast(),
            size_of::<LiveSocket>() as u32,
        );
    }
}
