//! `--vm`: the demo and the suites in virtual machines with other kernels.
//!
//! A guest has busybox, the workspace's programs and what these need in an
//! archive that is its root file system, and no disk and no network. What it
//! prints arrives line by line; it has succeeded only if it says so itself, in
//! words that no other guest knows.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    process::target,
    setup::{self, Need},
    test::{CRASHES, Counts, PARITY, pod_suites},
};

mod debian;
mod guest;
mod initramfs;
mod kernel;
mod modules;
mod programs;
mod qemu;

use guest::{Job, Report};
use kernel::Kernel;
use programs::Programs;

/// How many guests run at a time.
const GUESTS: usize = 2;

/// How long a guest may take. Emulated on a busy machine, all suites together have taken
/// half of it.
const LIMIT: Duration = Duration::from_secs(3600);

/// Suites that no guest runs, and why.
const NOT_IN_GUESTS: [(&str, &str); 4] = [
    (
        CRASHES,
        "it repeats until it would fail if it could, and needs another build",
    ),
    ("demo", "its cases are those of the suite cases"),
    ("load", "it measures, and an emulated machine has no speed"),
    ("proxies", "Envoy and HAProxy are too big for a guest"),
];

/// Parts of the names of tests that no guest runs: their proxies are too big,
/// and ask the kernel for what the embedded one asks for; or they are about
/// iptables' own text, which is the same on every kernel.
const NO_TESTS_OF: [&str; 4] = [
    "envoy",
    "haproxy",
    "what_iptables_saves_is_imported",
    "the_equivalent_chains_can_be_installed",
];

/// Parts of the names of tests that repeat what others do until it would fail if it
/// could, or need a machine with its full speed: attaching takes some seconds in an
/// emulated one. A guest runs them if it is told which tests to run.
const REPEATING: [&str; 4] = [
    "after_many_pods_it_is_as_it_was_before",
    "fifty_times_in_a_row_nothing_grows",
    "idle_it_does_nothing",
    "killed_",
];

/// What must be there.
const NEEDS: &[Need] = &[Need::Kernel, Need::Ip, Need::Iptables, Need::Qemu];

/// A kernel that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The newest of each packaged series.
    All,
    /// The newest of all.
    Newest,
    /// The newest whose version starts so.
    Version(String),
    /// The user's own.
    Image(PathBuf),
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_version = |text: &str| {
            text.contains('.')
                && text
                    .split('.')
                    .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
        };
        match text {
            "all" => Ok(Self::All),
            "newest" => Ok(Self::Newest),
            _ if is_version(text) => Ok(Self::Version(text.to_owned())),
            _ if Path::new(text).is_file() => Ok(Self::Image(text.into())),
            _ => Err("neither `all`, `newest`, a version such as 6.1, nor a kernel's file".into()),
        }
    }
}

/// Runs the demo with these arguments on each kernel.
///
/// # Errors
///
/// If something is missing or can't be built; a guest that fails is no error.
pub(crate) fn demo(wanted: &[Wanted], arguments: Vec<String>) -> Result<ExitCode> {
    setup::ensure(NEEDS)?;
    let programs = programs::build(
        &["interceptor", "interceptor-agent", "interceptor-demo"],
        &[],
    )?;
    let jobs = [Job {
        name: "demo".to_owned(),
        program: programs.binary("interceptor-demo")?.to_owned(),
        arguments,
        is_suite: false,
    }];
    run(wanted, &programs, &jobs)
}

/// What `interceptor` with these arguments prints on each kernel, whose series
/// (6.1) comes first.
///
/// # Errors
///
/// If something is missing or can't be built, or it fails in a guest.
pub(crate) fn outputs(wanted: &[Wanted], arguments: &[&str]) -> Result<Vec<(String, String)>> {
    setup::ensure(NEEDS)?;
    let programs = programs::build(&["interceptor"], &[])?;
    let jobs = [Job {
        name: format!("interceptor {}", arguments.join(" ")),
        program: programs.binary("interceptor")?.to_owned(),
        arguments: arguments.iter().copied().map(str::to_owned).collect(),
        is_suite: false,
    }];
    let outcomes = boot_all(wanted, &programs, &jobs, false)?;
    if outcomes.iter().any(|outcome| !outcome.report.succeeded()) {
        show(&outcomes);
        bail!("not on all kernels");
    }
    Ok(outcomes
        .into_iter()
        .map(|outcome| (outcome.kernel, outcome.report.printed()))
        .collect())
}

/// Runs the suites with these arguments on each kernel.
///
/// # Errors
///
/// If something is missing or can't be built; a guest that fails is no error.
pub(crate) fn test(wanted: &[Wanted], arguments: &[String]) -> Result<ExitCode> {
    setup::ensure(NEEDS)?;
    let mut suites = pod_suites()?;
    suites.push(PARITY.to_owned());
    suites.retain(|suite| {
        let not = NOT_IN_GUESTS.iter().find(|(name, _)| name == suite);
        if let Some((name, why)) = not {
            println!("vm: not in guests: suite {name}: {why}");
        }
        not.is_none()
    });
    let mut skips = NO_TESTS_OF.to_vec();
    // Its flags begin with dashes.
    if arguments.iter().all(|argument| argument.starts_with('-')) {
        skips.extend(REPEATING);
    }
    println!("vm: not in guests: tests {}", skips.join(", "));
    let programs = programs::build(&["interceptor"], &suites)?;
    let skips = skips.into_iter().flat_map(|name| ["--skip", name]);
    let skips = skips.map(str::to_owned);
    let arguments: Vec<String> = skips.chain(arguments.iter().cloned()).collect();
    let jobs: Vec<Job> = programs
        .suites()
        .iter()
        .map(|(name, program)| Job {
            name: name.clone(),
            program: program.clone(),
            arguments: arguments.clone(),
            is_suite: true,
        })
        .collect();
    run(wanted, &programs, &jobs)
}

/// What became of a guest.
struct Outcome {
    kernel: String,
    report: Report,
    counts: Counts,
    time: Duration,
    last: Vec<String>,
}

fn run(wanted: &[Wanted], programs: &Programs, jobs: &[Job]) -> Result<ExitCode> {
    Ok(show(&boot_all(wanted, programs, jobs, true)?))
}

/// Boots a guest with each kernel, and shows what they print if `aloud`.
fn boot_all(
    wanted: &[Wanted],
    programs: &Programs,
    jobs: &[Job],
    aloud: bool,
) -> Result<Vec<Outcome>> {
    let directory = target()?.join("vm");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    let kernels = find(wanted, &directory)?;
    for kernel in &kernels {
        println!("vm: {} is Linux {}", kernel.name, kernel.release);
    }
    let accelerator = qemu::Accelerator::of_this_machine();
    println!("vm: {accelerator}");
    let guests = kernels.len().clamp(1, GUESTS);
    let processors = thread::available_parallelism().map_or(1, usize::from) / guests;
    let host = Host {
        accelerator,
        processors: processors.clamp(1, 2),
        directory: &directory,
        aloud,
    };
    let mut outcomes: Vec<Outcome> = Vec::new();
    // A user sees the same for one guest as without `--vm`.
    let width = kernels.iter().map(|kernel| kernel.name.len()).max();
    let width = width.filter(|_| kernels.len() > 1);
    let waiting = Mutex::new(kernels.iter());
    let results: Vec<Result<Outcome>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..GUESTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut results = Vec::new();
                    loop {
                        let next = waiting
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .next();
                        let Some(kernel) = next else {
                            return results;
                        };
                        let prefix = width
                            .map_or_else(String::new, |width| format!("{:width$} | ", kernel.name));
                        results.push(
                            boot(kernel, programs, jobs, &host, &prefix)
                                .with_context(|| format!("kernel {}", kernel.name)),
                        );
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_default())
            .collect()
    });
    for result in results {
        outcomes.push(result?);
    }
    ensure!(outcomes.len() == kernels.len(), "a thread panicked");
    outcomes.sort_by_key(|outcome| kernels.iter().position(|k| k.name == outcome.kernel));
    Ok(outcomes)
}

/// The kernels, each once, in the order in which they were asked for.
fn find(wanted: &[Wanted], directory: &Path) -> Result<Vec<Kernel>> {
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut packaged = None;
    for wanted in wanted {
        let found = match wanted {
            Wanted::Image(path) => vec![Kernel::of_image(&path.display().to_string(), path)?],
            wanted => {
                let archive = match packaged.take() {
                    Some(archive) => archive,
                    None => debian::Archive::open(directory)?,
                };
                let found = archive.kernels(wanted);
                packaged = Some(archive);
                found?
            }
        };
        for kernel in found {
            if !kernels.iter().any(|other| other.image == kernel.image) {
                kernels.push(kernel);
            }
        }
    }
    Ok(kernels)
}

/// What this machine gives each guest.
struct Host<'a> {
    accelerator: qemu::Accelerator,
    processors: usize,
    directory: &'a Path,
    aloud: bool,
}

/// Runs the jobs in a guest with this kernel.
fn boot(
    kernel: &Kernel,
    programs: &Programs,
    jobs: &[Job],
    host: &Host<'_>,
    prefix: &str,
) -> Result<Outcome> {
    let start = Instant::now();
    // Goes with what is in it.
    let directory = tempfile::tempdir_in(host.directory).context("make a temporary directory")?;
    let image = kernel.uncompressed(directory.path())?;
    let archive = directory.path().join("initramfs.cpio");
    let modules = modules::collect(kernel)?;
    for name in &modules.missing {
        println!("{prefix}vm: this kernel has no module {name}");
    }
    let token = guest::token()?;
    let script = guest::script(jobs, &token, &modules);
    initramfs::write(&archive, programs, &modules, &script)?;
    let mut report = Report::new(&token, jobs);
    let mut counts = Counts::default();
    let machine = qemu::Machine {
        accelerator: host.accelerator,
        processors: host.processors,
        image: &image,
        initramfs: &archive,
    };
    let watched = qemu::watch(&mut machine.command()?, LIMIT, |line| {
        counts += Counts::parse(line).unwrap_or_default();
        let shown = report.read(line);
        if host.aloud {
            println!("{prefix}{shown}");
        }
        shown
    })?;
    report.end(&watched.end);
    Ok(Outcome {
        kernel: kernel.name.clone(),
        report,
        counts,
        time: start.elapsed(),
        last: watched.last,
    })
}

/// Shows how each guest went, and whether all went well.
fn show(outcomes: &[Outcome]) -> ExitCode {
    // Two guests' lines alternate: here they are together.
    for outcome in outcomes.iter().filter(|o| !o.report.succeeded()) {
        println!("\nThe last lines of {}:", outcome.kernel);
        for line in &outcome.last {
            println!("    {line}");
        }
    }
    let width = outcomes.iter().map(|o| o.kernel.len()).max().unwrap_or(0);
    println!();
    for Outcome {
        kernel,
        report,
        counts,
        time,
        ..
    } in outcomes
    {
        let tests = if *counts == Counts::default() {
            String::new()
        } else {
            format!("; {} tests passed, {} failed", counts.passed, counts.failed)
        };
        println!(
            "vm: {kernel:width$}  {:>4} s  {report}{tests}",
            time.as_secs()
        );
    }
    if outcomes.iter().all(|outcome| outcome.report.succeeded()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_a_word_a_version_or_a_file() {
        let parse = str::parse::<Wanted>;
        assert_eq!(parse("all"), Ok(Wanted::All));
        assert_eq!(parse("newest"), Ok(Wanted::Newest));
        assert_eq!(parse("6.1"), Ok(Wanted::Version("6.1".to_owned())));
        assert_eq!(
            parse("6.12.117"),
            Ok(Wanted::Version("6.12.117".to_owned()))
        );
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert_eq!(parse(file), Ok(Wanted::Image(file.into())));
        for wrong in ["6", "6.", "6.x", "", "/no/such/file"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
