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

/// The number of proxy addresses of each family that outbound connections are
/// spread over.
///
/// Each has an ephemeral port range of its own. Not more: every address that
/// closes gracefully may take an entry in the kernel's `tcp_metrics` table,
/// which all network namespaces of a host share.
pub const PROXY_ADDRESSES: u32 = 256;

/// `127.15.1.0`, as a number in host byte order.
const PROXY_NETWORK: u32 = 0x7f0f_0100;

/// The proxy's IPv4 address for a redirected connection: one of
/// `127.15.1.0` to `127.15.1.255`, by the low bits of `spread`.
#[inline(always)]
pub fn proxy_address_v4(spread: u32) -> Address {
    Address::from_be32((PROXY_NETWORK | (spread % PROXY_ADDRESSES)).to_be())
}

/// `100::f01:0`: where the proxy's IPv6 addresses begin. They are from the block
/// that is for discarding (RFC 6666), so that nobody's are taken away.
///
/// IPv6 has one loopback address only. These are the pod's own by a route of their
/// own to `lo`, that is there while the pod is attached.
pub const PROXY_NETWORK_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0xf01, 0);
/// The length of the prefix of the proxy's IPv6 addresses.
pub const PROXY_NETWORK_V6_LENGTH: u8 = 120;

/// The proxy's IPv6 address for a redirected connection: one of `100::f01:0` to
/// `100::f01:ff`, by the low bits of `spread`.
#[inline(always)]
pub fn proxy_address_v6(spread: u32) -> Address {
    let [one, two, three, four] = Address::from(PROXY_NETWORK_V6).to_be32s();
    Address::from_be32s([one, two, three, four | (spread % PROXY_ADDRESSES).to_be()])
}

/// Whether `address` is one of [`proxy_address_v4`]'s or [`proxy_address_v6`]'s.
#[inline(always)]
pub fn is_proxy_address(address: &Address) -> bool {
    let mut words = address.to_be32s();
    words[3] &= !(PROXY_ADDRESSES - 1).to_be();
    let network = Address::from_be32s(words);
    network == Address::from_be32(PROXY_NETWORK.to_be()) || network == PROXY_NETWORK_V6.into()
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, SocketAddr};

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
    fn the_spread_stays_in_its_range() {
        let mut seen = [0; PROXY_ADDRESSES as usize];
        for spread in 0..1024 {
            for address in [proxy_address_v4(spread), proxy_address_v6(spread)] {
                assert!(is_proxy_address(&address));
                seen[usize::from(address.octets[15])] += 1;
            }
        }
        assert_eq!(seen, [8; PROXY_ADDRESSES as usize]);
        assert!(is_proxy_address(&address("127.15.1.0")));
        assert!(is_proxy_address(&address("100::f01:ff")));
        for other in [
            "127.15.0.255",
            "127.15.2.0",
            "100::f00:ffff",
            "100::f01:100",
            "100::1:0:f01:0",
            "::127.15.1.0",
        ] {
            assert!(!is_proxy_address(&address(other)), "{other}");
        }
    }
}
