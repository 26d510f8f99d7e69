//! `interceptor-bench`: what interception costs. `cargo xtask bench` runs it.

use clap::Parser as _;
use interceptor_tests::bench;

fn main() -> anyhow::Result<()> {
    bench::run(&bench::Args::parse())
}
