//! `interceptor-demo`: a throwaway pod with a real proxy, attached, and what
//! becomes of every case of the tables. `cargo xtask run` runs it.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people"
)]

use std::{
    fs::File,
    io::{self, PipeReader, PipeWriter, Read, Write},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use interceptor_tests::{
    cases::{self, Bed, Family, Observed, Row},
    interception::{self, Interception, Rule},
    iptables::Flavour,
    pod::Credentials,
    proxies::{self, Proxy},
};
use nix::{
    sys::{
        prctl,
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    },
    unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid},
};
use serde_json::json;

/// Makes a throwaway pod with an application, a peer and a real proxy, attaches
/// Interceptor, makes every kind of connection and shows what became of each.
///
/// Needs root. Everything is removed at the end, by Ctrl-C too.
#[derive(Debug, Parser)]
#[command(name = "interceptor-demo", version)]
struct Args {
    /// The proxy in the pod
    #[arg(long, value_enum, default_value = "embedded")]
    proxy: ProxyKind,
    /// Make the same connections under live iptables, in a pod of their own, and compare
    #[arg(long)]
    compare: bool,
    /// Leave the pod running, and say how to enter and how to remove it
    #[arg(long)]
    keep: bool,
    /// How to show the result
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProxyKind {
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

impl From<ProxyKind> for proxies::Kind {
    fn from(kind: ProxyKind) -> Self {
        match kind {
            ProxyKind::Embedded => Self::Embedded,
            ProxyKind::Envoy => Self::Envoy,
            ProxyKind::Haproxy => Self::Haproxy,
        }
    }
}

/// Set by SIGINT and SIGTERM.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = catch_signals().and_then(|()| {
        if args.keep {
            run_and_keep(&args)
        } else {
            let mut stage = Stage::new(&args)?;
            stage.run_and_show(&args)
        }
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn catch_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(interrupt),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("catch {signal}"))?;
    }
    Ok(())
}

fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted; everything is removed");
    }
    Ok(())
}

/// The pod with everything in it, in the order in which it must go.
struct Stage {
    proxy: Proxy,
    // Detaches when dropped.
    _installed: interception::Installed,
    bed: Bed,
    interception: Interception,
}

/// What became of a case.
struct Done {
    family: Family,
    row: Row,
    rule: Option<Rule>,
}

impl Stage {
    fn new(args: &Args) -> Result<Self> {
        Self::with(args, Interception::Interceptor)
    }

    fn with(args: &Args, interception: Interception) -> Result<Self> {
        let bed = Bed::new()?;
        check_interrupted()?;
        let installed = interception.install(bed.pod())?;
        check_interrupted()?;
        let proxy = Proxy::start(bed.pod(), args.proxy.into())?;
        Ok(Self {
            proxy,
            _installed: installed,
            bed,
            interception,
        })
    }

    /// Runs the cases and says whether all is right.
    fn run_and_show(&mut self, args: &Args) -> Result<bool> {
        let expected = expected(args.proxy.into())?;
        let done = self.run(&expected)?;
        let iptables = args
            .compare
            .then(|| Self::with(args, Interception::Iptables(Flavour::Nft))?.run(&expected))
            .transpose()?;
        let compared: Vec<Compared> = match iptables {
            Some(iptables) => done
                .into_iter()
                .zip(iptables)
                .map(|(done, iptables)| Compared::with_iptables(done, iptables))
                .collect(),
            None => done
                .into_iter()
                .zip(&expected)
                .map(|(done, (_, row))| Compared::with_table(done, row))
                .collect(),
        };
        let wrong = compared
            .iter()
            .filter(|c| !c.differences.is_empty())
            .count();
        match args.output {
            Output::Table => show_tables(args, &compared),
            Output::Json => show_json(args, &compared)?,
        }
        Ok(wrong == 0)
    }

    fn run(&self, expected: &[(Family, Row)]) -> Result<Vec<Done>> {
        let mut progress = Progress::new(expected.len());
        let pod = self.bed.pod();
        expected
            .iter()
            .map(|(family, Row { case, .. })| {
                check_interrupted()?;
                progress.step();
                let before = self.interception.rules(pod, *family)?;
                let observed = self.bed.observe(case, Some(&self.proxy))?;
                let after = self.interception.rules(pod, *family)?;
                Ok(Done {
                    family: *family,
                    row: Row {
                        case: case.clone(),
                        observed,
                    },
                    rule: interception::decider(&before, &after),
                })
            })
            .collect()
    }
}

/// The cases that the proxy can serve, and what the tables say of them.
fn expected(kind: proxies::Kind) -> Result<Vec<(Family, Row)>> {
    let mut expected = Vec::new();
    for family in kind.families() {
        let rows = cases::table(*family)?.into_iter().map(Row::through_proxy);
        expected.extend(rows.map(|row| (*family, row)));
    }
    Ok(expected)
}

/// Says on standard error how far it is, if it takes longer than it should.
struct Progress {
    all: usize,
    done: usize,
    next: Instant,
}

impl Progress {
    const PAUSE: Duration = Duration::from_secs(2);

    fn new(all: usize) -> Self {
        Self {
            all,
            done: 0,
            next: Instant::now() + Self::PAUSE,
        }
    }

    fn step(&mut self) {
        self.done += 1;
        if Instant::now() >= self.next {
            self.next += Self::PAUSE;
            eprintln!("case {} of {}", self.done, self.all);
        }
    }
}

/// A case with what it differs in from what it should be.
struct Compared {
    done: Done,
    iptables: Option<Done>,
    differences: Vec<String>,
}

impl Compared {
    fn with_table(done: Done, table: &Row) -> Self {
        Self {
            differences: cases::exactly(table, &done.row),
            done,
            iptables: None,
        }
    }

    fn with_iptables(done: Done, iptables: Done) -> Self {
        let mut differences = cases::exactly(&iptables.row, &done.row);
        let (ours, theirs) = (rule_name(&done), rule_name(&iptables));
        if ours != theirs {
            differences.push(format!("rule is {ours}, expected {theirs}"));
        }
        Self {
            differences,
            done,
            iptables: Some(iptables),
        }
    }
}

fn rule_name(done: &Done) -> String {
    done.rule.as_ref().map_or_else(
        || "-".to_owned(),
        |rule| format!("{} {}", rule.chain, rule.number),
    )
}

/// What the last line says the cases do that are not as they should be.
fn verdict(args: &Args) -> &'static str {
    if args.compare {
        "differ from iptables"
    } else {
        "wrong"
    }
}

fn show_tables(args: &Args, compared: &[Compared]) {
    for family in Family::ALL {
        let cases: Vec<&Compared> = compared
            .iter()
            .filter(|c| c.done.family == family)
            .collect();
        if cases.is_empty() {
            continue;
        }
        println!(
            "\n{}",
            match family {
                Family::V4 => "IPv4",
                Family::V6 => "IPv6",
                Family::Mapped => "IPv4 on AF_INET6 sockets",
            }
        );
        let mut table = Table::new();
        table
            .load_preset(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header([
                "CASE",
                "RULE",
                "SERVED BY",
                "ORIGINAL DST",
                "CLIENT SAW",
                "SERVER SAW",
                if args.compare { "IPTABLES" } else { "" },
            ]);
        for compared in cases {
            let Observed {
                served_by,
                original_dst,
                client_getsockname,
                client_getpeername,
                server_getpeername,
                server_getsockname,
            } = &compared.done.row.observed;
            let verdict = match (compared.differences.as_slice(), args.compare) {
                ([], true) => "same".to_owned(),
                ([], false) => String::new(),
                (differences, _) => differences.join("\n"),
            };
            table.add_row([
                compared.done.row.case.name.clone(),
                rule_name(&compared.done),
                served_by.clone(),
                original_dst.clone(),
                format!("{client_getsockname} > {client_getpeername}"),
                format!("{server_getpeername} > {server_getsockname}"),
                verdict,
            ]);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        println!("{}", table.trim_fmt());
    }
    if args.proxy == ProxyKind::Haproxy {
        println!(
            "\nNo IPv6 cases: HAProxy asks for the original destination of IPv4 connections only."
        );
    }
    let wrong = compared
        .iter()
        .filter(|c| !c.differences.is_empty())
        .count();
    println!("\n{} cases, {wrong} {}", compared.len(), verdict(args));
}

fn show_json(args: &Args, compared: &[Compared]) -> Result<()> {
    let cases: Vec<_> = compared
        .iter()
        .map(
            |Compared {
                 done,
                 iptables,
                 differences,
             }| {
                let case = &done.row.case;
                let Credentials { uid, gid } = case.owner;
                let side =
                    |done: &Done| json!({ "rule": done.rule, "observed": done.row.observed });
                json!({
                    "family": done.family.to_string(),
                    "case": case.name,
                    "client": { "uid": uid, "gid": gid, "bind": case.bind, "to": case.to },
                    "interceptor": side(done),
                    "iptables": iptables.as_ref().map(side),
                    "differences": differences,
                })
            },
        )
        .collect();
    let wrong = compared
        .iter()
        .filter(|c| !c.differences.is_empty())
        .count();
    let result = json!({
        "cases": cases,
        "summary": format!("{} cases, {wrong} {}", compared.len(), verdict(args)),
    });
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

/// Runs in a child process that stays with the pod until it is told to end.
fn run_and_keep(args: &Args) -> Result<bool> {
    let (mut reader, writer) = io::pipe().context("make a pipe")?;
    // SAFETY: there is one thread so far, so that the child is whole.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { .. } => {
            drop(writer);
            wait_for_keeper(&mut reader)
        }
        ForkResult::Child => {
            drop(reader);
            // Until the result is out, the two end together.
            prctl::set_pdeathsig(Signal::SIGTERM)?;
            keep(args, writer)
        }
    }
}

/// The keeper writes one byte when the result is out: whether all was right.
fn wait_for_keeper(reader: &mut PipeReader) -> Result<bool> {
    let mut all_right = [0];
    match reader.read_exact(&mut all_right) {
        Ok(()) => Ok(all_right == [1]),
        // It has said why.
        Err(_) => Ok(false),
    }
}

fn keep(args: &Args, mut writer: PipeWriter) -> Result<bool> {
    let mut stage = Stage::new(args)?;
    let all_right = stage.run_and_show(args)?;
    check_interrupted()?;
    say_how_to_explore(&stage);
    prctl::set_pdeathsig(None)?;
    setsid().context("leave the terminal")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    writer.write_all(&[u8::from(all_right)])?;
    drop(writer);
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    while !INTERRUPTED.load(Ordering::Relaxed) {
        thread::park_timeout(Duration::from_millis(100));
    }
    Ok(true)
}

/// On standard error: standard output has the result alone.
fn say_how_to_explore(stage: &Stage) {
    let pod = stage.bed.pod();
    let (name, netns, peer) = (pod.name(), pod.netns().path(), pod.peer().path());
    let cgroup = pod.cgroup().path().display();
    eprintln!(
        "
The pod {name} stays, with its application, its peer and its proxy.
Enter it:      sh -c 'echo $$ > {cgroup}/cgroup.procs; exec nsenter --net={netns} bash'
Its peer:      nsenter --net={peer} bash
See its rules: interceptor chains --pod {name}
Remove it all: kill {keeper}
By hand:       kill -9 {keeper}; interceptor detach --pod {name}; ip netns del {name}; ip netns del {peer_name}; rmdir {cgroup}",
        netns = netns.display(),
        peer = peer.display(),
        peer_name = pod.peer().name(),
        keeper = std::process::id(),
    );
}
