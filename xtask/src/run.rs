//! `cargo xtask run`: the demo, `interceptor-demo` of the tests' package.

use std::{os::unix::process::CommandExt, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::{
    compile,
    process::{command, require_root, target},
    setup::{self, Need},
    vm,
};

/// The demo's own flags.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The proxy in the pod
    #[arg(long, value_enum, default_value_t = Proxy::Embedded)]
    proxy: Proxy,
    /// Make the same connections under live iptables too, and compare
    #[arg(long)]
    compare: bool,
    /// Leave the pod running, and say how to enter and how to remove it
    #[arg(long)]
    keep: bool,
    /// How to show the result
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Run it in virtual machines with these kernels instead: versions (6.1),
    /// `newest`, `all`, or files; with the embedded proxy
    #[arg(
        long,
        value_name = "KERNELS",
        value_delimiter = ',',
        conflicts_with = "keep"
    )]
    vm: Vec<vm::Wanted>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Proxy {
    /// `interceptor proxy`
    Embedded,
    /// Envoy
    Envoy,
    /// HAProxy (IPv4 only)
    Haproxy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table for each kind of socket
    Table,
    /// One JSON object
    Json,
}

impl Args {
    fn needs(&self) -> Vec<Need> {
        let mut needs = vec![Need::Kernel, Need::Ip, Need::Bpffs];
        match self.proxy {
            Proxy::Embedded => {}
            Proxy::Envoy => needs.push(Need::Envoy),
            Proxy::Haproxy => needs.push(Need::Haproxy),
        }
        if self.compare {
            needs.push(Need::Iptables);
        }
        needs
    }

    fn words(&self) -> Vec<String> {
        let value = |name: &str, value: Option<clap::builder::PossibleValue>| {
            let value = value.map_or_else(String::new, |value| value.get_name().to_owned());
            format!("--{name}={value}")
        };
        let mut words = vec![
            value("proxy", self.proxy.to_possible_value()),
            value("output", self.output.to_possible_value()),
        ];
        for (flag, given) in [("--compare", self.compare), ("--keep", self.keep)] {
            words.extend(given.then(|| flag.to_owned()));
        }
        words
    }
}

/// Becomes the demo, whose exit status is then this program's, or runs it in
/// virtual machines.
///
/// # Errors
///
/// If something is missing, the build fails, or this isn't root's process.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !args.vm.is_empty() {
        ensure!(
            args.proxy == Proxy::Embedded,
            "a virtual machine has no proxy but the embedded one"
        );
        return vm::demo(&args.vm, args.words());
    }
    require_root()?;
    setup::ensure(&args.needs())?;
    compile::debug(&["interceptor", "interceptor-agent", "interceptor-demo"])?;
    let program = target()?.join("debug/interceptor-demo");
    Err(command(&program).args(args.words()).exec())
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

    fn parse(line: &str) -> Args {
        Line::parse_from(line.split(' ')).args
    }

    #[test]
    fn the_demo_gets_its_flags() {
        assert_eq!(parse("run").words(), ["--proxy=embedded", "--output=table"]);
        assert_eq!(
            parse("run --compare --keep --proxy envoy -o json").words(),
            ["--proxy=envoy", "--output=json", "--compare", "--keep"]
        );
    }

    #[test]
    fn only_what_was_asked_for_is_needed() {
        let needs = parse("run").needs();
        assert!(!needs.contains(&Need::Envoy) && !needs.contains(&Need::Iptables));
        assert!(parse("run --proxy envoy").needs().contains(&Need::Envoy));
        assert!(
            parse("run --proxy haproxy")
                .needs()
                .contains(&Need::Haproxy)
        );
        assert!(parse("run --compare").needs().contains(&Need::Iptables));
    }
}
