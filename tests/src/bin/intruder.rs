//! `interceptor-intruder`: tries to reach what isn't its own, for a test.

fn main() -> anyhow::Result<()> {
    interceptor_tests::intruder::run()
}
