//! The workspace's own commands: `cargo xtask --help`.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people"
)]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod compile;
mod deploy;
mod lint;
mod process;
mod run;
mod setup;
mod test;
mod verifier;
mod vm;

/// Interceptor's own commands. Each installs what it needs and doesn't find.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install all that the other commands need
    Setup,
    /// Build the `interceptor` program for release, and print its path
    Build,
    /// Show Interceptor at work in a throwaway pod (needs root)
    Run(run::Args),
    /// Run the tests (all but unit need root)
    Test(test::Args),
    /// Measure what interception costs (needs root; --help lists its flags)
    Bench(bench::Args),
    /// What the kernel programs cost each kernel's verifier, against the record
    Verifier(verifier::Args),
    /// Check the format, the lints, the documentation and what is deployed
    Lint,
    /// Write the plain manifests, deploy/kubernetes.yaml, from the Helm chart
    Manifests,
    /// Build the container image (with podman, buildah or docker), and print its name
    Image {
        /// Its name [default: interceptor:VERSION]
        #[arg(long)]
        tag: Option<String>,
    },
}

fn main() -> Result<ExitCode> {
    match Args::parse().command {
        Command::Setup => setup::ensure(setup::ALL)?,
        Command::Build => println!("{}", compile::release()?.display()),
        Command::Run(args) => return run::run(&args),
        Command::Test(args) => return test::run(&args),
        Command::Bench(args) => bench::bench(&args)?,
        Command::Verifier(args) => return verifier::run(&args),
        Command::Lint => lint::run()?,
        Command::Manifests => deploy::write_manifests()?,
        Command::Image { tag } => println!("{}", deploy::image(tag)?),
    }
    Ok(ExitCode::SUCCESS)
}
