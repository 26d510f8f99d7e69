//! The data path of a pod: its kernel programs, their maps and their links,
//! all pinned, so that no process has to stay.

mod additions;
mod attach;
mod bpf;
mod explain;
mod kernel_types;
mod object;
mod pins;
mod plain;
mod policy;
mod routes;
mod view;

pub use attach::{Attached, Request, attach, detach, need_root};
pub use explain::{Explanation, Question, explain};
pub use object::{
    ForeignProgram, LogLevel, ProgramSize, check_kernel_types, foreign_programs, load_only,
};
pub use pins::{DEFAULT_ROOT, Pins};
pub use policy::{Change, set};
pub use routes::has_ipv6;
pub use view::{
    ChainView, EventView, LinkView, ListenerView, PodView, RuleView, chains, pods, view,
};
