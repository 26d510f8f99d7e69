//! `cargo xtask build`, and the one choice of packages for every other build.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::{
    process::{cargo, run, target},
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
