//! The harness of Interceptor's test suites: throwaway pods, the processes in
//! them, the chains of live iptables, and the table of cases to compare.

pub mod agent;
pub mod bench;
pub mod bpf;
pub mod cases;
pub mod cgroup;
pub mod cli;
pub mod command;
pub mod daemon;
pub mod faults;
pub mod flood;
pub mod foreign;
pub mod inside;
pub mod interception;
pub mod interpreter;
pub mod intruder;
pub mod iptables;
pub mod kubernetes;
pub mod mesh;
pub mod netns;
pub mod pod;
pub mod podman;
pub mod proxies;
pub mod traffic;
pub mod world;
