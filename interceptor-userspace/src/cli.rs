//! The command line: one file per subcommand, and only these print.
#![expect(clippy::print_stderr, reason = "this is where the command prints")]

mod attach;
mod chains;
mod check;
mod cleanup;
mod cni_install;
mod cni_uninstall;
mod connections;
mod daemon;
mod detach;
mod explain;
mod import;
mod istio_iptables;
mod logs;
mod node;
mod pods;
mod proxy;
mod set;
mod settings;
mod status;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand, ValueEnum};
use interceptor_userspace::datapath::{DEFAULT_ROOT, Pins};
use serde::Serialize;

/// The eBPF replacement for a service mesh sidecar's iptables rules.
///
/// Every TCP connection of a pod gets the answer that the sidecar's NAT chains would give, with
/// kernel programs on the pod's cgroup and network namespace instead. They are pinned: no process
/// has to keep running.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    /// The directory on a BPF file system below which each pod's programs and maps are pinned.
    /// [default: /sys/fs/bpf/interceptor]
    #[arg(long, global = true, value_name = "DIR", env = "INTERCEPTOR_PINS")]
    pins: Option<PathBuf>,

    /// The form of what is printed.
    #[arg(
        short,
        long,
        global = true,
        value_name = "FORM",
        default_value = "text"
    )]
    output: Output,

    #[command(subcommand)]
    command: Command,
}

/// The form of what a command prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Attach a pod: from here on its connections go through its proxy.
    Attach(attach::Args),
    /// Change an attached pod's settings, at once: each connection meets the old or the new.
    Set(set::Args),
    /// Detach a pod and remove all that attaching made.
    Detach(detach::Args),
    /// Show what is attached.
    Status(status::Args),
    /// Show a pod's chains, and how many connections each rule has decided.
    Chains(chains::Args),
    /// Show the live connections that go through pods' proxies, and where they were meant to go.
    Connections(connections::Args),
    /// Say which rule decides about a connection, and why.
    Explain(explain::Args),
    /// Read the settings off a pod's iptables chains.
    Import(import::Args),
    /// Take the place of the mesh's own tool: the same flags and environment variables.
    #[command(name = "istio-iptables")]
    IstioIptables(istio_iptables::Args),
    /// Install the CNI plugin on this node: its program, and its entry in the network's configuration.
    CniInstall(cni_install::Args),
    /// Remove the CNI plugin from this node.
    CniUninstall(cni_uninstall::Args),
    /// Check whether this machine can run Interceptor, and what stands in its way.
    Check(check::Args),
    /// Follow what a pod's kernel programs log.
    Logs(logs::Args),
    /// Look after all pods of this node, as its daemon.
    Daemon(Box<daemon::Args>),
    /// Show the pods that the daemon knows, and why those that aren't attached are not.
    Pods(pods::Args),
    /// Show all that is pinned on this node, and remove it with --remove.
    Cleanup(cleanup::Args),
    /// Run a small transparent TCP proxy on the ports that connections are redirected to.
    Proxy(proxy::Args),
}

/// Runs the command that the arguments name.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let pins = Pins::at(cli.pins.as_deref().unwrap_or(Path::new(DEFAULT_ROOT)));
    let result = match cli.command {
        Command::Attach(args) => attach::run(args, &pins, cli.output),
        Command::Set(args) => set::run(&args, &pins, cli.output),
        Command::Detach(args) => detach::run(&args, &pins, cli.output),
        Command::Status(args) => status::run(args, &pins, cli.output),
        Command::Chains(args) => chains::run(args, &pins, cli.output),
        Command::Connections(args) => connections::run(args, &pins, cli.output),
        Command::Explain(args) => explain::run(&args, &pins, cli.output),
        Command::Import(args) => import::run(&args, cli.output),
        Command::IstioIptables(args) => return istio_iptables::run(&args, &pins),
        Command::CniInstall(args) => cni_install::run(args, cli.output),
        Command::CniUninstall(args) => cni_uninstall::run(args, cli.output),
        Command::Check(args) => check::run(&args, cli.output),
        Command::Logs(args) => logs::run(&args, &pins),
        Command::Daemon(args) => daemon::run(*args, cli.pins),
        Command::Pods(args) => pods::run(&args, &pins, cli.output),
        Command::Cleanup(args) => cleanup::run(&args, &pins, cli.output),
        Command::Proxy(args) => proxy::run(args, cli.output),
    };
    exit_code(result)
}

/// The exit code of a command that ended so; says why it failed.
fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Reads a file, or standard input for `-`.
fn read_text(path: &Path) -> std::io::Result<String> {
    if path.as_os_str() == "-" {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(path)
    }
}

/// Prints a line, or a table.
fn print(text: impl std::fmt::Display) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Prints JSON.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(serde_json::to_string_pretty(value)?)
}

/// A table without lines, as other tools print them.
fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header);
    table
}

/// Whether who reads our output has gone, as in `| head`.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_arguments_make_sense_to_clap() {
        super::Cli::command().debug_assert();
    }
}
