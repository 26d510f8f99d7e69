//! What a pod's attachment remembers of itself.

use bytemuck::{Pod, Zeroable};

/// The layout of the maps and the state in them: raised when a change makes
/// older state unreadable.
pub const LAYOUT: u32 = 2;

/// The element of the `ATTACHMENT` map. The programs don't read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Attachment {
    /// [`LAYOUT`] of the version that attached.
    pub layout: u32,
    /// 1 if the IPv6 passthrough address was added to `lo`, to be removed when
    /// the pod is detached.
    pub passthrough_v6_added: u32,
    /// The device of the network namespace's file.
    pub netns_device: u64,
    /// The inode of the network namespace's file.
    pub netns_inode: u64,
    /// The number of the cgroup.
    pub cgroup_id: u64,
    /// The level of the programs' log: 0 (off) to 5 (trace), as aya-log counts.
    pub log_level: u64,
}
