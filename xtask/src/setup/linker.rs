//! bpf-linker: it must be on `PATH`, with an LLVM at least as new as the
//! compiler's.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::apt;
use crate::process::{cargo, command, find, output, step};

const NAME: &str = "bpf-linker";
const VERSION: &str = "^0.13";
/// The versions of LLVM that it can be built with.
const LLVMS: [u32; 3] = [21, 22, 23];

/// How to get one with its own LLVM; the newest, which is new enough.
pub(super) const ADVICE: &str = "cargo install cargo-binstall && cargo binstall bpf-linker";

/// Whether there is one, new enough or not.
pub(super) fn is_here() -> bool {
    find(NAME).is_some()
}

/// Finds or installs it, for a compiler with this version of LLVM.
///
/// # Errors
///
/// If that isn't possible here; the error says what to do.
pub(super) fn ensure(compiler: u32) -> Result<()> {
    if let Some(path) = find(NAME) {
        let path = path.display();
        let version = output(command(NAME).args([
            "--llvm-args=--version",
            "--output=/dev/null",
            "/dev/null",
        ]))
        .with_context(|| format!("{path} doesn't work; remove it"))?;
        let linker = llvm(&version)
            .with_context(|| format!("{path} doesn't tell its LLVM's version, but:\n{version}"))?;
        if linker < compiler {
            bail!(
                "{path} has LLVM {linker}, the compiler {compiler}: remove it, and this will \
                 install another"
            );
        }
        return Ok(());
    }
    install(compiler)
}

fn install(compiler: u32) -> Result<()> {
    let mut fit = LLVMS.into_iter().filter(|version| *version >= compiler);
    let prefix = |version| format!("/usr/lib/llvm-{version}");
    let is_here = |version| {
        Path::new(&prefix(version))
            .join("bin/llvm-config")
            .is_file()
    };
    let llvm = if let Some(version) = fit.clone().find(|version| is_here(*version)) {
        // Its libraries need not all be there.
        Some(version)
    } else if apt::is_here() {
        fit.find(|version| {
            apt::unknown(&[&format!("llvm-{version}-dev")]).is_ok_and(|unknown| unknown.is_empty())
        })
    } else {
        None
    };
    let Some(llvm) = llvm else {
        if output(command("cargo").args(["binstall", "-V"])).is_ok() {
            return step(
                "cargo binstall bpf-linker",
                &mut cargo(&["binstall", "--no-confirm", NAME]),
            );
        }
        bail!("run: {ADVICE}");
    };
    if apt::is_here() {
        let packages = [
            format!("llvm-{llvm}-dev"),
            format!("libpolly-{llvm}-dev"),
            "zlib1g-dev".to_owned(),
            "libzstd-dev".to_owned(),
            "libxml2-dev".to_owned(),
        ];
        apt::install(&packages.each_ref().map(String::as_str))?;
    }
    step(
        "cargo install bpf-linker (about two minutes)",
        cargo(&["install", NAME, "--version", VERSION, "--locked"])
            .args(["--no-default-features", "--features"])
            .arg(format!("llvm-{llvm}"))
            .env("LLVM_PREFIX", prefix(llvm)),
    )
}

/// The major version in LLVM's own words.
fn llvm(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("LLVM version ")?;
    rest.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvms_version_is_read() {
        let debian = "Debian LLVM version 22.1.8\n  Optimized build.\n";
        assert_eq!(llvm(debian), Some(22));
        let own = "LLVM (http://llvm.org/):\n  LLVM version 23.1.0-rust-1.99.0-nightly\n";
        assert_eq!(llvm(own), Some(23));
        assert_eq!(llvm("bpf-linker 0.13.0"), None);
    }
}
