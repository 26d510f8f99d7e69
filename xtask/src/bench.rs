//! `cargo xtask bench`: the benchmark, `interceptor-bench` of the tests' package.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::{
    compile::HOST,
    process::{cargo, command, require_root, run, target},
    setup::{self, Need},
};

/// What is built: always for release, or the numbers would mean nothing.
const PROGRAMS: [&str; 3] = ["interceptor", "interceptor-bench", "interceptor-inside"];

const NEEDS: &[Need] = &[Need::Kernel, Need::Ip, Need::Iptables, Need::Bpffs];

/// What `--proxies` needs beside.
const PROXIES: &[Need] = &[Need::Haproxy, Need::Envoy, Need::LoadGenerators];

/// The benchmark's own flags, which it explains itself (`--help`).
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// What the benchmark gets
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "FLAGS"
    )]
    flags: Vec<String>,
}

/// Becomes the benchmark, whose exit status is then this program's.
///
/// # Errors
///
/// If something is missing, the build fails, or this isn't root's process.
pub(crate) fn bench(args: &Args) -> Result<()> {
    require_root()?;
    setup::ensure(NEEDS)?;
    if args.flags.iter().any(|flag| flag == "--proxies") {
        setup::ensure(PROXIES)?;
    }
    let programs = PROGRAMS.iter().flat_map(|program| ["--bin", program]);
    run(cargo(&["build", "--release"]).args(HOST).args(programs))?;
    let program = target()?.join("release/interceptor-bench");
    Err(command(&program).args(&args.flags).exec())
        .with_context(|| format!("start {}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn the_benchmark_gets_its_flags() {
        for flags in ["--quick", "--help", "--full --proxies -o json --plots dir"] {
            let line = Line::try_parse_from(format!("bench {flags}").split(' '));
            assert_eq!(line.unwrap().args.flags.join(" "), flags);
        }
    }
}
