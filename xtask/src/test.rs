//! `cargo xtask test`: the tests that anyone can run, and those in real pods.

use std::{
    fmt, fs,
    io::{self, BufRead, BufReader, IsTerminal, Write},
    ops::AddAssign,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::{
    compile::{self, HOST},
    process::{cargo, require_root, workspace},
    setup::{self, Need},
    vm,
};

/// The one suite of the tests' package that needs no pod.
const MODEL: &str = "model";
/// The suite that compares with the mesh's own chains.
pub(crate) const PARITY: &str = "parity";

/// The suite of the node's daemon.
const DAEMON: &str = "daemon";
/// The suite that kills the daemon, and replaces it by another build.
pub(crate) const CRASHES: &str = "crashes";
/// The suite of the node's daemon and the Kubernetes API.
const KUBERNETES: &str = "kubernetes";
/// The suite of the node's daemon and podman's pods, which no virtual machine has.
const PODMAN: &str = "podman";

/// What to test.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which tests
    #[arg(value_enum, default_value_t = Which::All)]
    which: Which,
    /// Run the suites that need pods in virtual machines with these kernels
    /// instead: versions (6.1), `newest`, `all`, or files
    #[arg(
        long,
        value_name = "KERNELS",
        value_delimiter = ',',
        conflicts_with = "which"
    )]
    vm: Vec<vm::Wanted>,
    /// How many random connections to compare, each pair of settings and connection
    /// once
    #[arg(long, value_name = "N")]
    cases: Option<u32>,
    /// For the test programs: a part of a test's name, --nocapture, --test-threads ...
    #[arg(last = true)]
    arguments: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    /// Those that need no root
    Unit,
    /// Those that make pods and attach kernel programs
    Pod,
    /// Only the suite that compares Interceptor with the mesh's own chains
    Parity,
    /// Those of the node's daemon, also with the Kubernetes API and podman's pods
    Daemon,
    /// All of them
    All,
}

/// Runs them and prints a summary as the last line.
///
/// # Errors
///
/// If something is missing, a build fails, or this isn't root's process.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        args.cases.is_none() || args.which == Which::Parity,
        "--cases is for the suite parity: cargo xtask test parity --cases N"
    );
    if !args.vm.is_empty() {
        return vm::test(&args.vm, &args.arguments);
    }
    let suites_of_pods: Vec<String> = match args.which {
        Which::Parity => return parity(args),
        Which::Unit => Vec::new(),
        Which::Pod => pod_suites()?,
        Which::Daemon => [DAEMON, CRASHES, KUBERNETES, PODMAN]
            .map(str::to_owned)
            .to_vec(),
        Which::All => pod_suites()?
            .into_iter()
            .chain([PODMAN, PARITY].map(str::to_owned))
            .collect(),
    };
    let mut needs = vec![Need::Kernel];
    if !suites_of_pods.is_empty() {
        require_root()?;
        needs.extend(setup::PODS);
    }
    if suites_of_pods.iter().any(|suite| suite == PODMAN) {
        needs.push(Need::Podman);
    }
    setup::ensure(&needs)?;
    let mut results = Vec::new();
    if matches!(args.which, Which::Unit | Which::All) {
        let targets = ["--lib", "--bins", "--test", MODEL].map(str::to_owned);
        results.push(("unit", suites(&targets, &args.arguments)?));
    }
    if !suites_of_pods.is_empty() {
        // The suites start them; cargo builds only their own package's programs.
        compile::debug(&["interceptor", "interceptor-cni"])?;
        if suites_of_pods.iter().any(|suite| suite == CRASHES) {
            compile::next()?;
        }
        let targets: Vec<String> = suites_of_pods
            .into_iter()
            .flat_map(|suite| ["--test".to_owned(), suite])
            .collect();
        let name = if args.which == Which::Daemon {
            DAEMON
        } else {
            "pod"
        };
        results.push((name, suites(&targets, &args.arguments)?));
    }
    let passed = results.iter().all(|(_, result)| result.passed());
    let parts: Vec<String> = results
        .iter()
        .map(|(name, result)| format!("{name}: {result}"))
        .collect();
    println!("\ntest: {}", parts.join("; "));
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Compares with the mesh's own chains; the last line says how much, and how much
/// of it differs.
fn parity(args: &Args) -> Result<ExitCode> {
    require_root()?;
    setup::ensure(setup::PODS)?;
    compile::debug(&["interceptor"])?;
    let mut arguments = vec!["--nocapture".to_owned(), "--test-threads=1".to_owned()];
    arguments.extend_from_slice(&args.arguments);
    let mut comparisons = Comparisons::default();
    let outcome = run_suites(
        &["--test", PARITY].map(str::to_owned),
        &arguments,
        args.cases,
        &mut |line| comparisons.read(line),
    )?;
    println!("\nparity: {outcome}");
    println!("{comparisons}");
    Ok(if outcome.passed() && comparisons.differ == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the tests of the suite say that they have compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Comparisons {
    made: u64,
    differ: u64,
}

impl Comparisons {
    /// Reads `parity: N comparisons, M differ`; other lines count nothing.
    fn read(&mut self, line: &str) {
        let numbers = || -> Option<(u64, u64)> {
            let (_, rest) = line.split_once("parity: ")?;
            let (made, rest) = rest.split_once(" comparisons, ")?;
            Some((
                made.parse().ok()?,
                rest.strip_suffix(" differ")?.parse().ok()?,
            ))
        };
        if let Some((made, differ)) = numbers() {
            self.made += made;
            self.differ += differ;
        }
    }
}

impl fmt::Display for Comparisons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} comparisons, {} differ", self.made, self.differ)
    }
}

/// The names of the suites that need pods, but for the longest, the one that compares
/// with the mesh's own chains, and the one with podman's pods.
pub(crate) fn pod_suites() -> Result<Vec<String>> {
    let directory = workspace().join("tests/tests");
    let mut suites = Vec::new();
    for entry in
        fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?
    {
        let path = entry?.path();
        if let (Some(name), Some("rs")) = (
            path.file_stem().and_then(|name| name.to_str()),
            path.extension().and_then(|extension| extension.to_str()),
        ) && name != MODEL
            && name != PARITY
            && name != PODMAN
        {
            suites.push(name.to_owned());
        }
    }
    ensure!(!suites.is_empty(), "no suites in {}", directory.display());
    suites.sort();
    Ok(suites)
}

/// What became of some test programs.
#[derive(Debug)]
struct Outcome {
    succeeded: bool,
    counts: Counts,
    time: Duration,
}

impl Outcome {
    /// Tests that didn't run have not passed.
    const fn passed(&self) -> bool {
        self.succeeded && self.counts.failed == 0 && self.counts.passed > 0
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            passed,
            failed,
            ignored,
        } = self.counts;
        f.write_str(if self.passed() { "ok" } else { "FAILED" })?;
        write!(f, ", {passed} passed")?;
        for (count, what) in [(failed, "failed"), (ignored, "ignored")] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        if !self.succeeded && failed == 0 {
            f.write_str(", a test program didn't build or end as it should")?;
        } else if self.counts == Counts::default() {
            f.write_str(", no test ran")?;
        }
        write!(f, ", {} s", self.time.as_secs())
    }
}

/// What test programs say of their tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    ignored: u32,
}

impl Counts {
    /// Reads a test program's last line; other lines count nothing.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once("test result: ")?;
        let (_, rest) = rest.split_once(". ")?;
        let mut counts = Self::default();
        for part in rest.split("; ") {
            let (number, what) = part.split_once(' ')?;
            match what {
                "passed" => counts.passed = number.parse().ok()?,
                "failed" => counts.failed = number.parse().ok()?,
                "ignored" => counts.ignored = number.parse().ok()?,
                _ => {}
            }
        }
        Some(counts)
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// Runs the tests of these targets to the end, shows what they print, and counts.
fn suites(targets: &[String], arguments: &[String]) -> Result<Outcome> {
    run_suites(targets, arguments, None, &mut |_| {})
}

/// The same, and hands each line to `look`.
fn run_suites(
    targets: &[String],
    arguments: &[String],
    cases: Option<u32>,
    look: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let start = Instant::now();
    let mut command: Command = cargo(&["test", "--no-fail-fast"]);
    if let Some(cases) = cases {
        command.env("PARITY_CASES", cases.to_string());
    }
    command.args(HOST).args(targets).arg("--");
    if io::stdout().is_terminal() {
        command.arg("--color=always");
    }
    let mut child = command
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo test")?;
    let output = child.stdout.take().context("cargo test's output")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line.context("read cargo test's output")?;
        let text = String::from_utf8_lossy(&line);
        if let Some(more) = Counts::parse(&text) {
            counts += more;
        }
        look(&text);
        line.push(b'\n');
        io::stdout().write_all(&line).context("print")?;
    }
    Ok(Outcome {
        succeeded: child.wait().context("wait for cargo test")?.success(),
        counts,
        time: start.elapsed(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_programs_last_line_is_counted() {
        let line = "test result: FAILED. 5 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let counts = Counts {
            passed: 5,
            failed: 2,
            ignored: 1,
        };
        assert_eq!(Counts::parse(line), Some(counts));
        let coloured = "test result: \u{1b}[32mok\u{1b}[m. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(Counts::parse(coloured).map(|counts| counts.passed), Some(5));
        assert_eq!(Counts::parse("test a::b ... ok"), None);
    }

    #[test]
    fn comparisons_are_added_up() {
        let mut comparisons = Comparisons::default();
        for line in [
            "parity: 10 comparisons, 0 differ",
            "test x ... parity: 5 comparisons, 2 differ",
            "scenario empty: 3 connections, 0 differences",
        ] {
            comparisons.read(line);
        }
        assert_eq!(comparisons.to_string(), "15 comparisons, 2 differ");
    }

    #[test]
    fn tests_that_did_not_run_have_not_passed() {
        let outcome = |succeeded, passed, failed| Outcome {
            succeeded,
            counts: Counts {
                passed,
                failed,
                ignored: 0,
            },
            time: Duration::from_secs(3),
        };
        assert_eq!(outcome(true, 4, 0).to_string(), "ok, 4 passed, 3 s");
        assert_eq!(
            outcome(true, 0, 0).to_string(),
            "FAILED, 0 passed, no test ran, 3 s"
        );
        assert_eq!(
            outcome(false, 4, 1).to_string(),
            "FAILED, 4 passed, 1 failed, 3 s"
        );
        assert!(outcome(false, 4, 0).to_string().starts_with("FAILED"));
    }

    #[test]
    fn the_suites_are_those_in_the_directory() {
        let suites = pod_suites().unwrap();
        assert!(suites.contains(&"reference".to_owned()), "{suites:?}");
        for other in [MODEL, PARITY, PODMAN] {
            assert!(!suites.contains(&other.to_owned()), "{other}");
        }
    }
}
