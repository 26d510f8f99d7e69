//! The benchmark: what interception costs, in one run, for no interception,
//! live iptables and Interceptor, and how sure that is.

mod attach;
mod capacity;
mod docs;
mod hooks;
mod load;
mod machine;
mod mode;
mod pair;
mod plot;
mod proxies;
mod report;
mod rounds;
mod signals;
mod stage;
mod stats;
mod worker;

use std::{
    path::{Path as FilePath, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::{Subcommand, ValueEnum};

use self::{
    machine::Machine,
    mode::{Mode, Path},
    report::Report,
    stage::Stage,
};

/// After how many seconds no round begins, if it must be quick.
const QUICK: u64 = 110;

/// Processes that keep connections open, for more than 100,000 in all.
const FULL_PROCESSES: u32 = 12;

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
    /// Under three minutes: the ratios as JSON, by `<scenario>.<measure>.<mode>`
    #[arg(long, conflicts_with_all = ["full", "seconds", "output", "write_docs"])]
    quick: bool,
    /// All, with 500 pods and 100,000 connections at once
    #[arg(long)]
    full: bool,
    /// Real proxies too, Envoy and HAProxy, under wrk and sockperf
    #[arg(long, conflicts_with = "quick")]
    proxies: bool,
    /// Rounds at most
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=500))]
    rounds: u16,
    /// Seconds after which no round begins
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// The form of what is printed
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Write plots (SVG) and the results (JSON) into this directory
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Write docs/PERFORMANCE.md, with its plots and the results
    #[arg(long)]
    write_docs: bool,
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
    /// A server that answers HTTP requests
    #[command(hide = true)]
    Http(proxies::Http),
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
        Some(Role::Http(arguments)) => proxies::http(arguments),
        None => measure(args),
    }
}

fn measure(args: &Args) -> Result<()> {
    let start = Instant::now();
    let machine = Machine::this();
    signals::catch()?;
    // The last, away from where interrupts tend to be.
    let cpu = thread::available_parallelism()?.get() - 1;
    say("making pods");
    let mut stages = Vec::new();
    for mode in Mode::ALL {
        signals::check()?;
        stages.push(Stage::new(mode, cpu).with_context(|| format!("set {mode} up"))?);
    }
    let seconds = if args.quick { QUICK } else { args.seconds };
    let mut data = rounds::run(
        &mut stages,
        args.rounds.into(),
        start + Duration::from_secs(seconds),
    )?;
    if args.proxies {
        proxies::measure(&mut data)?;
    }
    let mut report = Report::new(machine, &data);
    for stage in stages.iter_mut().filter(|stage| stage.cli().is_some()) {
        for path in [Path::Outbound, Path::OutboundV6, Path::Inbound] {
            report.add_hooks(stage.mode, path, hooks::measure(stage, path)?);
        }
    }
    if !args.quick {
        for stage in &mut stages {
            if stage.mode != Mode::DirectAgain {
                let full = args.full.then_some(FULL_PROCESSES);
                report.capacity.extend(capacity::measure(stage, full, cpu)?);
            }
        }
    }
    drop(stages);
    attach(args, &mut report)?;
    if args.write_docs {
        let tests = FilePath::new(env!("CARGO_MANIFEST_DIR"));
        let docs = tests.parent().unwrap_or(tests).join("docs");
        docs::write(&report, &docs)?;
    }
    if let Some(directory) = &args.plots {
        docs::write_results(&report, directory)?;
    }
    show(args, &report)
}

/// Attaches new pods: one, and many.
fn attach(args: &Args, report: &mut Report) -> Result<()> {
    let counts: &[usize] = match (args.quick, args.full) {
        (true, _) => &[1],
        (false, false) => &[1, 100],
        (false, true) => &[1, 100, 500],
    };
    for mode in Mode::ALL.into_iter().filter(|mode| mode.intercepts()) {
        for pods in counts {
            say(&format!("attaching {pods}: {mode}"));
            report.attach.push(attach::measure(mode, *pods)?);
        }
    }
    if !args.proxies {
        report
            .not_measured
            .push("real proxies (Envoy, HAProxy) under wrk and sockperf: `--proxies`");
    }
    if !args.full {
        report
            .not_measured
            .push("500 pods, and 100,000 connections at once: `--full`");
    }
    let proxy = attach::proxy_memory()?;
    report.resident.insert("interceptor proxy", proxy);
    if !args.quick {
        say("the daemon with 50 pods");
        let (attach, memory) = attach::daemon(50)?;
        report.attach.push(attach);
        report
            .resident
            .insert("interceptor daemon, 50 pods", memory);
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "progress")]
fn say(what: &str) {
    eprintln!("bench: {what}");
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people"
)]
fn show(args: &Args, report: &Report) -> Result<()> {
    if args.quick {
        eprintln!("{report}");
        println!("{}", serde_json::to_string_pretty(&report.ratios())?);
        return Ok(());
    }
    match args.output {
        Output::Table => println!("{report}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
    }
    Ok(())
}
