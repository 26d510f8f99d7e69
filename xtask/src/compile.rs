//! `cargo xtask build`, and the one choice of packages for every other build.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    process::{cargo, run, target, workspace},
    setup::{self, Need},
};

/// All that is built for the host: the kernel programs are built on the way.
/// Always the same choice, so that cargo builds a dependency once.
pub(crate) const HOST: [&str; 3] = ["--workspace", "--exclude", "interceptor-ebpf"];

/// Builds the `interceptor` program for release and returns its path.
///
/// # Errors
///
/// If something is missing, or the build fails.
pub(crate) fn release() -> Result<PathBuf> {
    setup::ensure(&[Need::Kernel])?;
    run(cargo(&["build", "--release"])
        .args(HOST)
        .args(["--bin", "interceptor"]))?;
    let path = target()?.join("release/interceptor");
    ensure!(
        path.is_file(),
        "cargo built the program, but not as {}",
        path.display()
    );
    Ok(path)
}

/// Builds these programs in the profile of the tests: it is built sooner, and
/// what is built for the tests isn't built again.
///
/// # Errors
///
/// If the build fails.
pub(crate) fn debug(programs: &[&str]) -> Result<()> {
    let programs = programs.iter().flat_map(|program| ["--bin", program]);
    run(cargo(&["build"]).args(HOST).args(programs))
}

/// Builds the `interceptor` program of the tests once more, as `interceptor-next`: of
/// the same source, but with a later version, and with kernel programs that are
/// optimized less, so that they are others. For the tests of upgrades.
///
/// # Errors
///
/// If the build fails.
pub(crate) fn next() -> Result<()> {
    const NAME: &str = "interceptor-next";
    let directory = target()?.join("next");
    let manifest = read(&workspace().join("Cargo.toml"))?;
    let [major, minor] = [
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
    ];
    let later = minor.parse::<u32>().context("this version")? + 1;
    let version = |version: &str| format!("\nversion = \"{version}\"\n");
    let mut manifest = replace(
        &manifest,
        &version(env!("CARGO_PKG_VERSION")),
        &version(&format!("{major}.{later}.0")),
    )?;
    manifest.push_str("\n[profile.release.package.interceptor-ebpf]\nopt-level = 2\n");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    write(&directory.join("Cargo.toml"), &manifest)?;
    let lock = "Cargo.lock";
    write(&directory.join(lock), &read(&workspace().join(lock))?)?;

    // The same members, so that cargo builds no dependency again.
    for member in [
        "interceptor-common",
        "interceptor-ebpf",
        "interceptor-userspace",
        "tests",
        "xtask",
    ] {
        let (from, to) = (workspace().join(member), directory.join(member));
        fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
        let mut manifest = read(&from.join("Cargo.toml"))?;
        if member == "interceptor-userspace" {
            // Beside the first one in the directory of what is built.
            for line in ["name = \"interceptor\"", "default-run = \"interceptor\""] {
                let other = line.replace("interceptor", NAME);
                manifest = replace(&manifest, &format!("{line}\n"), &format!("{other}\n"))?;
            }
        }
        write(&to.join("Cargo.toml"), &manifest)?;
        for entry in fs::read_dir(&from).with_context(|| format!("read {}", from.display()))? {
            let name = entry?.file_name();
            if name == "Cargo.toml" {
                continue;
            }
            match symlink(from.join(&name), to.join(&name)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("link {}", to.display()));
                }
                _ => {}
            }
        }
    }
    run(cargo(&["build"])
        .args(HOST)
        .args(["--bin", NAME])
        .current_dir(&directory)
        .env("CARGO_TARGET_DIR", target()?))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// Writes a file, unless it says so already: cargo looks at the times.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Replaces what is there exactly once.
fn replace(text: &str, from: &str, to: &str) -> Result<String> {
    ensure!(
        text.matches(from).count() == 1,
        "a manifest has no single {from:?}"
    );
    Ok(text.replacen(from, to, 1))
}
