//! The maps of a pod. User space fills them, reads them and pins them under
//! these names.

use core::{
    ffi::c_void,
    mem::MaybeUninit,
    ptr::{from_ref, null},
};

use aya_ebpf::{
    bindings::{
        BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_SOCKMAP,
    },
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, SkStorage},
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::btf_map,
};
use interceptor_common::{
    chains::Decision,
    config::{GENERATIONS, List, Lists, MAX_PREFIXES, PrefixKey, Settings},
    conn::{Address, Endpoint, Handshake, Origin},
    counters::{Event, MAX_COUNTERS, decision_index},
    listeners::{PLACES, ProxyPort},
    pod::Attachment,
    routes::{MAX_ROUTES, Route},
};

use crate::kernel;

/// The most handshakes in flight, of connections to destinations without a number.
/// An entry lives from the client's SYN until the proxy's socket is established; the
/// memory is taken entry by entry.
const MAX_HANDSHAKES: usize = 4096;

/// Which of the settings are in force.
#[btf_map]
static GENERATION: Array<u32, 1> = Array::new();

/// What the chains compare connections with.
#[btf_map]
static SETTINGS: Array<Settings, { GENERATIONS as usize }> = Array::new();

/// The lists of the settings.
#[btf_map]
static PREFIXES: LpmTrie<PrefixKey, u32, { MAX_PREFIXES as usize }> = LpmTrie::new();

/// The pod's prefixes: which are local, and which source address leads there.
#[btf_map]
static ROUTES: LpmTrie<Address, Route, { MAX_ROUTES as usize }> = LpmTrie::new();

/// Original destinations of redirected connections between the client's SYN
/// and the proxy's accepted socket.
#[btf_map]
static HANDSHAKES: HashMap<Handshake, Endpoint, MAX_HANDSHAKES, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// The most original destinations with a number; the memory is taken one by one.
const MAX_DESTINATIONS: usize = 2048;

/// The original destinations that have a number, by it. An entry never changes.
#[btf_map]
static DESTINATIONS: HashMap<u32, Endpoint, MAX_DESTINATIONS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// What the sockets of redirected connections remember; freed with them.
#[btf_map]
static ORIGINS: SkStorage<Origin> = SkStorage::new();

/// Which DNS server each unconnected socket asked last; freed with it.
#[btf_map]
static ASKED: SkStorage<Endpoint> = SkStorage::new();

/// The proxy's listeners: [`PLACES`] for each [`ProxyPort`].
#[btf_map]
static LISTENERS: SocketMap<{ (ProxyPort::COUNT * PLACES) as usize }> = SocketMap {
    r#type: null(),
    key: null(),
    value: null(),
    max_entries: null(),
    map_flags: null(),
};

/// A `BPF_MAP_TYPE_SOCKMAP` whose values are socket cookies for user space;
/// those of aya's `SockMap` have half the size and can't be read.
#[repr(C)]
pub(crate) struct SocketMap<const MAX_ENTRIES: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKMAP as usize],
    key: *const u32,
    value: *const u64,
    max_entries: *const [i32; MAX_ENTRIES],
    map_flags: *const [i32; 0],
}

// SAFETY: the fields only describe the map to the loader; nothing reads them.
unsafe impl<const MAX_ENTRIES: usize> Sync for SocketMap<MAX_ENTRIES> {}

/// The proxy's listeners, one per slot.
pub(crate) mod listeners {
    use core::ptr::{from_mut, from_ref};

    use aya_ebpf::{
        bindings::{BPF_NOEXIST, bpf_sock, bpf_sock_ops},
        helpers::generated::{bpf_map_lookup_elem, bpf_sock_map_update},
    };

    use super::LISTENERS;

    /// Puts the listener that sock_ops is called for into a free slot; 0, or
    /// an errno below zero.
    #[inline(always)]
    pub(crate) fn insert(mut slot: u32, context: *mut bpf_sock_ops) -> i64 {
        // SAFETY: the program's own context, and a key of the map's type.
        unsafe {
            bpf_sock_map_update(
                context,
                from_ref(&LISTENERS).cast_mut().cast(),
                from_mut(&mut slot).cast(),
                u64::from(BPF_NOEXIST),
            )
        }
    }

    /// The listener in a slot, or null. It must be released.
    #[inline(always)]
    pub(crate) fn get(mut slot: u32) -> *mut bpf_sock {
        // SAFETY: a key of the map's type.
        unsafe {
            bpf_map_lookup_elem(
                from_ref(&LISTENERS).cast_mut().cast(),
                from_mut(&mut slot).cast(),
            )
        }
        .cast()
    }
}

/// Which of the proxy's ports has not been listened on yet, in a pod whose
/// connections pass until then: 1 at [`ProxyPort::index`], otherwise 0.
#[btf_map]
static PASSING: Array<u32, { ProxyPort::COUNT as usize }> = Array::new();

/// Whether connections that should go to this port of the proxy pass, because it has
/// not begun to listen.
#[inline(always)]
pub(crate) fn passes(port: ProxyPort) -> bool {
    kernel::MAY_PASS.load()
        && PASSING
            .get(port.index())
            .is_some_and(|passing| *passing != 0)
}

/// The proxy listens on a port: nothing passes there any more.
#[inline(always)]
pub(crate) fn end_passing(port: ProxyPort) {
    let end = |other: ProxyPort| {
        if port.ends_passing(other)
            && let Some(passing) = PASSING.get_ptr_mut(other.index())
        {
            // SAFETY: an element of the map; a word is written at once.
            unsafe {
                passing.write_volatile(0);
            }
        }
    };
    end(ProxyPort::Outbound);
    end(ProxyPort::Inbound);
    end(ProxyPort::Dns);
}

/// One counter per event and per rule. The loader makes it as long as the pod
/// needs.
#[btf_map]
static COUNTERS: PerCpuArray<u64, { MAX_COUNTERS as usize }> = PerCpuArray::new();

/// What the loader remembers of the attachment.
#[btf_map]
static ATTACHMENT: Array<Attachment, 1> = Array::new();

/// The pod's settings, those in force now; `None` never happens, an array's
/// elements always exist.
#[inline(always)]
pub(crate) fn settings() -> Option<&'static Settings> {
    SETTINGS.get(*GENERATION.get(0)?)
}

/// The lists of the settings.
pub(crate) struct ListMap;

impl Lists for ListMap {
    #[inline(always)]
    fn rule(&self, generation: u32, version: u32, list: List, key: &Address) -> u32 {
        let key = PrefixKey::new(generation, version, list, *key);
        let [a, b, c, d] = key.key.to_be32s();
        let before = u32::from_ne_bytes([key.generation, key.list, key.version, key.reserved]);
        let key = [PrefixKey::BITS_BEFORE + 128, before, a, b, c, d];
        // SAFETY: a key and values of the map's types.
        unsafe { longest_prefix::<u32>(from_ref(&PREFIXES).cast(), key) }
            .copied()
            .unwrap_or(0)
    }
}

/// What is known of the way to `address`.
#[inline(always)]
pub(crate) fn route(address: &Address) -> Option<&'static Route> {
    let [a, b, c, d] = address.to_be32s();
    // SAFETY: a key and values of the map's types; the last word is not read.
    unsafe { longest_prefix(from_ref(&ROUTES).cast(), [128, a, b, c, d, 0]) }
}

/// Looks up a trie's longest prefix of `key`: its length in bits, then its bytes.
///
/// The key is written to the stack in whole double words. Of smaller writes the
/// verifier doesn't learn that what was there before doesn't matter, and it
/// walks what follows once for each way in which that can differ.
///
/// # Safety
///
/// The map's keys must be no longer than this one, and its values of this type.
#[inline(always)]
unsafe fn longest_prefix<V>(map: *const c_void, key: [u32; 6]) -> Option<&'static V> {
    let words: [u64; 3] = bytemuck::cast(key);
    let mut stack = MaybeUninit::<[u64; 3]>::uninit();
    // SAFETY: writes within the array; the helper reads what was written, and
    // returns null or a value that lives as long as the program runs.
    unsafe {
        let first = stack.as_mut_ptr().cast::<u64>();
        first.write_volatile(words[0]);
        first.add(1).write_volatile(words[1]);
        first.add(2).write_volatile(words[2]);
        bpf_map_lookup_elem(map.cast_mut(), first.cast())
            .cast::<V>()
            .as_ref()
    }
}

/// Counts the rule that decided about a connection to `destination`.
#[inline(always)]
pub(crate) fn count_decision(decision: &Decision, destination: &Address) {
    if let Some(index) = decision_index(decision, destination.is_v4()) {
        count_at(index);
    }
}

/// Counts an event.
#[inline(always)]
pub(crate) fn count(event: Event) {
    count_at(event.index());
}

#[inline(always)]
fn count_at(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: the map's lookup returned this CPU's element, and a program
        // is not moved to another CPU while it runs; an interrupt between load
        // and store may lose a count, never memory.
        unsafe { *counter += 1 }
    }
}

/// Original destinations in flight.
pub(crate) mod handshakes {
    use super::{Endpoint, HANDSHAKES, Handshake};

    /// Keeps `destination` until the proxy's socket takes it.
    #[inline(always)]
    pub(crate) fn insert(key: &Handshake, destination: &Endpoint) -> Result<(), i32> {
        HANDSHAKES.insert(key, destination, 0)
    }

    /// The original destination of a handshake.
    #[inline(always)]
    pub(crate) fn get<'a>(key: &Handshake) -> Option<&'a Endpoint> {
        // SAFETY: an entry is written once, when it is inserted, and memory
        // of a removed one stays readable until the program ends. It could be
        // used anew meanwhile only if this handshake's two ends, who alone
        // remove it, were done with it.
        unsafe { HANDSHAKES.get(key) }
    }

    /// Forgets a handshake.
    #[inline(always)]
    pub(crate) fn remove(key: &Handshake) {
        // An entry that isn't there was taken by the proxy's side.
        let _: Result<(), i32> = HANDSHAKES.remove(key);
    }
}

/// Original destinations with a number.
pub(crate) mod destinations {
    use aya_ebpf::bindings::BPF_NOEXIST;
    use interceptor_common::conn::{Address, DestinationNumber};

    use super::{DESTINATIONS, Endpoint};

    /// The destination with this number.
    #[inline(always)]
    pub(crate) fn get<'a>(number: DestinationNumber) -> Option<&'a Endpoint> {
        // SAFETY: an entry never changes while a connection has its number.
        unsafe { DESTINATIONS.get(number.index()) }
    }

    /// The original destination that one of the proxy's addresses stands for.
    #[inline(always)]
    pub(crate) fn behind<'a>(address: &Address) -> Option<&'a Endpoint> {
        get(DestinationNumber::of(address)?)
    }

    /// The number of a destination, which gets one if it has none; `None` if others
    /// have those that it could have.
    #[inline(always)]
    pub(crate) fn number(destination: &Endpoint) -> Option<DestinationNumber> {
        let [one, two, three, four] = destination.address.to_be32s();
        match number_of(one, two, three, four, destination.port.into()) {
            u32::MAX => None,
            number => Some(DestinationNumber::from_hash(number)),
        }
    }

    /// [`number`] for an address in four words, whose bytes are in network order;
    /// `u32::MAX` for `None`.
    ///
    /// A global function, which the verifier walks once.
    #[unsafe(no_mangle)]
    #[inline(never)]
    extern "C" fn number_of(one: u32, two: u32, three: u32, four: u32, port: u32) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "it was a port")]
        let destination = Endpoint::new(Address::from_be32s([one, two, three, four]), port as u16);
        let mut hash = port;
        for word in [one, two, three, four] {
            hash = (hash ^ word).wrapping_mul(0x9e37_79b1);
            hash ^= hash >> 15;
        }
        for _ in 0..2 {
            let number = DestinationNumber::from_hash(hash);
            let taken = match get(number) {
                Some(taken) => *taken == destination,
                None => DESTINATIONS
                    .insert(number.index(), destination, u64::from(BPF_NOEXIST))
                    .is_ok(),
            };
            if taken {
                return number.index();
            }
            hash = hash.wrapping_mul(0x85eb_ca6b) ^ hash >> 13;
        }
        u32::MAX
    }
}

/// What sockets remember, for a `sk` that the kernel handed to the program.
pub(crate) mod origins {
    use core::ptr::{from_ref, null_mut};

    use aya_ebpf::bindings::bpf_sock;
    use interceptor_common::conn::Role;

    use super::{
        BPF_SK_STORAGE_GET_F_CREATE, Endpoint, ORIGINS, Origin, bpf_sk_storage_delete,
        bpf_sk_storage_get,
    };

    /// What `sk` remembers.
    #[inline(always)]
    pub(crate) fn get<'a>(sk: *mut bpf_sock) -> Option<&'a Origin> {
        // SAFETY: the verifier admits only a socket that the context gave and
        // that was checked not to be null; the helper returns null or storage
        // that lives as long as the socket, which outlives the program.
        unsafe {
            bpf_sk_storage_get(
                from_ref(&ORIGINS).cast_mut().cast(),
                sk.cast(),
                null_mut(),
                0,
            )
            .cast::<Origin>()
            .as_ref()
        }
    }

    /// Makes `sk` remember; false if there is no memory for it.
    #[inline(always)]
    pub(crate) fn set(
        sk: *mut bpf_sock,
        original_destination: &Endpoint,
        role: Role,
        source_chosen: u32,
    ) -> bool {
        // SAFETY: as in `get`. The fields are written in place, to save stack:
        // only the socket's own connect() under its lock, and the softirq that
        // establishes it, come here, and nobody reads before they are done.
        unsafe {
            let storage = bpf_sk_storage_get(
                from_ref(&ORIGINS).cast_mut().cast(),
                sk.cast(),
                null_mut(),
                u64::from(BPF_SK_STORAGE_GET_F_CREATE),
            )
            .cast::<Origin>();
            match storage.as_mut() {
                Some(storage) => {
                    storage.original_destination = *original_destination;
                    storage.role = role as u32;
                    storage.source_chosen = source_chosen;
                    true
                }
                None => false,
            }
        }
    }

    /// Makes `sk` forget.
    #[inline(always)]
    pub(crate) fn forget(sk: *mut bpf_sock) {
        // SAFETY: as in `get`. An error means that there was nothing to forget.
        unsafe {
            bpf_sk_storage_delete(from_ref(&ORIGINS).cast_mut().cast(), sk.cast());
        }
    }
}

/// Which DNS server a socket asked, for a `sk` that the kernel handed to the
/// program.
pub(crate) mod asked {
    use core::ptr::{from_ref, null_mut};

    use aya_ebpf::bindings::bpf_sock;

    use super::{ASKED, BPF_SK_STORAGE_GET_F_CREATE, Endpoint, bpf_sk_storage_get};

    /// The server that `sk` asked last.
    #[inline(always)]
    pub(crate) fn get<'a>(sk: *mut bpf_sock) -> Option<&'a Endpoint> {
        // SAFETY: as in `origins::get`.
        unsafe {
            bpf_sk_storage_get(from_ref(&ASKED).cast_mut().cast(), sk.cast(), null_mut(), 0)
                .cast::<Endpoint>()
                .as_ref()
        }
    }

    /// Makes `sk` remember the server; false if there is no memory for it.
    #[inline(always)]
    pub(crate) fn set(sk: *mut bpf_sock, server: &Endpoint) -> bool {
        // SAFETY: as in `origins::set`. Threads that share a socket may write at
        // the same time: each word is of one or the other server.
        unsafe {
            let storage = bpf_sk_storage_get(
                from_ref(&ASKED).cast_mut().cast(),
                sk.cast(),
                null_mut(),
                u64::from(BPF_SK_STORAGE_GET_F_CREATE),
            )
            .cast::<Endpoint>();
            match storage.as_mut() {
                Some(storage) => {
                    *storage = *server;
                    true
                }
                None => false,
            }
        }
    }
}
