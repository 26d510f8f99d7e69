//! `interceptor-agent`: a process of a throwaway pod or its peer, driven by
//! lines of JSON.

fn main() -> anyhow::Result<()> {
    interceptor_tests::agent::worker::run()
}
