//! The workspace's programs for guests, linked statically: a guest has no
//! libraries but those of the few programs of the machine's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::{cargo, output, target};

/// What cargo built.
pub(super) struct Programs {
    binaries: Vec<(String, PathBuf)>,
    suites: Vec<(String, PathBuf)>,
}

/// Builds the programs, and the suites if they are wanted.
///
/// # Errors
///
/// If the build fails.
pub(super) fn build(suites: bool) -> Result<Programs> {
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // For the target alone, so not for the kernel programs.
    let flags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        host.to_uppercase().replace('-', "_")
    );
    let mut command = cargo(&["build", "--package", "interceptor-userspace"]);
    command
        .args(["--package", "interceptor-tests", "--bins"])
        .args(["--message-format", "json-render-diagnostics"])
        .args(["--target", &host, "--target-dir"])
        .arg(target()?.join("vm/build"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // What is not stripped would be most of a guest's memory.
        .env(flags, "-C target-feature=+crt-static -C strip=debuginfo");
    if suites {
        command.args(["--test", "*"]);
    }
    // What cargo says to people is on its standard error.
    command.stderr(std::process::Stdio::inherit());
    let messages = output(&mut command)?;
    let artifacts = |kind: &str| -> Vec<(String, PathBuf)> {
        messages
            .lines()
            .filter_map(|line| artifact(line, kind))
            .collect()
    };
    let programs = Programs {
        binaries: artifacts("bin"),
        suites: artifacts("test"),
    };
    ensure!(!programs.binaries.is_empty(), "cargo built no programs");
    ensure!(
        programs.suites.is_empty() != suites,
        "cargo built other suites than were wanted"
    );
    Ok(programs)
}

/// The name and the path of a program that a line of cargo's speaks of.
fn artifact(line: &str, kind: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = &message["target"];
    (target["kind"][0] == kind).then_some(())?;
    Some((
        target["name"].as_str()?.to_owned(),
        message["executable"].as_str()?.into(),
    ))
}

impl Programs {
    /// The path of a program.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub(super) fn binary(&self, name: &str) -> Result<&Path> {
        self.binaries
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, path)| path.as_path())
            .with_context(|| format!("cargo built no program {name}"))
    }

    /// The suites' names and paths.
    pub(super) fn suites(&self) -> &[(String, PathBuf)] {
        &self.suites
    }

    /// The paths of all.
    pub(super) fn all(&self) -> impl Iterator<Item = &Path> {
        let all = self.binaries.iter().chain(&self.suites);
        all.map(|(_, path)| path.as_path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_the_programs_are() {
        let line = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"cases"},"executable":"/t/deps/cases-1"}"#;
        let expected = ("cases".to_owned(), PathBuf::from("/t/deps/cases-1"));
        assert_eq!(artifact(line, "test"), Some(expected));
        assert_eq!(artifact(line, "bin"), None);
        let library = r#"{"target":{"kind":["lib"],"name":"x"},"executable":null}"#;
        assert_eq!(artifact(library, "lib"), None);
        assert_eq!(artifact("no json", "bin"), None);
    }
}
