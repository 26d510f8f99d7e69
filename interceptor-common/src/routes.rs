//! What the kernel programs know of the pod's routes: which destinations are
//! local, which can't be reached, and which source address a connection gets.

use bytemuck::{Pod, Zeroable};

use crate::{
    config::{LOCALHOST_V4, LOCALHOST_V6},
    conn::Address,
};

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

/// Where the kernel would really go: an unspecified destination is the source
/// address for IPv4 (`__ip_route_output_key`), and localhost if that is
/// unspecified too, or for IPv6 (`tcp_v6_connect`).
#[inline(always)]
pub fn effective_destination(asked: &Address, bound: &Address) -> Address {
    if !asked.is_unspecified() {
        *asked
    } else if !asked.is_v4() && !bound.is_v4() {
        LOCALHOST_V6.into()
    } else if bound.is_unspecified() || !asked.is_v4() {
        LOCALHOST_V4.into()
    } else {
        *bound
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn an_unspecified_destination_is_the_socket_itself() {
        for (asked, bound, expected) in [
            ("10.0.0.1", "10.77.0.2", "10.0.0.1"),
            ("0.0.0.0", "10.77.0.2", "10.77.0.2"),
            ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
            ("0.0.0.0", "::", "127.0.0.1"),
            ("::", "::", "::1"),
            ("::", "fd00::2", "::1"),
            ("::", "0.0.0.0", "127.0.0.1"),
            ("::", "10.77.0.2", "127.0.0.1"),
        ] {
            let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
            assert_eq!(
                effective_destination(&address(asked), &address(bound)),
                address(expected),
                "{asked} from {bound}"
            );
        }
    }
}
