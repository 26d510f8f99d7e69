//! `cargo xtask lint`: the format, clippy for the host and for the kernel
//! programs, the documentation, whether it all compiles for other machines, and what is
//! deployed.
//! A warning is an error.

use std::{process::Command, time::Instant};

use anyhow::{Result, ensure};

use crate::{
    compile::HOST,
    deploy,
    process::{self, cargo},
    setup::{self, Need, toolchain},
};

/// Makes all the checks, whatever the ones before find.
///
/// # Errors
///
/// If one finds something, or something is missing.
pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Need::Kernel, Need::Clippy])?;
    let mut failed = Vec::new();
    for (what, mut command) in checks() {
        check(what, &mut failed, || process::run(&mut command));
    }
    check("chart, manifests and unit", &mut failed, deploy::check);
    ensure!(failed.is_empty(), "lint: failed: {}", failed.join(", "));
    Ok(())
}

/// Makes a check and says how it went.
fn check(what: &'static str, failed: &mut Vec<&'static str>, check: impl FnOnce() -> Result<()>) {
    let start = Instant::now();
    let result = check();
    let time = start.elapsed().as_secs();
    match result {
        Ok(()) => println!("lint: {what}: ok, {time} s"),
        Err(error) => {
            eprintln!("lint: {what}: FAILED, {time} s: {error:#}");
            failed.push(what);
        }
    }
}

fn checks() -> [(&'static str, Command); 6] {
    let mut clippy = cargo(&["clippy"]);
    clippy
        .args(HOST)
        .args(["--all-targets", "--keep-going", "--", "-D", "warnings"]);
    let mut documentation = cargo(&[
        "doc",
        "--keep-going",
        "--no-deps",
        "--document-private-items",
    ]);
    documentation.args(HOST).env("RUSTDOCFLAGS", "-D warnings");
    [
        ("format", cargo(&["fmt", "--all", "--check"])),
        ("clippy", clippy),
        (
            "clippy for the kernel programs",
            kernel("clippy", TARGET, std::env::consts::ARCH),
        ),
        ("documentation", documentation),
        ("check for aarch64", aarch64_check()),
        (
            "check of big-endian kernel programs",
            kernel("check", "bpfeb-unknown-none", "s390x"),
        ),
    ]
}

/// Everything for the host, for another architecture. Its standard library is
/// compiled from source: nothing has to be installed for it. The parts of ring that are
/// in C and assembler are left out, which a check doesn't need: their compiler is a
/// program that does nothing.
fn aarch64_check() -> Command {
    let mut command = toolchain::command_of("cargo");
    command
        .env("CC_aarch64_unknown_linux_gnu", "true")
        .env("AR_aarch64_unknown_linux_gnu", "true")
        .args(["check", "--all-targets", "-Z", "build-std"])
        .args(HOST)
        .args(["--target", "aarch64-unknown-linux-gnu"])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-D warnings");
    command
}

/// Cargo for the kernel programs of a machine of this byte order and
/// architecture, with core from source.
fn kernel(subcommand: &str, target: &str, architecture: &str) -> Command {
    let mut command = toolchain::command_of("cargo");
    command
        .args([subcommand, "--package", "interceptor-ebpf", "--bins"])
        .args(["--release", "--target", target, "-Z", "build-std=core"])
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "RUSTFLAGS",
            format!("--cfg=bpf_target_arch=\"{architecture}\" -D warnings"),
        );
    command
}

const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};
