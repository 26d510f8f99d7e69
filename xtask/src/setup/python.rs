//! Packages of PyPI's, each release by its hash.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use super::apt;
use crate::process::{command, output, step, target};

const REQUIREMENTS: &str = "xtask/chart-requirements.txt";

/// Where the packages are that check the chart.
///
/// # Errors
///
/// If this program's own path can't be told.
pub(crate) fn charts() -> Result<PathBuf> {
    Ok(target()?.join("tools/charts"))
}

/// Finds `pip`, or installs it.
///
/// # Errors
///
/// If that isn't possible here; the error says what to do.
pub(super) fn ensure_pip() -> Result<()> {
    if output(command("python3").args(["-m", "pip", "--version"])).is_err() {
        apt::install(&["python3-pip"]).context("pip, to download it")?;
    }
    Ok(())
}

/// Installs what checks the chart, unless it is there for these requirements.
///
/// # Errors
///
/// If that isn't possible here; the error says what to do.
pub(super) fn ensure_charts() -> Result<()> {
    let directory = charts()?;
    let wanted = fs::read_to_string(crate::process::workspace().join(REQUIREMENTS))
        .with_context(|| format!("read {REQUIREMENTS}"))?;
    let mark = directory.join("requirements.txt");
    if fs::read_to_string(&mark).is_ok_and(|there| there == wanted) {
        return Ok(());
    }
    ensure_pip()?;
    let _ = fs::remove_dir_all(&directory);
    step(
        "pip install helm-python-sdk kubernetes-validate",
        command("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-deps"])
            .args(["--only-binary=:all:", "--require-hashes"])
            .args(["--requirement", REQUIREMENTS, "--target"])
            .arg(&directory),
    )?;
    // Last: without it, what is there is not whole.
    fs::write(&mark, wanted).with_context(|| format!("write {}", mark.display()))
}
