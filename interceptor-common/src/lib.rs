//! What Interceptor's kernel programs and its user space agree on.
//!
//! All policy lives in [`chains`]: pure functions that the kernel programs call
//! for every new connection, and that user space and the tests call to explain
//! or to check an answer. The other modules hold the types of the BPF maps.
#![no_std]
#![forbid(unsafe_code)]

pub mod chains;
pub mod config;
pub mod conn;
pub mod counters;
pub mod listeners;
pub mod pod;
pub mod routes;
