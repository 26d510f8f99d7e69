//! The data path of a pod: its kernel programs, their maps and their links,
//! all pinned, so that no process has to stay.

mod additions;
mod adopt;
mod attach;
mod bpf;
mod cleanup;
mod connections;
mod explain;
mod kernel_types;
mod object;
mod pins;
mod plain;
mod policy;
mod routes;
mod startup;
mod view;

pub use adopt::{Inspected, Version, inspect, move_to, upgrade};
pub use attach::{Attached, Request, attach, detach, follow, need_root, remove_all_leftovers};
pub use cleanup::{Found, FoundState, everything, remove, remove_root};
pub use connections::{Connection, DecidedBy, Direction, Side, connections};
pub use explain::{Explanation, Question, explain};
pub(crate) use object::raise_locked_memory;
pub use object::{
    ForeignProgram, LogLevel, ProgramSize, check_kernel_types, foreign_programs, load_only,
};
pub use pins::{DEFAULT_ROOT, DaemonLock, Pins};
pub use policy::{Change, set};
pub use routes::has_ipv6;
pub use startup::{Holding, UntilProxyListens, hold};
pub use view::{
    ChainView, Counts, EventView, LinkView, ListenerView, PodView, RuleView, chains, counts, pods,
    view,
};
