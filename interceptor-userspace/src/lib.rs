//! Loads Interceptor's kernel programs for a pod and feeds their maps.

pub mod proxy;
