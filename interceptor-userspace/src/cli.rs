//! The command line: one file per subcommand, and only these print.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod proxy;

/// The eBPF replacement for a service mesh sidecar's iptables rules.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a small transparent TCP proxy on the ports that connections are redirected to.
    Proxy(proxy::Args),
}

/// Runs the command that the arguments name.
pub(crate) fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Proxy(args) => proxy::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
