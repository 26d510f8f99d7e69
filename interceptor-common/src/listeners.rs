//! Which listeners a redirected connection may be given to.

use crate::{chains::Verdict, conn::Address};

/// Places for the proxy's listeners on each of its ports. A proxy has one per
/// worker thread and address family when it uses `SO_REUSEPORT`.
pub const SLOTS: u32 = 128;

/// All places on each of the proxy's ports: the last is for the listener that holds
/// connections until the proxy listens, and gets those for which there is no other.
pub const PLACES: u32 = SLOTS + 1;

/// The ports of the proxy, each with a part of the `LISTENERS` map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyPort {
    /// 15001, for connections that the pod makes.
    Outbound,
    /// 15006, for connections that arrive.
    Inbound,
    /// 15053, for DNS over TCP.
    Dns,
}

impl ProxyPort {
    /// How many there are.
    pub const COUNT: u32 = 3;

    /// All.
    pub const ALL: [Self; Self::COUNT as usize] = [Self::Outbound, Self::Inbound, Self::Dns];

    /// The port that a verdict leads to; `None` for [`Verdict::Direct`].
    #[inline(always)]
    pub const fn of(verdict: Verdict) -> Option<Self> {
        match verdict {
            Verdict::Direct => None,
            Verdict::Outbound => Some(Self::Outbound),
            Verdict::Inbound => Some(Self::Inbound),
            Verdict::Dns => Some(Self::Dns),
        }
    }

    /// The port's place in the `PASSING` map.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        match self {
            Self::Outbound => 0,
            Self::Inbound => 1,
            Self::Dns => 2,
        }
    }

    /// The port's first place in the `LISTENERS` map.
    #[inline(always)]
    pub const fn first_slot(self) -> u32 {
        self.index() * PLACES
    }

    /// The place in the `LISTENERS` map for the listener that holds connections.
    #[inline(always)]
    pub const fn holding_slot(self) -> u32 {
        self.first_slot() + SLOTS
    }

    /// Whether nothing passes `other` any more once the proxy listens on this port: a
    /// server for DNS over UDP alone is never seen to listen.
    #[inline(always)]
    pub const fn ends_passing(self, other: Self) -> bool {
        self.index() == other.index() || matches!((self, other), (Self::Outbound, Self::Dns))
    }
}

/// Whether a listener bound to `bound` gets the connection, as after REDIRECT:
/// a connection from inside the pod is sent to localhost, one that arrives to
/// the address of the interface that it came in by. The kernel itself refuses
/// a listener of the wrong address family.
#[inline(always)]
pub fn accepts(bound: &Address, from_inside: bool) -> bool {
    bound.is_unspecified() || bound.is_loopback() == from_inside
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn a_listener_gets_what_redirect_would_send_it() {
        for (bound, inside, outside) in [
            ("0.0.0.0", true, true),
            ("::", true, true),
            ("127.0.0.1", true, false),
            ("::1", true, false),
            ("10.77.0.2", false, true),
            ("fd00::2", false, true),
        ] {
            let address = bound.parse::<IpAddr>().unwrap().into();
            assert_eq!(accepts(&address, true), inside, "{bound} from inside");
            assert_eq!(accepts(&address, false), outside, "{bound} from outside");
        }
    }
}
