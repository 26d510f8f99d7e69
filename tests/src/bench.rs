//! The benchmark: what interception costs, in one run, for no interception,
//! live iptables and Interceptor, and how sure that is.

mod hooks;
mod load;
mod mode;
mod pair;
mod report;
mod rounds;
mod signals;
mod stage;
mod stats;
mod worker;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::{Subcommand, ValueEnum};

use self::{
    mode::{Mode, Path},
    report::Report,
    stage::Stage,
};

/// Measures what intercepting a pod's connections costs.
///
/// Needs root. Everything happens in namespaces of its own and is removed at
/// the end, by Ctrl-C too.
#[derive(Debug, clap::Parser)]
#[command(
    name = "interceptor-bench",
    version,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// Under three minutes: the ratios that matter, as JSON
    #[arg(long)]
    quick: bool,
    /// Rounds at most
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=500))]
    rounds: u16,
    /// Seconds after which no round begins
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// The form of what is printed
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Tables
    Table,
    /// One JSON object
    Json,
}

/// What a process of the benchmark does that isn't the first.
#[derive(Clone, Copy, Debug, Subcommand)]
enum Role {
    /// A client and the proxy that it reaches
    #[command(hide = true)]
    Worker(worker::Arguments),
    /// A small transparent proxy
    #[command(hide = true)]
    Forward(pair::Forward),
    /// A server that echoes
    #[command(hide = true)]
    Serve(pair::Forward),
}

/// Does what the arguments say.
///
/// # Errors
///
/// If something can't be measured.
pub fn run(args: &Args) -> Result<()> {
    match args.role {
        Some(Role::Worker(arguments)) => worker::run(arguments),
        Some(Role::Forward(arguments)) => pair::forward(arguments),
        Some(Role::Serve(arguments)) => pair::serve(arguments),
        None => measure(args),
    }
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people"
)]
fn measure(args: &Args) -> Result<()> {
    let start = Instant::now();
    signals::catch()?;
    // The last, away from where interrupts tend to be.
    let cpu = thread::available_parallelism()?.get() - 1;
    let mut stages = Vec::new();
    for mode in Mode::ALL {
        signals::check()?;
        stages.push(Stage::new(mode, cpu).with_context(|| format!("set {mode} up"))?);
    }
    let seconds = if args.quick { 120 } else { args.seconds };
    let data = rounds::run(
        &mut stages,
        args.rounds.into(),
        start + Duration::from_secs(seconds),
    )?;
    let mut report = Report::new(&data);
    for stage in stages.iter_mut().filter(|stage| stage.cli().is_some()) {
        report.add_memory(stage.mode, hooks::memory(stage)?);
        for path in [Path::Outbound, Path::Inbound] {
            report.add_hooks(stage.mode, path, hooks::measure(stage, path)?);
        }
    }
    drop(stages);
    if args.quick {
        println!("{}", serde_json::to_string_pretty(&report.ratios())?);
        eprintln!("{report}");
    } else {
        match args.output {
            Output::Table => println!("{report}"),
            Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        }
    }
    Ok(())
}
