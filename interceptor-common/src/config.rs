//! The settings of one pod: what the chains compare connections with.

use core::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use bytemuck::{Pod, Zeroable};

use crate::conn::Address;

/// The most proxy uids, and the most proxy gids, that a pod may have.
pub const MAX_OWNERS: usize = 8;
/// The most inbound ports that may be excluded.
pub const MAX_EXCLUDED_PORTS: usize = 32;

/// A list of settings that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListError {
    /// It is longer than its place in the BPF map.
    TooMany {
        /// How many were given.
        given: usize,
        /// How many there may be.
        most: usize,
    },
    /// It holds 4294967295, which the kernel keeps for "no uid" and "no gid".
    InvalidId,
}

impl fmt::Display for ListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany { given, most } => write!(f, "{given} given, at most {most} possible"),
            Self::InvalidId => write!(f, "{} is nobody's: no process can have it", u32::MAX),
        }
    }
}

impl core::error::Error for ListError {}

macro_rules! list {
    ($(#[$doc:meta])* $name:ident, $item:ty, $most:expr, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
        #[repr(C)]
        pub struct $name {
            len: u32,
            values: [$item; $most],
        }

        impl $name {
            /// The list of these values, in their order.
            ///
            /// # Errors
            ///
            /// If there are more values than the BPF map has room for, or one
            /// that can't be.
            pub fn new(given: &[$item]) -> Result<Self, ListError> {
                if !given.iter().all($valid) {
                    return Err(ListError::InvalidId);
                }
                let mut values = [0; $most];
                values
                    .get_mut(..given.len())
                    .ok_or(ListError::TooMany { given: given.len(), most: $most })?
                    .copy_from_slice(given);
                #[expect(clippy::cast_possible_truncation, reason = "at most $most")]
                let len = given.len() as u32;
                Ok(Self { len, values })
            }

            /// How many values there are.
            #[inline(always)]
            pub const fn len(&self) -> u32 {
                self.len
            }

            /// Whether there are none.
            #[inline(always)]
            pub const fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// The value at `index`, if that is in use.
            #[inline(always)]
            pub fn get(&self, index: usize) -> Option<$item> {
                match self.values.get(index) {
                    Some(value) if index < self.len as usize => Some(*value),
                    _ => None,
                }
            }

            /// The values, in order.
            #[inline(always)]
            pub fn iter(&self) -> impl Iterator<Item = $item> {
                (0..$most).map_while(|index| self.get(index))
            }
        }
    };
}

list!(
    /// Uids or gids, as the initial user namespace numbers them.
    Owners,
    u32,
    MAX_OWNERS,
    |id| *id != u32::MAX
);
list!(
    /// TCP ports, in host byte order.
    Ports,
    u16,
    MAX_EXCLUDED_PORTS,
    |_port| true
);

/// The settings of one pod, as they lie in the `SETTINGS` map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// Where outbound connections are redirected to; host byte order.
    pub outbound_port: u16,
    /// Where inbound connections are redirected to; host byte order.
    pub inbound_port: u16,
    /// Uids whose connections are the proxy's own.
    pub proxy_uids: Owners,
    /// Gids whose connections are the proxy's own.
    pub proxy_gids: Owners,
    /// Inbound ports that are left alone.
    pub excluded_inbound_ports: Ports,
    /// The source address with which the proxy passes inbound connections on.
    pub passthrough_v4: Address,
    /// The same for IPv6.
    pub passthrough_v6: Address,
    /// What the chains call localhost.
    pub localhost_v4: Address,
    /// The same for IPv6.
    pub localhost_v6: Address,
}

/// The settings of the mesh's own chains: uid and gid 1337, ports 15001 and
/// 15006, inbound ports 22, 15090 and 15020 left alone, passthrough from
/// 127.0.0.6 and ::6.
impl Default for Settings {
    fn default() -> Self {
        let owner = Owners {
            len: 1,
            values: [1337, 0, 0, 0, 0, 0, 0, 0],
        };
        let mut ports = [0; MAX_EXCLUDED_PORTS];
        ports[..3].copy_from_slice(&[22, 15090, 15020]);
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            proxy_uids: owner,
            proxy_gids: owner,
            excluded_inbound_ports: Ports {
                len: 3,
                values: ports,
            },
            passthrough_v4: Address::v4([127, 0, 0, 6]),
            passthrough_v6: Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
            localhost_v4: Ipv4Addr::LOCALHOST.into(),
            localhost_v6: Ipv6Addr::LOCALHOST.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_its_order_and_its_bound() {
        let ports = Ports::new(&[3, 1, 2]).unwrap();
        assert!(ports.iter().eq([3, 1, 2]));
        assert_eq!(ports.len(), 3);
        assert!(Owners::new(&[]).unwrap().is_empty());
        assert!(
            Owners::new(&[7; MAX_OWNERS])
                .unwrap()
                .iter()
                .eq([7; MAX_OWNERS])
        );
        assert_eq!(
            Owners::new(&[7; MAX_OWNERS + 1]),
            Err(ListError::TooMany { given: 9, most: 8 })
        );
        assert_eq!(Owners::new(&[0, u32::MAX]), Err(ListError::InvalidId));
    }
}
