//! Counters that the kernel programs keep: one for every rule, and one for
//! every event that an operator may have to explain.

use crate::chains::{Chain, Decision};

const OUTPUT_RULES: u32 = 0;
#[expect(clippy::cast_possible_truncation, reason = "a few dozen rules")]
const INBOUND_RULES: u32 = OUTPUT_RULES + Chain::Output.most_rules() as u32;
#[expect(clippy::cast_possible_truncation, reason = "a few dozen rules")]
const EVENTS: u32 = INBOUND_RULES + Chain::Inbound.most_rules() as u32;

/// The size of the `COUNTERS` map.
#[expect(clippy::cast_possible_truncation, reason = "a few dozen events")]
pub const COUNTERS: u32 = EVENTS + Event::ALL.len() as u32;

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
}

impl Event {
    /// All events, in the order of their counters.
    pub const ALL: [Self; 6] = [
        Self::NoInboundListener,
        Self::OriginLost,
        Self::ListenerSlotsFull,
        Self::ListenerUnsuitable,
        Self::SourceNotKept,
        Self::RoutesChanged,
    ];

    /// The event's place in the `COUNTERS` map.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        EVENTS + self as u32
    }
}

/// The place in the `COUNTERS` map of a chain's rule (numbered from 1).
#[inline(always)]
pub const fn rule_index(chain: Chain, rule: u32) -> u32 {
    let first = match chain {
        Chain::Output => OUTPUT_RULES,
        Chain::Inbound => INBOUND_RULES,
    };
    first + rule - 1
}

/// The place in the `COUNTERS` map of the rule that decided; `None` if the
/// connection was not in the chain.
#[inline(always)]
pub const fn decision_index(chain: Chain, decision: &Decision) -> Option<u32> {
    match decision.rule {
        0 => None,
        rule => Some(rule_index(chain, rule)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_counters_share_a_place() {
        let mut taken = [false; COUNTERS as usize];
        let mut take = |index: u32| {
            let place = &mut taken[index as usize];
            assert!(!*place, "{index}");
            *place = true;
        };
        for chain in [Chain::Output, Chain::Inbound] {
            for rule in 1..=u32::try_from(chain.most_rules()).unwrap() {
                take(rule_index(chain, rule));
            }
        }
        for event in Event::ALL {
            take(event.index());
        }
        assert!(taken.iter().all(|t| *t));
    }
}
