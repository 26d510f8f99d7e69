//! Addresses and endpoints of connections, and the keys built from them.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use bytemuck::{Pod, Zeroable};

/// `IPPROTO_TCP`.
pub const TCP: u32 = 6;
/// `IPPROTO_UDP`, of which the chains look at DNS.
pub const UDP: u32 = 17;

/// The third word of an IPv4 address, in network byte order.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv4 or IPv6 address: 16 octets in network byte order, IPv4 as
/// `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
///
/// One form for both families lets an `AF_INET6` socket that talks IPv4 be
/// what it is on the wire: an IPv4 connection. The code works on words, because
/// octets would each take a register of a kernel program.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4))]
pub struct Address {
    /// The octets, first one first.
    pub octets: [u8; 16],
}

impl Address {
    /// `::`, which is no address.
    pub const UNSPECIFIED: Self = Self { octets: [0; 16] };

    /// The IPv4 address with these octets, first one first.
    #[inline(always)]
    pub fn v4(octets: [u8; 4]) -> Self {
        Self::from_be32(u32::from_ne_bytes(octets))
    }

    /// The address with these octets, first one first.
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> Self {
        Self { octets }
    }

    /// The IPv4 address in `word`, whose bytes in memory are in network order,
    /// as the kernel's `__be32` fields are.
    #[inline(always)]
    pub fn from_be32(word: u32) -> Self {
        Self::from_be32s([0, 0, MAPPED, word])
    }

    /// The address in four words, whose bytes in memory are in network order,
    /// as the kernel's `struct in6_addr` is.
    #[inline(always)]
    pub fn from_be32s(words: [u32; 4]) -> Self {
        bytemuck::cast(words)
    }

    /// The last four octets as one word with its bytes in network order: the
    /// kernel's `__be32` for an IPv4 address.
    #[inline(always)]
    pub fn to_be32(self) -> u32 {
        self.to_be32s()[3]
    }

    /// Four words with their bytes in memory in network order.
    #[inline(always)]
    pub fn to_be32s(self) -> [u32; 4] {
        bytemuck::cast(self)
    }

    /// Whether this is an IPv4 address (of the form `::ffff:a.b.c.d`).
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        let words = self.to_be32s();
        words[0] | words[1] | (words[2] ^ MAPPED) == 0
    }

    /// Whether this is `0.0.0.0` or `::`.
    #[inline(always)]
    pub fn is_unspecified(&self) -> bool {
        let words = self.to_be32s();
        words[0] | words[1] | words[3] == 0 && (words[2] == 0 || words[2] == MAPPED)
    }

    /// Whether this is in `127.0.0.0/8`, or `::1`.
    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        let words = self.to_be32s();
        if self.is_v4() {
            u32::from_be(words[3]) >> 24 == 127
        } else {
            words[0] | words[1] | words[2] | (words[3] ^ 1u32.to_be()) == 0
        }
    }

    /// Whether this is in `fe80::/10`: what it means depends on the interface.
    #[inline(always)]
    pub fn is_link_local_v6(&self) -> bool {
        u32::from_be(self.to_be32s()[0]) >> 22 == 0xfe80 >> 6
    }

    /// Whether the kernel makes no TCP connection to this address, whatever the
    /// routes: multicast, and IPv4's limited broadcast. (`0.0.0.0/8` but for the
    /// unspecified address is like any other since Linux 5.3.)
    #[inline(always)]
    pub fn is_never_reachable(&self) -> bool {
        let words = self.to_be32s();
        if self.is_v4() {
            let v4 = u32::from_be(words[3]);
            v4 >> 28 == 0xe || v4 == u32::MAX
        } else {
            u32::from_be(words[0]) >> 24 == 0xff
        }
    }
}

// Word by word: a comparison of octets would become a call to `memcmp`, which
// kernel programs don't have. And without a branch for each word, because the
// verifier walks every way through them.
impl PartialEq for Address {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.to_be32s(), other.to_be32s());
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }
}

impl Eq for Address {}

impl From<Ipv4Addr> for Address {
    #[inline(always)]
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(address.octets())
    }
}

impl From<Ipv6Addr> for Address {
    #[inline(always)]
    fn from(address: Ipv6Addr) -> Self {
        Self::v6(address.octets())
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.octets).to_canonical()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// An address and a TCP port.
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port, in host byte order.
    pub port: u16,
    /// Always zero, so that the type has no padding.
    pub reserved: u16,
}

impl Endpoint {
    /// `port` is in host byte order.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self {
            address,
            port,
            reserved: 0,
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::new(address.ip().into(), address.port())
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> Self {
        Self::new(endpoint.address.into(), endpoint.port)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(*self).fmt(f)
    }
}

/// A redirected connection on its way from the client's socket to the proxy's, or
/// one of [`Role::FromElsewhere`] on its way to the application's: the key of the
/// map of handshakes in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Handshake {
    /// The client's end.
    pub client: Endpoint,
    /// The other end: the proxy's, after the rewrite.
    pub proxy: Endpoint,
}

/// Which end of a redirected connection a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Role {
    /// The socket that called connect().
    Client = 1,
    /// The socket that the proxy accepted.
    Accepted = 2,
    /// A socket that would be redirected if there were a route to where it
    /// wants to go. connect() fails for want of one; if the kernel has one
    /// after all, the connection must not leave.
    Unroutable = 3,
    /// A socket that connects to its own pod from an address that isn't the
    /// pod's, under TPROXY: the proxy, from its client's address. It isn't
    /// redirected, and must not be taken for one that arrives.
    FromElsewhere = 4,
}

/// What a redirected connection's sockets remember as long as they live.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Origin {
    /// Where the client meant to go.
    pub original_destination: Endpoint,
    /// A [`Role`], as its number.
    pub role: u32,
    /// 1 if the source address was chosen for the client (it had bound none),
    /// so that its next connect() counts as unbound.
    pub source_chosen: u32,
}

/// A socket of a live connection, as the kernel programs tell of it when they are
/// asked for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LiveSocket {
    /// Its own end.
    pub local: Endpoint,
    /// The other end.
    pub remote: Endpoint,
    /// Where a redirected connection meant to go; zero if `role` is.
    pub original_destination: Endpoint,
    /// A [`Role`], as its number; 0 if the socket remembers nothing.
    pub role: u32,
    /// The state that TCP has it in (`net/tcp_states.h`).
    pub state: u32,
    /// The fsuid of who opened its file, as the initial user namespace numbers it;
    /// `u32::MAX` if nobody has it open.
    pub uid: u32,
    /// The fsgid, the same way.
    pub gid: u32,
    /// Its mark (`SO_MARK`).
    pub mark: u32,
    /// The index of the interface that it is bound to; 0 if it is bound to none.
    pub bound_interface: u32,
    /// The index of the interface that its SYN arrived by; 0 if it connected itself.
    pub in_interface: u32,
}

/// `127.15.0.0`, as a number in host byte order: where the proxy's IPv4 addresses begin.
const PROXY_NETWORK: u32 = 0x7f0f_0000;

/// `100::f01:0`: where the proxy's IPv6 addresses begin. They are from the block
/// that is for discarding (RFC 6666), so that nobody's are taken away.
///
/// IPv6 has one loopback address only. These are the pod's own by a route of their
/// own to `lo`, that is there while the pod is attached.
pub const PROXY_NETWORK_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0xf01, 0);
/// The length of the prefix of the proxy's IPv6 addresses.
pub const PROXY_NETWORK_V6_LENGTH: u8 = 128 - PROXY_ADDRESS_BITS;

/// The last bits of the proxy's addresses, which differ.
const PROXY_ADDRESS_BITS: u8 = 16;
/// Those bits of a word.
const PROXY_ADDRESS_MASK: u32 = (1 << PROXY_ADDRESS_BITS) - 1;

/// The number of addresses of each family for original destinations without a
/// number.
const UNNUMBERED_ADDRESSES: u32 = 256;

/// The number of addresses for each [`DestinationNumber`].
///
/// Each has an ephemeral port range of its own. Not more: every address that
/// closes gracefully may take an entry in the kernel's `tcp_metrics` table,
/// which all network namespaces of a host share.
const ADDRESSES_PER_NUMBER: u32 = 8;

/// The number of an original destination, which the proxy's address of a redirected
/// connection has in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationNumber(u32);

impl DestinationNumber {
    /// How many there are.
    pub const COUNT: u32 = (PROXY_ADDRESS_MASK + 1 - UNNUMBERED_ADDRESSES) / ADDRESSES_PER_NUMBER;

    /// Some number, always the same for a `hash`.
    #[inline(always)]
    pub const fn from_hash(hash: u32) -> Self {
        Self(hash % Self::COUNT)
    }

    /// Its place in the `DESTINATIONS` map, below [`Self::COUNT`].
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self.0
    }

    /// The number in one of the proxy's addresses; `None` in one without, and in others.
    #[inline(always)]
    pub fn of(address: &Address) -> Option<Self> {
        let last = u32::from_be(address.to_be32());
        if is_proxy_address(address) && last & PROXY_ADDRESS_MASK >= UNNUMBERED_ADDRESSES {
            Some(Self(
                ((last & PROXY_ADDRESS_MASK) - UNNUMBERED_ADDRESSES) / ADDRESSES_PER_NUMBER,
            ))
        } else {
            None
        }
    }

    /// One of its addresses, of the family of `v4`, by the low bits of `spread`.
    #[inline(always)]
    pub fn proxy_address(self, v4: bool, spread: u32) -> Address {
        proxy_address(
            v4,
            UNNUMBERED_ADDRESSES + self.0 * ADDRESSES_PER_NUMBER + spread % ADDRESSES_PER_NUMBER,
        )
    }
}

/// The proxy's address for a redirected connection whose original destination has no
/// number: one of `127.15.0.0` to `127.15.0.255` or of `100::f01:0` to `100::f01:ff`, by
/// the low bits of `spread`.
#[inline(always)]
pub fn unnumbered_proxy_address(v4: bool, spread: u32) -> Address {
    proxy_address(v4, spread % UNNUMBERED_ADDRESSES)
}

#[inline(always)]
fn proxy_address(v4: bool, last: u32) -> Address {
    if v4 {
        return Address::from_be32((PROXY_NETWORK | last).to_be());
    }
    let [one, two, three, four] = Address::from(PROXY_NETWORK_V6).to_be32s();
    Address::from_be32s([one, two, three, four | last.to_be()])
}

/// Whether `address` is one of the proxy's for redirected connections.
#[inline(always)]
pub fn is_proxy_address(address: &Address) -> bool {
    let mut words = address.to_be32s();
    words[3] &= !PROXY_ADDRESS_MASK.to_be();
    let network = Address::from_be32s(words);
    network == Address::from_be32(PROXY_NETWORK.to_be()) || network == PROXY_NETWORK_V6.into()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::{IpAddr, SocketAddr};
    use std::collections::HashSet;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn one_form_for_a_v4_address() {
        assert_eq!(address("10.77.0.2"), address("::ffff:10.77.0.2"));
        assert_eq!(
            Address::from_be32(u32::from_ne_bytes([10, 77, 0, 2])),
            address("10.77.0.2")
        );
        assert!(IpAddr::from(address("::ffff:10.77.0.2")).is_ipv4());
        assert!(address("10.77.0.2").is_v4());
        assert!(!address("::10.77.0.2").is_v4());
        assert!(!address("fd00::ffff:1.2.3.4").is_v4());
        assert_ne!(address("::1"), address("::2"));
    }

    #[test]
    fn words_keep_network_order() {
        let six = address("fd00:1:2:3:4:5:6:7");
        assert_eq!(Address::from_be32s(six.to_be32s()), six);
        assert_eq!(address("1.2.3.4").to_be32().to_ne_bytes(), [1, 2, 3, 4]);
    }

    #[test]
    fn classes_have_exact_edges() {
        for (text, loopback, unspecified, never_reachable) in [
            ("127.0.0.0", true, false, false),
            ("127.255.255.255", true, false, false),
            ("126.255.255.255", false, false, false),
            ("128.0.0.0", false, false, false),
            ("0.0.0.0", false, true, false),
            ("0.0.0.1", false, false, false),
            ("0.255.255.255", false, false, false),
            ("1.0.0.0", false, false, false),
            ("223.255.255.255", false, false, false),
            ("224.0.0.0", false, false, true),
            ("239.255.255.255", false, false, true),
            ("240.0.0.0", false, false, false),
            ("255.255.255.255", false, false, true),
            ("::", false, true, false),
            ("::1", true, false, false),
            ("::2", false, false, false),
            ("feff::1", false, false, false),
            ("ff00::", false, false, true),
        ] {
            let a = address(text);
            assert_eq!(a.is_loopback(), loopback, "{text}");
            assert_eq!(a.is_unspecified(), unspecified, "{text}");
            assert_eq!(a.is_never_reachable(), never_reachable, "{text}");
        }
    }

    #[test]
    fn link_local_is_ten_bits() {
        for (text, link_local) in [
            ("fe80::1", true),
            ("febf:ffff::", true),
            ("fec0::", false),
            ("fe7f:ffff::", false),
            ("169.254.0.1", false),
        ] {
            assert_eq!(address(text).is_link_local_v6(), link_local, "{text}");
        }
    }

    #[test]
    fn endpoints_read_as_socket_addresses() {
        for text in ["10.0.0.1:80", "[fd00::1]:443"] {
            let socket_address: SocketAddr = text.parse().unwrap();
            let endpoint = Endpoint::from(socket_address);
            assert_eq!(SocketAddr::from(endpoint), socket_address);
        }
    }

    #[test]
    fn every_proxy_address_has_one_number_or_none() {
        let mut seen = HashSet::new();
        for v4 in [true, false] {
            for spread in 0..2 * UNNUMBERED_ADDRESSES {
                let address = unnumbered_proxy_address(v4, spread);
                assert!(is_proxy_address(&address));
                assert_eq!(DestinationNumber::of(&address), None, "{address}");
                seen.insert(address.octets);
            }
            for hash in 0..2 * DestinationNumber::COUNT {
                let number = DestinationNumber::from_hash(hash);
                assert!(number.index() < DestinationNumber::COUNT);
                for spread in 0..2 * ADDRESSES_PER_NUMBER {
                    let address = number.proxy_address(v4, spread);
                    assert!(is_proxy_address(&address));
                    assert_eq!(DestinationNumber::of(&address), Some(number), "{address}");
                    seen.insert(address.octets);
                }
            }
        }
        assert_eq!(seen.len(), 2 << PROXY_ADDRESS_BITS);
        for (first, last) in [
            ("127.15.0.0", "127.15.255.255"),
            ("100::f01:0", "100::f01:ffff"),
        ] {
            assert!(is_proxy_address(&address(first)));
            assert!(is_proxy_address(&address(last)));
        }
        for other in [
            "127.14.255.255",
            "127.16.0.0",
            "100::f00:ffff",
            "100::f02:0",
            "100::1:0:f01:0",
            "::127.15.0.0",
        ] {
            assert!(!is_proxy_address(&address(other)), "{other}");
            assert_eq!(DestinationNumber::of(&address(other)), None, "{other}");
        }
    }
}
