//! What the kernel programs know of the pod's routes: which destinations are
//! local, and which source address a connection gets.

use bytemuck::{Pod, Zeroable};

use crate::conn::Address;

/// The most prefixes that a pod may have.
///
/// The keys of the `ROUTES` map, a longest-prefix trie, are addresses with the
/// number of leading bits that count: an IPv4 prefix's length plus 96.
pub const MAX_ROUTES: u32 = 4096;

/// What is known of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Route {
    /// The source address that the kernel gives an unbound socket that
    /// connects there; [`Address::UNSPECIFIED`] if that isn't known.
    pub source: Address,
    /// 1 if the prefix is local: the chains' `-o lo`. Else 0.
    pub local: u32,
}
