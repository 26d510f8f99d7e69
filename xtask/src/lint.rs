//! `cargo xtask lint`: the format, clippy for the host and for the kernel
//! programs, and the documentation. A warning is an error.

use std::{process::Command, time::Instant};

use anyhow::{Context, Result};

use crate::{
    compile::HOST,
    process::{self, cargo},
    setup::{self, Need, toolchain},
};

/// Checks all, one after the other.
///
/// # Errors
///
/// At the first that finds something, or if something is missing.
pub(crate) fn run() -> Result<()> {
    check("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    setup::ensure(&[Need::Kernel, Need::Clippy])?;
    check(
        "clippy",
        cargo(&["clippy"])
            .args(HOST)
            .args(["--all-targets", "--", "-D", "warnings"]),
    )?;
    check("clippy, the kernel programs", &mut kernel_clippy())?;
    check(
        "documentation",
        cargo(&["doc", "--no-deps", "--document-private-items"])
            .args(HOST)
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// Clippy as the kernel programs are built: for their own target, with core
/// from source.
fn kernel_clippy() -> Command {
    let mut command = toolchain::command_of("cargo");
    command
        .args(["clippy", "--package", "interceptor-ebpf", "--bins"])
        .args(["--release", "--target", TARGET, "-Z", "build-std=core"])
        .args(["--", "-D", "warnings"])
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        );
    command
}

const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

fn check(what: &str, command: &mut Command) -> Result<()> {
    let start = Instant::now();
    process::run(command).with_context(|| format!("lint: {what}"))?;
    println!("lint: {what}: ok, {} s", start.elapsed().as_secs());
    Ok(())
}
