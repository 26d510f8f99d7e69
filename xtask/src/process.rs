//! Running programs: where they are looked for, and what is shown of them.

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{self, IsTerminal, Seek, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// `PATH`, and after it the directories that it often lacks: cargo's own
/// programs, and the system's on the path of root only.
fn search_path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    for directory in cargo_programs().into_iter().chain(more) {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    env::join_paths(directories).unwrap_or(path)
}

/// Where `cargo install` puts programs.
fn cargo_programs() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .map(|home| home.join("bin"))
}

/// The program's path, if it is on this machine.
pub(crate) fn find(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    which::which_in(program, Some(search_path()), "/").ok()
}

/// A command that will be run in the workspace.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", search_path()).current_dir(workspace());
    command
}

/// A command of cargo's.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = command("cargo");
    command.args(arguments);
    command
}

/// The workspace's directory.
pub(crate) fn workspace() -> &'static Path {
    let this = Path::new(env!("CARGO_MANIFEST_DIR"));
    this.parent().unwrap_or(this)
}

/// The directory of what cargo builds: this program is in one of a profile in it.
///
/// # Errors
///
/// If this program's own path can't be told.
pub(crate) fn target() -> Result<PathBuf> {
    let this = env::current_exe().context("find this program's own path")?;
    this.ancestors()
        .nth(2)
        .map(Path::to_owned)
        .with_context(|| format!("{} is in no target directory", this.display()))
}

/// Whether this process is root's.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Fails if this process isn't root's.
///
/// # Errors
///
/// Then; the error has the command to type instead of this one.
pub(crate) fn require_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    bail!(
        "this makes network namespaces and attaches kernel programs, which needs root. Run:\n    \
         sudo -E env \"PATH=$PATH\" cargo xtask {}",
        arguments.join(" ")
    )
}

/// Runs a command to its end; what it prints is shown.
///
/// # Errors
///
/// If it can't be started or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start {}", shown(command)))?;
    ensure!(status.success(), "{}: {status}", shown(command));
    Ok(())
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
///
/// If it can't be started or fails; the error holds what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {}", shown(command)))?;
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    ensure!(
        output.status.success(),
        "{}: {}\n{out}{err}",
        shown(command),
        output.status,
    );
    Ok(out.into_owned())
}

/// Says what will be done and runs the command that does it. What that prints
/// is in the error, if it fails; meanwhile the time is shown.
///
/// # Errors
///
/// If it can't be started or fails.
pub(crate) fn step(what: &str, command: &mut Command) -> Result<()> {
    let mut printed = tempfile::tempfile().context("make a temporary file")?;
    let start = Instant::now();
    eprintln!("setup: {what}");
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(printed.try_clone()?)
        .stderr(printed.try_clone()?)
        .spawn()
        .with_context(|| format!("start {}", shown(command)))?;
    let (done, running) = mpsc::channel::<()>();
    let ticker = thread::spawn(move || {
        let terminal = io::stderr().is_terminal();
        let period = Duration::from_secs(if terminal { 1 } else { 30 });
        while running.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
            let seconds = start.elapsed().as_secs();
            if terminal {
                eprint!("\r       {seconds} s ");
                // Without it the time isn't seen, and nothing else is lost.
                let _ = io::stderr().flush();
            } else {
                eprintln!("       {seconds} s so far");
            }
        }
        if terminal && start.elapsed() > period {
            eprint!("\r");
        }
    });
    let status = child.wait();
    drop(done);
    // It can't fail but by a panic, which has been shown.
    let _ = ticker.join();
    let status = status.with_context(|| format!("wait for {}", shown(command)))?;
    if !status.success() {
        printed.rewind()?;
        let text = io::read_to_string(&printed).unwrap_or_default();
        bail!("{}: {status}\n{}", shown(command), text.trim_end());
    }
    if start.elapsed() > Duration::from_secs(2) {
        eprintln!("       took {} s", start.elapsed().as_secs());
    }
    Ok(())
}

/// The command as it would be typed.
pub(crate) fn shown(command: &Command) -> String {
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words: Vec<_> = words.map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_where_path_lacks_them() {
        assert!(env::split_paths(&search_path()).any(|path| path == Path::new("/usr/sbin")));
        assert!(find("sh").is_some());
        assert!(find("no-such-program").is_none());
    }

    #[test]
    fn a_failed_command_is_named_with_what_it_printed() {
        let mut command = command("sh");
        command.args(["-c", "echo to one; echo to the other >&2; exit 3"]);
        for error in [
            step("fail", &mut command).unwrap_err().to_string(),
            output(&mut command).unwrap_err().to_string(),
        ] {
            for part in ["sh -c", "exit status: 3", "to one", "to the other"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }
}
