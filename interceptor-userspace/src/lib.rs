//! Loads Interceptor's kernel programs for a pod and feeds their maps.
//!
//! [`check`] tells whether the machine can run it, [`pod`] what a pod is,
//! [`settings`] what it can be told, [`datapath`] attaches it, and [`proxy`] is
//! a small proxy to try it with. [`daemon`] looks after all pods of a node,
//! [`api`] is how one speaks to it, and [`cni`] the plugin that does.
//! Nothing here prints.

pub mod api;
pub mod check;
pub mod cni;
pub mod daemon;
pub mod datapath;
mod error;
pub mod pod;
pub mod proxy;
pub mod settings;
pub mod validation;

pub use error::{Error, Result};
