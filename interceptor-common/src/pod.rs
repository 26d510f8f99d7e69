//! What a pod's attachment remembers of itself.

use bytemuck::{Pod, Zeroable};

/// The layout of the maps and the state in them: raised when a change makes
/// older state unreadable.
pub const LAYOUT: u32 = 5;

/// What was added to the pod's network namespace, to be taken back when the pod
/// is detached: bits of [`Attachment::added`].
pub mod added {
    /// The IPv6 passthrough address on `lo`.
    pub const PASSTHROUGH_V6: u32 = 1;
    /// The rule `fwmark MARK lookup TABLE` of IPv4, for TPROXY.
    pub const RULE_V4: u32 = 1 << 1;
    /// The same of IPv6.
    pub const RULE_V6: u32 = 1 << 2;
    /// The route `local default dev lo table TABLE` of IPv4, for TPROXY.
    pub const ROUTE_V4: u32 = 1 << 3;
    /// The same of IPv6.
    pub const ROUTE_V6: u32 = 1 << 4;
    /// `net.ipv4.tcp_fwmark_accept=1` (both families), for TPROXY.
    pub const TCP_FWMARK_ACCEPT: u32 = 1 << 5;
    /// `net.ipv4.fwmark_reflect=1`, for TPROXY.
    pub const FWMARK_REFLECT_V4: u32 = 1 << 6;
    /// `net.ipv6.fwmark_reflect=1`, for TPROXY.
    pub const FWMARK_REFLECT_V6: u32 = 1 << 7;
    /// The route of the proxy's IPv6 addresses, [`crate::conn::PROXY_NETWORK_V6`].
    pub const PROXY_ROUTE_V6: u32 = 1 << 8;
}

/// The element of the `ATTACHMENT` map. The programs don't read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Attachment {
    /// [`LAYOUT`] of the version that attached.
    pub layout: u32,
    /// What was added to the network namespace: bits of [`added`].
    pub added: u32,
    /// The device of the network namespace's file.
    pub netns_device: u64,
    /// The inode of the network namespace's file.
    pub netns_inode: u64,
    /// The number of the cgroup.
    pub cgroup_id: u64,
    /// The level of the programs' log: 0 (off) to 5 (trace), as aya-log counts.
    pub log_level: u64,
}
