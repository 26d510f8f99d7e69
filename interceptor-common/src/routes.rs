//! What the kernel programs know of the pod's routes: which destinations are
//! local, which can't be reached, and which source address a connection gets.

use bytemuck::{Pod, Zeroable};

use crate::conn::Address;

/// The most prefixes that a pod may have.
///
/// The keys of the `ROUTES` map, a longest-prefix trie, are addresses with the
/// number of leading bits that count: an IPv4 prefix's length plus 96.
pub const MAX_ROUTES: u32 = 4096;

/// Where a prefix's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RouteKind {
    /// Nowhere: no route, or one that says so, or a broadcast address.
    /// connect() fails, each with the kernel's own error.
    Unreachable = 0,
    /// Out of the pod.
    Remote = 1,
    /// Back to the pod: the chains' `-o lo`.
    Local = 2,
}

/// The index of `lo` in every network namespace.
pub const LOOPBACK: u32 = 1;

/// What is known of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Route {
    /// The source address that the kernel gives an unbound socket that
    /// connects there; [`Address::UNSPECIFIED`] if that isn't known.
    pub source: Address,
    /// A [`RouteKind`], as its number.
    pub kind: u32,
    /// The index of the interface that packets leave by, `lo` for local ones; 0
    /// if that isn't known.
    pub out_interface: u32,
}

impl Route {
    /// A route of this kind.
    pub const fn new(kind: RouteKind, source: Address, out_interface: u32) -> Self {
        Self {
            source,
            kind: kind as u32,
            out_interface,
        }
    }

    /// Whether the route is of this kind.
    #[inline(always)]
    pub const fn is(&self, kind: RouteKind) -> bool {
        self.kind == kind as u32
    }
}
