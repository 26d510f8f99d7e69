//! Counters that the kernel programs keep: one for every rule, and one for
//! every event that an operator may have to explain.

use crate::chains::{Chain, Decision};

#[expect(clippy::cast_possible_truncation, reason = "a few dozen events")]
const RULES: u32 = Event::ALL.len() as u32;

/// The size of the `COUNTERS` map if every chain had as many rules as it can.
/// `ISTIO_OUTPUT`, which can have by far the most, comes last: a pod's map may
/// be shorter, and its further rules aren't counted then.
pub const MAX_COUNTERS: u32 = rule_index(Chain::Output, most_rules(Chain::Output), false) + 1;

#[expect(clippy::cast_possible_truncation, reason = "a few hundred rules")]
const fn most_rules(chain: Chain) -> u32 {
    chain.most_rules() as u32
}

/// Something that happened beside the rules' decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// An inbound connection was refused because no proxy listens.
    NoInboundListener,
    /// A redirected connection was refused because its original destination
    /// could not be kept (no memory, or too many handshakes in flight).
    OriginLost,
    /// A proxy's listener was not registered: all slots are taken.
    ListenerSlotsFull,
    /// A proxy's listener was not registered: the kernel does not take it into
    /// a socket map (an MPTCP listener).
    ListenerUnsuitable,
    /// The source address could not be kept; the proxy sees another one.
    SourceNotKept,
    /// A connection was stopped because the pod's routes have changed since
    /// they were read.
    RoutesChanged,
    /// A connection, or a request for DNS, went past the proxy because that had not
    /// begun to listen, and the pod is attached so that they pass until then.
    PassedAtStart,
}

impl Event {
    /// All events, in the order of their counters.
    pub const ALL: [Self; 7] = [
        Self::NoInboundListener,
        Self::OriginLost,
        Self::ListenerSlotsFull,
        Self::ListenerUnsuitable,
        Self::SourceNotKept,
        Self::RoutesChanged,
        Self::PassedAtStart,
    ];

    /// The event's place in the `COUNTERS` map.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self as u32
    }
}

/// The place in the `COUNTERS` map of a chain's rule (numbered from 1), of the
/// chains for IPv4 or for IPv6.
#[inline(always)]
pub const fn rule_index(chain: Chain, rule: u32, v4: bool) -> u32 {
    let before = match chain {
        Chain::Out => 0,
        Chain::In => most_rules(Chain::Out),
        Chain::Inbound => most_rules(Chain::Out) + most_rules(Chain::In),
        Chain::Output => {
            most_rules(Chain::Out) + most_rules(Chain::In) + most_rules(Chain::Inbound)
        }
    };
    RULES + 2 * (before + rule - 1) + if v4 { 0 } else { 1 }
}

/// The place in the `COUNTERS` map of the rule that decided; `None` if none
/// did.
#[inline(always)]
pub const fn decision_index(decision: &Decision, v4: bool) -> Option<u32> {
    match decision.rule {
        0 => None,
        rule => Some(rule_index(decision.chain, rule, v4)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_counters_share_a_place() {
        let mut taken = [false; MAX_COUNTERS as usize];
        let mut take = |index: u32| {
            let place = &mut taken[index as usize];
            assert!(!*place, "{index}");
            *place = true;
        };
        for chain in Chain::ALL {
            for rule in 1..=u32::try_from(chain.most_rules()).unwrap() {
                take(rule_index(chain, rule, true));
                take(rule_index(chain, rule, false));
            }
        }
        for event in Event::ALL {
            take(event.index());
        }
        assert!(taken.iter().all(|t| *t));
    }
}
