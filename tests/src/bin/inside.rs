//! `interceptor-inside`: makes sockets in a throwaway pod for a test.

fn main() -> anyhow::Result<()> {
    interceptor_tests::inside::run()
}
