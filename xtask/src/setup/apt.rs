//! Debian's packages.

use std::{ffi::OsStr, process::Command, sync::Once};

use anyhow::{Result, bail};

use crate::process::{command, find, is_root, output, step};

/// Whether this machine has Debian's package manager.
pub(super) fn is_here() -> bool {
    find("apt-get").is_some()
}

/// Which of the packages can't be installed.
///
/// # Errors
///
/// If apt fails.
pub(super) fn unknown<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    update();
    lacking(packages, CANDIDATE)
}

/// Installs those of the packages that aren't yet, and removes none for them.
///
/// # Errors
///
/// If this machine has no apt, this isn't root's process, or apt fails; the
/// error says what to do.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    if !is_here() {
        bail!(
            "install what Debian has as {}; there is no apt-get here to do it",
            packages.join(" ")
        );
    }
    let packages = lacking(packages, INSTALLED)?;
    if packages.is_empty() {
        return Ok(());
    }
    install_newest(&packages)
}

/// Installs the package, and takes its sibling along where that is installed in
/// another version: apt would remove the sibling otherwise, which it may not.
///
/// # Errors
///
/// As of [`install`].
pub(super) fn install_with_sibling(package: &str, sibling: &str) -> Result<()> {
    if is_here() && is_root() {
        update();
        let policy = policy(&[package, sibling])?;
        let (wanted, here) = (
            version(&policy, package, CANDIDATE),
            version(&policy, sibling, INSTALLED),
        );
        if let (Some(wanted), Some(here)) = (wanted, here)
            && wanted != here
        {
            eprintln!("setup: {package} is there as {wanted}, so {sibling} {here} becomes that");
            let names = [package.to_owned(), format!("{sibling}={wanted}")];
            return step(
                &format!("apt-get install {}", names.join(" ")),
                installation(&names).arg("--allow-downgrades"),
            );
        }
    }
    install(&[package])
}

/// Installs the packages in the newest version that there is of each, and removes
/// none for them.
///
/// # Errors
///
/// If this isn't root's process, or apt fails; the error says what to do.
pub(super) fn install_newest(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if !is_root() {
        bail!("run: sudo apt-get update && sudo apt-get install --no-install-recommends {names}");
    }
    let missing = unknown(packages)?;
    if !missing.is_empty() {
        bail!("apt-get knows no {} here", missing.join(" "));
    }
    step(
        &format!("apt-get install {names}"),
        &mut installation(packages),
    )
}

fn installation(packages: &[impl AsRef<OsStr>]) -> Command {
    let mut command = command("apt-get");
    command
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(["--no-remove", "-o", "DPkg::Lock::Timeout=120"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Fetches apt's lists, once: what old ones name may be gone, or too old.
fn update() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if !is_root() {
            return;
        }
        // One source that fails is no reason not to use the others.
        if let Err(error) = step("apt-get update", command("apt-get").arg("update")) {
            eprintln!("setup: {error:#}\nsetup: going on with the lists that are here");
        }
    });
}

/// What `apt-cache policy` says of a package: the version that is there, and
/// the one that `apt-get install` would leave there.
const INSTALLED: &str = "  Installed: ";
const CANDIDATE: &str = "  Candidate: ";

/// Those of the packages that have no version of this sort.
fn lacking<'a>(packages: &[&'a str], sort: &str) -> Result<Vec<&'a str>> {
    let policy = policy(packages)?;
    Ok(packages
        .iter()
        .copied()
        .filter(|package| version(&policy, package, sort).is_none())
        .collect())
}

fn policy(packages: &[&str]) -> Result<String> {
    output(
        command("apt-cache")
            .arg("policy")
            .args(packages)
            .env("LC_ALL", "C"),
    )
}

/// The package's version of this sort, as `apt-cache policy` has it.
fn version<'a>(policy: &'a str, package: &str, sort: &str) -> Option<&'a str> {
    policy
        .lines()
        .skip_while(|line| line.strip_suffix(':') != Some(package))
        .skip(1)
        .take_while(|line| line.starts_with(' '))
        .find_map(|line| line.strip_prefix(sort))
        .filter(|version| *version != "(none)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_without_a_version_is_not_there() {
        let policy = "\
iptables:
  Installed: (none)
  Candidate: 1.8.9-2
  Version table:
     1.8.9-2 500
rustc-web:
  Installed: (none)
  Candidate: (none)
  Version table:
bpftool:
  Installed: 7.1
  Candidate: 7.1
";
        assert_eq!(version(policy, "iptables", INSTALLED), None);
        assert_eq!(version(policy, "iptables", CANDIDATE), Some("1.8.9-2"));
        assert_eq!(version(policy, "rustc-web", CANDIDATE), None);
        assert_eq!(version(policy, "bpftool", INSTALLED), Some("7.1"));
        assert_eq!(version(policy, "table", INSTALLED), None);
    }
}
