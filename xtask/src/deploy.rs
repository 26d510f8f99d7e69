//! What is deployed: the chart, the manifests that are generated from it, the unit and
//! the image.
//!
//! The chart is rendered by Helm's own engine, and what comes out is held against the
//! schemas of Kubernetes' releases; both are in packages of PyPI's.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    compile::HOST,
    process::{cargo, command, find, output, run, target, workspace},
    setup::{self, Need, python},
};

const CHART: &str = "deploy/helm/interceptor";
const MANIFESTS: &str = "deploy/kubernetes.yaml";
const UNIT: &str = "deploy/systemd/interceptor.service";

/// The most that `systemd-analyze security` may find open, in tenths: what is left is
/// what the daemon is for.
const MOST_EXPOSED: u32 = 45;

/// Writes the plain manifests anew.
///
/// # Errors
///
/// If the chart isn't right, or something is missing.
pub(crate) fn write_manifests() -> Result<()> {
    setup::ensure(&[Need::Charts])?;
    let path = workspace().join(MANIFESTS);
    fs::write(&path, render()?).with_context(|| format!("write {}", path.display()))
}

/// Checks the chart, that the plain manifests are those that it makes, and the unit.
///
/// # Errors
///
/// If something isn't right, or missing.
pub(crate) fn check() -> Result<()> {
    setup::ensure(&[Need::Charts, Need::Systemd])?;
    let path = workspace().join(MANIFESTS);
    let written = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    ensure!(
        render()? == written,
        "{MANIFESTS} isn't what the chart makes: run `cargo xtask manifests`"
    );
    check_unit()
}

/// The plain manifests.
fn render() -> Result<String> {
    output(
        command("python3")
            .args(["-B", "xtask/render-chart.py", CHART])
            .env("PYTHONPATH", python::charts()?),
    )
}

fn check_unit() -> Result<()> {
    let text =
        fs::read_to_string(workspace().join(UNIT)).with_context(|| format!("read {UNIT}"))?;
    // It says so where a program isn't installed; any that is will do.
    let installed = text.replace(
        "/usr/bin/interceptor",
        env::current_exe()?.to_str().context("a path in UTF-8")?,
    );
    ensure!(
        installed != text,
        "{UNIT} doesn't start /usr/bin/interceptor"
    );
    let directory = tempfile::tempdir().context("make a temporary directory")?;
    let path = directory.path().join("interceptor.service");
    fs::write(&path, installed).with_context(|| format!("write {}", path.display()))?;
    let verified = command("systemd-analyze")
        .arg("verify")
        .arg(&path)
        .output()
        .context("start systemd-analyze")?;
    let said = String::from_utf8_lossy(&verified.stderr);
    // It ends well although it warns; of other units, which are this machine's, it may.
    let ours: Vec<_> = said
        .lines()
        .filter(|line| line.contains("interceptor.service"))
        .collect();
    ensure!(
        verified.status.success() && ours.is_empty(),
        "systemd-analyze verify {UNIT}: {}\n{said}",
        verified.status
    );
    output(
        command("systemd-analyze")
            .args(["security", "--no-pager", "--offline=yes"])
            .arg(format!("--threshold={MOST_EXPOSED}"))
            .arg(&path),
    )
    .map(drop)
}

/// Builds the image and returns its name.
///
/// # Errors
///
/// If something is missing, or a build fails.
pub(crate) fn image(name: Option<String>) -> Result<String> {
    setup::ensure(&[Need::Kernel])?;
    let Some(builder) = ["podman", "buildah", "docker"].into_iter().find_map(find) else {
        bail!("building an image needs podman, buildah or docker: install one");
    };
    let programs = static_programs()?;
    let name = name.unwrap_or_else(|| format!("interceptor:{}", env!("CARGO_PKG_VERSION")));
    run(command(builder)
        .args(["build", "--tag", &name, "--file"])
        .arg(workspace().join("deploy/Containerfile"))
        .arg(&programs))?;
    Ok(name)
}

/// Builds the programs so that they need no library, and returns the directory that
/// has them and nothing else.
fn static_programs() -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    // For this target alone: neither the kernel programs nor what runs while building.
    let flags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        triple.to_uppercase().replace('-', "_")
    );
    let names = ["interceptor", "interceptor-cni"];
    run(cargo(&["build", "--release", "--target", &triple])
        .args(HOST)
        .args(names.iter().flat_map(|name| ["--bin", name]))
        .env(
            flags,
            "-C target-feature=+crt-static -C relocation-model=static",
        ))?;
    let built = target()?.join(triple).join("release");
    let place = target()?.join("image");
    fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
    for name in names {
        strip(&built.join(name), &place.join(name))?;
    }
    Ok(place)
}

/// Copies a program without its symbols.
fn strip(from: &Path, to: &Path) -> Result<()> {
    run(command("strip").arg("-o").arg(to).arg(from))
}
