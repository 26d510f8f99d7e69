//! The harness of Interceptor's test suites.

pub mod interpreter;
