//! Running programs: the few things that every part of the harness does alike.

use std::{
    env,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// Runs a command to its end and returns its standard output.
///
/// # Errors
///
/// If it can't be started or fails; the error holds what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    // A group of its own: Ctrl-C at the terminal must not end the cleaning up.
    let output = command
        .process_group(0)
        .output()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `ip` with these arguments, separated by spaces.
///
/// # Errors
///
/// If it fails.
pub fn ip(arguments: &str) -> Result<String> {
    run(Command::new("ip").args(arguments.split_whitespace()))
}

/// Asks `done` again and again until it returns something.
///
/// # Errors
///
/// If `done` fails, or `what` has not happened after `limit`.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut done: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = done()? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("{what}: not within {limit:?}");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// A name that no other part of this run, and no other run, has.
pub fn unique_name(prefix: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}-{}-{count}", std::process::id())
}

/// The path of a program of this workspace: what the environment variable
/// says, or the one that cargo built beside this program.
///
/// # Errors
///
/// If it isn't there.
pub fn workspace_binary(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let this = env::current_exe().context("find this program's own path")?;
    // A test is in target/PROFILE/deps, a program in target/PROFILE.
    this.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no program `{name}` beside {}: build it (`cargo build`) or set {variable}",
                this.display()
            )
        })
}

/// Checks that this process may make namespaces and attach programs.
///
/// # Errors
///
/// If it isn't root's.
pub fn require_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: run it with `cargo xtask test`, or `sudo -E cargo test -p interceptor-tests`"
    );
    Ok(())
}
