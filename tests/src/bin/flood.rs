//! `interceptor-flood`: makes or takes very many connections in a throwaway
//! pod or its peer.

fn main() -> anyhow::Result<()> {
    interceptor_tests::flood::run()
}
