//! The toolchain of the kernel programs, which `interceptor-userspace/build.rs`
//! names: any with the source of core, whose target is built from source.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{apt, linker};
use crate::process::{command, find, output, step};

/// Its name, in rustup.
const NAME: &str = "interceptor-bpf";

/// Debian's compiler and the source of core, which are in /usr.
const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// What to do where Debian's packages aren't.
fn advice() -> String {
    let nightly = "rustup toolchain install nightly --profile default --component rust-src";
    if linker::is_here() {
        nightly.to_owned()
    } else {
        format!("{nightly} && {}", linker::ADVICE)
    }
}

/// A compiler that can build the kernel programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    sysroot: PathBuf,
    /// The major version of its LLVM.
    pub(super) llvm: u32,
}

impl Compiler {
    /// Asks the `rustc` of this command.
    fn inspect(rustc: impl Fn() -> Command) -> Result<Self> {
        let sysroot = PathBuf::from(output(rustc().args(["--print", "sysroot"]))?.trim());
        let core = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        ensure!(core.is_file(), "no {}", core.display());
        let version = output(rustc().arg("-vV"))?;
        let release = value(&version, "release").and_then(minor);
        let least = minor(env!("CARGO_PKG_RUST_VERSION"));
        ensure!(
            release >= least,
            "Rust {} is older than {}",
            value(&version, "release").unwrap_or("?"),
            env!("CARGO_PKG_RUST_VERSION"),
        );
        let llvm = value(&version, "LLVM version")
            .and_then(|version| version.split('.').next()?.parse().ok())
            .with_context(|| format!("no LLVM version in:\n{version}"))?;
        Ok(Self { sysroot, llvm })
    }

    fn of_toolchain(name: &str) -> Result<Self> {
        Self::inspect(|| rustup(name, "rustc"))
    }

    /// Gives it the name.
    fn link(self) -> Result<Self> {
        let path = self.sysroot.display().to_string();
        step(
            &format!("rustup toolchain link {NAME} {path}"),
            command("rustup").args(["toolchain", "link", NAME, &path]),
        )?;
        Ok(self)
    }
}

/// A program of the toolchain; without rustup, what is on `PATH`: so does
/// aya-build.
pub(crate) fn command_of(program: &str) -> Command {
    if find("rustup").is_some() {
        rustup(NAME, program)
    } else {
        command(program)
    }
}

fn rustup(toolchain: &str, program: &str) -> Command {
    let mut command = command("rustup");
    command.args(["run", toolchain, program]);
    command
}

/// Finds or installs the compiler.
///
/// # Errors
///
/// If that isn't possible here; the error says what to do.
pub(super) fn ensure() -> Result<Compiler> {
    if find("rustup").is_none() {
        return Compiler::inspect(|| command("rustc")).context(
            "without rustup it must be the rustc on PATH; install rustup, or the source of core",
        );
    }
    if let Ok(compiler) = Compiler::of_toolchain(NAME) {
        return Ok(compiler);
    }
    let list = output(command("rustup").args(["toolchain", "list"]))?;
    let installed = candidates(&list)
        .into_iter()
        .find_map(|name| Compiler::of_toolchain(name).ok());
    if let Some(compiler) = installed.or_else(of_debian) {
        return compiler.link();
    }
    if !apt::is_here() || !apt::unknown(&PACKAGES)?.is_empty() {
        bail!("run: {}", advice());
    }
    apt::install_newest(&PACKAGES).with_context(|| format!("Debian's, or run: {}", advice()))?;
    of_debian()
        .with_context(|| format!("Debian's packages are no such toolchain; run: {}", advice()))?
        .link()
}

/// The compiler in /usr, if it is Debian's own and fit.
fn of_debian() -> Option<Compiler> {
    let compiler = Compiler::inspect(|| command("/usr/bin/rustc")).ok()?;
    // A rustup of Debian's is in /usr too, its toolchains are not.
    (compiler.sysroot == Path::new("/usr")).then_some(compiler)
}

/// Finds or installs clippy for the compiler.
///
/// # Errors
///
/// If that isn't possible here; the error says what to do.
pub(super) fn ensure_clippy() -> Result<()> {
    let there = || output(command_of("cargo").args(["clippy", "--version"]));
    if there().is_ok() {
        return Ok(());
    }
    let compiler = ensure()?;
    if compiler.sysroot == Path::new("/usr") {
        apt::install(&["rust-web-clippy"])?;
        return there().map(drop);
    }
    bail!(
        "run: rustup component add clippy --toolchain NAME, of the toolchain in {}",
        compiler.sysroot.display()
    )
}

/// The toolchains of `rustup toolchain list`, the nightlies first: they are
/// where one expects the source of core.
fn candidates(list: &str) -> Vec<&str> {
    let mut names: Vec<&str> = list
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != NAME)
        .collect();
    names.sort_by_key(|name| !name.starts_with("nightly"));
    names
}

/// The value in a line `key: value`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
}

/// The first two numbers of a version.
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = "\
rustc 1.97.0-nightly (e50aa6fba 2026-05-19)
binary: rustc
release: 1.97.0-nightly
LLVM version: 22.1.4
";

    #[test]
    fn versions_are_read() {
        assert_eq!(value(VERSION, "release").and_then(minor), Some((1, 97)));
        assert_eq!(value(VERSION, "LLVM version"), Some("22.1.4"));
        assert_eq!(value(VERSION, "host"), None);
        assert!(minor("1.100.0") > minor("1.95"));
        assert_eq!(minor("unknown"), None);
    }

    #[test]
    fn nightlies_come_first() {
        let list = "stable-x86_64-unknown-linux-gnu (active, default)\n\
                    nightly-x86_64-unknown-linux-gnu\ninterceptor-bpf\n";
        assert_eq!(
            candidates(list),
            [
                "nightly-x86_64-unknown-linux-gnu",
                "stable-x86_64-unknown-linux-gnu"
            ]
        );
    }
}
